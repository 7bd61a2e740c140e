"""The report is one self-contained page whose numbers are those of the run."""

import base64
import dataclasses
import io
import json
import re
import shlex
import shutil
import subprocess
from collections import Counter
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from scipy.optimize import brentq
from scipy.stats import binom
from sklearn.datasets import load_digits

from bnncert.metrics import ece
from experiments.pipeline.outcomes import OUTCOMES, by_class, outcomes, pick
from experiments.report import figures
from experiments.report import files as report
from experiments.report.__main__ import main
from experiments.report.cautions import cautions
from experiments.report.document import interval, percent_interval
from experiments.report.figures import radius_text
from experiments.report.fineprint import command
from experiments.report.gallery import png
from experiments.report.palette import DARK, LIGHT
from experiments.setup.config import to_dict
from experiments.setup.methods import MAP
from experiments.setup.presets import PRESETS, parse
from experiments.setup.provenance import commit, provenance

EPS, TRAIN_EPS, RADII = 0.05, 0.06, [0.0, 0.02, 0.04, 0.05, 0.06, 0.08, 0.1]
ACCURACIES = {"clean": "clean_correct", "attacked": "attacked_correct", "certified": "certified"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder that tests read and do not change."""
    return linear_run(tmp_path_factory.mktemp("runs") / "finished")


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A run folder to change."""
    return Path(shutil.copytree(finished, tmp_path / "run", ignore=lambda *_: {"report.html"}))


@pytest.fixture(scope="module")
def html(finished: Path) -> str:
    path = report.write_report(finished)
    assert path == finished / "report.html"
    return path.read_text(encoding="utf-8")


def test_nothing_is_loaded_from_elsewhere(html: str) -> None:
    links = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert len(links) > 20  # the images of the grid
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert not re.search(r"<script|<link|<iframe|@import|url\((?!#)", html)


def test_markup_is_balanced_and_ids_are_unique(html: str) -> None:
    page = Markup(html)
    assert page.open == []
    assert [name for name, times in Counter(page.ids).items() if times > 1] == []
    used = re.findall(r'(?:url\(#|href="#)([^)"]+)', html)
    assert used and set(used) <= set(page.ids)


def test_table_shows_rates_intervals_and_counts(finished: Path, html: str) -> None:
    certificates = np.load(finished / "certificates.npz")
    rows = dict(re.findall(r"<th scope=row>(\w+)<small>[^<]*</small></th>(.*?)</tr>", html))
    shown = []
    for name, field in ACCURACIES.items():
        n, k = len(certificates[field]), int(certificates[field].sum())
        numbers = [
            float(x) for x in re.findall(r"[\d.]+", re.sub("<[^>]*>", " ", rows[name.title()]))
        ]
        expected = [100 * k / n, *(100 * end for end in exact_interval(k, n)), k]
        np.testing.assert_allclose(numbers, expected, atol=0.0501)
        assert f"<b>{100 * k / n:.1f}%</b>" in html or f">{100 * k / n:.1f}% are proved</b>" in html
        shown.append(numbers[0])
    assert shown[0] > shown[1] > shown[2]  # strictly, on this run: each row can be mixed up


def test_quality_table_shows_the_results(finished: Path, html: str) -> None:
    results = json.loads((finished / "results.json").read_text())
    text = Markup(html).text
    for label, value in (
        ("Negative log-likelihood nats per image", f"{results['nll']:.3f}"),
        ("Brier score", f"{results['brier']:.3f}"),
        ("Expected calibration error", f"{results['ece']:.3f}"),
        (
            "Mutual information nats, mean: label and weights",
            f"{results['mutual_information']:.4f}",
        ),
        ("Posterior spread median sd / median |location|", "0.027"),
    ):
        assert f"{label} {value}" in text


def test_class_table_equals_a_count_by_hand(finished: Path, html: str) -> None:
    certificates = dict(np.load(finished / "certificates.npz"))
    counts = by_class(certificates, 10)
    of_table = html[html.index("<h2>By true class") :]
    for c in range(10):
        of_class = certificates["label"] == c
        cumulated = counts[c].cumsum()
        for column, field in enumerate(("certified", "attacked_correct", "clean_correct")):
            assert cumulated[column] == np.sum(certificates[field][of_class])
        assert cumulated[-1] == of_class.sum()
        rate = 100 * np.mean(certificates["certified"][of_class])
        row = re.search(rf"<tr><th scope=row>{c}</th>(.*?)</tr>", of_table)
        assert row and row[1].endswith(f"<b>{rate:.1f}</b></td>")


def exact_interval(hits: int, num: int) -> tuple[float, float]:
    """Where as few, or as many, hits have a chance of 2.5%: bisection of the binomial's tails."""
    low: Any = brentq(lambda p: binom.sf(hits - 1, num, p) - 0.025, 1e-12, 1 - 1e-12)
    high: Any = brentq(lambda p: binom.cdf(hits, num, p) - 0.025, 1e-12, 1 - 1e-12)
    return low, high


def test_intervals_are_exact_and_known_at_the_ends() -> None:
    for hits, num in ((1, 20), (19, 20), (333, 360)):
        np.testing.assert_allclose(interval(hits / num, num), exact_interval(hits, num), rtol=1e-6)
    assert interval(0.0, 10)[0] == 0 and interval(1.0, 10)[1] == 1
    np.testing.assert_allclose(interval(1.0, 10)[0], 0.025**0.1)  # p^10 = 0.025
    assert percent_interval(1.0, 10) == "69.2 to 100.0"


def test_outcomes_refuse_a_certified_image_that_the_attack_broke(finished: Path) -> None:
    certificates = dict(np.load(finished / "certificates.npz"))
    victim = int(np.flatnonzero(certificates["certified"])[3])
    certificates["attacked_correct"] = certificates["attacked_correct"].copy()
    certificates["attacked_correct"][victim] = False
    with pytest.raises(ValueError, match=rf"violated at test images \[{victim}\] \(1 in all\)"):
        outcomes(certificates)


def test_picked_images_hold_the_first_of_every_outcome(finished: Path) -> None:
    certificates = dict(np.load(finished / "certificates.npz"))
    outcome = outcomes(certificates)
    picked = pick(certificates, each=3)
    assert len(set(picked.tolist())) == 3 * len(OUTCOMES)
    for kind in range(len(OUTCOMES)):
        mine = picked[outcome[picked] == kind]
        np.testing.assert_array_equal(mine, np.flatnonzero(outcome == kind)[:3])


def test_grid_shows_attacked_images_where_the_attack_succeeded(finished: Path, html: str) -> None:
    certificates, images = (np.load(finished / f"{n}.npz") for n in ("certificates", "gallery"))
    broken = certificates["clean_correct"] & ~certificates["attacked_correct"]
    first = int(np.flatnonzero(broken[images["index"]])[0])
    index = images["index"][first]
    card = re.search(rf"<li class=\"card broken\">(?:(?!</li>).)*test image {index}<.*?</li>", html)
    assert card
    sources = [decoded(source) for source in re.findall(r'src="([^"]*)"', card[0])]
    change = 0.5 + (images["attacked"][first] - images["image"][first]) / (2 * EPS)
    expected = (images["image"][first], images["attacked"][first], change)
    for pixels, picture in zip(sources, expected, strict=True):
        np.testing.assert_allclose(pixels / 255, picture[..., 0], atol=0.51 / 255)
    assert f"now <b>{certificates['attacked_predicted'][index]}</b>" in card[0]
    assert np.abs(change - 0.5).max() > 0.4  # the difference uses the whole range
    assert not re.search(r'<li class="card certified">(?:(?!</li>).)*difference', html)


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>\"'& $x$"
    run = linear_run(tmp_path / "run", class_names=[hostile, *"123456789"])
    html = report.write_report(run).read_text(encoding="utf-8")
    assert "<script" not in html and escape(hostile) in html
    assert Markup(html).open == []
    assert "&lt;b&gt; &amp; co" in html  # from config.json
    svg = report.summary_picture(run, tmp_path / "picture.svg").read_text()
    assert "<script" not in svg


def test_a_failed_write_leaves_the_old_page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report.write_report(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(report, "page", lambda run: "half a page" * 10**5 + "\ud800")
    with pytest.raises(UnicodeEncodeError):
        report.write_report(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("name", report.FILES)
def test_a_missing_file_is_named(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(name)):
        report.write_report(folder)
    assert main([str(folder)]) == 1
    assert re.search(rf"error: .*no {re.escape(name)}", capsys.readouterr().err)
    assert not (folder / "report.html").exists()


def test_results_of_another_evaluation_are_refused(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    results["certified_accuracy"] += 1 / results["num_test"]
    (folder / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match="not of the same evaluation"):
        report.write_report(folder)


def test_command_line_writes_page_and_picture(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(folder), "--summary", str(tmp_path / "summary.png")])
    assert capsys.readouterr().out.split() == [
        str(folder / "report.html"),
        str(tmp_path / "summary.png"),
    ]
    with Image.open(tmp_path / "summary.png") as picture:
        width, height = picture.size
    assert width > 1500 and 2 < width / height < 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"samples": 1}, "deployed as a single network"),
        ({"epochs": 1}, "Accuracy on held-out training images"),
        ({"validation": False}, "No images were held out"),
        ({"channels": 3}, "deployed as the average of 4 posterior samples"),
        ({"attacked_images": False}, "correct, until the attack changed the class"),
        ({"radii": [0.0]}, "Accuracy over the radius"),
    ],
)
def test_special_runs(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    run = linear_run(tmp_path / "run", **options)
    html = report.write_report(run).read_text(encoding="utf-8")
    page = Markup(html)
    assert page.open == [] and words in page.text
    assert not re.search(r"\bnan\b|\binf\b(?!\.)", page.text)
    assert ("difference of the two" in html) == options.get("attacked_images", True)
    assert report.summary_picture(run, tmp_path / "picture.png").stat().st_size > 10_000


def test_every_picture_and_table_is_named_and_scrolls_by_itself(html: str) -> None:
    assert not re.search(r"<svg(?![^>]*aria-label=\"[^\"]{20,}\")", html)
    assert not re.search(r"<img(?![^>]*alt=\"[^\"]{5,}\")", html)
    boxed = r'<div class="scroll" role="region" tabindex="0" aria-label="[^"]+"><table'
    assert len(re.findall(boxed, html)) == html.count("<table") == html.count("<caption>") == 4
    assert html.count("<figure") == html.count("<figcaption>")
    assert 'aria-label="Accuracy over the radius. At the largest radius, 0.1: clean ' in html


def test_paper_cuts_nothing_off_and_stays_light(html: str) -> None:
    printed = html[html.index("@media print") : html.index("</style>")]
    assert ".scroll, pre { overflow: visible; }" in printed
    assert ".pair.tables { display: block; }" in printed
    dark = re.findall(r"@media([^{]*prefers-color-scheme: dark[^{]*)", html)
    assert len(dark) == 2 and all("screen" in condition for condition in dark)


def test_labels_stand_at_the_ends_of_their_lines() -> None:
    """On a logarithmic axis too, where both were once put at the linear places."""
    epochs = [
        {"epoch": n, "loss": 50.0 / n, "log_likelihood": -5.0 / n, "kl": 1.0, "eps": 0.1}
        for n in range(1, 31)
    ]
    figure = Figure(figsize=figures.SMALL, layout="constrained")
    figures.objective(figure, epochs)
    above = figure.axes[0]
    assert above.get_yscale() == "log"
    figure.canvas.draw()
    for text, last in (("loss", 50 / 30), ("−log lik.", 5 / 30)):
        label: Any = next(found for found in above.texts if found.get_text() == text)
        place = above.transAxes.transform((1, label.xy[1]))[1]
        line = above.transData.transform((30, last))[1]
        assert abs(place - line) < 0.05 * above.bbox.height


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({}, "The 4 samples agree on nearly everything"),
        ({"mutual_information": 0.1}, None),
        ({"kl_weight": 1.0, "lam": 1.0, "posterior_scale": 0.01}, "unfamiliar image."),
        ({"eps": 0.0}, "The radius is 0."),
        ({"eps": 0.1}, "Training went up to radius 0.06, and the test radius is 0.1"),
        ({"num_test": 360}, "within 89.3 to 95.0%"),
        ({"clean_accuracy": 0.15}, "hardly better than guessing (10%)"),
        ({"curve": {"attack_steps": 0}}, "No attack was tried."),
        ({"curve": {"attack_steps": 1}}, "The attack is short (1 step):"),
        ({"num_samples": 1}, None),
    ],
)
def test_what_could_mislead_is_said(changed: dict[str, Any], says: str | None) -> None:
    usual: dict[str, Any] = {
        "eps": 0.05,
        "train_eps": 0.06,
        "num_test": 10_000,
        "clean_accuracy": 0.9,
        "certified_accuracy": 333 / 360,
        "curve": {"attack_steps": 40},
        "num_samples": 4,
        "mutual_information": 0.0002,
        "predictive_entropy": 0.1,
        "kl_weight": 0.02,
        "lam": 0.5,
        "posterior_scale": 1.4,
    }
    found = cautions(usual | changed, 10)
    text = Markup(" ".join(found)).text
    assert (says in text) if says else not found
    tempered = "as if every image had been seen 50 times" in text
    assert tempered == ("kl_weight" not in changed and "agree" in text)


