"""Rows that pass affine runs, and planes of several values, by one matrix each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert.bounds import bound, runs
from bnncert.bounds.tracing import trace
from bnncert.sets import Box
from tests.bounds.architectures import Plan, build

NETWORKS = {
    "attention": ((4,), ("dense", "attention", "arctan")),
    "norm": ((4,), ("dense", "layer_norm", "dense", "relu")),
    "gate": ((4, 3, 2), ("conv", "silu", "squeeze_excite")),
    "unbounded": ((4,), ("dense", "residual", "product", "log1p")),
}


@pytest.mark.parametrize("region", ["box", "l2"])
@pytest.mark.parametrize("name", NETWORKS)
def test_bounds_are_those_of_operation_by_operation(name, region, monkeypatch, float64):
    sizes, parts = NETWORKS[name]
    network = build(Plan(sizes, parts, region, False, 1))

    def crown():
        whole = bound(lambda *sets: network.apply(network.params, *sets), "crown")
        return jax.jit(whole)(*network.sets)

    composed = crown()
    monkeypatch.setattr(runs, "_FEW", 0)
    monkeypatch.setattr(runs, "_FEW_OF_PLANES", 0)
    one_by_one = crown()
    np.testing.assert_allclose(composed.lower, one_by_one.lower, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(composed.upper, one_by_one.upper, rtol=1e-9, atol=1e-9)


def test_a_run_ends_on_what_is_not_affine():
    box = Box(jnp.zeros(2), jnp.ones(2))
    graph = trace(lambda x: 3 * (jnp.tanh(2 * x) + x), (box,), {})
    run, sources = runs.run_of(graph, len(graph.nodes) - 1)
    assert [graph.nodes[i].op for i in sources] == ["input", "tanh"]
    assert [graph.nodes[i].op for i in run] == ["add", "mul"]
