import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert.posterior import Gaussian, LowRank, MeanField, Mixture, Samples
from experiments.pipeline.posteriors import load, save

LOC = {"a": [jnp.arange(3.0), (jnp.ones(()), None)], "b": jnp.full((2, 2), -1.0)}
SCALE = {"a": [jnp.full(3, 0.1), (None, None)], "b": jnp.full((2, 2), 0.2)}
FACTORS = {"a": [jnp.ones((4, 3)), (None, None)], "b": jnp.ones((4, 2, 2))}
FIELD = MeanField(LOC, SCALE)
POSTERIORS: dict[str, Any] = {
    "mean-field": FIELD,
    "low rank": LowRank(LOC, SCALE, FACTORS),
    "gaussian": Gaussian(LOC, jnp.eye(4), ("b",)),
    "samples": Samples(FIELD.sample(jax.random.key(0), 3)),
    "mixture": Mixture(jax.tree.map(lambda v: jnp.stack([v, v + 1]), FIELD)),
}


@pytest.mark.parametrize("name", POSTERIORS)
def test_a_posterior_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    q = POSTERIORS[name]
    save(tmp_path / "posterior.npz", q)
    found = load(tmp_path / "posterior.npz")
    assert type(found) is type(q)
    chex.assert_trees_all_equal(found, q)
    assert jax.tree.structure(found) == jax.tree.structure(q)
    draws = (p.sample(jax.random.key(1), 2) for p in (found, q))
    chex.assert_trees_all_equal(*draws)
    assert [file.name for file in tmp_path.iterdir()] == ["posterior.npz"]


def test_dtypes_are_kept(tmp_path: Path) -> None:
    q = Samples({"w": jnp.ones((2, 3), jnp.float16)})
    save(tmp_path / "posterior.npz", q)
    assert load(tmp_path / "posterior.npz").params["w"].dtype == jnp.float16


def test_reading_needs_no_code_that_trained_it(tmp_path: Path) -> None:
    save(tmp_path / "posterior.npz", FIELD)
    script = (
        "import sys; from pathlib import Path; from experiments.pipeline.posteriors import load\n"
        f"q = load(Path({str(tmp_path / 'posterior.npz')!r}))\n"
        "assert not {'experiments.pipeline.training', 'experiments.setup'} & set(sys.modules)\n"
        "print(type(q).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "MeanField", done.stderr


def test_what_cannot_be_stored_is_named_and_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "posterior.npz"
    save(path, FIELD)
    for params, name in (({1: jnp.ones(2)}, "dict"), (OrderedDict(w=jnp.ones(2)), "OrderedDict")):
        with pytest.raises(TypeError, match=f"cannot store a {name}"):
            save(path, Samples(params))
    chex.assert_trees_all_equal(load(path), FIELD)
    np.savez(tmp_path / "other.npz", a=np.ones(2))
    with pytest.raises(ValueError, match=r"other.npz holds no posterior"):
        load(tmp_path / "other.npz")
