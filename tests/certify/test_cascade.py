"""Many points by several methods: what the best of them proves, at the cost of the cheapest."""

import jax
import numpy as np
import pytest

from bnncert.certify import cascade, decision, joint_decision
from bnncert.certify.exact.cascade import stage_of
from bnncert.sets import ball
from tests.certify.test_joint import NETWORKS, mlp

XS = jax.random.normal(jax.random.key(3), (20, 4))
SETS = jax.vmap(lambda x: ball(x, 0.2))(XS)
METHODS = ("ibp", "crown-ibp", "crown", "joint")


def alone(method):
    def one(x):
        if method == "joint":
            return joint_decision(mlp, NETWORKS, ball(x, 0.2))
        return decision(mlp, NETWORKS, ball(x, 0.2), method=method)

    return jax.jit(jax.vmap(one))(XS)


def test_it_equals_its_best_stage():
    found = cascade(mlp, NETWORKS, SETS, methods=METHODS, batch_size=4)
    stages = [alone(method) for method in METHODS]
    robust = np.array([stage.robust for stage in stages])
    assert 0 < robust[0].sum() < robust[-1].sum() < len(XS)  # there is something for each to do
    np.testing.assert_array_equal(found.decision.robust, robust.any(0))
    first = np.where(robust.any(0), robust.argmax(0), len(METHODS) - 1)
    np.testing.assert_array_equal(found.stage, first)
    margins = np.array([stage.margins for stage in stages])
    for i, last in enumerate(found.stage):
        best = margins[: last + 1, i].max(0)
        np.testing.assert_allclose(found.decision.margins[i], best, atol=1e-6)
        lower = max(float(stage.probability.lower[i]) for stage in stages[: last + 1])
        np.testing.assert_allclose(found.decision.probability.lower[i], lower, atol=1e-6)
    assert found.decision.arithmetic == "float32"
    two = cascade(mlp, NETWORKS, SETS, methods=METHODS[:2], batch_size=64)
    assert two.decision.arithmetic == "float32"
    stage = stage_of(mlp, "joint", "nearest")
    shapes = jax.eval_shape(stage, NETWORKS, ball(XS[0], 0.2), XS[0])
    assert shapes.arithmetic == "real"


def test_points_that_are_not_wanted_are_seen_once(capsys):
    wanted = np.arange(len(XS)) % 2 == 0
    found = cascade(
        mlp, NETWORKS, SETS, methods=("ibp", "crown"), wanted=wanted, batch_size=4, progress=True
    )
    assert (found.stage[~wanted] == 0).all() and (found.stage[wanted] == 1).any()
    shown = capsys.readouterr().err
    assert "ibp" in shown and "20/20" in shown


def test_all_points_proved_by_the_first():
    sets = jax.vmap(lambda x: ball(x, 0.0))(XS)
    found = cascade(mlp, NETWORKS, sets, methods=("ibp", "crown"), x=XS)
    assert found.decision.robust.all() and (found.stage == 0).all()


def test_errors_name_the_value():
    with pytest.raises(ValueError, match=r"\('ibp', 'zonotope'\): name each once, of ibp"):
        cascade(mlp, NETWORKS, SETS, methods=("ibp", "zonotope"))
    with pytest.raises(ValueError, match="name each once"):
        cascade(mlp, NETWORKS, SETS, methods=("ibp", "ibp"))
    with pytest.raises(ValueError, match="batch_size = 0"):
        cascade(mlp, NETWORKS, SETS, batch_size=0)
    with pytest.raises(TypeError, match="x_sets"):
        cascade(mlp, NETWORKS, XS)  # pyright: ignore[reportArgumentType]
