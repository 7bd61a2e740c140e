"""What a robust training step costs: Bayes by Backprop, robust over plain likelihood.

    python -m experiments.benchmarks.training_step

Both steps are whole: one draw of the weights, the likelihood of a minibatch and its gradient, the
KL, gradient clipping, Adam. Plain: the clean log-likelihood. Robust: the clean and the certified
worst case (IBP, margins merged into the last layer). The steps are timed in turn and the best of
the repeats is compared: other work on the machine slows both alike. Data are random: the cost
depends on shapes alone.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bnncert import prior as priors
from bnncert.infer import svi
from bnncert.likelihood import clean_categorical, robust_categorical
from bnncert.types import Algorithm, Batch, Threat

from ..pipeline.allocator import keep_freed_pages
from ..setup.data import Dataset, Split
from ..setup.models import Model, build
from ..setup.settings import PIXELS

NUM_DATA = 60_000


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.training_step",
        description="Times a robust training step against a plain one (MNIST shapes).",
    )
    parser.add_argument("--batch-size", type=int, default=256, help="images in a step")
    parser.add_argument("--repeats", type=int, default=40, help="timings of each step")
    parser.add_argument("--models", nargs="+", default=["mlp", "cnn"], choices=["mlp", "cnn"])
    options = parser.parse_args(arguments)
    keep_freed_pages()
    print(f"{jax.devices()[0].device_kind}, batch {options.batch_size}, jax {jax.__version__}")
    print(f"{'model':6}{'plain ms':>10}{'robust ms':>11}{'ratio':>7}{'epoch s':>9}")
    for model in options.models:
        steps = {name: _step(model, name, options.batch_size) for name in ("plain", "robust")}
        best = interleaved(steps, options.repeats)
        plain, robust = best["plain"], best["robust"]
        epoch = robust * -(-NUM_DATA // options.batch_size)
        print(
            f"{model:6}{1e3 * plain:10.2f}{1e3 * robust:11.2f}{robust / plain:7.2f}{epoch:9.2f}",
            flush=True,
        )


def interleaved(steps: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The best time of each step, in seconds; the steps take turns."""
    best = dict.fromkeys(steps, float("inf"))
    for step in steps.values():
        jax.block_until_ready(step())  # compiles
    for _ in range(repeats):
        for name, step in steps.items():
            started = time.perf_counter()
            jax.block_until_ready(step())
            best[name] = min(best[name], time.perf_counter() - started)
    return best


def mnist_model(name: str) -> Model:
    """A network for images of MNIST's shape."""
    images = np.zeros((1, 28, 28, 1), np.float32)
    split = Split(images, np.zeros(1, np.int32))
    classes = tuple(str(i) for i in range(10))
    return build(name, Dataset("mnist", split, split, classes, (0.1307,), (0.3081,)))


def stepper(algorithm: Algorithm, params: Any, batch_size: int) -> Callable[[], object]:
    """A function that takes one training step on random images and remembers its state."""
    key = jax.random.key(0)
    batch = Batch(
        jax.random.uniform(jax.random.fold_in(key, 1), (batch_size, 28, 28, 1)),
        jax.random.randint(jax.random.fold_in(key, 2), (batch_size,), 0, 10),
        jnp.ones(batch_size),
    )
    threat = Threat(jnp.float32(0.1), jnp.float32(0.25), jnp.float32(0.0))
    update = jax.jit(algorithm.update, donate_argnums=1)
    state = [jax.tree.map(jnp.copy, algorithm.init(key, params))]

    def step() -> object:
        state[0], info = update(key, state[0], batch, threat)
        return info, state[0]

    return step


def _step(model_name: str, likelihood: str, batch_size: int) -> Callable[[], object]:
    """A step of Bayes by Backprop on the plain or the robust likelihood."""
    model = mnist_model(model_name)
    params = model.init(jax.random.key(0))
    log_likelihood = {
        "plain": clean_categorical(model.apply),
        "robust": robust_categorical(model.apply, clip=PIXELS),
    }[likelihood]
    algorithm = svi.build(
        log_likelihood,
        priors.normal(params, 0.1),
        num_data=NUM_DATA,
        optimizer=optax.chain(optax.clip_by_global_norm(10.0 * NUM_DATA), optax.adam(1e-3)),
        kl_weight=0.1,
    )
    return stepper(algorithm, params, batch_size)


if __name__ == "__main__":
    main()
