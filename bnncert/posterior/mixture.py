"""An equal-weight mixture of posteriors of one kind: what an ensemble of them returns.

    q(w) = (1/K) sum_k q_k(w)

with mean and variance of a weight

    E w = mean_k m_k,    Var w = mean_k v_k + mean_k (m_k - E w)^2.

Source: Wilson and Izmailov, "Bayesian Deep Learning and a Probabilistic Perspective of
Generalization", NeurIPS 2020, section 3 (MultiSWAG); Lakshminarayanan et al. 2017 (deep ensembles).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnncert import prior as priors
from bnncert.posterior.leaves import check_count, draw_keys
from bnncert.types import Key, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mixture:
    """K posteriors of one kind, stacked, of weight 1/K each.

        q(w) = (1/K) sum_k q_k(w)

    Attributes:
        members: a posterior as a pytree with a leading axis K on every leaf, e.g.
            `jax.tree.map(lambda *leaves: jnp.stack(leaves), *posteriors)`.

    Cost: K times that of a member.

    Source: Wilson and Izmailov, NeurIPS 2020, section 3.

    Example:
        >>> from bnncert.posterior import MeanField
        >>> q = Mixture(MeanField({"w": jnp.zeros((2, 3))}, {"w": jnp.ones((2, 3))}))
        >>> q.num_members, q.sample(jax.random.key(0), 5)["w"].shape
        (2, (5, 3))
    """

    members: Any

    @property
    def num_members(self) -> int:
        """The number K of members."""
        return jax.tree.leaves(self.members)[0].shape[0]

    def sample(self, key: Key, n: int) -> Params:
        """Draws n networks evenly from the members: floor(n/K) or ceil(n/K) from each.

        They come in rounds, one from each member, in an order that the key shuffles: where K does
        not divide n, the n mod K members drawn once more are a uniform choice. So each draw is one
        from q, and given the order they are independent, but not identically distributed: averages
        over a multiple of K draws are unbiased given the order too, and vary less than those of
        independent draws (stratification). The first m of n draws are the m draws of the same key
        wherever the members promise so.

        Args:
            key: a PRNG key.
            n: number of draws, >= 1.

        Returns:
            Stacked params: every leaf gains a leading axis of length n. Memory: as the members',
            for n rounded up to a multiple of K (for n < K, n of them draw).

        Raises:
            ValueError: if n < 1.
        """
        check_count(n)
        order_key, own = jax.random.split(key)
        order = jax.random.permutation(order_key, self.num_members)[:n]
        rounds = -(-n // len(order))
        chosen = jax.tree.map(lambda leaf: leaf[order], self.members)
        keys = draw_keys(own, self.num_members)[order]
        draws = jax.vmap(lambda member, k: member.sample(k, rounds))(chosen, keys)

        def interleave(leaf: Array) -> Array:
            in_rounds = jnp.swapaxes(leaf, 0, 1)
            return in_rounds.reshape(-1, *leaf.shape[2:])[:n]

        return jax.tree.map(interleave, draws)

    def log_prob(self, params: Params) -> Float[Array, ""]:
        """Computes the log density over the random leaves in nats, by log-sum-exp over the members.

        Args:
            params: one draw, not stacked. Deterministic leaves are not compared, even where members
                differ in them.

        Returns:
            A scalar. K times the cost of a member's.
        """
        terms = jax.vmap(lambda member: member.log_prob(params))(self.members)
        return jax.nn.logsumexp(terms) - jnp.log(self.num_members)

    def kl(self, prior: priors.Prior) -> Float[Array, ""]:
        """Refuses: there is no closed form of KL(self || prior).

        Args:
            prior: of any kind.

        Raises:
            NotImplementedError: always. A Monte Carlo estimate is another thing than a KL, so it
                has to be asked for.
        """
        raise NotImplementedError(
            f"the KL of a mixture ({self.num_members} members) has no closed form. Estimate it as "
            "the mean of `q.log_prob(w) - bnncert.prior.log_prob(prior, w)` over draws w of "
            "`q.sample`, with its standard error; or bound it from above by the members' mean KL"
        )

    def moments(self) -> tuple[Params, Params]:
        """Gives the mean and the standard deviation of every weight under the mixture.

        Returns:
            `(mean, deviation)`: Var w = mean_k v_k + mean_k (m_k - E w)^2, K times the cost of a
            member's.
        """
        locs, scales = jax.vmap(lambda member: member.moments())(self.members)
        mean = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), locs)
        within = priors.named(scales)
        deviations = [
            jnp.sqrt(jnp.var(leaf, axis=0) + _mean_square(within[name]))
            for name, leaf in priors.named(locs).items()
            if leaf is not None
        ]
        return mean, jax.tree.unflatten(jax.tree.structure(mean), deviations)


def _mean_square(scale: Array | None) -> Array | float:
    return 0.0 if scale is None else jnp.mean(jnp.square(scale), axis=0)
