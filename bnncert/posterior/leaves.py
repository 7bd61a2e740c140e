"""What all posteriors share: their random leaves as one vector, keys, checks, and a KL.

A Gaussian q of any covariance meets an independent normal prior only through its variances,

    E_q[log p(w)] = log p(loc) - sum_i var_i / (2 s_i^2),

so that KL(q || p) = -H[q] - E_q[log p] is closed wherever the entropy H[q] is.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnncert import prior as priors
from bnncert.types import Key, Params, Posterior


def flatten(params: Params, names: Sequence[str]) -> Float[Array, " size"]:
    """Flattens the named leaves to one vector, in the order of the names, row by row within each.

    Args:
        params: any params.
        names: of leaves, as `bnncert.prior.names` gives them.

    Returns:
        A vector of all their weights.

    Example:
        >>> flatten({"w": jnp.ones((2, 2)), "b": jnp.zeros(1)}, ["w"]).tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    leaves = priors.named(params)
    return jnp.concatenate([jnp.ravel(leaves[name]) for name in names] or [jnp.zeros(0)])


def unflatten(
    vector: Float[Array, " size"], params: Params, names: Sequence[str]
) -> dict[str, Array]:
    """Cuts a vector into the named leaves: the inverse of `flatten`.

    Args:
        vector: all their weights.
        params: gives shapes and dtypes.
        names: of the leaves, in the vector's order.

    Returns:
        The leaves by name.

    Example:
        >>> params = {"w": jnp.zeros(2), "b": jnp.zeros(1)}
        >>> unflatten(jnp.arange(3.0), params, ["b", "w"])["w"].tolist()
        [1.0, 2.0]
    """
    leaves = priors.named(params)
    found, start = {}, 0
    for name in names:
        leaf = leaves[name]
        piece = vector[start : start + leaf.size]
        found[name] = piece.reshape(leaf.shape).astype(leaf.dtype)
        start += leaf.size
    return found


def draw_keys(key: Key, n: int) -> Array:
    """Makes one key a draw; the first m of n are the m of the same key, unlike those of a split.

    Args:
        key: a PRNG key.
        n: number of keys.

    Returns:
        Keys, shape (n,).

    Example:
        >>> key = jax.random.key(0)
        >>> bool((draw_keys(key, 3)[:2] == draw_keys(key, 2)).all())
        True
    """
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(n))


def check_stacked(samples: Any) -> None:
    """Refuses a posterior that stands where stacked weights are wanted.

    Args:
        samples: what was given as stacked weights.

    Raises:
        TypeError: naming it, and how to get weights from it.

    Example:
        >>> from bnncert.posterior import Samples
        >>> check_stacked(Samples({"w": jnp.zeros((4, 2))}))
        Traceback (most recent call last):
        TypeError: ...give its members: samples.params.
    """
    if isinstance(samples, Posterior):
        name = type(samples).__name__
        way = (
            "its members: samples.params" if name == "Samples" else "draws: samples.sample(key, n)"
        )
        raise TypeError(
            f"samples is a {name}, a posterior, where stacked weights are wanted: give {way}."
        )


def check_count(n: int) -> None:
    """Refuses a number of draws below 1.

    Args:
        n: number of draws.

    Raises:
        ValueError: if it is below 1.
    """
    if n < 1:
        raise ValueError(f"the number of draws must be at least 1, got {n}")


def check_structure(loc: Params, other: Any, what: str) -> None:
    """Refuses a tree that has not the leaves of `loc`, None among them.

    Args:
        loc: params.
        other: a tree for the same leaves.
        what: its name in the error.

    Raises:
        ValueError: naming the leaves that only one of the two has.
    """
    differ = priors.named(loc).keys() ^ priors.named(other).keys()
    if differ:
        raise ValueError(
            f"{what} must have loc's structure, with None for a deterministic leaf: they differ "
            f"in {sorted(differ)}"
        )


def check_random(names: Sequence[str], prior: priors.Prior) -> None:
    """Refuses a prior whose random leaves are not the posterior's.

    Args:
        names: of the posterior's random leaves.
        prior: any.

    Raises:
        ValueError: naming the leaves that are random in one of the two alone.
    """
    ours, theirs = set(names), set(priors.names(prior))
    if ours != theirs:
        raise ValueError(
            "prior and posterior must be random in the same leaves: "
            f"only the prior is in {sorted(theirs - ours)}, "
            f"only the posterior is in {sorted(ours - theirs)}; "
            "None marks a deterministic leaf in both"
        )


def kl_from_entropy(
    entropy: Float[Array, ""], loc: Params, scale: Params, prior: priors.Prior
) -> Float[Array, ""]:
    """Computes KL(q || prior) of a Gaussian q of this entropy, means and standard deviations.

        KL(q || p) = -H[q] - log p(loc) + sum_i var_i / (2 s_i^2)

    Args:
        entropy: of q, over its random leaves, in nats.
        loc: means, all leaves.
        scale: standard deviations of single weights; None for the deterministic leaves.
        prior: independent normals, None for the deterministic leaves.

    Returns:
        Nats, summed over weights.

    Raises:
        ValueError: if prior and posterior disagree on structure, shapes or which leaves are random.
        NotImplementedError: for a prior that is not normal; says what to do instead.
    """
    priors.check(prior, loc)
    scales = {name: leaf for name, leaf in priors.named(scale).items() if leaf is not None}
    check_random(tuple(scales), prior)
    widths = priors.normal_parameters(prior)[1]
    excess = [0.5 * jnp.sum(jnp.square(scales[name] / widths[name])) for name in scales]
    return sum(excess, -entropy - priors.log_prob(prior, loc))
