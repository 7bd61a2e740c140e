"""The discrete measure on S members: what a sampler, an ensemble or a single network returns.

    q(w) = (1/S) sum_s [w = w_s]

It is *the* predictor that is deployed and certified exactly: no continuous posterior stands behind.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnncert import prior as priors
from bnncert.posterior.leaves import check_count
from bnncert.types import Key, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Samples:
    """The discrete measure with mass 1/S on each of S members.

        q(w) = (1/S) sum_s [w = w_s]

    Certificates and attacks take its `params`.

    Attributes:
        params: stacked params, every leaf (S, ...).

    Cost: S times one network's params.

    Example:
        >>> q = Samples(stack([{"w": jnp.zeros(2)}, {"w": jnp.ones(2)}]))
        >>> q.num_samples, round(float(q.log_prob({"w": jnp.ones(2)})), 4)
        (2, -0.6931)
    """

    params: Params

    @property
    def num_samples(self) -> int:
        """The number S of members."""
        return jax.tree.leaves(self.params)[0].shape[0]

    def sample(self, key: Key, n: int) -> Params:
        """Chooses n different members, uniformly, in stored order: n = S gives them all as stored.

        Without replacement, so that no member is paid for twice by whoever sweeps them. Draws are
        therefore not independent.

        Args:
            key: a PRNG key.
            n: number of members, 1 <= n <= S.

        Returns:
            Stacked params: every leaf (n, ...).

        Raises:
            ValueError: if n < 1 or n > S.
        """
        check_count(n)
        if n > self.num_samples:
            raise ValueError(
                f"cannot draw {n} different members from {self.num_samples}: ask for at most "
                f"{self.num_samples}, or infer more samples"
            )
        chosen = jnp.sort(jax.random.choice(key, self.num_samples, (n,), replace=False))
        return jax.tree.map(lambda leaf: leaf[chosen], self.params)

    def log_prob(self, params: Params) -> Float[Array, ""]:
        """Computes the log of the fraction of members equal to `params` in every leaf, or -inf.

        Args:
            params: one member, not stacked.

        Returns:
            Nats; the log of a probability, not of a density.
        """
        equal = jax.tree.map(
            lambda leaf, x: jnp.all((leaf == x).reshape(leaf.shape[0], -1), axis=1),
            self.params,
            params,
        )
        return jnp.log(jnp.mean(jnp.stack(jax.tree.leaves(equal)).all(axis=0)))

    def kl(self, prior: priors.Prior) -> Float[Array, ""]:
        """Gives KL(self || prior), infinite for a prior with a density: it gives members no mass.

        Args:
            prior: continuous distributions for the random leaves, None for deterministic ones.

        Returns:
            inf; 0 if no leaf has a prior.

        Raises:
            ValueError: if prior and members do not match, see `bnncert.prior.check`.
        """
        priors.check(prior, jax.eval_shape(lambda p: jax.tree.map(lambda a: a[0], p), self.params))
        return jnp.asarray(jnp.inf if priors.sites(prior) else 0.0)

    def moments(self) -> tuple[Params, Params]:
        """Gives the mean and the standard deviation of every weight over the members.

        Returns:
            `(mean, deviation)`, of one network's structure; the variance is the unbiased one.
        """
        ddof = 1 if self.num_samples > 1 else 0
        mean = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), self.params)
        return mean, jax.tree.map(lambda leaf: jnp.std(leaf, axis=0, ddof=ddof), self.params)


def stack(members: Sequence[Params]) -> Params:
    """Stacks a list of params: every leaf gains a leading axis.

    Args:
        members: params of one structure, shapes and dtypes.

    Returns:
        Stacked params, every leaf (S, ...).

    Raises:
        ValueError: if the list is empty.

    Example:
        >>> stack([{"w": jnp.zeros(2)}, {"w": jnp.ones(2)}])["w"].shape
        (2, 2)
    """
    if not members:
        raise ValueError("cannot stack an empty list: give the params of at least one member")
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
