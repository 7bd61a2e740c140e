import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.pipeline import checkpoint

REPOSITORY = str(Path(__file__).resolve().parents[2])


class State(NamedTuple):
    step: jax.Array
    key: jax.Array
    params: dict[str, Any]
    optimiser: Any


def state(step: int) -> State:
    params = {"kernel": jnp.full((3, 2), float(step)), "nothing": None}
    optimiser = optax.adam(1e-3).init(params)
    return State(jnp.int32(step), jax.random.key(step), params, optimiser)


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    saved = state(5)
    checkpoint.save(tmp_path / "new" / "folder", 5, saved)
    restored = checkpoint.restore(tmp_path / "new" / "folder", state(0))
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    assert type(restored) is State
    assert type(restored.optimiser[0]) is type(saved.optimiser[0])
    np.testing.assert_array_equal(restored.params["kernel"], saved.params["kernel"])
    assert restored.step.dtype == jnp.int32
    # The key is a typed key still, and draws the same numbers.
    assert jnp.issubdtype(restored.key.dtype, jax.dtypes.prng_key)
    draws = jax.random.normal(restored.key, (4,))
    np.testing.assert_array_equal(draws, jax.random.normal(jax.random.key(5), (4,)))


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        checkpoint.save(tmp_path, step, state(step))
    assert {path.name for path in tmp_path.iterdir()} == {"2", "10"}
    assert checkpoint.latest(tmp_path) == 10  # by number, not by name
    assert checkpoint.restore(tmp_path, state(0), step=2).step == 2


def test_half_written_and_half_removed_folders_do_not_count(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, state(1))
    (tmp_path / "2.orbax-checkpoint-tmp" / "default").mkdir(parents=True)
    (tmp_path / "3" / "default").mkdir(parents=True)
    assert checkpoint.latest(tmp_path) == 1
    assert checkpoint.restore(tmp_path, state(0)).step == 1
    checkpoint.save(tmp_path, 2, state(2))  # the name that was half taken
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}
    assert checkpoint.restore(tmp_path, state(0)).step == 2


def test_a_killed_process_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """kill -9 at an arbitrary moment of a loop that does nothing but save."""
    program = f"""
import jax.numpy as jnp
from experiments.pipeline import checkpoint
step = 0
while True:
    step += 1
    checkpoint.save({str(tmp_path)!r}, step, {{"w": jnp.full((200, 784), float(step))}})
"""
    path = os.pathsep.join(filter(None, [REPOSITORY, os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path}
    )
    try:
        deadline = time.monotonic() + 120
        while (checkpoint.latest(tmp_path) or 0) < 3 and time.monotonic() < deadline:
            assert process.poll() is None, "the saving process died by itself"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    step = checkpoint.latest(tmp_path)
    assert step is not None
    assert step >= 3
    restored = checkpoint.restore(tmp_path, {"w": jnp.zeros((200, 784))})
    assert (restored["w"] == step).all()


def test_nothing_to_restore_is_a_clear_error(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "absent") is None
    with pytest.raises(FileNotFoundError, match="no whole checkpoint in"):
        checkpoint.restore(tmp_path, state(0))
    checkpoint.save(tmp_path, 1, state(1))
    with pytest.raises(FileNotFoundError, match="no whole checkpoint of step 7"):
        checkpoint.restore(tmp_path, state(0), step=7)


def test_an_older_step_is_refused_and_not_silently_dropped(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 5, state(5))
    for step in (4, 5):
        with pytest.raises(ValueError, match=f"checkpoint of step 5; cannot save step {step}"):
            checkpoint.save(tmp_path, step, state(step))


def test_another_structure_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, {"a": jnp.ones(3)})
    with pytest.raises(ValueError):
        checkpoint.restore(tmp_path, {"b": jnp.ones(3)})
