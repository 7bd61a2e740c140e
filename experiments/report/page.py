"""The page of a report: a run's numbers, plots and images as one HTML document.

It reads from the general to the particular: the sentence a person came for, the tables, accuracy
over the radius, single images, classes, training, and what the certificates do and do not say.
All text from a run is escaped; nothing is loaded from elsewhere.
"""

from collections.abc import Mapping, Sequence
from html import escape
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from bnncert import metrics

from ..pipeline.outcomes import OUTCOMES, by_class, outcomes
from ..setup.methods import METHODS, about
from . import additions, figures, fineprint, gallery, palette
from . import cautions as misleading
from .document import cautions, document, figure, percent_interval, table


class Run(NamedTuple):
    """The files of a finished run, read."""

    config: Mapping[str, Any]
    epochs: Sequence[Mapping[str, Any]]
    results: Mapping[str, Any]
    certificates: Mapping[str, np.ndarray]
    gallery: gallery.Gallery
    class_names: Sequence[str]
    later: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
    """Results added to the run since, by name."""


def page(run: Run) -> str:
    """The whole document."""
    title = f"{_plain(run.results['model'])} on {_plain(run.results['dataset'])}"
    body = "".join(
        section(run)
        for section in (
            _headline,
            _cautions,
            _tables,
            _over_eps,
            _additions,
            _images,
            _classes,
            _training,
            _fine_print,
        )
    )
    return document(title, body)


def _headline(run: Run) -> str:
    r = run.results
    samples = r["num_samples"]
    deployed = (
        f"deployed as the average of {samples} posterior samples"
        if samples > 1
        else "deployed as a single network"
    )
    counts = np.bincount(outcomes(run.certificates), minlength=len(OUTCOMES))
    legend = "".join(
        f"<li>{gallery.symbol(i)}<b>{_percent(counts[i] / counts.sum())}</b> {kind.name}"
        f'<br><span class="soft">{kind.meaning}</span></li>'
        for i, kind in enumerate(OUTCOMES)
    )
    return (
        f"<h1>{escape(_plain(r['model']))} on {escape(_plain(r['dataset']))}, "
        f"{escape(_method(r['inference']))}, {deployed}</h1>"
        f'<p class="lead"><b>{_percent(r["clean_accuracy"])}</b> of the {r["num_test"]:,} test '
        f"images are classified correctly, <b>{_percent(r['attacked_accuracy'])}</b> survive "
        f'{escape(_attack(r))}, and <b class="certified">{_percent(r["certified_accuracy"])} are '
        f"proved</b> to stay correct for every perturbation with {fineprint.ball(r['eps'])}.</p>"
        f'<div class="whole">{_bar(counts)}<ul>{legend}</ul></div>'
    )


def _cautions(run: Run) -> str:
    return cautions(misleading.cautions(run.results, len(run.class_names)))


def _tables(run: Run) -> str:
    r = run.results
    rows = (
        ("clean", "Clean", "classified correctly"),
        ("attacked", "Attacked", "still correct after the attack"),
        ("certified", "Certified", "proved correct in the whole ball"),
    )
    order = table(
        "Accuracies: clean, attacked, certified",
        ["", "accuracy", "95% interval", f"of {r['num_test']:,}"],
        [
            (
                f"{label}<small>{hint}</small>",
                f'<td class="key">{_percent(r[f"{name}_accuracy"])}</td>',
                percent_interval(r[f"{name}_accuracy"], r["num_test"]),
                f"{round(r[f'{name}_accuracy'] * r['num_test']):,}",
            )
            for name, label, hint in rows
        ],
        kind="order",
        note=f"Test images with {fineprint.ball(r['eps'])}, pixels in [0,&nbsp;1]",
    )
    quality = (
        ("nll", "Negative log-likelihood", "nats per image", "{:.3f}"),
        ("brier", "Brier score", "", "{:.3f}"),
        ("ece", "Expected calibration error", "", "{:.3f}"),
        ("predictive_entropy", "Predictive entropy", "nats, mean", "{:.3f}"),
        ("mutual_information", "Mutual information", "nats, mean: label and weights", "{:.4f}"),
        ("kl_weight", "KL weight", "under 1: a tempered posterior", "{:g}"),
        ("posterior_scale", "Posterior spread", "median sd / median |location|", "{:.2g}"),
        ("seconds_per_epoch", "Seconds per epoch", "", "{:.3g}"),
    )
    values = table(
        "Likelihood, calibration, uncertainty",
        [],
        [
            (f"{label}{f' <small>{hint}</small>' if hint else ''}", _number(r.get(name), form))
            for name, label, hint, form in quality
        ],
        kind="values",
        note="Of the deployed predictor on the clean test images",
    )
    return (
        '<div class="pair tables"><section class="panel"><h2>Clean &ge; attacked &ge; certified'
        f'</h2>{order}<p class="note">Intervals: Clopper and Pearson\'s, the test images being a '
        f"sample of others like them. Attack: {escape(r.get('attack') or 'PGD')}. Bounds: "
        f"{escape(str(r.get('certify_method') or 'unknown'))}. True robust accuracy lies between "
        "the last two rows.</p></section>"
        f'<section class="panel"><h2>Likelihood, calibration, uncertainty</h2>{values}</section>'
        "</div>"
    )


