"""The factorised Gaussian, what mean-field inference returns.

    q(w) = prod_i N(w_i; loc_i, scale_i^2)
    KL(q || p) = sum over random leaves of KL(q_leaf || p_leaf)            (nats)

Source: Graves, "Practical variational inference for neural networks", NeurIPS 2011, section 4;
Blundell et al., "Weight uncertainty in neural networks", ICML 2015.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float

from bnncert import prior as priors
from bnncert.posterior.leaves import check_count, check_random, check_structure, draw_keys
from bnncert.types import Key, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MeanField:
    """Independent normals; leaves whose scale is None are deterministic and stay at `loc`.

        q(w) = prod_i N(w_i; loc_i, scale_i^2)

    Attributes:
        loc: params, the means.
        scale: standard deviations, > 0: the structure of `loc`, None for deterministic leaves.

    Cost: draws, densities and KLs are O(P) for P weights.

    Source: Graves, NeurIPS 2011, section 4; Blundell et al., ICML 2015.

    Example:
        >>> loc = {"w": jnp.zeros(3), "b": jnp.ones(2)}
        >>> q = MeanField(loc, scale={"w": jnp.ones(3), "b": None})
        >>> jax.tree.map(jnp.shape, q.sample(jax.random.key(0), 5))
        {'b': (5, 2), 'w': (5, 3)}
    """

    loc: Params
    scale: Params

    def sample(self, key: Key, n: int) -> Params:
        """Draws n independent members; deterministic leaves are repeated.

        The first m of n draws are the m draws of the same key: more samples refine, not replace.

        Args:
            key: a PRNG key.
            n: number of draws, >= 1.

        Returns:
            Stacked params: every leaf of `loc` gains a leading axis of length n. Memory: n times
            the params.

        Raises:
            ValueError: if n < 1, or the structures of `loc` and `scale` differ.
        """
        check_count(n)
        normals = self._normals()
        # vmap repeats what does not depend on the key: the deterministic leaves
        return jax.vmap(lambda k: priors.sample(k, normals, self.loc))(draw_keys(key, n))

    def log_prob(self, params: Params) -> Float[Array, ""]:
        """Computes the log density over the random leaves: nats, summed over weights.

        Args:
            params: one member, not stacked. Its deterministic leaves are not compared.

        Returns:
            A scalar.
        """
        return priors.log_prob(self._normals(), params)

    def kl(self, prior: priors.Prior) -> Float[Array, ""]:
        """Computes KL(self || prior) in closed form: nats, summed over weights.

        Args:
            prior: distributions for the random leaves, None for the deterministic ones.

        Returns:
            A scalar >= 0; deterministic leaves add 0.

        Raises:
            ValueError: if prior and posterior disagree on structure, shapes or which leaves are
                random (a point against a density would have an infinite KL).
            NotImplementedError: from NumPyro, for a prior whose KL from a normal it does not know;
                estimate it as the mean of `log_prob(w) - prior.log_prob(prior, w)` over draws.
        """
        priors.check(prior, self.loc)
        normals, others = priors.sites(self._normals()), priors.sites(prior)
        check_random(tuple(normals), prior)
        terms = [
            # NumPyro pairs distributions of equal event dimension
            jnp.sum(dist.kl_divergence(normal.to_event(others[name].event_dim), others[name]))
            for name, normal in normals.items()
        ]
        return sum(terms, jnp.zeros(()))

    def moments(self) -> tuple[Params, Params]:
        """Gives the mean and the standard deviation of every weight.

        Returns:
            `(mean, deviation)`, of the structure of `loc`; None for the deviation of a
            deterministic leaf.
        """
        return self.loc, self.scale

    def _normals(self) -> priors.Prior:
        """Gives the same density in the form of a prior, whose functions then serve both."""
        check_structure(self.loc, self.scale, "scale")
        loc, scale = priors.named(self.loc), priors.named(self.scale)
        normals = [
            None if scale[name] is None else dist.Normal(leaf, scale[name])
            for name, leaf in loc.items()
        ]
        return jax.tree.unflatten(jax.tree.structure(self.loc, is_leaf=priors.is_leaf), normals)
