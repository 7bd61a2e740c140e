import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.setup import models
from experiments.setup.data import Dataset, Split

PRIMITIVES = {
    "add",
    "broadcast_in_dim",
    "conv_general_dilated",
    "div",
    "dot_general",
    "max",
    "mul",
    "reshape",
    "squeeze",
    "sub",
    "transpose",
}


def fake(shape: tuple[int, int, int] = (28, 28, 1), classes: int = 10) -> Dataset:
    split = Split(np.zeros((1, *shape), np.float32), np.zeros(1, np.int32))
    names = tuple(str(c) for c in range(classes))
    channels = shape[2]
    mean = tuple(0.1 + 0.1 * c for c in range(channels))
    std = tuple(0.3 + 0.1 * c for c in range(channels))
    return Dataset("fake", split, split, names, mean, std)


def primitives(jaxpr) -> set[str]:
    """Names of all primitives, calls opened."""
    found = set()
    for eqn in jaxpr.eqns:
        inner = [p for p in eqn.params.values() if hasattr(p, "eqns") or hasattr(p, "jaxpr")]
        for sub in inner:
            found |= primitives(getattr(sub, "jaxpr", sub))
        if not inner:
            found.add(eqn.primitive.name)
    return found


@pytest.mark.smoke
@pytest.mark.parametrize("name", models.MODELS)
def test_a_model_maps_one_image_to_logits_by_simple_primitives(name: str) -> None:
    model = models.build(name, fake((32, 32, 3)))
    params = model.init(jax.random.key(0))
    x = jax.random.uniform(jax.random.key(1), (32, 32, 3))
    assert model.apply(params, x).shape == (10,)
    assert primitives(jax.make_jaxpr(model.apply)(params, x).jaxpr) <= PRIMITIVES
    assert type(params) is dict
    assert all(type(layer) is dict for layer in params.values())


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("mlp", {(784, 512), (512, 10)}),
        ("cnn", {(4, 4, 1, 16), (4, 4, 16, 32), (7 * 7 * 32, 100), (100, 10)}),
    ],
)
def test_layers(name: str, shapes: set[tuple[int, ...]]) -> None:
    params = models.build(name, fake()).init(jax.random.key(0))
    assert {layer["kernel"].shape for layer in params.values()} == shapes


@pytest.mark.parametrize("name", models.MODELS)
def test_weights_start_at_the_ibp_scale(name: str) -> None:
    params = models.build(name, fake()).init(jax.random.key(0))
    for layer in (layer for name, layer in params.items() if not name.startswith("BatchNorm")):
        kernel, bias = layer["kernel"], layer["bias"]
        scale = math.sqrt(2 * math.pi) / math.prod(kernel.shape[:-1])
        # Five standard errors of a standard deviation, and of a mean, from that many draws.
        tolerance = 5 / math.sqrt(kernel.size)
        assert abs(float(kernel.std()) / scale - 1) < tolerance
        assert abs(float(kernel.mean())) / scale < tolerance
        assert not bias.any()


def test_the_initialisation_keeps_the_width_of_intervals() -> None:
    """E sum_i |w_i| = fan_in sqrt(2 / pi) std = 2; the ReLU lets about half of it through."""
    kernel = models.ibp_normal(jax.random.key(0), (2000, 400))
    assert float(jnp.abs(kernel).sum(0).mean()) == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize("name", models.MODELS)
def test_the_normalisation_is_inside(name: str) -> None:
    """The network of (mean 0, std 1) on normalised pixels is the network on pixels."""
    dataset = fake((8, 8, 3))
    model = models.build(name, dataset)
    plain = models.build(name, dataset._replace(mean=(0.0,) * 3, std=(1.0,) * 3))
    params = model.init(jax.random.key(0))
    x = jax.random.uniform(jax.random.key(1), (8, 8, 3))
    normalised = (x - jnp.array(dataset.mean)) / jnp.array(dataset.std)
    np.testing.assert_allclose(
        model.apply(params, x), plain.apply(params, normalised), rtol=1e-4, atol=1e-6
    )


@pytest.mark.smoke
def test_double_precision_stays_double(float64: None) -> None:
    model = models.build("cnn", fake((8, 8, 1)))
    params = jax.tree.map(lambda p: p.astype(jnp.float64), model.init(jax.random.key(0)))
    assert model.apply(params, jnp.ones((8, 8, 1))).dtype == jnp.float64


def test_unknown_model_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'mlpp': did you mean 'mlp'\?"):
        models.build("mlpp", fake())
