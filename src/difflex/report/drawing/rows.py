"""Named rows with points or bars along one axis: for names too long to stand beside one another."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from difflex.report.drawing.elements import WIDTH, Drawing, element, heading, shortened, svg, text, wide
from difflex.report.drawing.plots import PlotPoint, SeriesStyle, marker
from difflex.report.drawing.scales import Axis, AxisScale, scaled

__all__ = ["ChartRow", "RowChart", "RowEntry", "rows"]

TOP, ROW, EDGE, FOOT = 26.0, 37.0, 12.0, 44.0


@dataclass(frozen=True, kw_only=True)
class RowEntry:
    """One point or bar of a row."""

    series: str
    """Whose entry in the legend shows and hides it."""
    look: SeriesStyle
    mark: PlotPoint
    """Its y says nothing here."""
    bar: bool = False
    """Drawn as a bar from 0, not as a point."""


@dataclass(frozen=True, kw_only=True)
class ChartRow:
    """What stands above its own line, by name."""

    name: str
    entries: tuple[RowEntry, ...]
    note: str = ""
    """A few words or a number at the end of the name's line."""


@dataclass(frozen=True, kw_only=True)
class RowChart:
    """Rows over one axis."""

    title: str
    description: str
    x: Axis
    rows: tuple[ChartRow, ...]


def rows(asked: RowChart) -> Drawing:
    """`asked` as a drawing: each name above its own line, so that both have the whole width."""
    marks = [entry.mark for row in asked.rows for entry in row.entries]
    there = [mark for mark in marks if asked.x.has(mark.x)]
    bounds = [bound for mark in there for bound in (mark.x, mark.low, mark.high) if bound is not None]
    height = TOP + ROW * len(asked.rows) + FOOT
    x = scaled(asked.x, bounds, EDGE, WIDTH - EDGE)
    made: list[Markup] = [heading(asked.title), *_axis(x, height)]
    for number, row in enumerate(asked.rows):
        made += _row(row, x, TOP + ROW * number)
    return Drawing(svg((WIDTH, height), asked.title, asked.description, *made), len(marks) - len(there))


def _axis(x: AxisScale, height: float) -> list[Markup]:
    bottom, made = height - FOOT + 4, []
    for tick in x.ticks(across=True):
        at, half = x(tick.value), wide(tick.label) / 2
        made.append(element("line", x1=at, x2=at, y1=bottom - 4, y2=bottom, class_="grid"))
        made.append(text(min(max(at, half), WIDTH - half), bottom + 13, tick.label, "middle", "tick"))
    made.append(text(WIDTH / 2, height - 8, x.axis.label, "middle", "axis"))
    return made


def _row(row: ChartRow, x: AxisScale, top: float) -> list[Markup]:
    line = top + 25
    room = WIDTH - (wide(row.note) + 12 if row.note else 0)
    made = [
        text(0, top + 12, shortened(row.name, room), kind="name"),
        text(WIDTH, top + 12, row.note, "end", "tick"),
        element("line", x1=x.start, x2=x.end, y1=line, y2=line, class_="grid"),
    ]
    return [*made, *(_entry(entry, x, line) for entry in row.entries if x.axis.has(entry.mark.x))]


def _entry(entry: RowEntry, x: AxisScale, line: float) -> Markup:
    mark, at = entry.mark, x(entry.mark.x)
    inside: list[Markup] = []
    if mark.low is not None and mark.high is not None and x.axis.has(mark.low) and x.axis.has(mark.high):
        inside.append(element("line", x1=x(mark.low), x2=x(mark.high), y1=line, y2=line, class_="whisker"))
    drawn = _bar(mark, x, line) if entry.bar else marker(entry.look, at, line, 5.2, data_tip=mark.tip)
    return element("g", *inside, drawn, class_=f"series c{entry.look.colour}", data_series=entry.series)


def _bar(mark: PlotPoint, x: AxisScale, line: float) -> Markup:
    """From 0; at least a hair wide, so that nothing can be seen, and pointed at, too."""
    zero = x(0.0) if not x.axis.log else x.start
    start, end = sorted((zero, x(mark.x)))
    return element("rect", x=start, y=line - 5, width=max(end - start, 1.5), height=10.0, rx=2.0, class_="bar", data_tip=mark.tip)
