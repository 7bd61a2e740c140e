"""What a training step of each inference method costs, in steps of Bayes by Backprop.

    python -m experiments.benchmarks.inference_step

Every step is a whole robust one (IBP, margins merged into the last layer) with the method's own
settings. The steps are timed in turn and the best of the repeats is compared: other work on the
machine slows all alike. Data are random: the cost depends on shapes alone.
"""

import argparse
from collections.abc import Callable, Sequence

import jax
import numpy as np

from ..pipeline.allocator import keep_freed_pages
from ..pipeline.inference import Problem, build_algorithm
from ..setup.data import Split
from ..setup.presets import preset
from ..tasks.images import error_model
from .training_step import NUM_DATA, interleaved, mnist_model, stepper

METHODS = ("bbb", "map", "vogn", "noisy-adam", "ivon", "swag", "sgld", "sghmc")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.inference_step",
        description="Times a robust training step of each inference method (MNIST shapes).",
    )
    parser.add_argument("--batch-size", type=int, default=256, help="images in a step")
    parser.add_argument("--repeats", type=int, default=30, help="timings of each step")
    parser.add_argument("--models", nargs="+", default=["mlp", "cnn"], choices=["mlp", "cnn"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS[1:]), choices=METHODS[1:])
    options = parser.parse_args(arguments)
    keep_freed_pages()
    print(f"{jax.devices()[0].device_kind}, batch {options.batch_size}, jax {jax.__version__}")
    print(f"{'model':6}{'method':12}{'ms':>8}{'steps of bbb':>14}")
    for model in options.models:
        names = ["bbb", *options.methods]
        steps = {name: _step(model, name, options.batch_size) for name in names}
        best = interleaved(steps, options.repeats)
        for name in names:
            print(f"{model:6}{name:12}{1e3 * best[name]:8.2f}{best[name] / best['bbb']:14.2f}")


def _step(model_name: str, inference: str, batch_size: int) -> Callable[[], object]:
    model = mnist_model(model_name)
    params = model.init(jax.random.key(0))
    config = preset(f"mnist-{model_name}", inference)
    steps = NUM_DATA // batch_size
    data = Split(np.zeros((NUM_DATA, 0), np.float32), np.zeros(NUM_DATA, np.int32))
    problem = Problem(model, data, error_model(config.train, model.apply))
    algorithm = build_algorithm(config.inference, config.train, problem, params, steps)
    return stepper(algorithm, params, batch_size)


if __name__ == "__main__":
    main()
