"""Ensembles: any method run K times from K starts, side by side as one method.

    q(w) = (1/K) sum_k q_k(w)

K networks of MAP are a deep ensemble, the discrete measure on K modes; K runs of SWAG are MultiSWAG
and K of variational inference a mixture of K Gaussians: each member covers one mode, and the
mixture several. Members see the same minibatches with keys of their own, and start apart; nothing
couples them, so each is what it would have been alone.

Source: Lakshminarayanan, Pritzel and Blundell, "Simple and Scalable Predictive Uncertainty
Estimation using Deep Ensembles", NeurIPS 2017; Wilson and Izmailov, NeurIPS 2020, section 3.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from bnncert.posterior import Mixture, Samples
from bnncert.types import Algorithm, Batch, Key, Params, Threat


def build(algorithm: Algorithm, num_members: int, *, vectorize: bool = True) -> Algorithm:
    """Makes an `Algorithm` of K members of an algorithm: its state is theirs, stacked.

        q(w) = (1/K) sum_k q_k(w)

    Args:
        algorithm: as `bnncert.infer.map.build(...)` or any other gives it.
        num_members: K, >= 1.
        vectorize: True: members are vmapped, which keeps an accelerator busy. False: they are
            unrolled, one after the other in one compiled step. On CPUs that is the faster one for
            convolutional networks: vmapped over kernels a convolution becomes a grouped one, and
            inside `lax.map` its gradients are slow too. It compiles K times as much.

    Returns:
        `Algorithm(init, update, posterior)`.
        `init(key, params)` takes the members' params stacked (leading axis K), or a function
        `initialise(key) -> params` of one member. Member k has the k-th of `jax.random.split(key,
        K)`, in `init` and in `update`.
        The info of `update` is that of the algorithm, every field averaged over members.
        The posterior is a `Samples` of all members where theirs are `Samples` (MAP), and a
        `Mixture` of theirs otherwise.

    Raises:
        ValueError: num_members < 1; from `init`, params without a leading axis K.

    Cost: K times the algorithm's, in time and memory.

    Source: Lakshminarayanan et al., NeurIPS 2017, algorithm 1; Wilson and Izmailov, NeurIPS 2020.

    Example:
        >>> import optax
        >>> from bnncert import likelihood, prior
        >>> from bnncert.infer import map
        >>> single = map.build(
        ...     likelihood.clean_categorical(lambda w, x: w @ x),
        ...     prior.normal(jnp.zeros((2, 3))),
        ...     num_data=10,
        ...     optimizer=optax.sgd(0.1),
        ... )
        >>> algorithm = build(single, 5)
        >>> state = algorithm.init(jax.random.key(0), lambda key: jax.random.normal(key, (2, 3)))
        >>> algorithm.posterior(state).num_samples
        5
    """
    if num_members < 1:
        raise ValueError(f"num_members = {num_members}: give the number of members, at least 1.")
    each = jax.vmap if vectorize else partial(_unrolled, num_members)
    return Algorithm(
        partial(_init, algorithm, num_members, each),
        partial(_update, algorithm, num_members, each),
        partial(_posterior, algorithm),
    )


def _init(
    algorithm: Algorithm,
    num_members: int,
    each: Callable,
    key: Key,
    params: Params | Callable[[Key], Params],
) -> Any:
    keys = jax.random.split(key, num_members)
    if callable(params):

        def start(key: Key) -> Any:
            first, second = jax.random.split(key)
            return algorithm.init(second, params(first))

        return each(start)(keys)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if jnp.ndim(leaf) == 0 or leaf.shape[0] != num_members:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"leaf {name!r} has shape {jnp.shape(leaf)}: stack the params of {num_members} "
                "members (bnncert.posterior.stack), or give a function `initialise(key) -> params`"
            )
    return each(algorithm.init)(keys, params)


def _update(
    algorithm: Algorithm,
    num_members: int,
    each: Callable,
    key: Key,
    state: Any,
    batch: Batch,
    threat: Threat,
) -> tuple[Any, Any]:
    """Takes one step of every member on the same minibatch."""
    step = each(lambda key, state: algorithm.update(key, state, batch, threat))
    state, infos = step(jax.random.split(key, num_members), state)
    return state, jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), infos)


def _posterior(algorithm: Algorithm, state: Any) -> Samples | Mixture:
    members = jax.vmap(algorithm.posterior)(state)
    if isinstance(members, Samples):  # (K, S, ...): the union of K discrete measures
        return Samples(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), members.params))
    return Mixture(members)


def _unrolled(num_members: int, f: Callable) -> Callable:
    """Does what `jax.vmap(f)` does, by a loop that tracing unrolls."""

    def each(*args: Any) -> Any:
        found = [f(*jax.tree.map(lambda leaf, k=k: leaf[k], args)) for k in range(num_members)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)

    return each
