"""Plots of points and lines over two axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from difflex.report.drawing.elements import WIDTH, Drawing, element, heading, svg, text, wide
from difflex.report.drawing.scales import Axis, AxisScale, scaled

__all__ = ["MARKERS", "Plot", "PlotCurve", "PlotPoint", "SeriesStyle", "marker", "plot"]

HEIGHT = 250.0
TOP, RIGHT, BOTTOM = 30.0, 14.0, 46.0
Marker = Literal["circle", "diamond", "square", "triangle", "cross", "wedge", "ring", "none"]
# Each within a circle of radius 1 at the origin; told apart without any colour.
MARKERS: dict[Marker, str] = {
    "circle": "M-.8 0a.8 .8 0 1 0 1.6 0a.8 .8 0 1 0 -1.6 0Z",
    "diamond": "M0 -1.1L1 0L0 1.1L-1 0Z",
    "square": "M-.75 -.75H.75V.75H-.75Z",
    "triangle": "M0 -1L.95 .7H-.95Z",
    "cross": "M-.95 -.55L-.55 -.95L0 -.4L.55 -.95L.95 -.55L.4 0L.95 .55L.55 .95L0 .4L-.55 .95L-.95 .55L-.4 0Z",
    "wedge": "M0 1L.95 -.7H-.95Z",
    "ring": "M-.95 0a.95 .95 0 1 0 1.9 0a.95 .95 0 1 0 -1.9 0ZM-.5 0a.5 .5 0 1 1 1 0a.5 .5 0 1 1 -1 0Z",
    "none": "",
}


@dataclass(frozen=True, kw_only=True)
class SeriesStyle:
    """How a series looks: by colour, by the form of its points and by the pattern of its lines, each enough by itself."""

    colour: int = 0
    """0 to 8: which of the colours of the style sheet."""
    marker: Marker = "circle"
    dash: str = ""
    """Lengths of strokes and gaps, as SVG takes them; empty for a full line."""


@dataclass(frozen=True, kw_only=True)
class PlotPoint:
    """A point that can be asked for its numbers."""

    x: float
    y: float
    tip: str
    """What it says when it is pointed at: a name, then a line for each number."""
    low: float | None = None
    """Where its interval begins, along y in plots and along x in rows."""
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class PlotCurve:
    """The points of one series."""

    series: str
    """Whose entry in the legend shows and hides it."""
    look: SeriesStyle
    marks: tuple[PlotPoint, ...]
    line: bool = True
    """Whether the points are joined, in the order they are given in."""
    dots: bool = True
    """Whether points are seen; they answer when pointed at all the same."""
    steps: bool = False
    """Whether the line goes level and then up or down, as a distribution does."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Curves over two axes."""

    title: str
    description: str
    x: Axis
    y: Axis
    curves: tuple[PlotCurve, ...]


def plot(asked: Plot, height: float = HEIGHT) -> Drawing:
    """`asked` as a drawing; what has no place on its axes is left out and counted."""
    marks = [mark for curve in asked.curves for mark in curve.marks]
    there = [mark for mark in marks if asked.x.has(mark.x) and asked.y.has(mark.y)]
    bounds = [bound for mark in there for bound in (mark.y, mark.low, mark.high) if bound is not None]
    y = scaled(asked.y, bounds, height - BOTTOM, TOP)
    left = 10 + max((wide(tick.label) for tick in y.ticks(across=False)), default=0)
    x = scaled(asked.x, [mark.x for mark in there], left, WIDTH - RIGHT)
    inside = [*_frame(asked.title, x, y, height), *(_curve(curve, x, y) for curve in asked.curves)]
    return Drawing(svg((WIDTH, height), asked.title, asked.description, heading(asked.title), *inside), len(marks) - len(there))


def marker(look: SeriesStyle, x: float, y: float, size: float = 4.6, **attributes: str | float | None) -> Markup:
    """The point of a series at a place."""
    move = f"translate({x:.2f} {y:.2f}) scale({size:g})"
    return element("path", d=MARKERS[look.marker], transform=move, class_="dot", **attributes)


def _frame(title: str, x: AxisScale, y: AxisScale, height: float) -> list[Markup]:
    """Grid, ticks and labels; that of y stands above its axis, where it need not be turned, unless it is the title."""
    made = [text(x.end, TOP - 6, y.axis.label, "end", "axis")] if y.axis.label != title else []
    for tick in y.ticks(across=False):
        at = y(tick.value)
        made.append(element("line", x1=x.start, x2=x.end, y1=at, y2=at, class_="grid"))
        made.append(text(x.start - 6, at + 4, tick.label, "end", "tick"))
    for tick in x.ticks(across=True):
        at = x(tick.value)
        made.append(element("line", x1=at, x2=at, y1=y.start, y2=y.start + 4, class_="grid"))
        made.append(text(_held(at, wide(tick.label)), y.start + 17, tick.label, "middle", "tick"))
    made.append(element("line", x1=x.start, x2=x.end, y1=y.start, y2=y.start, class_="base"))
    made.append(text((x.start + x.end) / 2, height - 8, x.axis.label, "middle", "axis"))
    return made


def _held(at: float, width: float) -> float:
    """`at`, moved so far that a centred text of this width stays in the drawing."""
    return min(max(at, width / 2), WIDTH - width / 2)


def _curve(curve: PlotCurve, x: AxisScale, y: AxisScale) -> Markup:
    there = [mark for mark in curve.marks if x.axis.has(mark.x) and y.axis.has(mark.y)]
    places = [(x(mark.x), y(mark.y)) for mark in there]
    made: list[Markup] = []
    for mark, (at, _) in zip(there, places, strict=True):
        if mark.low is not None and mark.high is not None and y.axis.has(mark.low) and y.axis.has(mark.high):
            made.append(element("line", x1=at, x2=at, y1=y(mark.low), y2=y(mark.high), class_="whisker"))
    if curve.line and len(places) > 1:
        made.append(element("path", d=_path(places, curve.steps), class_="line", stroke_dasharray=curve.look.dash or None))
    seen = curve.look if curve.dots else SeriesStyle(colour=curve.look.colour, marker="circle")
    hidden = None if curve.dots else "0"
    for mark, (at, up) in zip(there, places, strict=True):
        made.append(marker(seen, at, up, data_tip=mark.tip, opacity=hidden))
    return element("g", *made, class_=f"series c{curve.look.colour}", data_series=curve.series)


def _path(places: Sequence[tuple[float, float]], steps: bool) -> str:
    (x, y), *rest = places
    corner = "H{0:.2f}V{1:.2f}" if steps else "L{0:.2f} {1:.2f}"
    return f"M{x:.2f} {y:.2f}" + "".join(corner.format(*place) for place in rest)
