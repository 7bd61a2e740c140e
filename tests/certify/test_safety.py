"""P_safe: the truth lies between the bounds, and what was counted is what was proved."""

import math
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtr

import bnncert as bc
from bnncert import certify
from bnncert.certify import Constraints, class_stays, outputs_within
from bnncert.certify.formal import boxes, mass
from bnncert.posterior import LowRank, MeanField
from bnncert.sets import Box, LpBall

KEY = jax.random.key(0)
T = Box(jnp.array([0.5]), jnp.array([1.0]))
ROWS = Constraints(np.array([[-1.0]]), np.array([2.0]))


def safety(*args, method: Any = "crown-ibp", **options):
    """By boxes of weights, where nothing else is said."""
    return certify.safety(*args, method=method, **options)


def line(params, x):
    return params["w"] * x


def unit(params, x):
    """One hidden unit, two uncertain weights: v relu(w x + 1)."""
    return params["v"] * jax.nn.relu(params["w"] * x + 1.0)


def small(params, x):
    return params["v"] @ jax.nn.relu(params["w"] @ x + params["c"])


def gaussian(scale, **loc):
    loc = {name: jnp.asarray(value, jnp.float32) for name, value in loc.items()}
    return MeanField(loc, jax.tree.map(lambda leaf: jnp.full(leaf.shape, scale), loc))


def flat(boxes):
    """Lower and upper ends of K boxes, shape (K, P)."""
    found = [leaf for leaf in jax.tree.leaves(boxes.boxes, is_leaf=bc.sets.is_set)]
    pairs = [(leaf.lower, leaf.upper) for leaf in found if bc.sets.is_set(leaf)]
    count = len(boxes.masses)
    return [np.concatenate([np.reshape(p[i], (count, -1)) for p in pairs], 1) for i in (0, 1)]


def truth_of_line(loc, scale):
    """|w x| < 1 on [.5, 1] is |w| < 1."""
    return float(ndtr((1 - loc) / scale) - ndtr((-1 - loc) / scale))


def truth_of_unit(scale):
    """v relu(w x + 1) < 2 on [.5, 1], by quadrature over w: the largest feature is at an end."""
    w = np.linspace(-12, 12, 400_001) * scale + 0.5
    density = np.exp(-0.5 * ((w - 0.5) / scale) ** 2) / (scale * math.sqrt(2 * math.pi))
    h = np.maximum(np.maximum(0.5 * w + 1, w + 1), 0)
    with np.errstate(divide="ignore"):
        inside = np.where(h > 0, ndtr((2 / np.maximum(h, 1e-300) - 0.8) / scale), 1.0)
    return float(np.trapezoid(inside * density, w))


@pytest.mark.parametrize("loc, scale", [(0.0, 1.0), (0.9, 0.3), (2.0, 0.5), (0.0, 0.1)])
def test_one_weight_by_its_closed_form(loc, scale):
    q = gaussian(scale, w=[loc])
    found = safety(KEY, line, q, T, outputs_within(-1.0, 1.0), num_boxes=16)
    truth = truth_of_line(float(q.loc["w"][0]), float(q.scale["w"][0]))
    assert found.lower <= truth <= found.upper
    assert found.upper - found.lower < 1e-3


@pytest.mark.parametrize("scale", [0.2, 0.5])
def test_two_weights_by_quadrature(scale):
    q = gaussian(scale, w=[0.5], v=[0.8])
    rows = ROWS
    truth = truth_of_unit(float(q.scale["w"][0]))
    gaps = []
    for count in (4, 64):
        found = safety(KEY, unit, q, T, rows, num_boxes=count)
        assert found.lower <= truth <= found.upper
        gaps.append(found.upper - found.lower)
    assert gaps[1] < 0.05 and gaps[1] < gaps[0]


def random_case(seed) -> tuple[MeanField, Any, Constraints]:
    random = np.random.default_rng(seed)
    scale = float(np.exp(random.uniform(-4, 0)))
    q = gaussian(
        scale,
        w=random.normal(size=(3, 2)),
        c=0.5 * random.normal(size=3),
        v=random.normal(size=(2, 3)),
    )
    x = jnp.asarray(random.uniform(size=2), jnp.float32)
    return q, bc.ball(x, 0.05), class_stays(int(jnp.argmax(small(q.loc, x))), 2)


@partial(jax.jit, static_argnums=0)
def rows_at(apply, samples, points, rows):
    """The least row over points, for each draw: what is safe there may not be everywhere."""
    matrix, offset = (jnp.asarray(part) for part in rows)

    def one(params, x):
        return jnp.min(matrix @ apply(params, x) + offset)

    return jax.vmap(lambda p: jnp.min(jax.vmap(partial(one, p))(points)))(samples)


