"""The colours of a report, and plots as SVG that follow the page into dark mode.

A plot is drawn in the light palette. `svg` then writes each of its colours as a CSS variable,
`var(--certified, #...)`, and the page's style swaps the variables for a dark reader.
"""

import io
import re
from collections.abc import Callable
from html import escape

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, FigureBase

# The outcome colours are told apart by people with any colour vision: they differ in lightness.
LIGHT = {
    "ink": "#1c2226",
    "soft": "#59636a",
    "line": "#dde2e4",
    "card": "#fffffe",
    "page": "#f7f8f7",
    "certified": "#0b63a5",
    "undecided": "#e9b949",
    "broken": "#c2410d",
    "misclassified": "#6d767d",
}
DARK = {
    "ink": "#e7ebed",
    "soft": "#a3adb4",
    "line": "#363e44",
    "card": "#1b2024",
    "page": "#121619",
    "certified": "#5fb0ee",
    "undecided": "#f0c862",
    "broken": "#ff8a57",
    "misclassified": "#98a2a9",
}


def css() -> str:
    """Both palettes as CSS variables."""
    light, dark = (
        "".join(f"--{name}:{colour};" for name, colour in palette.items())
        for palette in (LIGHT, DARK)
    )
    return f":root{{{light}}}@media screen and (prefers-color-scheme: dark){{:root{{{dark}}}}}"


def svg(draw: Callable[[FigureBase], None], size: tuple[float, float], description: str) -> str:
    """A drawing as inline SVG: text stays text, colours follow the page, ids are its own.

    Args:
        draw: puts the plot on an empty figure.
        size: width and height in inches; the page scales it.
        description: what the plot shows, for those who do not see it.
    """
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    buffer = io.StringIO()
    own = re.sub(r"[^a-z]", "", description.lower())[:24]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": own}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{own}-", text)
    for name, colour in LIGHT.items():
        text = text.replace(colour, f"var(--{name}, {colour})")
    box = re.search(r'viewBox="[^"]*"', text)
    opening = f'<svg role="img" aria-label="{escape(description)}" {box.group() if box else ""}>'
    return opening + text[text.index(">") + 1 :]
