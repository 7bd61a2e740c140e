"""Posteriors over weights: what inference returns, and what certificates and attacks deploy.

    MeanField   q(w) = prod_i N(w_i; loc_i, scale_i^2)
    Samples     q(w) = (1/S) sum_s [w = w_s]             (the discrete measure)

Each has `sample(key, n)`, `log_prob(params)` and `kl(prior)`, in nats summed over weights:

    KL(q || p) = E_q[log q(w) - log p(w)] = sum over random leaves of KL(q_leaf || p_leaf).

"Stacked" params have one leading axis more on every leaf, over weight samples. Both classes are
pytrees: they pass through `jit` and `vmap`, and optimisers can differentiate through them.

Source: Graves, "Practical variational inference for neural networks", NeurIPS 2011, section 4
(the factorised Gaussian); Blundell et al., "Weight uncertainty in neural networks", ICML 2015.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float

from bnncert import prior as priors
from bnncert.types import Key, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MeanField:
    """Independent normals; leaves whose scale is None are deterministic and stay at `loc`.

    Attributes:
        loc: params, the means.
        scale: standard deviations, > 0: the structure of `loc`, None for deterministic leaves.

    Example:
        >>> loc = {"w": jnp.zeros(3), "b": jnp.ones(2)}
        >>> q = MeanField(loc, scale={"w": jnp.ones(3), "b": None})
        >>> jax.tree.map(jnp.shape, q.sample(jax.random.key(0), 5))
        {'b': (5, 2), 'w': (5, 3)}
    """

    loc: Params
    scale: Params

    def sample(self, key: Key, n: int) -> Params:
        """Draw n independent members; deterministic leaves are repeated.

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
        _check_count(n)
        normals = self._normals()
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(n))
        # vmap repeats what does not depend on the key: the deterministic leaves
        return jax.vmap(lambda k: priors.sample(k, normals, self.loc))(keys)

    def log_prob(self, params: Params) -> Float[Array, ""]:
        """Log density over the random leaves: nats, summed over weights.

        Args:
            params: one member, not stacked. Its deterministic leaves are not compared.

        Returns:
            A scalar.
        """
        return priors.log_prob(self._normals(), params)

    def kl(self, prior: priors.Prior) -> Float[Array, ""]:
        """KL(self || prior) in closed form: nats, summed over weights.

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
        if normals.keys() != others.keys():
            raise ValueError(
                "prior and posterior must be random in the same leaves: "
                f"only the prior is in {sorted(others.keys() - normals.keys())}, "
                f"only the posterior is in {sorted(normals.keys() - others.keys())}; "
                "None marks a deterministic leaf in both"
            )
        terms = [
            # NumPyro pairs distributions of equal event dimension
            jnp.sum(dist.kl_divergence(normal.to_event(others[name].event_dim), others[name]))
            for name, normal in normals.items()
        ]
        return sum(terms, jnp.zeros(()))

    def _normals(self) -> priors.Prior:
        """The same density in the form of a prior, whose functions then serve both."""
        loc, scale = priors.named(self.loc), priors.named(self.scale)
        if loc.keys() != scale.keys():
            raise ValueError(
                "scale must have loc's structure, with None for a deterministic leaf: they differ "
                f"in {sorted(loc.keys() ^ scale.keys())}"
            )
        normals = [
            None if scale[name] is None else dist.Normal(leaf, scale[name])
            for name, leaf in loc.items()
        ]
        return jax.tree.unflatten(jax.tree.structure(self.loc, is_leaf=priors.is_leaf), normals)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Samples:
    """The discrete measure with mass 1/S on each of S members.

    Attributes:
        params: stacked params, every leaf (S, ...).

    Example:
        >>> q = Samples(stack([{"w": jnp.zeros(2)}, {"w": jnp.ones(2)}]))
        >>> q.num_samples, round(float(q.log_prob({"w": jnp.ones(2)})), 4)
        (2, -0.6931)
    """

    params: Params

    @property
    def num_samples(self) -> int:
        """Number S of members."""
        return jax.tree.leaves(self.params)[0].shape[0]

    def sample(self, key: Key, n: int) -> Params:
        """Choose n different members, uniformly, in stored order: n = S gives them all as they are.

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
        _check_count(n)
        if n > self.num_samples:
            raise ValueError(
                f"cannot draw {n} different members from {self.num_samples}: ask for at most "
                f"{self.num_samples}, or infer more samples"
            )
        chosen = jnp.sort(jax.random.choice(key, self.num_samples, (n,), replace=False))
        return jax.tree.map(lambda leaf: leaf[chosen], self.params)

    def log_prob(self, params: Params) -> Float[Array, ""]:
        """Log of the fraction of members equal to `params` in every leaf; -inf if there is none.

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
        """KL(self || prior), infinite for a prior with a density: it gives the members no mass.

        Args:
            prior: continuous distributions for the random leaves, None for deterministic ones.

        Returns:
            inf; 0 if no leaf has a prior.

        Raises:
            ValueError: if prior and members do not match, see `bnncert.prior.check`.
        """
        priors.check(prior, jax.eval_shape(lambda p: jax.tree.map(lambda a: a[0], p), self.params))
        return jnp.asarray(jnp.inf if priors.sites(prior) else 0.0)


def stack(members: Sequence[Params]) -> Params:
    """Stacked params from a list of params: every leaf gains a leading axis.

    Raises:
        ValueError: if the list is empty.

    Example:
        >>> stack([{"w": jnp.zeros(2)}, {"w": jnp.ones(2)}])["w"].shape
        (2, 2)
    """
    if not members:
        raise ValueError("cannot stack an empty list: give the params of at least one member")
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)


def spread(posterior: MeanField | Samples) -> Float[Array, ""]:
    """Median standard deviation over median |mean|, across the weights of the random leaves.

    A number without unit that says how far a posterior is from a single network. For `Samples`
    mean and deviation are those of the members (unbiased variance), and a leaf in which all
    members agree is deterministic.

    Args:
        posterior: any of this module.

    Returns:
        A scalar >= 0; 0 if nothing is random, inf if most means are 0.

    Example:
        >>> print(spread(MeanField({"w": jnp.full(3, 2.0)}, {"w": jnp.ones(3)})))
        0.5
    """
    if isinstance(posterior, MeanField):
        scales = priors.named(posterior.scale)
        locs = priors.named(posterior.loc)
    else:
        ddof = 1 if posterior.num_samples > 1 else 0
        stacked = priors.named(posterior.params)
        scales = {name: jnp.std(leaf, axis=0, ddof=ddof) for name, leaf in stacked.items()}
        locs = {name: jnp.mean(leaf, axis=0) for name, leaf in stacked.items()}
    random = [name for name, scale in scales.items() if scale is not None]
    if not random:
        return jnp.zeros(())
    # NaN hides the leaves that turn out deterministic: which ones is not known under a trace
    shown = {name: jnp.where(jnp.any(scales[name] > 0), 0.0, jnp.nan) for name in random}
    scale = jnp.concatenate([jnp.ravel(scales[name] + shown[name]) for name in random])
    loc = jnp.concatenate([jnp.ravel(jnp.abs(locs[name]) + shown[name]) for name in random])
    return jnp.nan_to_num(jnp.nanmedian(scale) / jnp.nanmedian(loc), nan=0.0, posinf=jnp.inf)


def _check_count(n: int) -> None:
    if n < 1:
        raise ValueError(f"the number of draws must be at least 1, got {n}")
