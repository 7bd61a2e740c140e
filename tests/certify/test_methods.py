"""Every certificate takes a method by name or as an object with options."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnncert as bc
from bnncert.bounds import mean_bound
from bnncert.bounds.margins import all_margin_bounds, margin_bounds

KEY = jax.random.key(0)
X = jnp.array([0.8, -0.3])
REGION, WIDE = bc.ball(X, 0.05), bc.ball(X, 0.4)
SAMPLES = jnp.float32(np.random.default_rng(1).normal(size=(2, 8, 8)))
POSTERIOR = bc.MeanField(SAMPLES[0], jnp.full_like(SAMPLES[0], 1e-3))
THREAT = bc.Threat(jnp.float32([0.05]), jnp.float32(0.5), jnp.float32(0.0))


def apply(w, x):
    """Three layers, of one matrix: two inputs, three logits."""
    return 0.2 * w[:3] @ jax.nn.relu(w @ jax.nn.relu(w[:, :2] @ x))


TAKERS = {
    "decision": lambda m: bc.certify.decision(apply, SAMPLES, REGION, method=m),
    "predictive": lambda m: bc.certify.predictive(apply, SAMPLES, REGION, method=m),
    "uncertainty": lambda m: bc.certify.uncertainty(apply, SAMPLES, REGION, method=m),
    "mean_and_variance": lambda m: bc.certify.mean_and_variance(apply, SAMPLES, REGION, method=m),
    "statistical": lambda m: bc.certify.statistical(
        KEY, apply, POSTERIOR, REGION, num_samples=20, num_pilot=5, method=m
    ),
    "radius": lambda m: bc.certify.radius(apply, SAMPLES, X, largest=1.0, steps=2, method=m),
    "cascade": lambda m: bc.certify.cascade(
        apply, SAMPLES, jax.tree.map(lambda leaf: leaf[None], REGION), methods=(m,)
    ),
    "proves_class": lambda m: bc.certify.proves_class(apply, REGION, 0, method=m)(SAMPLES[0]),
    "likelihood": lambda m: bc.likelihood.robust_categorical(apply, method=m)(
        KEY, SAMPLES[0], X, jnp.asarray(0), THREAT
    ),
}


@pytest.mark.parametrize("name", TAKERS)
def test_a_name_is_short_for_an_object(name):
    by_name, by_object = (TAKERS[name](m) for m in ("ibp", bc.IBP()))
    for a, b in zip(*map(jax.tree.leaves, (by_name, by_object)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_options_of_an_object_are_used():
    """A slope makes a bound of its own; more steps of alpha-CROWN closer ones."""

    def margins(method):
        return np.asarray(bc.certify.decision(apply, SAMPLES, WIDE, method=method).margins)

    zero, one, chord = (margins(bc.CROWN(lower_slope=s)) for s in ("zero", "one", "chord"))
    assert (zero != one).any() and (one != chord).any()
    few, more = (margins(bc.AlphaCROWN(steps=n)) for n in (1, 12))
    assert (more >= few - 1e-6).all() and (more > few).any()


def test_a_cascade_names_each_once_however_it_is_written():
    sets = jax.tree.map(lambda leaf: leaf[None], REGION)
    with pytest.raises(ValueError, match="name each once"):
        bc.certify.cascade(apply, SAMPLES, sets, methods=("crown", bc.CROWN()))
    slopes = (bc.CROWN(lower_slope="zero"), bc.CROWN(lower_slope="one"))
    found = bc.certify.cascade(apply, SAMPLES, sets, methods=slopes)
    assert found.decision.robust.shape == (1,)


def test_joint_bounds_take_an_object_as_it_is():
    by_name, one = (
        np.asarray(bc.certify.joint_decision(apply, SAMPLES, WIDE, method=m).margins)
        for m in ("crown", bc.CROWN("one"))
    )
    assert (by_name != one).any()


def test_no_option_of_a_method_or_an_arithmetic_is_left_beside_it():
    """They were keywords of `bound`, and could not be reached from certificates."""
    certificates = [getattr(bc.certify, name) for name in bc.certify.__all__]
    functions = [f for f in certificates if inspect.isfunction(f)]
    functions += [bc.bound, bc.linear_bounds, mean_bound, margin_bounds, all_margin_bounds]
    loose = {"unit_roundoff", "lower_slope", "unstable_only"}
    taking = [f for f in functions if "method" in inspect.signature(f).parameters]
    assert len(taking) >= 12
    for f in functions:
        assert not loose & set(inspect.signature(f).parameters), f
    for f in taking:
        assert "Method" in str(inspect.signature(f).parameters["method"].annotation) or hasattr(
            inspect.signature(f).parameters["method"].annotation, "__args__"
        ), f
