"""A Gaussian whose covariance is diagonal plus low rank: what SWAG returns.

    w = loc + scale * z_1 + sum_{k <= K} deviations_k z_2k,      z_1 ~ N(0, I_P), z_2 ~ N(0, I_K)
    q(w) = N(w; loc, diag(scale^2) + D D^T),      D = [deviations_1 ... deviations_K]

over all P weights of the random leaves, which share the K factors z_2. By the matrix inversion and
determinant lemmas densities cost O(P K^2), and no P x P matrix is ever formed.

Source: Maddox et al., "A Simple Baseline for Bayesian Uncertainty in Deep Learning", NeurIPS 2019,
equation 1; the densities are those of NumPyro's LowRankMultivariateNormal.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float

from bnncert import prior as priors
from bnncert.posterior.leaves import (
    check_count,
    check_structure,
    draw_keys,
    flatten,
    kl_from_entropy,
)
from bnncert.types import Key, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """A normal of a diagonal and K shared factors; leaves whose scale is None are deterministic.

        q(w) = N(w; loc, diag(scale^2) + D D^T),   D = [deviations_1 ... deviations_K]

    Attributes:
        loc: params, the means.
        scale: standard deviations of the diagonal part, > 0 (densities divide by it): the structure
            of `loc`, None for deterministic leaves.
        deviations: the K factors, as `scale` with leaves (K, ...), None for deterministic leaves.

    Cost: O(K P) numbers for P weights; draws O(K P), densities O(K^2 P).

    Source: Maddox et al., NeurIPS 2019, equation 1.

    Example:
        >>> loc = {"w": jnp.zeros(3), "b": jnp.ones(2)}
        >>> q = LowRank(loc, {"w": jnp.ones(3), "b": None}, {"w": jnp.ones((4, 3)), "b": None})
        >>> jax.tree.map(jnp.shape, q.sample(jax.random.key(0), 5)), q.rank
        ({'b': (5, 2), 'w': (5, 3)}, 4)
    """

    loc: Params
    scale: Params
    deviations: Params

    @property
    def rank(self) -> int:
        """The number K of shared factors."""
        leaves = jax.tree.leaves(self.deviations)
        return leaves[0].shape[0] if leaves else 0

    def sample(self, key: Key, n: int) -> Params:
        """Draws n independent members; deterministic leaves are repeated.

        The first m of n draws are the m draws of the same key, up to rounding.

        Args:
            key: a PRNG key.
            n: number of draws, >= 1.

        Returns:
            Stacked params: every leaf of `loc` gains a leading axis of length n. Time O(n K P),
            memory n times the params.

        Raises:
            ValueError: if n < 1, or `loc`, `scale` and `deviations` do not match.
        """
        check_count(n)
        random = self._random()
        locs, scales = priors.named(self.loc), priors.named(self.scale)
        deviations = priors.named(self.deviations)

        def draw(key: Key) -> Params:
            own, shared = jax.random.split(key)
            values = {}
            for k, name in zip(jax.random.split(own, len(random)), random, strict=True):
                loc, columns = locs[name], deviations[name]
                noise = scales[name] * jax.random.normal(k, loc.shape, loc.dtype)
                factors = jax.random.normal(shared, (self.rank,), loc.dtype)
                common = jnp.tensordot(factors, columns, 1, precision=jax.lax.Precision.HIGHEST)
                values[name] = loc + noise + common
            return priors.replace(self.loc, values)

        # vmap repeats what does not depend on the key: the deterministic leaves
        return jax.vmap(draw)(draw_keys(key, n))

    def log_prob(self, params: Params) -> Float[Array, ""]:
        """Computes the log density over the random leaves, jointly, in nats.

        Args:
            params: one member, not stacked. Its deterministic leaves are not compared.

        Returns:
            A scalar. Time O(P K^2), memory O(P K).
        """
        return self._normal().log_prob(flatten(params, self._random()))

    def kl(self, prior: priors.Prior) -> Float[Array, ""]:
        """Computes KL(self || prior) in closed form, for normal priors: nats, summed over weights.

        Args:
            prior: independent normals for the random leaves, None for the deterministic ones.

        Returns:
            A scalar >= 0; deterministic leaves add 0. Time O(P K^2).

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
        return self.loc, jax.tree.map(
            lambda scale, columns: jnp.sqrt(scale**2 + jnp.sum(columns**2, axis=0)),
            self.scale,
            self.deviations,
        )

    def _normal(self) -> dist.LowRankMultivariateNormal:
        random = self._random()
        columns = jax.vmap(lambda tree: flatten(tree, random))(self.deviations)
        variances = jnp.square(flatten(self.scale, random))
        return dist.LowRankMultivariateNormal(flatten(self.loc, random), columns.T, variances)

    def _random(self) -> tuple[str, ...]:
        """Names the random leaves, after a check that the three trees match."""
        check_structure(self.loc, self.scale, "scale")
        check_structure(self.loc, self.deviations, "deviations")
        locs, scales = priors.named(self.loc), priors.named(self.scale)
        for name, columns in priors.named(self.deviations).items():
            fixed = scales[name] is None
            if (columns is None) != fixed:
                raise ValueError(
                    f"leaf {name!r} is deterministic in one of scale and deviations only: give it "
                    "None in both, or arrays in both (deviations of zeros couple nothing)"
                )
            if not fixed and columns.shape != (self.rank, *locs[name].shape):
                raise ValueError(
                    f"deviations of leaf {name!r} have shape {columns.shape}: stack the K = "
                    f"{self.rank} factors, shape {(self.rank, *locs[name].shape)}"
                )
        return tuple(name for name, scale in scales.items() if scale is not None)
