"""What certificates are given: stacked weights, a set of inputs, and the nominal input in it.

Checked once, at the public edge. What is known of a value that is traced is its shape alone: where
a set may be empty, or may not hold the nominal input, nothing is certified, in place of an error.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bnncert._emptiness import empty_unless, holds
from bnncert.posterior.leaves import check_stacked
from bnncert.sets import Set, check_set, is_concrete, is_set
from bnncert.types import Stacked


def num_samples(samples: Stacked) -> int:
    """Counts the networks S of stacked weights.

    Args:
        samples: stacked weights, every leaf with a leading axis S.

    Returns:
        S.

    Raises:
        TypeError: a posterior in their place.
        ValueError: there are none, or the leaves disagree.

    Example:
        >>> num_samples({"w": jnp.zeros((4, 2)), "b": jnp.zeros(4)})
        4
    """
    check_stacked(samples)
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(samples)}
    if len(sizes) != 1 or sizes in ({()}, {(0,)}):
        raise ValueError(
            f"samples: leading axes {sorted(sizes)}; every leaf must have the same one, of S >= 1 "
            "stacked weights (for one network: jax.tree.map(lambda leaf: leaf[None], params))."
        )
    return sizes.pop()[0]


def nominal_input(x: Array | None, x_set: Set) -> tuple[Array, Set]:
    """Gives where the predicted class is read off, and the set: empty if it does not hold x.

    Args:
        x: None for the set's center.
        x_set: the set.

    Returns:
        `(x, x_set)`; where x is traced and outside, the set is empty.

    Raises:
        ValueError: x has another shape, or is known to lie outside.

    Example:
        >>> from bnncert.sets import Box
        >>> nominal_input(None, Box(jnp.zeros(1), jnp.ones(1)))[0].tolist()
        [0.5]
    """
    if x is None:
        return x_set.center, x_set
    x, shape = jnp.asarray(x), jnp.shape(x_set.center)
    if x.shape != shape:
        raise ValueError(f"x has shape {x.shape}, but the set {shape}.")
    if all(map(is_concrete, (x, *jax.tree.leaves(x_set)))):
        if not np.all(jax.device_get(holds(x_set, x))):
            raise ValueError(
                "x lies outside the set: the decision there says nothing about the set. Give the "
                "input that the set was made of, or leave x out."
            )
        return x, x_set
    return x, empty_unless(holds(x_set, x), x_set)


def check_region(x_set: Set) -> None:
    """Checks that inputs are a set, and none that is known to be empty.

    Args:
        x_set: what was given as one.

    Raises:
        TypeError: it is no set.
        ValueError: it is known to be empty; as `bnncert.sets.check_set`.
    """
    if not is_set(x_set):
        raise TypeError(
            f"x_set is a {type(x_set).__name__}: give a bnncert.Box or a bnncert.LpBall (for an "
            "input x and a radius eps: bnncert.ball(x, eps))."
        )
    check_set(x_set, "x_set")
