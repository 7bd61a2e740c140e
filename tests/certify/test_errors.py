"""What certificates refuse, and that they say why and what to do instead."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnncert as bc
from bnncert import attack, certify
from bnncert.sets import Box, LpBall, ball

W = jax.random.normal(jax.random.key(0), (3, 4, 2))
X = jnp.array([0.3, -0.7])
XS = jnp.stack([X, -X])
SETS = jax.vmap(lambda x: ball(x, 0.1))(XS)
FEW = W.astype(jnp.bfloat16)


def apply(w, x):
    return w @ x


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (Box(jnp.zeros((0, 2)), jnp.zeros((0, 2))), r"\(0, 2\).*no point"),
        (Box(jnp.float32(0.0), jnp.float32(1.0)), r"shape \(\).*jax.vmap"),
        (ball(X, 0.1), r"one point.*shape \(\).*apply.*jax.vmap"),
        (LpBall(XS, jnp.float32(0.1), 2), r"LpBall.eps.*\(\).*jax.vmap"),
        (Box(XS, XS.astype(jnp.float16)), "float32.*float16.*one dtype"),
    ],
    ids=["empty", "scalar", "one point", "one radius for all", "two dtypes"],
)
def test_a_cascade_is_given_a_batch_of_sets(sets, said):
    with pytest.raises(ValueError, match=said):
        certify.cascade(apply, W, sets)


def test_a_cascade_has_one_nominal_input_a_set():
    with pytest.raises(ValueError, match=r"x has shape \(1, 2\).*2 sets"):
        certify.cascade(apply, W, SETS, x=XS[:1])
    with pytest.raises(ValueError, match=r"wanted has shape \(3,\).*2 sets"):
        certify.cascade(apply, W, SETS, wanted=np.ones(3, bool))


def test_a_cascade_under_jit_says_what_to_jit_instead():
    with pytest.raises(TypeError, match=r"x_sets.*traced.*certify\.decision"):
        jax.jit(lambda s: certify.cascade(apply, W, s))(SETS)
    with pytest.raises(TypeError, match=r"samples.*traced.*certify\.decision"):
        jax.jit(lambda w: certify.cascade(apply, w, SETS))(W)


@pytest.mark.parametrize("method", ["ibp", "crown"])
def test_a_box_of_two_dtypes_is_an_error_everywhere(method):
    two = Box(X, X.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match=r"float32.*bfloat16.*one dtype"):
        bc.bound(apply, method)(W[0], two)
    with pytest.raises(ValueError, match=r"float32.*bfloat16.*one dtype"):
        jax.jit(lambda s: certify.decision(apply, W, s, method=method))(two)


KEY = jax.random.key(1)
Q = bc.MeanField({"w": W[0]}, {"w": jnp.full_like(W[0], 0.1)})
AROUND = ball(X.astype(jnp.bfloat16), 0.1)
COARSE = {
    "decision": lambda **o: certify.decision(apply, FEW, AROUND, **o),
    "predictive": lambda **o: certify.predictive(apply, FEW, AROUND, **o),
    "uncertainty": lambda **o: certify.uncertainty(apply, FEW, AROUND, **o),
    "radius": lambda **o: certify.radius(
        apply, FEW, X.astype(jnp.bfloat16), largest=1.0, steps=1, **o
    ),
    "cascade": lambda **o: certify.cascade(
        apply, FEW, jax.tree.map(lambda leaf: leaf[None], AROUND), methods=("ibp",), **o
    ),
    "statistical": lambda **o: certify.statistical(
        KEY,
        lambda p, x: p["w"] @ x,
        bc.MeanField({"w": FEW[0]}, {"w": jnp.full_like(FEW[0], 0.1)}),
        AROUND,
        num_samples=2,
        **o,
    ),
}


@pytest.mark.parametrize("name", COARSE)
def test_an_arithmetic_in_which_nothing_can_be_certified_is_an_error(name):
    with pytest.raises(ValueError, match=r'bfloat16.*can certify.*float32.*rounding="nearest"'):
        COARSE[name]()


def test_the_way_out_of_a_coarse_arithmetic_is_one():
    COARSE["decision"](rounding="nearest")
    found = certify.decision(lambda w, x: apply(w, x).astype(jnp.float32), FEW, AROUND)
    assert found.arithmetic == "float32"


def test_half_precision_is_refused_from_as_many_samples_as_make_it_vacuous():
    enough = jnp.zeros((2048, 4, 1), jnp.float16)
    one = ball(jnp.zeros(1, jnp.float16), 0.1)
    with pytest.raises(ValueError, match=r"float16.*4 classes.*2048"):
        certify.decision(apply, enough, one, method="ibp")
    certify.decision(apply, enough[:2], one, method="ibp")


TAKES_SAMPLES = {
    "decision": lambda s: certify.decision(apply, s, ball(X, 0.1)),
    "predictive": lambda s: certify.predictive(apply, s, ball(X, 0.1)),
    "joint_decision": lambda s: certify.joint_decision(apply, s, ball(X, 0.1)),
    "cascade": lambda s: certify.cascade(apply, s, SETS),
    "uncertainty": lambda s: certify.uncertainty(apply, s, ball(X, 0.1)),
    "mean_and_variance": lambda s: certify.mean_and_variance(apply, s, ball(X, 0.1)),
    "radius": lambda s: certify.radius(apply, s, X, largest=1.0),
    "attacked_radius": lambda s: certify.attacked_radius(KEY, apply, s, X, 0, largest=1.0),
    "pgd": lambda s: attack.pgd(KEY, apply, s, X, 0, 0.1),
    "fgsm": lambda s: attack.fgsm(apply, s, X, 0, 0.1),
    "square": lambda s: attack.square(KEY, apply, s, X, 0, 0.1),
    "strongest": lambda s: attack.strongest(KEY, apply, s, X, 0, 0.1),
    "transfer": lambda s: attack.transfer(apply, s, XS, 0),
}


@pytest.mark.parametrize("name", TAKES_SAMPLES)
def test_a_posterior_in_the_place_of_stacked_weights_is_an_error(name):
    with pytest.raises(TypeError, match=r"samples is a Samples.*\.params"):
        TAKES_SAMPLES[name](bc.Samples(W))
    with pytest.raises(TypeError, match=r"samples is a MeanField.*\.sample\(key, n\)"):
        TAKES_SAMPLES[name](Q)
    with pytest.raises(TypeError, match="samples is a MeanField"):
        jax.jit(TAKES_SAMPLES[name])(Q)
