"""Plots of curves over two axes, row charts with one axis, and their legends."""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from markupsafe import Markup

from difflex.report.drawing import WIDTH, Axis, AxisScale, Drawing, element, shortened, svg, text, text_width

HEIGHT, TOP, RIGHT, BOTTOM = 250.0, 30.0, 14.0, 46.0
"""Of a plot and its margins."""
ROWS_TOP, ROW, EDGE, FOOT = 26.0, 37.0, 12.0, 44.0
"""The margins of a row chart, and the height of a row."""
Marker = Literal["circle", "diamond", "square", "triangle", "cross", "wedge", "ring", "none"]
# Each fits into a circle of radius 1 at the origin; they differ without colour.
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


class SeriesStyle(NamedTuple):
    """The colour, marker and dashes of a series; each of them is enough to tell it apart."""

    colour: int = 0
    """0 to 8, a colour of the style sheet."""
    marker: Marker = "circle"
    dash: str = ""
    """Lengths of strokes and gaps in SVG's notation; empty for a solid line."""


class Series(NamedTuple):
    """A series of a figure and its entry in the legend, a button that hides it and shows it again."""

    id: str
    name: str
    style: SeriesStyle
    line: bool = True
    """Whether the legend shows a line, or a marker alone."""
    bar: bool = False
    """Whether row charts draw its values as bars from 0."""


class PlotPoint(NamedTuple):
    """A point with a tooltip; a value that is None or not finite is not drawn."""

    x: float | None
    y: float | None = 0.0
    """Unused in row charts."""
    tip: str = ""
    """The tooltip: a name, then a line for each number."""
    low: float | None = None
    """Start of its interval, along y in plots and along x in row charts."""
    high: float | None = None


class PlotCurve(NamedTuple):
    """The points of one series."""

    series: Series
    points: Sequence[PlotPoint]
    line: bool = True
    """Whether the points are joined, in their order."""
    dots: bool = True
    """Whether the points are visible; they have tooltips either way."""


class ChartRow(NamedTuple):
    """A row with its name above it, and its points or bars by series."""

    name: str
    points: Sequence[tuple[Series, PlotPoint]]
    note: str = ""
    """A few words or a number at the right end of the name's line."""


def plot(title: str, description: str, x: Axis, y: Axis, curves: Sequence[PlotCurve]) -> Drawing:
    """Draw curves over two axes; points that the axes cannot show are left out and counted."""
    points = [point for curve in curves for point in curve.points]
    drawable = [point for point in points if x.has(point.x) and y.has(point.y)]
    bounds = [bound for point in drawable for bound in (point.y, point.low, point.high) if bound is not None]
    vertical = y.scale(bounds, HEIGHT - BOTTOM, TOP)
    left = 10 + max((text_width(tick.label) for tick in vertical.ticks(across=False)), default=0)
    across = x.scale([point.x for point in drawable], left, WIDTH - RIGHT)
    parts = [*_frame(title, across, vertical), *(_curve(curve, across, vertical) for curve in curves)]
    return Drawing(svg(HEIGHT, title, description, *parts), len(points) - len(drawable))


def row_chart(title: str, description: str, x: Axis, rows: Sequence[ChartRow]) -> Drawing:
    """Draw rows over one axis, each name above its own line, so that long names have room."""
    points = [point for row in rows for _, point in row.points]
    drawable = [point for point in points if x.has(point.x)]
    bounds = [bound for point in drawable for bound in (point.x, point.low, point.high) if bound is not None]
    height = ROWS_TOP + ROW * len(rows) + FOOT
    scale = x.scale(bounds, EDGE, WIDTH - EDGE)
    parts = [*_x_ticks(scale, height - FOOT), text(WIDTH / 2, height - 8, x.label, "middle", "axis")]
    for i, row in enumerate(rows):
        parts += _row(row, scale, ROWS_TOP + ROW * i)
    return Drawing(svg(height, title, description, *parts), len(points) - len(drawable))


def legend(series: Iterable[Series]) -> Markup:
    """Return a list of buttons that hide and show the series of the figure they are in."""
    return element("ul", *(element("li", _button(entry)) for entry in series), class_="legend")


def _button(series: Series) -> Markup:
    line = element("path", d="M1 7H27", class_="line", stroke_dasharray=series.style.dash or None) if series.line else ""
    inside = element("g", line, _marker(series.style, 14, 7, 4.6), class_=f"series c{series.style.colour}")
    swatch = element("svg", inside, viewBox="0 0 28 14", width="28", height="14", aria_hidden="true")
    return element("button", swatch, element("span", series.name), type="button", aria_pressed="true", data_series=series.id)