def test_guessing_depends_on_the_number_of_classes() -> None:
    usual = {"eps": 0.1, "num_test": 5000, "num_samples": 1, "curve": {}, "certified_accuracy": 0.5}
    assert "(50%)" in cautions({**usual, "clean_accuracy": 0.52}, 2)[0]
    assert not cautions({**usual, "clean_accuracy": 0.8}, 2)


def test_an_attack_that_broke_a_certified_image_stops_the_report(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    certified = np.load(folder / "certificates.npz")["certified"]
    np.savez(folder / "attack-forged.npz", broken=certified)
    record = {"kind": "attack", "norm": "inf", "eps": EPS}
    (folder / "attack-forged.json").write_text(json.dumps(record))
    assert main([str(folder)]) == 1
    error = capsys.readouterr().err
    assert "is certified in certificates, but attack-forged changed its class" in error
    assert len(error.splitlines()) == 1 and not (folder / "report.html").exists()


def test_the_page_tells_no_folder_of_the_machine(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"out": str(folder), "data_dir": "/data/here", "start": "/home/me/runs/first"}
    (folder / "config.json").write_text(json.dumps(config))
    results = json.loads((folder / "results.json").read_text())
    results |= {"commit": "0123456789abcdef+changes", "device": "H<100>"}
    (folder / "results.json").write_text(json.dumps(results))
    text = Markup(report.write_report(folder).read_text()).text
    assert str(folder.parent) not in text and "/data" not in text and "/home" not in text
    assert "--data-dir DIR" in text and '".../first"' in text
    assert "Commit: 0123456789ab , with changes that are in no commit." in text
    assert "Device: H<100>." in text and "Versions: jax 0.10.2, bnncert 0.1.0." in text


def test_the_commit_of_a_clone_is_known(tmp_path: Path) -> None:
    assert commit(tmp_path) is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    (tmp_path / "a").write_text("1")
    for words in (["init", "-q"], ["add", "a"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    clean = commit(tmp_path)
    assert clean and re.fullmatch("[0-9a-f]{40}", clean)
    (tmp_path / "a").write_text("2")
    assert commit(tmp_path) == f"{clean}+changes"
    known = provenance()
    assert known["versions"].keys() == {"bnncert", "jax", "jaxlib", "python"} and known["device"]


def test_a_resumed_epoch_counts_once_and_last(folder: Path) -> None:
    lines = training_curves(3)
    written = [*lines, {**lines[1], "loss": 123.0}, {**lines[2], "loss": 456.0}]
    text = "".join(json.dumps(line) + "\n" for line in written)
    (folder / "metrics.jsonl").write_text(text)
    assert [e["loss"] for e in report.load(folder).epochs] == [lines[0]["loss"], 123.0, 456.0]


def test_images_keep_their_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3))
    np.testing.assert_array_equal(decoded(png(pixels / 255.0)), pixels)
    np.testing.assert_array_equal(decoded(png(pixels[..., :1] / 255.0)), pixels[..., 0])


def test_command_reproduces_the_configuration() -> None:
    for name, base in PRESETS.items():
        preset = dataclasses.replace(base, data="my.npz") if name == "my" else base
        changed = dataclasses.replace(
            preset,
            inference=MAP(clip_norm=3.0),
            seed=7,
            train=dataclasses.replace(
                preset.train, epochs=3, flip=not preset.train.flip, learning_rate_drops=(0.5, 0.8)
            ),
        )
        for config in (preset, changed):
            as_json = json.loads(json.dumps(to_dict(config)))
            python, module, run, *arguments = shlex.split(command(as_json))
            assert (python, module, run, arguments[0]) == ("python", "-m", "experiments.run", name)
            assert parse(arguments) == config


def test_a_run_of_a_method_that_is_not_known_has_its_report(folder: Path) -> None:
    for inference in ("newest", {"name": "newest", "speed": 3}):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "inference": inference}))
        html = report.write_report(folder).read_text()
        assert "python -m experiments.run digits --inference newest --seed 0" in html


