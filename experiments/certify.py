"""Certify a finished run again: by other bounds, at other radii, in another norm.

    python -m experiments.certify RUN --method crown --radius 0.05 0.1
    python -m experiments.certify RUN --method ibp crown-ibp crown      # each on what is left open
    python -m experiments.certify RUN --method "alpha-crown(steps=100)"
    python -m experiments.certify RUN --unit-roundoff 0.00048828125     # where products are in TF32

Writes certify-METHOD-RADIUS.npz and .json into the run's folder, a pair for each radius, and shows
them in its report.html. What is certified is the predictor that the run deployed; certificates of
images that an attack of the same folder broke stop it with an error. Stopped, the same command goes
on where it was.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from inspect import cleandoc
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from bnncert import Float, certify
from bnncert.certify.exact.cascade import STAGES, stage_of
from bnncert.sets import ball

from .pipeline.finished import Finished, Rows, Stage, in_stages, open_run
from .setup.command import program, read
from .setup.requirements import Fraction, check
from .setup.settings import PIXELS
from .setup.spelling import method_of, slug
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

_BEST = {
    "robust": np.logical_or,
    "margin": np.maximum,
    "probability_lower": np.maximum,
    "probability_upper": np.minimum,
}
"""How what two methods prove of an image is put together: both hold."""


EXAMPLES = """\
  COMMAND runs/digits-bbb-seed0 --method crown --radius 0.05 0.1
  COMMAND runs/digits-bbb-seed0 --method ibp crown-ibp crown
  COMMAND runs/digits-bbb-seed0 --norm 2 --radius 0.5"""

Methods = Annotated[
    tuple[str, ...],
    tyro.conf.arg(
        metavar="METHOD [METHOD ...]",
        help=f"Bounds: {', '.join(STAGES)}; with options, in quotes, as "
        "'alpha-crown(steps=100)' or 'crown(lower_slope=zero)'. Several are a cascade: each looks "
        "at the images that the ones before it left open, so name cheap ones first. joint is one "
        "linear bound for all samples by CROWN.",
    ),
]


@dataclass(frozen=True)
class Options:
    """Certify the test images of a finished run: by other bounds, at other radii.

    Each radius adds a row to the run's report.html, and certify-METHOD-RADIUS.json and .npz to its
    folder; what the run wrote is not changed. Stopped with Ctrl-C, the same command goes on where
    it was.
    """

    run: Run
    radius: Annotated[tuple[Fraction, ...], radii("--eps")] = ()
    method: Methods = ("crown-ibp",)
    unit_roundoff: Annotated[
        float | None,
        tyro.conf.arg(
            metavar="U",
            help="Largest relative error of one rounding where the network will run, if that is "
            "less exact than float32: 2^-11 for TF32 (0.00048828125), 2^-8 for bfloat16.",
            help_behavior_hint="(default: that of float32)",
        ),
    ] = None
    norm: Norm = "inf"
    images: Images = None
    batch_size: BatchSize = 128
    data_dir: DataDir = None


def _examples() -> str:
    return EXAMPLES.replace("COMMAND", program("certify"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = read(
        Options,
        program("certify"),
        arguments,
        validate=_validate,
        description=f"{cleandoc(Options.__doc__ or '')}\n\nexamples:\n{_examples()}",
    )
    opened = partial(open_run, options.run, options.data_dir, options.images)
    return for_each_radius(opened, options.radius, partial(certified, options), summary)


def certified(options: Options, run: Finished, radius: float) -> Record:
    """Certifies every image at one radius, and writes the result; one that is there is kept.

    Raises:
        SoundnessError: an image that an attack broke was certified.
        ValueError: there is a result, or a part of one, of other settings.
    """
    unit = options.unit_roundoff
    asked = [text.replace(" ", "") for text in options.method]
    methods = "+".join(map(slug, asked)) + ("" if unit is None else f"-u{unit:g}")
    name = f"certify-{methods}-{of_norm(options.norm)}{radius:g}"
    settings = {
        "method": asked,
        "eps": radius,
        "norm": options.norm,
        "num_images": len(run.test.y),
    }
    if "joint" in asked:  # results in real arithmetic are neither kept nor carried on
        settings["rounding"] = "outward"
    if unit is not None:
        settings["unit_roundoff"] = unit

    def compute() -> tuple[Record, Rows]:
        stages = {
            method: _stage(run, method, radius, options.norm, Float(unit)) for method in asked
        }
        rows = in_stages(run, name, settings, stages, _open, _BEST, options.batch_size)
        rows["label"], correct = run.test.y, rows["predicted"] == run.test.y
        rows["certified"] = rows["robust"] & correct
        places = rows["stage"][rows["certified"]]
        return {
            "clean_accuracy": float(correct.mean()),
            "certified_accuracy": float(rows["certified"].mean()),
            "certified_by": {m: int(np.sum(places == i)) for i, m in enumerate(asked)},
            "tier": "exact",
            "arithmetic": "float32" if unit is None else f"unit roundoff {unit:g}",
        }, rows

    return kept_or_computed(run, "certify", name, settings, compute)


def summary(record: Record) -> str:
    """A result in one line."""
    norm = "" if record["norm"] == "inf" else f" (l{record['norm']})"
    return (
        f"{', '.join(record['method'])} at radius {record['eps']:g}{norm}: "
        f"{record['certified_accuracy']:.2%} of {record['num_images']} images certified, "
        f"{record['clean_accuracy']:.2%} classified correctly; {record['seconds']:.0f} s"
    )


def _stage(run: Finished, method: str, radius: float, norm: str, rounding: Float) -> Stage:
    clip = PIXELS if norm == "inf" else None  # an l2 ball is not cut: more is proved
    one_method = stage_of(run.apply, method if method == "joint" else method_of(method), rounding)

    @jax.jit
    def batch(samples: Any, x: Any) -> certify.Decision:
        def one(x: Any) -> certify.Decision:
            region = ball(x, radius, p=NORMS[norm], clip=clip)
            return one_method(samples, region, x)

        return jax.vmap(one)(x)

    def compute(x: np.ndarray, y: np.ndarray, i: np.ndarray) -> Rows:
        found = batch(run.samples, x)
        margins = np.array(found.margins)
        margins[np.arange(len(x)), np.asarray(found.predicted)] = np.inf
        return {
            "predicted": np.asarray(found.predicted),
            "robust": np.asarray(found.robust),
            "margin": margins.min(1),
            "probability_lower": np.asarray(found.probability.lower),
            "probability_upper": np.asarray(found.probability.upper),
            "correct": np.asarray(found.predicted) == y,
        }

    return compute


def _open(rows: Rows) -> np.ndarray:
    return ~rows["robust"] & rows["correct"]


def _validate(options: Options) -> None:
    check(options)
    check_radii(options.radius, options.norm, "--radius")
    if not options.method or len(set(options.method)) < len(options.method):
        raise ValueError(f"--method {' '.join(options.method)}: name each once, and one at least")
    for text in options.method:
        if text != "joint":
            method_of(text)
    try:
        Float(options.unit_roundoff)
    except ValueError as error:
        raise ValueError(f"--unit-roundoff {options.unit_roundoff}: {error}") from error


if __name__ == "__main__":
    raise SystemExit(main())