def _marker(style: SeriesStyle, x: float, y: float, size: float = 4.6, **attributes: str | float | None) -> Markup:
    move = f"translate({x:.2f} {y:.2f}) scale({size:g})"
    return element("path", d=MARKERS[style.marker], transform=move, class_="dot", **attributes)


def _x_ticks(x: AxisScale, top: float) -> list[Markup]:
    """Return the ticks of a horizontal axis, from `top` downwards; their labels stay inside the drawing."""
    parts = []
    for tick in x.ticks(across=True):
        at, half = x(tick.value), text_width(tick.label) / 2
        parts.append(element("line", x1=at, x2=at, y1=top, y2=top + 4, class_="grid"))
        parts.append(text(min(max(at, half), WIDTH - half), top + 17, tick.label, "middle", "tick"))
    return parts


def _frame(title: str, x: AxisScale, y: AxisScale) -> list[Markup]:
    """Return grid, ticks and labels of a plot; the label of y is above its axis, where it need not be turned."""
    parts = [text(x.end, TOP - 6, y.axis.label, "end", "axis")] if y.axis.label != title else []
    for tick in y.ticks(across=False):
        at = y(tick.value)
        parts.append(element("line", x1=x.start, x2=x.end, y1=at, y2=at, class_="grid"))
        parts.append(text(x.start - 6, at + 4, tick.label, "end", "tick"))
    parts += _x_ticks(x, y.start)
    parts.append(element("line", x1=x.start, x2=x.end, y1=y.start, y2=y.start, class_="base"))
    parts.append(text((x.start + x.end) / 2, HEIGHT - 8, x.axis.label, "middle", "axis"))
    return parts


def _curve(curve: PlotCurve, x: AxisScale, y: AxisScale) -> Markup:
    style = curve.series.style
    points = [(p, x(p.x), y(p.y)) for p in curve.points if x.axis.has(p.x) and y.axis.has(p.y)]
    parts = [
        element("line", x1=at, x2=at, y1=y(point.low), y2=y(point.high), class_="whisker")
        for point, at, _ in points
        if y.axis.has(point.low) and y.axis.has(point.high)
    ]
    if curve.line and len(points) > 1:
        path = "M" + "L".join(f"{at:.2f} {up:.2f}" for _, at, up in points)
        parts.append(element("path", d=path, class_="line", stroke_dasharray=style.dash or None))
    visible = style if curve.dots else SeriesStyle(style.colour)
    opacity = None if curve.dots else "0"
    parts += [_marker(visible, at, up, data_tip=point.tip, opacity=opacity) for point, at, up in points]
    return element("g", *parts, class_=f"series c{style.colour}", data_series=curve.series.id)


def _row(row: ChartRow, x: AxisScale, top: float) -> list[Markup]:
    line = top + 25
    room = WIDTH - (text_width(row.note) + 12 if row.note else 0)
    parts = [
        text(0, top + 12, shortened(row.name, room), kind="name"),
        text(WIDTH, top + 12, row.note, "end", "tick"),
        element("line", x1=x.start, x2=x.end, y1=line, y2=line, class_="grid"),
    ]
    return [*parts, *(_row_point(series, point, x, line) for series, point in row.points if x.axis.has(point.x))]


def _row_point(series: Series, point: PlotPoint, x: AxisScale, line: float) -> Markup:
    parts = []
    if x.axis.has(point.low) and x.axis.has(point.high):
        parts.append(element("line", x1=x(point.low), x2=x(point.high), y1=line, y2=line, class_="whisker"))
    shape = _bar(point, x, line) if series.bar else _marker(series.style, x(point.x), line, 5.2, data_tip=point.tip)
    return element("g", *parts, shape, class_=f"series c{series.style.colour}", data_series=series.id)


def _bar(point: PlotPoint, x: AxisScale, line: float) -> Markup:
    """Return a bar from 0, wide enough to be seen and pointed at even where its value is 0."""
    start, end = sorted((x.start if x.axis.log else x(0.0), x(point.x)))
    width = max(end - start, 1.5)
    return element("rect", x=start, y=line - 5, width=width, height=10.0, rx=2.0, class_="bar", data_tip=point.tip)
