"""The fine print of a report: what is certified and what is not, and how to get the run again."""

import json
import shlex
from collections.abc import Mapping
from html import escape
from pathlib import PurePath
from typing import Any

from ..setup.command import program
from ..setup.config import options_of, to_dict
from ..setup.methods import METHODS
from ..setup.presets import PRESETS, preset
from ..setup.requirements import flag
from ..setup.upgrade import upgraded
from .figures import radius_text


def statement(results: Mapping[str, Any]) -> str:
    """What the certificates of a run say, and what they do not, as a section of the page."""
    r = results
    samples, tier = r["num_samples"], r.get("tier", "exact")
    predictor = (
        f"the average of the softmax outputs of {samples} fixed weight samples, and it is this "
        "average that is deployed"
        if samples > 1
        else "one fixed network"
    )
    certified = {
        "exact": f"The predictor is {predictor}: the bound is a proof about the predictor itself "
        "(<b>exact</b> tier), and not an estimate for a continuous posterior behind it.",
    }.get(tier, f"The certificates are of the <b>{escape(str(tier))}</b> tier.")
    arithmetic = {
        "real": "The bounds hold for the network evaluated in <b>real arithmetic</b>. Rounding in "
        "float32, of the network and of the bounds, is not covered: do not rely on a margin of the "
        "order of 1e-6.",
        "float32": "The bounds are rounded outward and hold for the network in <b>float32</b>.",
    }.get(r.get("arithmetic", "real"), "")
    weight = r.get("kl_weight")
    tempered = (
        f" The KL term has weight {weight:g}, so the posterior is tempered as well."
        if weight not in (None, 1) and r.get("posterior_scale")
        else ""
    )
    items = (
        f"<b>Which predictor.</b> {certified}",
        f"<b>Which inputs.</b> All x&prime; with {ball(r['eps'])} and every pixel in [0, 1]: the "
        "ball is clipped to the pixel range. Rotations, blur, noise beyond the ball: nothing is "
        "said.",
        "<b>Which statement.</b> The predicted class keeps the strictly highest predictive "
        "probability everywhere in the ball. That it is the right class is known for these test "
        "images because they have labels; on a new image a certificate says robust, not right.",
        f"<b>Which arithmetic.</b> {arithmetic}",
        "<b>An attack is not a proof.</b> An image that survives the attack may fall to a "
        "stronger one; an image without a certificate may still be robust. On every test image "
        "attack and certificate speak of the same samples and the same ball.",
        "<b>Which posterior.</b> The robust likelihood does not sum to one over the classes: what "
        f"it yields is a generalised (Gibbs) posterior.{tempered}",
    )
    return (
        '<section><h2>What is certified and what is not</h2><ul class="plain">'
        + "".join(f"<li>{item}</li>" for item in items)
        + "</ul></section>"
    )


def reproduction(results: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The command, the versions and the configuration, as a section of the page."""
    taken = [
        f"{what} took {results[field]:,.0f} s."
        for what, field in (
            ("Training", "train_seconds"),
            ("Sampling, or the approximation that follows training,", "refinement_seconds"),
            ("Evaluation, with certificates and attacks,", "evaluate_seconds"),
        )
        if results.get(field) is not None
    ]
    return reproduced(command(config), " ".join(taken), results, config)


def reproduced(
    again: str, taken: str, results: Mapping[str, Any], config: Mapping[str, Any]
) -> str:
    """The section of any run's page that tells how to get it again.

    Args:
        again: the command.
        taken: sentences on how long it took.
        results: with its versions, device and commit, as far as they are known.
        config: its settings.
    """
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    known = [f"Versions: {escape(versions)}."]
    if results.get("device"):
        known.append(f"Device: {escape(str(results['device']))}.")
    if results.get("commit"):
        head, _, changed = str(results["commit"]).partition("+")
        known.append(
            f"Commit: <code>{escape(head[:12])}</code>"
            + (", with changes that are in no commit." if changed else ".")
        )
    settings = escape(json.dumps(portable(config), indent=2, ensure_ascii=False))
    return (
        f'<section><h2>Reproduce this run</h2><pre tabindex="0">{escape(again)}</pre>'
        f'<p class="soft">{escape(taken)} {" ".join(known)}</p>'
        "<details><summary>Configuration</summary>"
        f'<pre tabindex="0">{settings}</pre></details></section>'
    )


def portable(value: Any) -> Any:
    """Settings without the folders of a machine: of an absolute path, its last part.

    >>> portable({"out": "/home/me/runs/one", "seed": 1})
    {'out': '.../one', 'seed': 1}
    """
    if isinstance(value, Mapping):
        return {name: portable(child) for name, child in value.items()}
    if isinstance(value, list):
        return [portable(child) for child in value]
    absolute = isinstance(value, str) and PurePath(value).is_absolute()
    return f".../{PurePath(value).name}" if absolute else value


def command(config: Mapping[str, Any]) -> str:
    """The command line of a run: its preset and every option in which it differs from that.

    Where the data lie is the machine's affair: a data folder is written as DIR.

    >>> command({"preset": "digits", "inference": "map", "seed": 1, "train": {"epochs": 5}})
    'python -m experiments.run digits --inference map --seed 1 --train.epochs 5'
    """
    asked = options_of(upgraded(config))
    known = asked["preset"] in PRESETS and asked["inference"] in METHODS
    usual = options_of(to_dict(preset(asked["preset"], asked["inference"]))) if known else {}
    words = [*program("run").split(), str(asked["preset"])]
    for name, value in asked.items():
        if name in ("preset", "out", "resume"):
            continue
        if name == "data_dir":
            words += [flag(name), "DIR"] if value is not None else []
        elif name in ("inference", "seed") or (name in usual and value != usual[name]):
            words += _option(flag(name), value)
    return shlex.join(words)


def ball(eps: float) -> str:
    """|x' - x|_inf <= eps in HTML, unbroken."""
    norm = "|x&prime; &minus; x|<sub>&infin;</sub>"
    return f'<span class="math">{norm} &le; {radius_text(eps)}</span>'


def _option(option: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        head, _, name = option.rpartition(".")
        return [option if value else f"{head}.no-{name}" if head else f"--no-{name[2:]}"]
    value = portable(value)
    return [option, *map(str, value)] if isinstance(value, list) else [option, str(value)]
