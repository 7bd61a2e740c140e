"""Relaxations over two sets of boxes at once are those over each of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert.bounds.api import traced
from bnncert.bounds.arithmetic import Float, Real
from bnncert.bounds.methods import CROWN, CROWNIBP
from bnncert.bounds.methods.crown import intermediate_bounds, output_bounds, swept
from bnncert.bounds.methods.ibp import interval_bounds
from bnncert.bounds.methods.steps import Passage, further, steps_of, steps_of_both, view_of
from bnncert.bounds.ops import Choice
from bnncert.bounds.plan import Options, make_plan
from bnncert.bounds.rows import Apart, Ways
from bnncert.sets import Box, LpBall
from tests.bounds.architectures import Plan, build

KEY = jax.random.key(3)


def weights(*shape):
    return jax.random.normal(jax.random.fold_in(KEY, sum(shape)), shape)


def around(v, by):
    return Box(v - by, v + by)


X = around(0.3 * weights(4), 0.2)
W1, W2, W3 = weights(5, 4), weights(5, 5), weights(3, 5)


def dense(x):
    return W3 @ jax.nn.relu(W2 @ jax.nn.relu(W1 @ x) + 0.1)


def clipped(x):
    """Two variants, before and after one of which there is one."""
    return W3 @ jax.nn.relu(W2 @ jnp.clip(W1 @ x, -0.5, 0.7)) + jax.nn.tanh(W3 @ (W1 @ x))


def bayesian(v, w, x):
    """Weights' boxes are eliminated."""
    return v @ jax.nn.relu(w @ jax.nn.relu(W1 @ x))


def reduced(x):
    hidden = jax.nn.silu(W2 @ jax.nn.relu(W1 @ x))
    return jnp.stack([hidden.max(), jax.nn.logsumexp(hidden), jax.nn.softmax(hidden)[0]])


def product_of(shape, *layers):
    network = build(Plan(shape, layers, "box", False, 0))
    params, sets = jax.tree.map(
        lambda v: jnp.asarray(v, jnp.float32), (network.params, network.sets)
    )
    return (lambda *points: network.apply(params, *points)), tuple(sets)


CASES = {
    "dense": (dense, (X,)),
    "over a ball": (dense, (LpBall(X.center, 0.3, 2),)),
    "clip": (clipped, (X,)),
    "bayesian": (bayesian, (around(W3, 0.1), around(W2, 0.1), X)),
    "reductions": (reduced, (X,)),
    "attention": product_of((4,), "dense", "attention", "arctan"),
    "gate": product_of((4, 3, 2), "conv", "silu", "squeeze_excite"),
    "output in the middle": ((lambda x: (W2 @ (W1 @ x), dense(x))), (X,)),
}


@pytest.mark.parametrize("arithmetic", [Real(), Float()], ids=["real", "float"])
@pytest.mark.parametrize("name", CASES)
def test_both_at_once_are_the_better_of_each(name, arithmetic):
    f, sets = CASES[name]
    if arithmetic != Real() and name == "reductions":
        pytest.skip("its rounding is not known op by op")

    @jax.jit
    def bounds(sets):
        plan = make_plan(traced(f, sets, {}, Options(128, arithmetic)), Options(128, arithmetic))
        found, known = intermediate_bounds(plan, interval_bounds(plan), CROWN())
        alone = output_bounds(plan, found, steps_of(plan, known))
        every = CROWNIBP().boxes(plan), alone, CROWN().boxes(plan)
        return tuple([boxes[i] for i in plan.outputs] for boxes in every)

    for wider, alone, both in zip(*bounds(sets), strict=True):
        lower, upper = np.maximum(wider.lower, alone.lower), np.minimum(wider.upper, alone.upper)
        np.testing.assert_allclose(both.lower, lower, rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(both.upper, upper, rtol=2e-5, atol=2e-6)


def both_steps(f, *sets):
    plan = make_plan(traced(f, sets, {}, Options(128, Real())), Options(128, Real()))
    wider = view_of(plan, interval_bounds(plan))
    changed = swept(plan)
    boxes, _ = intermediate_bounds(plan, wider.boxes, CROWN())
    known = further(plan, boxes, Passage(), Choice(), wider, changed)
    return plan, known, steps_of_both(plan, known, wider, changed)


def test_what_is_exact_by_intervals_is_relaxed_once():
    plan, known, steps = both_steps(lambda x: W3 @ jax.nn.relu(W2 @ x[:5]), around(weights(5), 0.1))
    assert len(plan.relaxed) == 1 and not swept(plan)
    assert not any(isinstance(step, Ways | Apart) for step in steps.relaxed.values())
    assert known.both == known.relaxed


def test_all_that_is_relaxed_in_several_ways_is_in_as_many():
    _, _, steps = both_steps(clipped, X)
    numbers = {step.number for step in steps.relaxed.values() if isinstance(step, Ways | Apart)}
    assert numbers == {4}


def test_a_weights_box_is_not_repeated():
    _, _, steps = both_steps(bayesian, around(W3, 0.1), around(W2, 0.1), X)
    assert any(isinstance(step, Apart) for step in steps.relaxed.values())