def _over_eps(run: Run) -> str:
    r, certificates = run.results, run.certificates
    bins = metrics.reliability(
        jnp.asarray(certificates["probs"]), jnp.asarray(certificates["label"])
    )
    curve = r["curve"]
    count, steps = curve.get("num_images"), curve.get("attack_steps")
    on = "all test images" if count in (None, r["num_test"]) else f"the first {count:,} test images"
    attack = "no attack" if steps == 0 else f"PGD with {steps} steps" if steps else "PGD"
    plots = (
        figure(
            "Accuracy over the radius",
            lambda f: figures.accuracy_over_eps(f, r),
            f"On {on}, {attack}. The shaded band is what neither proof nor attack decides. Bars at "
            "the test radius: 95% intervals of the accuracies on the whole test set.",
            size=figures.SMALL,
            said=_ends(curve),
        ),
        figure(
            "Reliability",
            lambda f: figures.reliability(f, bins, r["ece"]),
            "Accuracy against confidence of the clean predictions, with 95% intervals; on the "
            "dotted line, a prediction made with 70% confidence is right 70% of the time. Below, "
            "how many images a point stands for.",
            size=figures.SMALL,
            said=f"Expected calibration error {r['ece']:.3f}.",
        ),
    )
    return f'<div class="pair">{"".join(plots)}</div>'


def _additions(run: Run) -> str:
    return additions.section(run.later)


def _images(run: Run) -> str:
    cards = gallery.sections(
        run.gallery, run.certificates, run.class_names, float(run.results["eps"])
    )
    return (
        '<section><h2>Test images</h2><p class="soft">The predicted class with its probability; '
        "below, the certified range of that probability over the ball (the tick is its value at "
        "the image), and the certified lower bound on its margin over every other class: above "
        "zero is a proof. Where the attack succeeded, the attacked image stands beside the "
        "original, and their difference, with &minus;&epsilon; black and +&epsilon; white.</p>"
        f"{cards}</section>"
    )


