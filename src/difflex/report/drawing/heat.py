"""Heat maps: a colour for each cell, its number written in where there is room."""

from __future__ import annotations

import math
from dataclasses import dataclass

from markupsafe import Markup

from difflex.report.drawing.elements import WIDTH, Drawing, element, heading, shortened, svg, text, wide

__all__ = ["HeatCell", "HeatMap", "HeatStrips", "heat_map", "ramp", "strength", "strips"]

FAINT = 0.1
"""How strong the colour of the least value is; that of the most is 1. One hue over the ground of the page, light or dark, so
that it reads alike to all eyes."""
OVER = {"over": 0.68, "half": 0.55}
"""From these strengths on, numbers are written in the colour of the ground: on light pages, and already on dark ones."""
TOP, FOOT, LINE, GAP = 28.0, 42.0, 26.0, 1.5


@dataclass(frozen=True, kw_only=True)
class HeatCell:
    """A value with its place between the least and the most."""

    share: float
    """From 0 to 1: which colour. NaN where there is none."""
    label: str
    tip: str


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Rows by columns; a cell that is None stays empty."""

    title: str
    description: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[HeatCell | None, ...], ...]
    across: str
    """What the columns are."""


@dataclass(frozen=True, kw_only=True)
class HeatStrips:
    """Rows of many narrow cells, each under its name: histograms, one below another."""

    title: str
    description: str
    names: tuple[str, ...]
    notes: tuple[str, ...]
    """A few words at the end of each name's line."""
    cells: tuple[tuple[HeatCell | None, ...], ...]
    ticks: tuple[tuple[float, str], ...]
    """Labels along the foot, each at a number of cells from the left."""
    across: str


def strength(share: float) -> float:
    """How strong the colour of `share`, from 0 to 1, is."""
    return FAINT + (1 - FAINT) * min(max(share, 0.0), 1.0)


def ramp(low: str, high: str, label: str) -> Markup:
    """The legend of a heat map: what its first and its last colour stand for."""
    bar = element("span", class_="ramp-bar")
    return element("p", element("span", label), element("span", low), bar, element("span", high), class_="ramp")


def heat_map(asked: HeatMap) -> Drawing:
    """`asked` as a drawing; the names of rows stand beside them."""
    left = min(max(map(wide, asked.rows), default=0) + 8, WIDTH * 0.45)
    step = (WIDTH - left) / max(len(asked.columns), 1)
    line = min(LINE, max(step, 14.0))
    height = TOP + line * len(asked.rows) + FOOT
    made = [heading(asked.title)]
    for number, (name, cells) in enumerate(zip(asked.rows, asked.cells, strict=True)):
        top = TOP + line * number
        made.append(text(left - 8, top + line / 2 + 4, shortened(name, left - 8), "end", "name"))
        made += [_cell(cell, left + step * i, top, step, line) for i, cell in enumerate(cells)]
    ticks = tuple((i + 0.5, name) for i, name in enumerate(asked.columns))
    made += _foot(ticks, left, step, height, asked.across)
    return Drawing(svg((WIDTH, height), asked.title, asked.description, *made), _undrawn(asked.cells))


def strips(asked: HeatStrips) -> Drawing:
    """`asked` as a drawing."""
    line, count = 34.0, max(map(len, asked.cells), default=1)
    step, height = WIDTH / count, TOP + 34.0 * len(asked.names) + FOOT
    made = [heading(asked.title)]
    for number, (name, note, cells) in enumerate(zip(asked.names, asked.notes, asked.cells, strict=True)):
        top = TOP + line * number
        made.append(text(0, top + 12, shortened(name, WIDTH - wide(note) - 12), kind="name"))
        made.append(text(WIDTH, top + 12, note, "end", "tick"))
        made.append(element("line", x1=0.0, x2=WIDTH, y1=top + 28, y2=top + 28, class_="grid"))
        made += [_cell(cell, step * i, top + 16, step, 12.0) for i, cell in enumerate(cells) if cell is not None]
    made += _foot(asked.ticks, 0.0, step, height, asked.across)
    return Drawing(svg((WIDTH, height), asked.title, asked.description, *made), _undrawn(asked.cells))


def _undrawn(cells: tuple[tuple[HeatCell | None, ...], ...]) -> int:
    return sum(cell is not None and not math.isfinite(cell.share) for row in cells for cell in row)


def _cell(cell: HeatCell | None, x: float, y: float, width: float, height: float) -> Markup:
    gap = GAP if width > 12 else 0.4
    place = {"x": x, "y": y, "width": max(width - gap, 0.5), "height": max(height - gap, 0.5)}
    if cell is None or not math.isfinite(cell.share):
        return element("rect", class_="ground", data_tip=cell and cell.tip, **place)
    made = element("rect", class_="heat", fill_opacity=strength(cell.share), data_tip=cell.tip, **place)
    if wide(cell.label, 11) + 4 > width or height < 14:
        return made
    over = next((f" {name}" for name, least in OVER.items() if strength(cell.share) > least), "")
    centre = {"x": x + (width - gap) / 2, "y": y + height / 2 + 3.5}
    return made + element("text", cell.label, text_anchor="middle", class_=f"in-cell{over}", **centre)


def _foot(ticks: tuple[tuple[float, str], ...], left: float, step: float, height: float, across: str) -> list[Markup]:
    """Names of columns, as many as there is room for, and what they are."""
    made, reach = [], -math.inf
    for place, label in ticks:
        half = wide(label) / 2
        at = min(max(left + step * place, half), WIDTH - half)
        if at - half - 3 >= reach:
            made.append(text(at, height - FOOT + 14, label, "middle", "tick"))
            reach = at + half
    return [*made, text((left + WIDTH) / 2, height - 8, across, "middle", "axis")]
