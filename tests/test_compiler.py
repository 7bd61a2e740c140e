"""The compiler adds up the right numbers, and the version that does not is known."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert._compiler import avoid_wrong_sums

pytestmark = pytest.mark.smoke


def test_compiled_sums_of_products_are_the_sums():
    """Of the form that jaxlib 0.10.2 gets wrong in seven places of ten."""
    rng = np.random.default_rng(0)
    shapes = ((2500, 2), (43, 2500, 2), (2500,), (2500,))
    weights, values, scale, shift = (np.float32(rng.normal(size=s)) for s in shapes)

    def f(weights, values, scale, shift):
        return jax.vmap(lambda v: scale * jnp.sum(weights * v, -1) + shift)(values)

    exact = scale * (weights * values).sum(-1) + shift
    np.testing.assert_allclose(jax.jit(f)(weights, values, scale, shift), exact, atol=1e-5)


def test_the_version_at_fault_is_disarmed(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=nowhere")
    with pytest.warns(UserWarning, match="install another version of jax"):
        assert avoid_wrong_sums("0.10.2")
    expected = "--xla_dump_to=nowhere --xla_cpu_experimental_ynn_fusion_type="
    assert os.environ["XLA_FLAGS"] == expected
    with pytest.warns(UserWarning):
        avoid_wrong_sums("0.10.2")
    assert os.environ["XLA_FLAGS"] == expected
    assert not avoid_wrong_sums("0.11.0")


def test_importing_computes_nothing():
    """So that flags set then still count."""
    code = (
        "import logging, sys; logging.basicConfig(level=logging.DEBUG, stream=sys.stdout);"
        "import bnncert, bnncert.bounds, bnncert.certify"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Initializing backend" not in done.stdout + done.stderr
