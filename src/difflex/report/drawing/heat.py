"""Heat maps: a colour for each cell, with its number where there is room."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from difflex.report.drawing import WIDTH, Drawing, element, shortened, svg, text, text_width

FAINT = 0.1
"""The opacity of the smallest value; that of the largest is 1. One hue looks the same to colour-blind eyes."""
OVER = {"over": 0.68, "half": 0.55}
"""Above these opacities numbers are in the colour of the background: on light pages, and on dark ones."""
TOP, FOOT, LINE, GAP = 28.0, 42.0, 26.0, 1.5
STRIP = 34.0
"""The height of a strip with its name."""
HEAD, NAME, GROUP, CELL, BROADEST = 60.0, 19.0, 75.0, 15.0, 60.0
"""Of grouped heat maps: the height of the names of columns, of that of a group, and of all its rows at most; the largest cell."""
STRIDES = (1, 2, 5, 10, 20, 50)
"""Which of the columns of a name have labels: as many as have room."""


class HeatCell(NamedTuple):
    """A value as a colour."""

    share: float
    """Its place between the smallest value, 0, and the largest, 1; NaN for none."""
    label: str
    tip: str
    """The tooltip."""


HeatRows = Sequence[Sequence[HeatCell | None]]


class HeatStrip(NamedTuple):
    """A histogram as a row of narrow cells under its name."""

    name: str
    note: str
    """A few words at the right end of the name's line."""
    cells: Sequence[HeatCell | None]


class HeatGroup(NamedTuple):
    """Rows of a heat map under their own name."""

    name: str
    note: str
    """A few words at the right end of the name's line."""
    cells: HeatRows
    framed: tuple[int, int] | None = None
    """The row and the column of the cell with a frame."""


class HeatColumn(NamedTuple):
    """A column of grouped rows: the name that it shares with its neighbours, and its own."""

    shared: str
    name: str


def ramp(low: str, high: str, label: str) -> Markup:
    """Return the legend of a heat map: the values of its first and its last colour."""
    bar = element("span", class_="ramp-bar")
    return element("p", element("span", label), element("span", low), bar, element("span", high), class_="ramp")


def heat_map(title: str, description: str, rows: Sequence[str], columns: Sequence[str], cells: HeatRows, label: str) -> Drawing:
    """Draw `cells` row by row beside the names of the rows; None is an empty cell, `label` says what the columns are."""
    left = min(max(map(text_width, rows), default=0) + 8, WIDTH * 0.45)
    step = (WIDTH - left) / max(len(columns), 1)
    line = min(LINE, max(step, 14.0))
    height = TOP + line * len(rows) + FOOT
    parts = []
    for i, (name, row) in enumerate(zip(rows, cells, strict=True)):
        top = TOP + line * i
        parts.append(text(left - 8, top + line / 2 + 4, shortened(name, left - 8), "end", "name"))
        parts += [_cell(cell, left + step * j, top, step, line) for j, cell in enumerate(row)]
    ticks = [(i + 0.5, name) for i, name in enumerate(columns)]
    parts += _foot(ticks, left, step, height, label)
    return Drawing(svg(height, title, description, *parts), _left_out(cells))


def heat_strips(
    title: str, description: str, strips: Sequence[HeatStrip], ticks: Sequence[tuple[float, str]], label: str
) -> Drawing:
    """Draw `strips` one below another; `ticks` are labels at a number of cells from the left."""
    cells = [strip.cells for strip in strips]
    step, height = WIDTH / max(map(len, cells), default=1), TOP + STRIP * len(strips) + FOOT
    parts = []
    for i, strip in enumerate(strips):
        top = TOP + STRIP * i
        parts.append(text(0, top + 12, shortened(strip.name, WIDTH - text_width(strip.note) - 12), kind="name"))
        parts.append(text(WIDTH, top + 12, strip.note, "end", "tick"))
        parts.append(element("line", x1=0.0, x2=WIDTH, y1=top + 28, y2=top + 28, class_="grid"))
        parts += [_cell(cell, step * j, top + 16, step, 12.0) for j, cell in enumerate(strip.cells) if cell is not None]
    parts += _foot(ticks, 0.0, step, height, label)
    return Drawing(svg(height, title, description, *parts), _left_out(cells))


