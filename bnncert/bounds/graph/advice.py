"""Advice by primitive: the spelling to use where one has no bound rule."""

from collections.abc import Mapping

_INDEX = "Where the largest value stands jumps: compare the values themselves (jnp.max, margins)."
_SOLVE = (
    "Factorisations and solvers have no bound rule: apply them to values that no set reaches, and "
    "multiply by what they return."
)
_CALLBACK = "What runs outside of JAX cannot be bounded: write it in jax.numpy."

_INSTEAD: Mapping[str, str] = {
    **dict.fromkeys(("argmax", "argmin", "top_k_places"), _INDEX),
    "approx_top_k": "Write jax.lax.top_k.",
    "atan2": "Where x > 0, jnp.arctan2(y, x) is jnp.arctan(y / x).",
    **dict.fromkeys(
        ("custom_root", "custom_linear_solve", "cholesky", "eig", "eigh", "lu", "qr", "svd"), _SOLVE
    ),
    **dict.fromkeys(("schur", "hessenberg", "tridiagonal", "triangular_solve"), _SOLVE),
    **dict.fromkeys(("pure_callback", "io_callback", "debug_callback"), _CALLBACK),
    "device_put": "Put the arguments on their device before the function is bounded.",
    "pow": "A power is bounded for a constant exponent; a ** x is jnp.exp(x * jnp.log(a)), for x "
    "and a > 0 both bounded too.",
    "scatter-sub": "Write x.at[i].add(-v).",
    "scatter-mul": "Write x.at[i].set(v * x[i]).",
    "scatter-max": "Write x.at[i].set(jnp.maximum(x[i], v)).",
    "scatter-min": "Write x.at[i].set(jnp.minimum(x[i], v)).",
    "reduce_window": "Give jax.lax.reduce_window the neutral value of its operation: -jnp.inf for "
    "jax.lax.max, jnp.inf for jax.lax.min, 0 for jax.lax.add.",
}


def instead_of(primitive: str) -> str:
    """A sentence or two; for a primitive that nothing is said of, what holds for all."""
    return _INSTEAD.get(
        primitive, "Compute it on values that no set reaches, or from operations that have a rule."
    )
