"""The arithmetic that certificates hold in: what the network asks for, and what is given."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import bnncert as bc
from bnncert.bounds import UnsupportedPrimitiveError

X = jnp.float32([0.3, 0.9, 0.5])
SAMPLES = jnp.float32(np.random.default_rng(0).normal(size=(2, 3, 3)))
REGION = bc.ball(X, 1e-4)


def network(w, x, asked=None):
    return 4 * jnp.dot(w, x, precision=asked)


def test_a_decision_names_the_format_that_products_are_computed_in():
    def name(asked=None, **options):
        return bc.certify.decision(
            partial(network, asked=asked), SAMPLES, REGION, **options
        ).arithmetic

    assert name() == name("highest") == "float32"
    assert name("tensorfloat32") == name(lax.Precision.HIGH) == "tensorfloat32"
    assert name("bfloat16") == "bfloat16"
    assert name("bfloat16", rounding="nearest") == "real"
    assert name("bfloat16", rounding=bc.Float(2.0**-11)) == "unit roundoff 0.000488281"
    with jax.default_matmul_precision("bfloat16"):
        assert name() == "bfloat16"


def test_a_network_in_less_than_float32_has_smaller_margins():
    margins = [
        bc.certify.decision(partial(network, asked=asked), SAMPLES, REGION).margins.max()
        for asked in ("highest", "tensorfloat32", "bfloat16")
    ]
    assert margins[0] > margins[1] > margins[2]


def test_a_format_that_nothing_is_known_of_is_refused():
    """Not every backend has it: bounds themselves are computed in float32."""
    apply = partial(network, asked=lax.DotAlgorithmPreset.F16_F16_F32)
    proves = bc.certify.proves_class(apply, REGION, 0)
    with pytest.raises(UnsupportedPrimitiveError, match="unit_roundoff"):
        proves(SAMPLES[0])
    bc.certify.proves_class(apply, REGION, 0, rounding=bc.Float(2.0**-11))(SAMPLES[0])


KEY = jax.random.key(0)
POSTERIOR = bc.MeanField(SAMPLES[0], jnp.full_like(SAMPLES[0], 1e-3))


def posterior_apply(w, x):
    return network(w, x)


CERTIFICATES = {
    "decision": lambda u: (
        bc.certify.decision(network, SAMPLES, REGION, rounding=bc.Float(u)).margins
    ),
    "predictive": lambda u: (
        bc.certify.predictive(network, SAMPLES, REGION, rounding=bc.Float(u)).lower
    ),
    "uncertainty": lambda u: (
        bc.certify.uncertainty(network, SAMPLES, REGION, rounding=bc.Float(u)).confidence.lower
    ),
    "mean_and_variance": lambda u: (
        bc.certify.mean_and_variance(network, SAMPLES, REGION, rounding=bc.Float(u)).mean.lower
    ),
    "statistical": lambda u: (
        bc.certify.statistical(
            KEY, posterior_apply, POSTERIOR, REGION, num_samples=20, rounding=bc.Float(u)
        ).probability.lower
    ),
    "cascade": lambda u: (
        bc.certify.cascade(
            network, SAMPLES, jax.tree.map(lambda v: v[None], REGION), rounding=bc.Float(u)
        ).decision.margins
    ),
    "radius": lambda u: (
        bc.certify.radius(network, SAMPLES, X, largest=1.0, steps=14, rounding=bc.Float(u)).radius
    ),
}


@pytest.mark.parametrize("name", CERTIFICATES)
def test_every_certificate_takes_the_unit_roundoff(name):
    fine, coarse = (np.asarray(CERTIFICATES[name](u)) for u in (None, 2.0**-13))
    assert (coarse <= fine).all() and (coarse < fine).any()


def test_proofs_of_one_network_take_it_too():
    label = int(network(SAMPLES[0], X).argmax())
    outputs = network(SAMPLES[0], X)
    within = bc.Box(outputs - 0.01, outputs + 0.01)
    for proves in (
        lambda u: bc.certify.proves_class(network, REGION, label, rounding=bc.Float(u)),
        lambda u: bc.certify.proves_outputs(network, REGION, within, rounding=bc.Float(u)),
    ):
        assert bool(proves(None)(SAMPLES[0])) and not bool(proves(2.0**-4)(SAMPLES[0]))
    rows = bc.certify.class_stays(label, 3)
    for method in ("linear", "crown-ibp"):
        found = bc.certify.safety(
            KEY, network, POSTERIOR, REGION, rows, method=method, num_boxes=1,
            rounding=bc.Float(2.0**-13),
        )  # fmt: skip
        assert found.arithmetic == "unit roundoff 0.00012207"


@pytest.mark.parametrize("bad", (0.0, 0.5, -1.0))
def test_a_bad_unit_roundoff_is_refused(bad):
    with pytest.raises(ValueError, match="unit_roundoff"):
        bc.certify.decision(network, SAMPLES, REGION, rounding=bc.Float(bad))
    with pytest.raises(ValueError, match="nearest"):
        bc.certify.decision(network, SAMPLES, REGION, rounding="to nearest")