def heat_groups(
    title: str,
    description: str,
    groups: Sequence[HeatGroup],
    rows: Sequence[str],
    columns: Sequence[HeatColumn],
    labels: tuple[str, str],
) -> Drawing:
    """Draw `groups` one below another, all of the same rows and columns; `labels` say what the rows and the colours are."""
    left = min(max(map(text_width, (labels[0], *rows))) + 8, WIDTH * 0.45)
    step = min((WIDTH - left) / max(len(columns), 1), BROADEST)
    line = min(CELL, GROUP / max(len(rows), 1)) if len(groups) > 1 else CELL
    top, parts = HEAD, [text(left - 8, HEAD - 8, labels[0], "end", "tick"), *_heads(columns, left, step)]
    for group in groups:
        note = shortened(group.note, 0.75 * WIDTH)
        parts.append(text(0, top + 13, shortened(group.name, WIDTH - text_width(note) - 12), kind="name"))
        parts.append(text(WIDTH, top + 13, note, "end", "tick"))
        top += NAME
        every = math.ceil(12 / line)
        parts += [
            text(left - 8, top + line * (i + 0.5) + 4, shortened(rows[i], left - 8), "end", "tick")
            for i in range(0, len(rows), every)
        ]
        for i, row in enumerate(group.cells):
            parts += [_cell(cell, left + step * j, top + line * i, step, line) for j, cell in enumerate(row)]
        if group.framed:
            i, j = group.framed
            place = {"x": left + step * j, "y": top + line * i, "width": step, "height": line}
            parts.append(element("rect", class_="frame", **place))
        top += line * len(rows) + 6
    parts += _scale(labels[1], left, top + 10)
    return Drawing(svg(top + 28, title, description, *parts), sum(_left_out(group.cells) for group in groups))


def _heads(columns: Sequence[HeatColumn], left: float, step: float) -> list[Markup]:
    """Return the names of columns: shared ones over a line as long as their columns, and own ones as far as they have room."""
    broadest = max((text_width(column.name) + 3 for column in columns), default=1.0)
    every = next((every for every in STRIDES if every * step >= broadest), len(columns))
    parts, start = [], 0
    while start < len(columns):
        end = next((i for i in range(start, len(columns)) if columns[i].shared != columns[start].shared), len(columns))
        near, far = left + step * start, left + step * end - GAP
        if text_width(name := shortened(columns[start].shared, far - near)) <= far - near:
            parts.append(text((near + far) / 2, HEAD - 26, name, "middle", "name"))
        parts.append(element("line", x1=near, x2=far, y1=HEAD - 21, y2=HEAD - 21, class_="base"))
        parts += _ticks([(i + 0.5, columns[i].name) for i in range(start, end, every)], left, step, HEAD - 8)
        start = end
    return parts


def _scale(label: str, left: float, top: float) -> list[Markup]:
    """Return the colours from the value 0 to 1 in a row."""
    words = f"1  {label}"
    start = min(left + text_width("0") + 6, WIDTH - text_width(words) - 12 * 11 - 5)
    cells = [_cell(HeatCell(i / 10, "", ""), start + 12 * i, top, 12.0, 10.0) for i in range(11)]
    return [text(start - 5, top + 9, "0", "end", "tick"), *cells, text(start + 12 * 11 + 5, top + 9, words, kind="tick")]


def _left_out(cells: HeatRows) -> int:
    return sum(cell is not None and not math.isfinite(cell.share) for row in cells for cell in row)


def _cell(cell: HeatCell | None, x: float, y: float, width: float, height: float) -> Markup:
    gap = GAP if width > 12 else 0.4
    place = {"x": x, "y": y, "width": max(width - gap, 0.5), "height": max(height - gap, 0.5)}
    if cell is None or not math.isfinite(cell.share):
        return element("rect", class_="ground", data_tip=cell and cell.tip, **place)
    opacity = FAINT + (1 - FAINT) * min(max(cell.share, 0.0), 1.0)
    square = element("rect", class_="heat", fill_opacity=opacity, data_tip=cell.tip or None, **place)
    if text_width(cell.label, 11) + 4 > width or height < 14:
        return square
    over = next((f" {name}" for name, least in OVER.items() if opacity > least), "")
    centre = {"x": x + (width - gap) / 2, "y": y + height / 2 + 3.5}
    return square + element("text", cell.label, text_anchor="middle", class_=f"in-cell{over}", **centre)


def _foot(ticks: Sequence[tuple[float, str]], left: float, step: float, height: float, label: str) -> list[Markup]:
    """Return the labels of columns, as many as have room, and the label of the axis."""
    parts = _ticks(ticks, left, step, height - FOOT + 14)
    return [*parts, text((left + WIDTH) / 2, height - 8, label, "middle", "axis")]


def _ticks(ticks: Sequence[tuple[float, str]], left: float, step: float, line: float) -> list[Markup]:
    """Return labels at numbers of cells from the left, as many as have room."""
    parts, reach = [], -math.inf
    for place, name in ticks:
        half = text_width(name) / 2
        at = min(max(left + step * place, half), WIDTH - half)
        if at - half - 3 >= reach:
            parts.append(text(at, line, name, "middle", "tick"))
            reach = at + half
    return parts
