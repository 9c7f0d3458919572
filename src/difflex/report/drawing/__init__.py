"""Figures as self-contained SVG and HTML, drawn from plain data.

This module has the elements and axes of drawings; `charts` draws plots, row charts and legends, `heat` heat maps. A page with
drawings includes `drawing.css` (the colours, light and dark) and `drawing.js` (tooltips, and legends that hide series). A figure
is an element of class `figure` with its drawings and its legend. All drawings are `WIDTH` units wide, about the width of a phone,
so that their letters have one size; place several side by side where there is room.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup, escape

__all__ = ["WIDTH", "Axis", "AxisScale", "AxisTick", "Drawing", "element", "shortened", "svg", "text", "text_width"]

WIDTH = 400.0
"""Of a drawing, in its own units."""
LETTERS = 12.0
"""The size of all letters, in the units of a drawing."""
NARROW, BROAD = set("iljtfrI.,:;|!'()[]/ -"), set("mwMW@%+<>=\N{EN DASH}\N{MULTIPLICATION SIGN}\N{INFINITY}")


class Drawing(NamedTuple):
    """An SVG element, and the number of values that it cannot show: NaN, infinity, 0 on a log axis."""

    svg: Markup
    left_out: int = 0


def element(name: str, *inside: str, **attributes: str | float | None) -> Markup:
    """Return `<name ...>inside</name>`, all escaped except Markup. `class_` becomes class, `_` becomes `-`, None is left out."""
    assignments = [
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _attribute(value))
        for key, value in attributes.items()
        if value is not None
    ]
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), Markup("").join(assignments), Markup("").join(map(escape, inside)))


def svg(height: float, title: str, description: str, *inside: str) -> Markup:
    """Return a scalable drawing with its heading; screen readers read out `title` and `description`."""
    labels = (element("title", title), element("desc", f"{description} The arrow keys step through its values."))
    # Bold letters are a little wider than others.
    heading = text(0, LETTERS, shortened(title, WIDTH, LETTERS * 1.08), kind="heading")
    box = f"0 0 {WIDTH:g} {height:g}"
    return element("svg", *labels, heading, *inside, viewBox=box, role="img", class_="drawing", tabindex="0", aria_label=title)


def text(x: float, y: float, words: str, anchor: str = "start", kind: str | None = None) -> Markup:
    """Return a line of text whose baseline starts, ends or is centred at (x, y)."""
    return element("text", words, x=x, y=y, text_anchor=anchor, class_=kind)


def text_width(words: str, letters: float = LETTERS) -> float:
    """Return the largest width of `words` in any common sans-serif font, in the units of a drawing."""
    return letters * sum(
        0.4 if letter in NARROW else 0.98 if letter in BROAD else 0.74 if letter.isupper() else 0.62 for letter in words
    )


def shortened(words: str, room: float, letters: float = LETTERS) -> str:
    """Return `words` without as much of their middle as does not fit into `room`; the ends tell names apart."""
    if text_width(words, letters) <= room:
        return words
    length = len(words) - 1
    while length > 2 and text_width(_cut(words, length), letters) > room:
        length -= 1
    return _cut(words, length)


def _cut(words: str, length: int) -> str:
    return f"{words[: length - length // 2]}…{words[len(words) - length // 2 :]}"


def _attribute(value: str | float) -> str:
    if isinstance(value, str):
        return value
    assert math.isfinite(value), "callers leave such values out"
    return f"{value:.2f}".rstrip("0").rstrip(".")


class AxisTick(NamedTuple):
    """A labelled position on an axis."""

    value: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Axis:
    """The quantity along one direction; bounds and ticks that are not set follow the values."""

    label: str
    log: bool = False
    low: float | None = None
    high: float | None = None
    ticks: tuple[AxisTick, ...] = ()
    """Replace round numbers, for example by the sizes that were trained."""
    percent: bool = False
    """Whether labels are shares in per cent."""
    reversed: bool = False
    """Whether large values come first."""

    def has(self, value: float | None) -> bool:
        """Return whether `value` can be drawn on this axis."""
        return value is not None and math.isfinite(value) and (value > 0 or not self.log)

    def scale(self, values: Sequence[float | None], start: float, end: float) -> AxisScale:
        """Lay the axis out from `start` to `end` with room for `values`; bounds that are not set become round numbers."""
        finite = [value for value in values if value is not None and self.has(value)]
        low = self.low if self.low is not None else min(finite, default=1.0 if self.log else 0.0)
        high = self.high if self.high is not None else max(finite, default=10.0 if self.log else 1.0)
        if self.log:
            low, high = (low / 1.5, high * 1.5) if high / low < 1.5 else (low, high)
            low = low if self.low is not None else low / (high / low) ** 0.06
            high = high if self.high is not None else high * (high / low) ** 0.06
        else:
            if high <= low:
                low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
            step = _tick_distance(high - low)
            low = self.low if self.low is not None else math.floor(low / step) * step
            high = self.high if self.high is not None else math.ceil(high / step) * step
        return AxisScale(axis=self, low=low, high=high, start=start, end=end)


@dataclass(frozen=True, kw_only=True)
class AxisScale:
    """An axis laid out from `start` to `end`, in the units of the drawing."""

    axis: Axis
    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float | None) -> float:
        """Return the position of `value`; values outside the bounds are drawn at the border."""
        assert value is not None, "callers leave such values out"
        low, high, at = map(math.log10, (self.low, self.high, value)) if self.axis.log else (self.low, self.high, value)
        share = min(max((at - low) / (high - low), 0.0), 1.0)
        return self.start + (1 - share if self.axis.reversed else share) * (self.end - self.start)

    def ticks(self, across: bool) -> list[AxisTick]:
        """Return the ticks whose labels fit; `across` for a horizontal axis, whose labels are side by side."""
        candidates = [tick for tick in self.axis.ticks if self.low <= tick.value <= self.high] or self._round_ticks()
        ticks: list[AxisTick] = []
        reach = -math.inf
        for tick in sorted(candidates, key=lambda tick: self(tick.value) * (1 if across else -1)):
            place = self(tick.value) if across else -self(tick.value)
            half = text_width(tick.label) / 2 + 3 if across else 9
            if place - half >= reach:
                ticks.append(tick)
                reach = place + half
        return ticks

    def _round_ticks(self) -> list[AxisTick]:
        if self.axis.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            decades = math.log10(self.high / self.low)
            factors = (1,) if decades > 3 else (1, 2, 5) if decades > 1.2 else (1, 1.5, 2, 3, 5, 7)
            values = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
        else:
            step = _tick_distance(self.high - self.low)
            count = math.floor(self.high / step + 1e-9) - math.ceil(self.low / step - 1e-9)
            values = [(math.ceil(self.low / step - 1e-9) + i) * step for i in range(count + 1)]
        inside = [value for value in values if self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9) or value == 0]
        return [AxisTick(value, _tick_label(value, self.axis)) for value in inside]


def _tick_distance(span: float) -> float:
    """Return a round number of which four to eight make `span`."""
    rough = span / 5
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.9999)


def _tick_label(value: float, axis: Axis) -> str:
    if axis.percent:
        return f"{round(100 * value, 6):g} %"
    if value == 0:
        return "0"
    if axis.log and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{round(value, 10):,.10g}" if abs(value) < 1e15 else f"{value:.1e}"
