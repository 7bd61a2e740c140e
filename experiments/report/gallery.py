"""The grid of test images in a report: what the network says of each, and what is proved.

Each image is a card: the picture, its true and predicted class, the verdict, the certified range
of the predicted class's probability over the ball, and, where the attack succeeded, the attacked
picture and the difference, stretched so that +-eps is white and black.
"""

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from ..pipeline.outcomes import OUTCOMES, Certificates, outcomes


class Gallery(NamedTuple):
    """The images of a run's gallery.npz.

    `places` (n,) are indices in the test set, `image` and `attacked` (n, height, width,
    channels) pixels in [0, 1]; `attacked` is None where a run kept no attacked images.
    """

    places: Int[np.ndarray, "n"]
    image: Float[np.ndarray, "n height width channels"]
    attacked: Float[np.ndarray, "n height width channels"] | None


def sections(
    gallery: Gallery,
    certificates: Certificates,
    class_names: Sequence[str],
    eps: float,
) -> str:
    """The cards as HTML, by outcome: at most 8 of each, 6 where three pictures make a card."""
    outcome = outcomes(certificates)
    parts = []
    for number, kind in enumerate(OUTCOMES):
        wide = " wide" if kind.name == "broken" and gallery.attacked is not None else ""
        places = np.flatnonzero(outcome[gallery.places] == number)[: 6 if wide else 8]
        if not places.size:
            continue
        cards = "".join(_card(gallery, certificates, int(p), class_names, eps) for p in places)
        total = int(np.sum(outcome == number))
        parts.append(
            f"<h3>{symbol(number)}{kind.name.capitalize()} "
            f'<span class="soft">{places.size} of {total}: {kind.meaning}</span></h3>'
            f'<ul class="cards{wide}">{cards}</ul>'
        )
    return "".join(parts)


def strip(
    gallery: Gallery, certificates: Certificates, class_names: Sequence[str]
) -> list[tuple[np.ndarray, str, str]]:
    """Eight pictures with captions and palette names: certified ones above, attacked ones below."""
    outcome = outcomes(certificates)[gallery.places]
    names = [c.name for c in OUTCOMES]

    def called(place: int, field: str = "predicted") -> str:
        return class_names[int(certificates[field][gallery.places[place]])]

    def plain(kind: int, said: str) -> list[tuple[np.ndarray, str, str]]:
        return [
            (gallery.image[p], f"{OUTCOMES[kind].symbol} {called(p)}{said}", names[kind])
            for p in np.flatnonzero(outcome == kind).tolist()
        ]

    attacked: list[tuple[np.ndarray, str, str]] = []
    if gallery.attacked is not None:
        for p in np.flatnonzero(outcome == names.index("broken"))[:2].tolist():
            after = f"✗ now {called(p, 'attacked_predicted')}"
            attacked.append((gallery.image[p], called(p), "ink"))
            attacked.append((gallery.attacked[p], after, "broken"))
    proved = plain(names.index("certified"), ", proved")
    undecided = plain(names.index("undecided"), "")
    above = proved[:4] + undecided[: max(0, 4 - len(proved))]
    return (above + attacked + proved[4:] + undecided)[:8]


def png(image: Float[np.ndarray, "height width channels"]) -> str:
    """A picture in [0, 1] with 1 or 3 channels as a PNG data URI, at its own size."""
    pixels = np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(
        buffer, "PNG", optimize=True
    )
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def symbol(outcome: int) -> str:
    """An outcome's symbol in its colour."""
    kind = OUTCOMES[outcome]
    return f'<span class="symbol {kind.name}" aria-hidden="true">{kind.symbol}</span>'


def _card(
    gallery: Gallery, certificates: Certificates, place: int, names: Sequence[str], eps: float
) -> str:
    index = int(gallery.places[place])
    of: dict[str, Any] = {name: values[index] for name, values in certificates.items()}
    outcome = int(outcomes({name: values[[index]] for name, values in certificates.items()})[0])
    kind = OUTCOMES[outcome].name
    truth, predicted = escape(names[int(of["label"])]), escape(names[int(of["predicted"])])
    image = gallery.image[place]
    views = [_view(image, f"test image {index}, true class {truth}", f"test image {index}")]
    if kind == "broken" and gallery.attacked is not None:
        attacked = gallery.attacked[place]
        to = escape(names[int(of["attacked_predicted"])])
        change = 0.5 + (attacked - image) / (2 * eps or 1.0)
        views.append(_view(attacked, f"attacked image, now taken for {to}", f"now <b>{to}</b>"))
        views.append(_view(change, "difference of the two, amplified", "difference"))
    wrong = "" if of["predicted"] == of["label"] else f"<br>is {truth}"
    verdict = kind
    if kind == "misclassified":
        verdict = "stays wrong" if of["robust"] else "wrong"
    low, high = (float(np.clip(of[f"probability_{end}"], 0, 1)) for end in ("lower", "upper"))
    now = float(of["probs"][int(of["predicted"])])
    return (
        f'<li class="card {kind}"><div class="views">{"".join(views)}</div>'
        f'<p class="class"><b>{predicted}</b> <span class="soft">{100 * now:.0f}%</span>{wrong}</p>'
        f'<p class="verdict">{symbol(outcome)}{verdict}</p>'
        f'<div class="range" role="img" aria-label="probability of {predicted} in the ball: '
        f'between {low:.2f} and {high:.2f}"><i style="left:{100 * low:.1f}%;'
        f'right:{100 * (1 - high):.1f}%"></i><b style="left:{100 * now:.1f}%"></b></div>'
        f'<p class="soft">margin &ge; {_signed(float(of["margin"]))}</p></li>'
    )


def _view(image: np.ndarray, alt: str, caption: str) -> str:
    return (
        f'<figure><img src="{png(image)}" alt="{alt}" width="{image.shape[1]}" '
        f'height="{image.shape[0]}"><figcaption>{caption}</figcaption></figure>'
    )


def _signed(value: float) -> str:
    """Two decimals, or one digit where those would read as zero: the sign is the statement."""
    text = f"{value:+.2f}" if abs(value) >= 0.005 else f"{value:+.1g}"
    return text.replace("-", "&minus;", 1) if value < 0 else text
