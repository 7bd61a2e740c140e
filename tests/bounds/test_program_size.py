"""How large the programs are that bounds compile to: what a user waits for before the first answer.

The limits are a tenth above what there was when they were written. Most of the time to compile is
that of equations; a change that needs more of them says so here.
"""

import jax
import jax.numpy as jnp
import pytest

from bnncert.bounds import bound
from bnncert.sets import Box
from tests.bounds.architectures import Plan, build

VECTOR, IMAGE = (4,), (4, 3, 2)
LIMITS = {
    "relu": (VECTOR, ("dense", "relu", "dense", "relu"), 830, 1120),
    "attention": (VECTOR, ("dense", "attention", "arctan"), 2230, 3380),
    "norms": (VECTOR, ("dense", "attention", "gelu", "layer_norm", "layer_norm"), 4400, 7350),
    "gate": (IMAGE, ("conv", "silu", "squeeze_excite"), 1650, 2540),
}
"""By name: the shape of the input, layers, and the most equations by CROWN-IBP and by CROWN."""


def equations(jaxpr) -> int:
    """Those of a jaxpr and of all that it calls."""
    found = len(jaxpr.eqns)
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for body in value if isinstance(value, (tuple, list)) else (value,):
                body = getattr(body, "jaxpr", body)
                found += equations(body) if hasattr(body, "eqns") else 0
    return found


def size(name, method):
    shape, layers, *_ = LIMITS[name]
    network = build(Plan(shape, layers, "box", False, 0))
    arguments = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), (network.params, network.sets))

    def bounded(params, sets):
        return bound(lambda *points: network.apply(params, *points), method)(*sets)

    return equations(jax.make_jaxpr(bounded)(*arguments).jaxpr)


def test_calls_are_counted():
    once = equations(jax.make_jaxpr(jax.nn.relu)(1.0).jaxpr)
    twice = equations(jax.make_jaxpr(lambda x: jax.nn.relu(jax.nn.relu(x)))(1.0).jaxpr)
    assert twice == 2 * once > 2


@pytest.mark.parametrize("name", LIMITS)
def test_programs_stay_small(name):
    _, _, crown_ibp, crown = LIMITS[name]
    found = size(name, "crown-ibp"), size(name, "crown")
    assert found[0] <= crown_ibp and found[1] <= crown, found


def test_one_more_hidden_layer_adds_what_the_one_before_did_and_its_sweep():
    """CROWN sweeps to each hidden layer through all before it: by few equations a layer passed."""

    def total(depth):
        def deep(x):
            for _ in range(depth):
                x = jax.nn.relu(jnp.ones((3, 3)) @ x)
            return x

        box = Box(jnp.zeros(3), jnp.ones(3))
        return equations(jax.make_jaxpr(bound(deep, "crown"))(box).jaxpr)

    two, three, four = (total(depth) for depth in (2, 3, 4))
    assert (four - three) - (three - two) < 60, (two, three, four)
