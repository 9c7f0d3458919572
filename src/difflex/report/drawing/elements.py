"""Elements of SVG and HTML, with everything escaped, and how wide a text will be."""

import math
from typing import NamedTuple

from markupsafe import Markup, escape

__all__ = ["LETTERS", "WIDTH", "Drawing", "element", "heading", "shortened", "svg", "text", "wide"]

WIDTH = 400.0
"""Of a drawing, in its own units: about what it measures on a phone."""
LETTERS = 12.0
"""Size of all letters, in the units of a drawing."""
NARROW, BROAD = set("iljtfrI.,:;|!'()[]/ -"), set("mwMW@%+<>=\N{EN DASH}\N{MULTIPLICATION SIGN}\N{INFINITY}")


class Drawing(NamedTuple):
    """An image as an SVG element, and how many of its values could not be drawn: NaN, infinity, 0 on a log axis."""

    svg: Markup
    left_out: int = 0


def element(name: str, *inside: str, **attributes: str | float | None) -> Markup:
    """`<name ...>inside</name>`; all escaped but what is Markup. `class_` is class, `_` becomes `-`, None is left out."""
    said = [
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _plain(value))
        for key, value in attributes.items()
        if value is not None
    ]
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), Markup("").join(said), Markup("").join(map(escape, inside)))


def svg(size: tuple[float, float], title: str, description: str, *inside: str) -> Markup:
    """An image that scales with its place on the page and tells those who cannot see it what it shows."""
    named = (element("title", title), element("desc", f"{description} The arrow keys tell its numbers one after another."))
    box = f"0 0 {size[0]:g} {size[1]:g}"
    return element("svg", *named, *inside, viewBox=box, role="img", class_="drawing", tabindex="0", aria_label=title)


def text(x: float, y: float, words: str, anchor: str = "start", kind: str | None = None) -> Markup:
    """A line of text whose base begins, ends or is centred at a point."""
    return element("text", words, x=x, y=y, text_anchor=anchor, class_=kind)


def heading(words: str) -> Markup:
    """The title of a drawing, at its top; it is bold, and so a little wider than other text."""
    return text(0, LETTERS, shortened(words, WIDTH, LETTERS * 1.08), kind="heading")


def wide(words: str, letters: float = LETTERS) -> float:
    """How wide `words` will be at most, in the units of a drawing, whatever sans-serif the reader has."""
    return letters * sum(0.4 if each in NARROW else 0.98 if each in BROAD else 0.74 if each.isupper() else 0.62 for each in words)


def shortened(words: str, room: float, letters: float = LETTERS) -> str:
    """`words`, or as much of them as fits the `room` with its middle left out: names differ at their ends."""
    if wide(words, letters) <= room:
        return words
    kept = len(words) - 1
    while kept > 2 and wide(_cut(words, kept), letters) > room:
        kept -= 1
    return _cut(words, kept)


def _cut(words: str, kept: int) -> str:
    return f"{words[: kept - kept // 2]}…{words[len(words) - kept // 2 :]}"


def _plain(value: str | float) -> str:
    if isinstance(value, str):
        return value
    assert math.isfinite(value), "a drawing has no place for it"
    return f"{value:.2f}".rstrip("0").rstrip(".")
