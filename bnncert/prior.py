"""Priors over weights: a pytree of NumPyro distributions with the structure of the params.

    log p(w) = sum over random leaves of log p_leaf(w_leaf)        (nats)

A leaf whose prior is None is deterministic: it keeps the value it has in the params, and adds
nothing to any density. A network with a few random leaves is a partly Bayesian one.

NumPyro's distributions are themselves pytrees: to map over a prior, pass `is_leaf=is_leaf`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float

from bnncert.sets import is_concrete
from bnncert.types import Key, Params, Prior

_STATISTICS = "batch_stats"  # Flax Linen's collection
# By name: the frameworks need not be installed.
_STATES = {
    "flax": {"BatchStat", "Cache", "Intermediate", "RngState"},
    "equinox": {"State", "StateIndex"},
}


def is_leaf(node: Any) -> bool:
    """Says whether a node of a prior is a leaf of it: a distribution, or None.

    Args:
        node: of a prior.

    Returns:
        A bool.

    Example:
        >>> is_leaf(dist.Normal(0.0, 1.0)), is_leaf({"w": None})
        (True, False)
    """
    return node is None or isinstance(node, dist.Distribution)


def normal(
    params: Params,
    scale: float | Float[Array, ""] = 1.0,
    *,
    where: Callable[[str], bool] | None = None,
) -> Prior:
    """Makes the prior of independent N(0, scale^2) over every weight that `where` picks.

        log p(w) = sum_i log N(w_i; 0, scale^2)     over the weights of the random leaves

    Deterministic in any case are leaves that are no weights: those that hold no floats (counters,
    random keys), and a framework's running statistics and other state, such as those of batch-norm:
    Flax Linen's collection `batch_stats`, Flax NNX's variables of type `BatchStat` (`Cache`,
    `Intermediate`, `RngState`), Equinox's `State`. Statistics that are none of these, plain arrays
    in a dictionary say, are named by `where`.

    Args:
        params: the network's params; only names, shapes and dtypes are read.
        scale: standard deviation of every weight, > 0.
        where: takes a weight's name ("dense/kernel") and says whether it is random; all are if it
            is None.

    Returns:
        A prior with the structure of `params`.

    Raises:
        ValueError: if `scale` is not positive and finite, or `where` leaves no leaf random.

    Example:
        >>> params = {"dense": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}}
        >>> names(normal(params, 0.1, where=lambda name: name.endswith("kernel")))
        ('dense/kernel',)
    """
    if is_concrete(scale) and not 0 < scale < jnp.inf:
        raise ValueError(f"the prior's scale must be positive and finite, got {scale}")

    def leaf(path: tuple[Any, ...], value: Any) -> Any:
        if _is_state(value):
            return jax.tree.map(lambda _: None, value)
        if _STATISTICS in _name(path).split("/"):
            return None
        if value is None or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            return None
        if where is not None and not where(_name(path)):
            return None
        loc = jnp.zeros(jnp.shape(value), jnp.result_type(value))
        return dist.Normal(loc, jnp.asarray(scale, loc.dtype)).to_event(loc.ndim)

    prior = jax.tree_util.tree_map_with_path(
        leaf, params, is_leaf=lambda node: is_leaf(node) or _is_state(node)
    )
    if not sites(prior):
        raise ValueError(f"no leaf is random: `where` picks no float leaf of {list(named(params))}")
    return prior


def fitted(prior: Prior, mean: Params, deviation: Params) -> Prior:
    """Fits the scale of each random leaf to a posterior: N(0, sigma^2) with the least KL to it.

        sigma^2 = mean over the leaf of loc^2 + scale^2,
        KL = sum over the leaf of log(sigma / scale)    for a factorised Gaussian

    Empirical Bayes, layer by layer: no scale is given beforehand, and weights of any size have the
    KL that their relative deviations say. The evidence bound holds for the prior that is found, and
    is optimistic by what choosing one number a leaf costs.

    Args:
        prior: says which leaves are random.
        mean: the posterior's, params.
        deviation: its standard deviations, None for leaves that are deterministic.

    Returns:
        A prior of that structure; no derivative passes it (at the least KL there is none).

    Raises:
        NotImplementedError: a leaf whose prior is not normal; names it.

    Source: MacKay, "A Practical Bayesian Framework for Backpropagation Networks", 1992, section 3;
    the closed form is the maximum of the ELBO over sigma.

    Example:
        >>> p = fitted(normal(jnp.zeros(2)), jnp.array([3.0, 4.0]), jnp.zeros(2))
        >>> p.variance.tolist()                               # (9 + 16) / 2
        [12.5, 12.5]
    """
    locs, scales = named(mean), named(deviation)
    for name, given in sites(prior).items():
        base: Any = given
        while hasattr(base, "base_dist"):
            base = base.base_dist
        if not isinstance(base, dist.Normal):
            raise NotImplementedError(
                f"the prior of leaf {name!r} is a {type(base).__name__}: a scale is fitted to "
                "normal priors alone (bnncert.prior.normal); keep this one by fit_prior=False."
            )

    def leaf(name: str) -> dist.Distribution:
        loc = jnp.asarray(locs[name])
        square = jnp.mean(jnp.square(loc) + jnp.square(scales[name]))
        scale = jnp.sqrt(jax.lax.stop_gradient(square))
        return dist.Normal(jnp.zeros_like(loc), scale).to_event(loc.ndim)

    return unflatten(
        prior, {n: leaf(n) if d is not None else None for n, d in named(prior).items()}
    )


def named(tree: Any) -> dict[str, Any]:
    """Lists the leaves of a prior, or of params, by name ("dense/kernel"); None counts as a leaf.

    Args:
        tree: a prior, params, or any tree of their structure.

    Returns:
        The leaves by name, in the order of the tree.

    Raises:
        ValueError: if two leaves have the same name (a "/" inside a key can do that).

    Example:
        >>> named({"dense": {"kernel": 1.0, "bias": None}})
        {'dense/bias': None, 'dense/kernel': 1.0}
    """
    found: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf):
        name = _name(path)
        if name in found:
            raise ValueError(f"two leaves are named {name!r}: rename one of their keys")
        found[name] = leaf
    return found


def sites(prior: Prior) -> dict[str, dist.Distribution]:
    """Lists the random leaves' distributions by name, in the order of the tree's leaves.

    Args:
        prior: a pytree of distributions and None.

    Returns:
        Distributions by name, without the deterministic leaves.

    Example:
        >>> list(sites({"bias": None, "kernel": dist.Normal(0.0, 1.0)}))
        ['kernel']
    """
    return {name: leaf for name, leaf in named(prior).items() if leaf is not None}


def names(prior: Prior) -> tuple[str, ...]:
    """Lists the random leaves' names: the path to each, joined by "/".

    Args:
        prior: a pytree of distributions and None.

    Returns:
        Names in the order of the tree's leaves.

    Example:
        >>> names({"dense": {"kernel": dist.Normal(0.0, 1.0), "bias": None}})
        ('dense/kernel',)
    """
    return tuple(sites(prior))


def replace(params: Params, values: Mapping[str, Array]) -> Params:
    """Replaces the named leaves of params: so sampled sites become weights again.

    Args:
        params: any params.
        values: new leaves by name, as `names` gives them.

    Returns:
        Params of the same structure.

    Raises:
        ValueError: if a name is not that of a leaf.

    Example:
        >>> print(replace({"w": jnp.zeros(2), "b": jnp.ones(1)}, {"w": jnp.ones(2)})["w"])
        [1. 1.]
    """
    leaves = named(params)
    unknown = sorted(set(values) - set(leaves))
    if unknown:
        raise ValueError(f"params have no leaf named {unknown}; their leaves are {list(leaves)}")
    treedef = jax.tree.structure(params, is_leaf=is_leaf)
    return jax.tree.unflatten(treedef, [values.get(name, leaf) for name, leaf in leaves.items()])


def unflatten(prior: Prior, values: Mapping[str, Any]) -> Any:
    """Puts named values into the structure of the prior: the inverse of `named`.

    Args:
        prior: gives the structure.
        values: one for each leaf of it, the deterministic ones too; others are ignored.

    Returns:
        A tree of the prior's structure.

    Raises:
        KeyError: a leaf without a value.

    Example:
        >>> unflatten([None, {"w": dist.Normal(0.0, 1.0)}], {"0": "here", "1/w": "there"})
        ['here', {'w': 'there'}]
    """
    treedef = jax.tree.structure(prior, is_leaf=is_leaf)
    return jax.tree.unflatten(treedef, [values[name] for name in named(prior)])


def sample(key: Key, prior: Prior, params: Params) -> Params:
    """Draws once from the prior; deterministic leaves keep their values in `params`.

    Args:
        key: a PRNG key.
        prior: a pytree of distributions and None.
        params: gives the deterministic leaves, and the dtype of the others.

    Returns:
        Params of the same structure, shapes and dtypes.

    Raises:
        ValueError: if prior and params do not match, see `check`.

    Example:
        >>> params = {"w": jnp.zeros(3), "b": jnp.ones(1)}
        >>> prior = normal(params, 0.1, where=lambda name: name == "w")
        >>> drawn = sample(jax.random.key(0), prior, params)
        >>> drawn["w"].shape, drawn["b"].tolist()
        ((3,), [1.0])
    """
    check(prior, params)
    leaves, found = named(params), sites(prior)
    keys = jax.random.split(key, len(found))
    draws = {
        name: jnp.asarray(leaf.sample(k), jnp.result_type(leaves[name]))
        for k, (name, leaf) in zip(keys, found.items(), strict=True)
    }
    return replace(params, draws)


def log_prob(prior: Prior, params: Params) -> Float[Array, ""]:
    """Computes the log density of the params: nats, summed over the random leaves' weights.

        log p(w) = sum over random leaves of log p_leaf(w_leaf)

    Args:
        prior: a pytree of distributions and None.
        params: where to evaluate it.

    Returns:
        A scalar; 0 if no leaf is random.

    Raises:
        ValueError: if prior and params do not match, see `check`.

    Example:
        >>> print(f"{log_prob({'w': dist.Normal(0.0, 1.0)}, {'w': jnp.array(0.0)}):.4f}")
        -0.9189
    """
    check(prior, params)
    leaves = named(params)
    terms = [jnp.sum(leaf.log_prob(leaves[name])) for name, leaf in sites(prior).items()]
    return sum(terms, jnp.zeros(()))


def check(prior: Prior, params: Any) -> None:
    """Checks that the prior has the params' structure and, leaf by leaf, their shapes.

    Args:
        prior: a pytree of distributions and None.
        params: of one network, or their shapes and dtypes.

    Raises:
        ValueError: naming the leaves that only one of the two has, or the leaf whose distribution
            has another shape, with both shapes.

    Example:
        >>> check({"w": dist.Normal(0.0, 1.0).expand([2])}, {"w": jnp.zeros(3)})
        Traceback (most recent call last):
        ValueError: the prior of leaf 'w' has shape (2,), the params have (3,); ...
    """
    leaves, priors = named(params), named(prior)
    if leaves.keys() != priors.keys():
        raise ValueError(
            "the prior must have the params' structure, with None for a deterministic leaf: "
            f"only the params have {sorted(leaves.keys() - priors.keys())}, "
            f"only the prior has {sorted(priors.keys() - leaves.keys())}"
        )
    for name, leaf in sites(prior).items():
        if leaves[name] is None:
            raise ValueError(f"leaf {name!r} has a prior, but the params hold None there")
        if leaf.shape() != jnp.shape(leaves[name]):
            raise ValueError(
                f"the prior of leaf {name!r} has shape {leaf.shape()}, the params have "
                f"{jnp.shape(leaves[name])}; give the distribution the leaf's shape with "
                "`.expand(shape).to_event(len(shape))`"
            )


def normal_parameters(prior: Prior) -> tuple[dict[str, Array], dict[str, Array]]:
    """Reads the locations and scales of a prior of independent normals.

    Args:
        prior: a pytree of normals and None.

    Returns:
        `(locations, scales)`, each by name of the random leaves, in their shapes.

    Raises:
        NotImplementedError: naming a leaf whose prior is another distribution.

    Example:
        >>> _, scales = normal_parameters({"w": dist.Normal(0.0, 2.0).expand([3]), "b": None})
        >>> print(scales["w"])
        [2. 2. 2.]
    """
    locs, scales = {}, {}
    for name, leaf in sites(prior).items():
        base = leaf
        while isinstance(base, dist.Independent | dist.ExpandedDistribution):
            base = base.base_dist
        if not isinstance(base, dist.Normal):
            raise NotImplementedError(
                f"the prior of leaf {name!r} is a {type(base).__name__}: closed forms are for "
                "independent normals (bnncert.prior.normal). Estimate a KL as the mean of "
                "`log_prob(w) - bnncert.prior.log_prob(prior, w)` over draws w"
            )
        locs[name] = jnp.broadcast_to(jnp.asarray(base.loc), leaf.shape())
        scales[name] = jnp.broadcast_to(jnp.asarray(base.scale), leaf.shape())
    return locs, scales


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_state(node: Any) -> bool:
    """Says whether a node is a framework's container of what is no weight, or a kind of one."""
    kinds = type(node).__mro__
    own = getattr(node, "type", None)  # NNX before 0.12 keeps the variable's type so in its states
    if isinstance(own, type):
        kinds += own.__mro__
    return any(t.__name__ in _STATES.get(t.__module__.split(".")[0], ()) for t in kinds)