def test_a_hundred_random_cases_against_draws():
    """A draw that breaks at a point is unsafe: what is left is no less than P_safe, so than lower.

    And of the unsafe boxes' mass, no more may be lacking from it than the draws' own error.
    """
    count, lowers, decided = 4000, 0, 0
    for seed in range(100):
        q, x_set, rows = random_case(seed)
        found = safety(KEY, small, q, x_set, rows, num_boxes=4, rounds=2, steps=8)
        points = jax.random.uniform(KEY, (16, 2), minval=x_set.lower, maxval=x_set.upper)
        corners = jnp.stack([x_set.lower, x_set.upper])
        samples = q.sample(jax.random.key(seed), count)
        estimate = float(
            jnp.mean(rows_at(small, samples, jnp.concatenate([points, corners]), rows) > 0)
        )
        error = 4 * math.sqrt((estimate * (1 - estimate) + 1e-3) / count)
        assert found.lower <= estimate + error
        assert 0 <= found.lower <= found.upper <= 1
        lowers += found.lower > 0.5
        decided += found.upper - found.lower < 0.5
    assert lowers > 10 and decided > 20  # it is not by saying nothing


def proved(kind, apply, q, x_set, rows, found):
    """Each box anew, from what the certificate holds: ends, and for unsafe ones input and row."""
    matrix, offset = (jnp.asarray(part) for part in rows)
    g = jax.jit(bc.bound(lambda p, x: matrix @ jnp.ravel(apply(p, x)) + offset, rounding="outward"))
    part = getattr(found, kind)
    for k in range(len(part.masses)):
        box = jax.tree.map(
            lambda leaf: Box(leaf.lower[k], leaf.upper[k]) if bc.sets.is_set(leaf) else leaf,  # noqa: B023
            part.boxes,
            is_leaf=bc.sets.is_set,
        )
        if kind == "safe":
            yield bool((g(box, x_set).lower > 0).all())
        else:
            x = jnp.asarray(found.inputs[k])
            assert bool(((x >= x_set.lower) & (x <= x_set.upper)).all())
            yield bool(g(box, x).upper[found.rows[k]] < 0)


def check(apply, q, x_set, rows, found):
    """Counted is what was propagated; boxes are disjoint; sums are those of the masses."""
    ends = [flat(part) for part in (found.safe, found.unsafe)]
    loc, scale = (
        np.concatenate([np.ravel(a) for a in jax.tree.leaves(t)]) for t in (q.loc, q.scale)
    )
    for part, (lower, upper) in zip((found.safe, found.unsafe), ends, strict=True):
        for one, below, above in zip(part.masses, lower, upper, strict=True):
            assert one == mass.mass(below, above, loc, scale)
    assert all(proved("safe", apply, q, x_set, rows, found))
    assert all(proved("unsafe", apply, q, x_set, rows, found))
    lower, upper = (np.concatenate([e[i] for e in ends]) for i in (0, 1))
    overlap = np.minimum(upper[:, None], upper[None]) > np.maximum(lower[:, None], lower[None])
    assert (overlap.all(-1) == np.eye(len(lower), dtype=bool)).all()
    assert found.lower <= math.fsum(found.safe.masses)
    assert found.upper >= 1 - math.fsum(found.unsafe.masses)


Q = gaussian(0.5, w=[0.5], v=[0.8])


def test_what_was_counted_was_proved_and_is_disjoint():
    found = safety(KEY, unit, Q, T, ROWS, num_boxes=24)
    assert len(found.safe.masses) > 3 and len(found.unsafe.masses) > 1
    assert found.arithmetic == "float32"
    check(unit, Q, T, ROWS, found)


def test_the_old_faults_are_found(monkeypatch):
    """Boxes of m deviations counted at 2 m; boxes that overlap, whatever sum is made of them."""
    true_search = boxes.search

    def twice(claims, posterior, uniform, **options):
        found = []
        for p in true_search(claims, posterior, uniform, **options):
            middle = np.clip(posterior.loc, p.lower, p.upper)
            ends = (middle + 2 * (p.lower - middle), middle + 2 * (p.upper - middle))
            found.append(p._replace(lower=ends[0], upper=ends[1]))
        return found

    def again(claims, posterior, uniform, **options):
        found = true_search(claims, posterior, uniform, **options)
        largest = max((p for p in found if p.safe), key=lambda p: np.prod(p.upper - p.lower))
        return [*found, largest]

    for fault in (twice, again):
        monkeypatch.setattr(sys.modules[certify.safety.__module__], "search", fault)
        found = safety(KEY, unit, Q, T, ROWS, num_boxes=8)
        with pytest.raises(AssertionError):
            check(unit, Q, T, ROWS, found)


