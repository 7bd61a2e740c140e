"""A Gaussian with full covariance over some leaves: what a Laplace approximation returns.

    w = loc + L z,   z ~ N(0, I_P)
    q(w) = N(w; loc, L L^T)

over the P weights of the random leaves as one vector: leaf by leaf in the order given, row by row
within each. L is the lower Cholesky factor of the *covariance*: a draw and a density then are one
product and one triangular solve, O(P^2), in P^2 memory. 10,000 weights are 400 MB.

Source: MacKay, "A Practical Bayesian Framework for Backpropagation Networks", 1992, section 2; the
densities are those of NumPyro's MultivariateNormal.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float

from bnncert import prior as priors
from bnncert.posterior.leaves import check_count, draw_keys, flatten, kl_from_entropy, unflatten
from bnncert.types import Key, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gaussian:
    """One multivariate normal over the named leaves; the others are deterministic.

        q(w) = N(w; loc, L L^T),   L = scale_tril

    Attributes:
        loc: params, the means.
        scale_tril: lower Cholesky factor of the covariance, shape (P, P), in nobody's unit but the
            weights' own.
        random: names of the random leaves, as `bnncert.prior.names` gives them. Static.

    Cost: P^2 numbers for P weights of the random leaves; draws and densities O(P^2).

    Source: MacKay 1992, section 2.

    Example:
        >>> loc = {"w": jnp.zeros(3), "b": jnp.ones(2)}
        >>> q = Gaussian(loc, scale_tril=0.1 * jnp.eye(3), random=("w",))
        >>> jax.tree.map(jnp.shape, q.sample(jax.random.key(0), 5))
        {'b': (5, 2), 'w': (5, 3)}
    """

    loc: Params
    scale_tril: Float[Array, "*members size size"]
    random: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    def sample(self, key: Key, n: int) -> Params:
        """Draws n independent members; deterministic leaves are repeated.

        The first m of n draws are the m draws of the same key, up to rounding.

        Args:
            key: a PRNG key.
            n: number of draws, >= 1.

        Returns:
            Stacked params: every leaf of `loc` gains a leading axis of length n. Time O(n P^2),
            memory n times the params.

        Raises:
            ValueError: if n < 1, or `scale_tril` or `random` do not fit `loc`.
        """
        check_count(n)
        loc = self._flat_loc()

        def draw(key: Key) -> Params:
            normal = jax.random.normal(key, loc.shape, loc.dtype)
            moved = jnp.matmul(self.scale_tril, normal, precision=jax.lax.Precision.HIGHEST)
            return priors.replace(self.loc, unflatten(loc + moved, self.loc, self.random))

        # vmap repeats what does not depend on the key: the deterministic leaves
        return jax.vmap(draw)(draw_keys(key, n))

    def log_prob(self, params: Params) -> Float[Array, ""]:
        """Computes the log density over the random leaves, jointly, in nats.

        Args:
            params: one member, not stacked. Its deterministic leaves are not compared.

        Returns:
            A scalar. Time O(P^2).
        """
        return self._normal().log_prob(flatten(params, self.random))

    def kl(self, prior: priors.Prior) -> Float[Array, ""]:
        """Computes KL(self || prior) in closed form, for normal priors: nats, summed over weights.

        Args:
            prior: independent normals for the random leaves, None for the deterministic ones.

        Returns:
            A scalar >= 0; deterministic leaves add 0. Time O(P^2).

        Raises:
            ValueError: if prior and posterior disagree on structure, shapes or which leaves are
                random.
            NotImplementedError: for any other prior; says how to estimate it from draws.
        """
        return kl_from_entropy(self._normal().entropy(), *self.moments(), prior)

    def moments(self) -> tuple[Params, Params]:
        """Gives the mean and the standard deviation of every weight.

        Returns:
            `(mean, deviation)`, of the structure of `loc`; None for the deviation of a
            deterministic leaf.
        """
        self._flat_loc()
        deviation = jnp.sqrt(jnp.sum(jnp.square(self.scale_tril), axis=1))
        found = unflatten(deviation, self.loc, self.random)
        leaves = [found.get(name) for name in priors.named(self.loc)]
        return self.loc, jax.tree.unflatten(
            jax.tree.structure(self.loc, is_leaf=priors.is_leaf), leaves
        )

    def _normal(self) -> dist.MultivariateNormal:
        return dist.MultivariateNormal(self._flat_loc(), scale_tril=self.scale_tril)

    def _flat_loc(self) -> Float[Array, " size"]:
        """Flattens the random leaves' means, after a check that the fields match."""
        leaves = priors.named(self.loc)
        unknown = [name for name in self.random if leaves.get(name) is None]
        if unknown:
            raise ValueError(f"loc has no leaf named {unknown}; its leaves are {list(leaves)}")
        loc = flatten(self.loc, self.random)
        if self.scale_tril.shape != (loc.size, loc.size):
            raise ValueError(
                f"scale_tril has shape {self.scale_tril.shape}, but the leaves {self.random} hold "
                f"{loc.size} weights: give the Cholesky factor of their covariance, flattened in "
                "this order"
            )
        return loc