def _classes(run: Run) -> str:
    counts = by_class(run.certificates, len(run.class_names))
    totals = np.maximum(counts.sum(1), 1)
    rates = np.cumsum(counts, axis=1) / totals[:, None]
    classes = table(
        "Accuracies by true class",
        ["", "images", "outcomes", "clean %", "attacked %", "certified %"],
        [
            (
                escape(name),
                f"{counts[c].sum():,}",
                f'<td class="thin">{_bar(counts[c])}</td>',
                *(f"{100 * rates[c, place]:.1f}" for place in (2, 1)),
                f"<b>{100 * rates[c, 0]:.1f}</b>",
            )
            for c, name in enumerate(run.class_names)
            if counts[c].sum()
        ],
        note="Test images of each class; the bar has the outcomes in their colours",
    )
    of, outcome = run.certificates, outcomes(run.certificates)
    confidence = np.max(of["probs"], axis=1)
    columns = (confidence, ".2f"), (of["mutual_information"], ".4f"), (of["margin"], "+.2f")
    kinds = table(
        "What sets the outcomes apart",
        ["", "images", "confidence", "mutual inf.", "margin bound"],
        [
            (
                f"{gallery.symbol(i)}{kind.name}",
                f"{np.sum(outcome == i):,}",
                *(f"{np.median(values[outcome == i]):{form}}" for values, form in columns),
            )
            for i, kind in enumerate(OUTCOMES)
            if np.any(outcome == i)
        ],
        note="Medians over the test images; mutual information in nats",
    )
    margins = palette.svg(
        lambda f: figures.margins(f, of["margin"], outcome),
        figures.LOW,
        "Histogram of the certified margin bounds of all test images, by outcome. "
        f"{np.mean(of['margin'] > 0):.0%} are above zero, where the class is proved to stay.",
    )
    stubborn = int(np.sum(~np.asarray(of["clean_correct"], bool) & np.asarray(of["robust"], bool)))
    wrong = int(np.sum(outcome == len(OUTCOMES) - 1))
    return (
        f'<div class="pair tables"><section class="panel"><h2>By true class</h2>{classes}</section>'
        f'<section class="panel"><h2>What sets the outcomes apart</h2>{kinds}'
        f'<p class="note">Of the {wrong:,} misclassified images, {stubborn:,} '
        f"{'is' if stubborn == 1 else 'are'} proved to keep the wrong class in the whole ball: a "
        f"certificate of robustness is not one of correctness.</p><figure>{margins}<figcaption>"
        "Certified lower bounds on the margins of all test images, in the colours of the outcomes."
        "</figcaption></figure></section></div>"
    )


def _training(run: Run) -> str:
    held_out = any(epoch.get("val_clean_accuracy") is not None for epoch in run.epochs)
    schedule = "the training radius &epsilon; and the weight &lambda; of the clean likelihood."
    plots = (
        figure(
            "Objective",
            lambda f: figures.objective(f, run.epochs),
            "Training loss and negative robust log-likelihood, and the KL divergence of posterior "
            "and prior (of single networks: minus their log prior). Shaded: the radius is ramped "
            "up, so the task becomes harder.",
            size=figures.SMALL,
            said=f"Over {len(run.epochs)} epochs.",
        ),
        figure(
            "Validation" if held_out else "Schedule",
            lambda f: figures.validation(f, run.epochs),
            f"Accuracy on held-out training images; below, {schedule}"
            if held_out
            else f"No images were held out. Drawn are {schedule}",
            size=figures.SMALL,
            said=f"Over {len(run.epochs)} epochs.",
        ),
    )
    return f'<h2>Training</h2><div class="pair">{"".join(plots)}</div>'


def _fine_print(run: Run) -> str:
    return fineprint.statement(run.results) + fineprint.reproduction(run.results, run.config)


def _ends(curve: Mapping[str, Any]) -> str:
    """What a curve of accuracies says at its last radius, in words."""
    rates = ", ".join(f"{n} {_percent(curve[n][-1])}" for n in ("clean", "attacked", "certified"))
    return f"At the largest radius, {curve['eps'][-1]:.3g}: {rates}."


def _bar(counts: np.ndarray) -> str:
    """A bar in the proportions of the outcomes; the text is for those who do not see it."""
    said = ", ".join(f"{n} {kind.name}" for n, kind in zip(counts, OUTCOMES, strict=True))
    parts = "".join(
        f'<span class="{kind.name}" style="flex:{n}"></span>'
        for n, kind in zip(counts, OUTCOMES, strict=True)
        if n
    )
    return f'<div class="bar" role="img" aria-label="{said}">{parts}</div>'


_NAMES = {
    "digits": "scikit-learn digits",
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
    "cifar10": "CIFAR-10",
    "mlp": "Multilayer perceptron",
    "cnn": "Convolutional network",
    "cnn-bn": "Convolutional network with batch-norm",
}


def _plain(name: str) -> str:
    return _NAMES.get(name, str(name))


def _method(name: str) -> str:
    """An inference method's name, with what it is where this version knows it."""
    return f"{name} ({about(name)})" if name in METHODS else str(name)


def _attack(results: Mapping[str, Any]) -> str:
    if results.get("attack") == "none":
        return "no attack at all, for none was tried"
    method, _, details = str(results.get("attack") or "PGD").partition(", ")
    return f"an attack by {method}" + (f" ({details})" if details else "")


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f}%"


def _number(value: float | None, form: str) -> str:
    return "&ndash;" if value is None else form.format(value)
