"""Attack a finished run with the whole battery: how much of its accuracy is left.

    python -m experiments.attack RUN --steps 50 --restarts 2
    python -m experiments.attack RUN --eps 0.05 0.1 --attacks pgd apgd-dlr targeted

One attack after the other (`bnncert.attack.battery`), each on the images that withstood the ones
before it: an image counts as broken if any attack breaks it. Writes attack-EPS-STEPSxRESTARTS.npz
and .json into the run's folder, a pair for each radius, and shows them in its report.html. Breaking
an image that is certified in the same folder is an error, and nothing is written. Stopped, the same
command goes on where it was.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnncert import attack
from experiments.commands import (
    NORMS,
    Record,
    add_common,
    check_common,
    for_each_radius,
    kept_or_computed,
    of_norm,
)
from experiments.finished import Finished, Rows, Stage, in_stages
from experiments.setup.settings import PIXELS

ATTACKS: dict[str, str] = {
    "pgd": "projected gradients with fixed steps, on the cross-entropy",
    "apgd-ce": "APGD, which chooses its own steps, on the cross-entropy",
    "apgd-dlr": "APGD on the difference-of-logits ratio",
    "targeted": "APGD on the targeted ratio, for the most likely other classes",
    "square": "random search without gradients (norm inf alone)",
    "transfer": "APGD on the network of the mean weights, judged by the predictive",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = _parse(arguments)
    return for_each_radius(options, options.eps, attacked, summary)


def attacked(run: Finished, options: argparse.Namespace, eps: float) -> Record:
    """Attacks every image at one radius, and writes the result; one that is there is kept.

    Raises:
        SoundnessError: an image that is certified was broken.
        ValueError: there is a result, or a part of one, of other settings.
    """
    name = f"attack-{of_norm(options.norm)}{eps:g}-{options.steps}x{options.restarts}"
    settings = {
        "attacks": options.attacks,
        "eps": eps,
        "norm": options.norm,
        "steps": options.steps,
        "restarts": options.restarts,
        "targets": options.targets,
        "queries": options.queries,
        "seed": options.seed,
        "num_images": len(run.test.y),
    }

    def compute() -> tuple[Record, Rows]:
        stages = _stages(run, options, eps)
        left = lambda rows: ~rows["broken"]  # noqa: E731
        merge = {"margin": np.minimum}  # the worst over attacks
        rows = in_stages(run, name, settings, stages, left, merge, options.batch_size)
        rows["label"] = run.test.y
        broken = {
            stage: int(np.sum(rows["broken"] & (rows["stage"] == i)))
            for i, stage in enumerate(stages)
        }
        return {
            "clean_accuracy": 1 - broken.pop("clean") / len(run.test.y),
            "attacked_accuracy": float(np.mean(~rows["broken"])),
            "broken_by": broken,
        }, rows

    return kept_or_computed(run, "attack", name, settings, compute)


def summary(record: Record) -> str:
    """A result in one line."""
    norm = "" if record["norm"] == "inf" else f" (l{record['norm']})"
    by = ", ".join(f"{name} {count}" for name, count in record["broken_by"].items())
    return (
        f"at radius {record['eps']:g}{norm} {record['attacked_accuracy']:.2%} of "
        f"{record['num_images']} images withstand all attacks, {record['clean_accuracy']:.2%} are "
        f"classified correctly; broken by {by}; {record['seconds']:.0f} s"
    )


def _stages(run: Finished, options: argparse.Namespace, eps: float) -> dict[str, Stage]:
    """The clean images first, then the attacks that were asked for, in their order."""
    within = {"clip": PIXELS}
    usual = {"steps": options.steps, "restarts": options.restarts, "p": NORMS[options.norm]}
    usual |= within
    seeded = {"queries": options.queries, "restarts": options.restarts, **within}

    def clean(key: Any, apply: Any, samples: Any, x: Any, y: Any, eps: Any) -> attack.AttackResult:
        return attack.transfer(apply, samples, x[None], y)

    def carried(
        key: Any, apply: Any, samples: Any, x: Any, y: Any, eps: Any
    ) -> attack.AttackResult:
        mean = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], run.posterior.moments()[0])
        other = attack.apgd(key, apply, mean, x, y, eps, loss="ce", **usual).x
        return attack.transfer(apply, samples, jnp.stack([x, other]), y)

    known: dict[str, Callable[..., attack.AttackResult]] = {
        "pgd": partial(attack.pgd, **usual),
        "apgd-ce": partial(attack.apgd, loss="ce", **usual),
        "apgd-dlr": partial(attack.apgd, loss="dlr", **usual),
        "targeted": partial(attack.targeted_apgd, num_targets=options.targets, **usual),
        "square": partial(attack.square, **seeded),
        "transfer": carried,
    }
    key = jax.random.key(run.config.seed if options.seed is None else options.seed)
    chosen = {"clean": clean} | {name: known[name] for name in options.attacks}
    return {name: _stage(run, one, key, eps) for name, one in chosen.items()}


def _stage(run: Finished, one: Callable[..., attack.AttackResult], key: Any, eps: float) -> Stage:
    @jax.jit
    def batch(samples: Any, x: Any, y: Any, i: Any) -> attack.AttackResult:
        def single(x: Any, y: Any, i: Any) -> attack.AttackResult:
            return one(jax.random.fold_in(key, i), run.apply, samples, x, y, eps)

        return jax.vmap(single)(x, y, i)

    def compute(x: np.ndarray, y: np.ndarray, i: np.ndarray) -> Rows:
        found = batch(run.samples, x, y, i)
        columns = ("predicted", "broken", "margin")
        return {column: np.asarray(getattr(found, column)) for column in columns}

    return compute


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    listed = "\n".join(f"  {name:<10}{text}" for name, text in ATTACKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m experiments.attack",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Attack the test images of a finished run, each attack on those that withstood "
        "the ones before it.\nResults are added to the run's folder and report; what the run wrote "
        "is not changed.\n\nattacks:\n" + listed,
        epilog="Stopped with Ctrl-C, the same command goes on where it was.",
    )
    add_common(parser, "--eps")
    parser.add_argument(
        "--attacks",
        nargs="+",
        choices=ATTACKS,
        metavar="NAME",
        help="which, in this order (default: all that the norm allows)",
    )
    for name, default, text in (
        ("steps", 20, "gradient steps of each attack"),
        ("restarts", 1, "starting points of each attack"),
        ("queries", 200, "of square, for each restart"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N",
                            help=f"{text} (default: {default})")  # fmt: skip
    parser.add_argument(
        "--targets", type=int, metavar="N", help="classes of targeted (default: all, at most 9)"
    )
    parser.add_argument("--seed", type=int, help="of the random starts (default: the run's)")
    options = parser.parse_args(arguments)
    allowed = [name for name in ATTACKS if options.norm == "inf" or name != "square"]
    options.attacks = options.attacks or allowed
    for name in options.attacks:
        if name not in allowed:
            parser.error(f"--attacks {name}: it is for --norm inf alone")
        if options.attacks.count(name) > 1:
            parser.error(f"--attacks {name}: name each once")
    for name in ("steps", "restarts", "queries", "targets"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: at least 1")
    check_common(parser, options, options.eps, "--eps")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
