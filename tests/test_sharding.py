"""What is sharded is what is not: `jax.shard_map` with its checks of what varies over a mesh.

The types are those of a mesh of any size, so that one device shows whether they fit.
"""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from bnncert.attack import apgd, pgd, square
from bnncert.bounds import CROWN, bound, mean_bound
from bnncert.certify import decision
from bnncert.certify.radii import radius
from bnncert.sets import Box, ball
from tests.bounds.networks import in_few_steps

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
W, V = (jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((4, 3, 2), (4, 3, 3)))
X = jnp.asarray(RNG.uniform(size=(4, 2)), jnp.float32)
KEYS = jax.random.split(jax.random.key(0), 4)

HALF = jnp.asarray([[1.0, -0.5, 0.5]])


def network(params, x):
    w, v = params
    hidden = jax.nn.relu(w @ x)
    return v @ jnp.where(hidden > 0.0, hidden, 0.1 * hidden)


def smooth(params, x):
    """Functions of jax.nn that are recognised, and numbers that are literals."""
    hidden = jax.nn.leaky_relu(params[0] @ x, 0.2) + 1.0
    return jax.nn.softmax(params[1] @ (2.0 * jax.nn.softplus(hidden) - jax.nn.elu(hidden)))


def first(samples):
    return jax.tree.map(lambda leaf: leaf[0], samples)


def over_weights(samples, x, key):
    w, v = first(samples)
    return bound(network, "ibp")((Box(w - 0.1, w + 0.1), v), ball(x, 0.1))


def of_closure(samples, x, key):
    params = first(samples)
    return bound(lambda x: smooth(params, x), "crown-ibp", rounding="outward")(ball(x, 0.1, p=2))


CASES = {
    **{
        f"{method}-{rounding}": lambda samples, x, key, m=method, r=rounding: bound(
            network, in_few_steps(m, 2), rounding=r, batch_size=2
        )(first(samples), ball(x, 0.1))
        for method in ("ibp", "forward", "crown-ibp", "crown", "alpha-crown")
        for rounding in ("nearest", "outward")
    },
    "unstable-only": lambda samples, x, key: bound(
        lambda x: HALF @ jax.nn.relu(network(first(samples), x)), CROWN(unstable_only=True)
    )(ball(x, 0.1)),
    "over-weights": over_weights,
    "of-closure": of_closure,
    "mean": lambda samples, x, key: mean_bound(network, "crown-ibp", rounding="outward")(
        samples, ball(x, 0.1)
    ),
    "decision": lambda samples, x, key: decision(network, samples, ball(x, 0.1), x=x),
    "radius": lambda samples, x, key: radius(network, samples, x, largest=1.0, method="ibp"),
    "pgd": lambda samples, x, key: pgd(key, network, samples, x, 0, 0.1, restarts=2),
    "apgd": lambda samples, x, key: apgd(key, network, samples, x, 0, 0.1, steps=3),
    "square": lambda samples, x, key: square(key, network, samples, x, 0, 0.1, queries=3),
}


def over_images(f):
    return lambda samples, x, keys: jax.vmap(lambda x, key: f(samples, x, key))(x, keys)


def sharded(f, mesh, samples, images, out):
    specs = {"in_specs": (samples, images, images), "out_specs": out}
    return jax.jit(jax.shard_map(over_images(f), mesh=mesh, **specs))


def stacked(f):
    """With an axis for the blocks of samples."""
    return lambda *args: jax.tree.map(lambda leaf: leaf[None], f(*args))


def mesh_of(images, samples):
    return jax.make_mesh((images, samples), ("images", "samples"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("name", CASES)
def test_types_fit_where_samples_and_images_are_sharded(name):
    """Over axes of their own: sets have to vary with the weights, and weights with the sets."""
    f = sharded(
        stacked(CASES[name]), mesh_of(1, 1), P("samples"), P("images"), P("images", "samples")
    )
    jax.eval_shape(f, (W, V), X, KEYS)


NUMERIC = ("crown-outward", "alpha-crown-nearest", "of-closure", "decision", "pgd")


def check_devices():
    """On two by two devices each block of samples and images is what it is alone."""
    mesh = mesh_of(2, 2)
    for name in NUMERIC:
        f = jax.jit(over_images(CASES[name]))
        each = [f((W[i : i + 2], V[i : i + 2]), X, KEYS) for i in (0, 2)]
        specs = P("samples"), P("images"), P("images", "samples")
        found = sharded(stacked(CASES[name]), mesh, *specs)((W, V), X, KEYS)
        for got, *want in zip(*map(jax.tree.leaves, (found, *each)), strict=True):
            np.testing.assert_allclose(got, np.stack(want, 1), rtol=1e-4, atol=1e-5, err_msg=name)


def test_four_devices_find_what_one_does():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    code = "from tests.test_sharding import check_devices; check_devices()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