@pytest.mark.parametrize(
    ("eps", "text"),
    [(0.1, "0.1"), (2 / 255, "2/255"), (8 / 255, "8/255"), (0.2, "0.2"), (0.0, "0")],
)
def test_a_radius_is_written_as_it_was_meant(eps: float, text: str) -> None:
    assert radius_text(eps) == text
    assert radius_text(float(np.float32(eps))) == text


def test_no_global_state_is_left_behind(finished: Path, tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    report.write_report(finished)
    report.summary_picture(finished, tmp_path / "picture.png")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("palette", [LIGHT, DARK])
def test_text_is_readable_on_every_ground(palette: dict[str, str]) -> None:
    for text in ("ink", "soft", "certified", "broken"):
        for ground in ("page", "card"):
            assert contrast(palette[text], palette[ground]) >= 4.5  # WCAG 2.1, level AA


class Markup(HTMLParser):
    """The tags left open, the ids and the text of a page."""

    VOID = frozenset({"meta", "br", "img"})

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def decoded(source: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))))


def contrast(first: str, second: str) -> float:
    """WCAG's contrast ratio of two colours, 1 to 21."""

    def luminance(colour: str) -> float:
        values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    dark, light = sorted([luminance(first), luminance(second)])
    return (light + 0.05) / (dark + 0.05)


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def fit(x: np.ndarray, y: np.ndarray, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Ridge classifiers on bootstraps of the data: weights (S, D, C), offsets (S, C)."""
    rng = np.random.default_rng(0)
    solutions = []
    for _ in range(samples):
        rows = rng.integers(0, len(x), len(x))
        a = np.c_[x[rows], np.ones(len(rows))]
        right = a.T @ (10 * np.eye(10)[y[rows]])
        solutions.append(np.linalg.solve(a.T @ a + 100 * np.eye(a.shape[1]), right))
    solution = np.stack(solutions)
    return solution[:, :-1], solution[:, -1]


def evaluate(
    x: np.ndarray, label: np.ndarray, w: np.ndarray, b: np.ndarray, eps: float
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Certificates and attacked images of averaged linear classifiers.

    The worst logit differences of a linear classifier over a box are closed form; the attack
    steps once along the sign of the average weights.
    """
    each = softmax(np.einsum("nd,sdc->snc", x, w) + b[:, None])
    probs = each.mean(0)
    predicted = probs.argmax(-1)
    toward = w[:, :, predicted].transpose(0, 2, 1)[..., None] - w[:, None]  # (S, N, D, C)
    offset = b[:, predicted][..., None] - b[:, None]
    low, high = np.clip(x - eps, 0, 1), np.clip(x + eps, 0, 1)
    up, down = np.maximum(toward, 0), np.minimum(toward, 0)
    product = "nd,sndc->snc"
    worst = np.einsum(product, low, up) + np.einsum(product, high, down) + offset
    best = np.einsum(product, high, up) + np.einsum(product, low, down) + offset
    lower = 1 / np.exp(-worst).sum(-1, keepdims=True)
    upper = 1 / np.exp(-best).sum(-1, keepdims=True)
    # pi_predicted - pi_j = pi_predicted (1 - exp(-difference)), sample by sample
    gap = (np.where(worst > 0, lower, upper) * (1 - np.exp(-worst))).mean(0)
    margin = np.where(np.eye(10, dtype=bool)[predicted], np.inf, np.clip(gap, -1, 1)).min(-1)

    own, n = np.eye(10, dtype=bool)[label], np.arange(len(x))
    rival = np.where(own, -np.inf, probs).argmax(-1)
    mean = w.mean(0)
    attacked = np.clip(x + eps * np.sign(mean[:, rival] - mean[:, label]).T, 0, 1)
    after = softmax(np.einsum("nd,sdc->snc", attacked, w) + b[:, None]).mean(0)
    correct = predicted == label

    def entropy(p: np.ndarray) -> np.ndarray:
        return -(p * np.log(np.maximum(p, 1e-30))).sum(-1)

    certificates = {
        "label": label,
        "predicted": predicted,
        "robust": margin > 0,
        "certified": (margin > 0) & correct,
        "margin": margin,
        "probability_lower": lower.mean(0)[:, 0],
        "probability_upper": upper.mean(0)[:, 0],
        "clean_correct": correct,
        "attacked_correct": correct & (after.argmax(-1) == label),
        "attacked_predicted": after.argmax(-1),
        "attacked_margin": np.log(after[n, label] / np.where(own, 0, after).max(-1)),
        "probs": probs.astype(np.float32),
        "mutual_information": np.maximum(entropy(probs) - entropy(each).mean(0), 0),
    }
    return certificates, attacked


def linear_run(
    folder: Path,
    *,
    samples: int = 4,
    epochs: int = 20,
    channels: int = 1,
    class_names: list[str] | None = None,
    attacked_images: bool = True,
    validation: bool = True,
    radii: list[float] | None = None,
) -> Path:
    """A run folder of averaged linear classifiers on real digits; training curves are made up."""
    digits: Any = load_digits()
    x, y = digits.data / 16.0, digits.target
    w, b = fit(x[:1437], y[:1437], samples)
    x, label = x[1437:], y[1437:]
    certificates, attacked = evaluate(x, label, w, b, EPS)
    radii = RADII if radii is None else radii
    sweep = [evaluate(x, label, w, b, radius)[0] for radius in radii]
    probs = certificates["probs"]
    results = {
        "eps": EPS,
        "num_test": len(label),
        "num_samples": samples,
        **{f"{name}_accuracy": float(certificates[of].mean()) for name, of in ACCURACIES.items()},
        "nll": float(-np.log(probs[np.arange(len(label)), label]).mean()),
        "brier": float(((probs - np.eye(10)[label]) ** 2).sum(-1).mean()),
        "ece": float(ece(jnp.asarray(probs), jnp.asarray(label))),
        "predictive_entropy": 0.3141,
        "mutual_information": float(certificates["mutual_information"].mean()),
        "kl_weight": 0.1,
        "posterior_scale": 0.0271 if samples > 1 else None,
        "seconds_per_epoch": 0.612,
        "train_seconds": 48.0,
        "evaluate_seconds": 11.0,
        "inference": "bbb" if samples > 1 else "map",
        "preset": "digits",
        "dataset": "digits",
        "model": "mlp",
        "seed": 0,
        "epochs": epochs,
        "train_eps": TRAIN_EPS,
        "lam": 0.1,
        "power": 0.0,
        "prior_scale": 0.1,
        "certify_method": "crown-ibp",
        "attack": "PGD, 20 steps, 1 restart",
        "arithmetic": "real",
        "tier": "exact",
        "curve": {
            "eps": radii,
            **{name: [float(c[of].mean()) for c in sweep] for name, of in ACCURACIES.items()},
            "num_images": len(label),
            "attack_steps": 20,
        },
        "versions": {"jax": "0.10.2", "bnncert": "0.1.0"},
        "class_names": class_names or [str(c) for c in range(10)],
    }
    config = {"preset": "digits", "inference": "bbb", "seed": 0, "train": {"epochs": epochs}}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**config, "note": "<b> & co"}))
    (folder / "results.json").write_text(json.dumps(results, allow_nan=False))
    lines = training_curves(epochs, validation)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    index = pick(certificates, each=8)

    def pictures(flat: np.ndarray) -> np.ndarray:
        return np.repeat(flat[index].reshape(-1, 8, 8, 1), channels, -1)

    images = {"index": index, "image": pictures(x)}
    if attacked_images:
        images["attacked"] = pictures(attacked)
    for name, arrays in (("certificates", certificates), ("gallery", images)):
        np.savez(folder / f"{name}.npz", allow_pickle=False, **arrays)
    return folder


def training_curves(epochs: int, validation: bool = True) -> list[dict[str, Any]]:
    lines = []
    for epoch in range(1, epochs + 1):
        done, ramp = epoch / epochs, min(1.0, 2 * epoch / epochs)
        fit = -2.3 * np.exp(-6 * done) - 0.5 * ramp
        kl = 12 + 6 * done
        lines.append(
            {
                "epoch": epoch,
                "step": 12 * epoch,
                "loss": -fit + 0.1 * kl,
                "log_likelihood": fit,
                "kl": kl,
                "eps": TRAIN_EPS * ramp,
                "lam": 1 - 0.9 * ramp,
                "learning_rate": 2e-3,
                "val_clean_accuracy": 0.96 - 0.8 * np.exp(-8 * done) if validation else None,
                "val_certified_accuracy": 0.75 * done if validation and epoch % 2 else None,
                "seconds": 0.6,
            }
        )
    return lines
