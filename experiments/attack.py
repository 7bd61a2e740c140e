"""Attack a finished run with the whole battery: how much of its accuracy is left.

    python -m experiments.attack RUN --steps 50 --restarts 2
    python -m experiments.attack RUN --eps 0.05 0.1 --attacks pgd apgd-dlr targeted

One attack after the other (`bnncert.attack.battery`), each on the images that withstood the ones
before it: an image counts as broken if any attack breaks it. Writes attack-EPS-STEPSxRESTARTS.npz
and .json into the run's folder, a pair for each radius, and shows them in its report.html. Breaking
an image that is certified in the same folder is an error, and nothing is written. Stopped, the same
command goes on where it was.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import cleandoc
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from bnncert import attack

from .pipeline.finished import Finished, Rows, Stage, in_stages, open_run
from .setup.command import program, read, rows
from .setup.requirements import AtLeast1, Fraction, Requirement, check, check_name
from .setup.settings import PIXELS
from .tasks.additions import (
    NORMS,
    BatchSize,
    DataDir,
    Images,
    Norm,
    Record,
    Run,
    check_radii,
    for_each_radius,
    kept_or_computed,
    of_norm,
    radii,
)

ATTACKS: dict[str, str] = {
    "pgd": "projected gradients with fixed steps, on the cross-entropy",
    "apgd-ce": "APGD, which chooses its own steps, on the cross-entropy",
    "apgd-dlr": "APGD on the difference-of-logits ratio",
    "targeted": "APGD on the targeted ratio, for the most likely other classes",
    "square": "random search without gradients (norm inf alone)",
    "transfer": "APGD on the network of the mean weights, judged by the predictive",
}


EXAMPLES = """\
  COMMAND runs/digits-bbb-seed0 --steps 50 --restarts 2
  COMMAND runs/digits-bbb-seed0 --eps 0.05 0.1 --attacks pgd apgd-dlr"""


@dataclass(frozen=True)
class Options:
    """Attack the test images of a finished run, by one attack after the other.

    Each goes on with the images that withstood the ones before it. Each radius adds a row to the
    run's report.html, and attack-EPS-STEPSxRESTARTS.json and .npz to its folder; what the run wrote
    is not changed. Breaking an image that is certified there is an error. Stopped with Ctrl-C, the
    same command goes on where it was.
    """

    run: Run
    eps: Annotated[tuple[Fraction, ...], radii("--radius")] = ()
    attacks: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]", help_behavior_hint="")
    ] = ()
    """Which attacks, in this order; by default all that the norm allows."""
    steps: AtLeast1 = 20
    """Gradient steps of each attack."""
    restarts: AtLeast1 = 1
    """Starting points of each attack."""
    queries: AtLeast1 = 200
    """Predictions that square may ask for, in each restart."""
    targets: Annotated[
        int | None,
        Requirement("at least 1", lambda v: v is None or v >= 1),
        tyro.conf.arg(metavar="N", help_behavior_hint=""),
    ] = None
    """Other classes that targeted aims at, one by one; by default all, at most 9."""
    seed: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")] = None
    """Seed of the random starts; by default the run's."""
    norm: Norm = "inf"
    images: Images = None
    batch_size: BatchSize = 128
    data_dir: DataDir = None


def _examples() -> str:
    return EXAMPLES.replace("COMMAND", program("attack"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = read(
        Options,
        program("attack"),
        arguments,
        validate=_validate,
        description=f"{cleandoc(Options.__doc__ or '')}\n\nattacks:\n{rows(ATTACKS)}"
        f"\n\nexamples:\n{_examples()}",
    )
    opened = partial(open_run, options.run, options.data_dir, options.images)
    return for_each_radius(opened, options.eps, partial(attacked, options), summary)


def attacked(options: Options, run: Finished, eps: float) -> Record:
    """Attacks every image at one radius, and writes the result; one that is there is kept.

    Raises:
        SoundnessError: an image that is certified was broken.
        ValueError: there is a result, or a part of one, of other settings.
    """
    name = f"attack-{of_norm(options.norm)}{eps:g}-{options.steps}x{options.restarts}"
    settings = {
        "attacks": _asked(options),
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


def _stages(run: Finished, options: Options, eps: float) -> dict[str, Stage]:
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
    chosen = {"clean": clean} | {name: known[name] for name in _asked(options)}
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


def _asked(options: Options) -> list[str]:
    """The attacks in their order: by default all that the norm allows."""
    return list(options.attacks) or [n for n in ATTACKS if options.norm == "inf" or n != "square"]


def _validate(options: Options) -> None:
    check(options)
    check_radii(options.eps, options.norm, "--eps")
    for name in options.attacks:
        check_name(name, tuple(ATTACKS), "attack")
        if name == "square" and options.norm != "inf":
            raise ValueError(f"--attacks {name}: it is for --norm inf alone")
        if options.attacks.count(name) > 1:
            raise ValueError(f"--attacks {name}: name each once")


if __name__ == "__main__":
    raise SystemExit(main())