def test_more_boxes_never_leave_a_wider_gap():
    found = [safety(KEY, unit, Q, T, ROWS, num_boxes=count) for count in (1, 2, 5, 12)]
    gaps = [f.upper - f.lower for f in found]
    assert gaps == sorted(gaps, reverse=True) and gaps[0] > gaps[-1]


def test_deterministic_leaves_and_balls():
    q = MeanField(
        {"w": jnp.array([0.3]), "v": jnp.array([1.0])}, {"w": jnp.array([0.5]), "v": None}
    )
    ball = LpBall(jnp.array([0.75]), jnp.float32(0.25), 2)  # in one dimension, the box
    truth = float(ndtr((1.0 - 0.3) / 0.5))
    for x_set in (T, ball):
        found = safety(KEY, unit, q, x_set, ROWS, num_boxes=10)
        assert found.lower <= truth + 1e-6 and truth - 1e-6 <= found.upper
        assert found.upper - found.lower < 1e-2
        assert found.safe.boxes["v"] is q.loc["v"]


def test_what_is_refused():
    q = gaussian(1.0, w=[0.0])
    rows = outputs_within(-1.0, 1.0)
    low_rank = LowRank(q.loc, q.scale, {"w": jnp.ones((1, 1))})
    with pytest.raises(TypeError, match="MeanField"):
        safety(KEY, line, low_rank, T, rows)
    stacked: Any = bc.Samples(q.sample(KEY, 2))
    for method in ("linear", "ibp"):
        with pytest.raises(TypeError, match="is a Samples"):
            safety(KEY, line, stacked, T, rows, method=method)
    with pytest.raises(ValueError, match="method is empty"):
        safety(KEY, line, q, T, rows, method=())
    with pytest.raises(ValueError, match="'linnear'"):
        safety(KEY, line, q, T, rows, method=("linear", "linnear"))
    with pytest.raises(ValueError, match="no leaf"):
        safety(KEY, line, MeanField(q.loc, {"w": None}), T, rows)
    with pytest.raises(ValueError, match="scale positive"):
        safety(KEY, line, MeanField(q.loc, {"w": jnp.zeros(1)}), T, rows)
    with pytest.raises(ValueError, match="num_boxes = 0"):
        safety(KEY, line, q, T, rows, num_boxes=0)
    with pytest.raises(ValueError, match=r"give shapes \(rows, 1\)"):
        safety(KEY, line, q, T, class_stays(0, 3))
    for ends in ((1.0, 1.0), (-math.inf, 1.0), (0.0, math.nan)):
        with pytest.raises(ValueError, match="lower < upper"):
            outputs_within(*ends)
    not_a_set: Any = jnp.ones(1)
    with pytest.raises(TypeError, match="x_set"):
        safety(KEY, line, q, not_a_set, rows)
    with pytest.raises(ValueError, match="label = 3"):
        class_stays(3, 3)


def test_several_methods_give_the_best_of_their_bounds():
    q, rows = gaussian(0.4, w=[0.3]), outputs_within(-1.0, 1.0)
    both = safety(KEY, line, q, T, rows, method=("linear", bc.IBP()), num_boxes=6)
    linear = safety(KEY, line, q, T, rows, method="linear")
    boxes_ = safety(KEY, line, q, T, rows, method="ibp", num_boxes=6)
    assert both.lower == max(linear.lower, boxes_.lower)
    assert both.upper == min(linear.upper, boxes_.upper)
    assert len(both.safe.masses) == len(boxes_.safe.masses) > 0
    assert both.lower <= truth_of_line(0.3, 0.4) <= both.upper


def test_by_default_no_box_is_looked_for():
    q, rows = gaussian(0.1, w=[0.3]), outputs_within(-1.0, 1.0)
    found = certify.safety(KEY, line, q, T, rows)
    assert len(found.safe.masses) == 0 and found.arithmetic == "float32"
    assert 0.99 < found.lower <= truth_of_line(0.3, 0.1)


def test_rows_are_bounded_by_any_method_of_margins():
    loc = {
        "a": jnp.array([[1.0, 0.5], [-0.5, 1.0], [0.7, -0.6]]),
        "b": jnp.array([[1.0, 1.0, -1.0]]),
    }
    q = MeanField(loc, jax.tree.map(lambda v: jnp.full_like(v, 0.05), loc))
    region, within = Box(jnp.zeros(2), jnp.full(2, 0.6)), outputs_within(-0.4, 1.6)

    def found(**options):
        apply = lambda p, x: p["b"] @ jax.nn.relu(p["a"] @ x)  # noqa: E731
        return certify.safety(KEY, apply, q, region, within, **options).lower

    crown, alpha, cheap = (found(rows=m) for m in ("crown", bc.AlphaCROWN(steps=20), "ibp"))
    assert found() == crown and cheap <= crown <= alpha
    with pytest.raises(ValueError, match="method = 'forward'"):
        found(rows="forward")
