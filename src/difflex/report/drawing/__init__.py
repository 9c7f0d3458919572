"""A small vocabulary of figures: plots, rows, heat maps and legends as SVG and HTML that need nothing from outside.

Every function takes plain data and gives a `Drawing`. A page that shows drawings has `style()` in its head and `script()` at its
end: the first holds the colours, for light and dark, the second lets points tell their numbers and legends hide series. A figure
is an element of class `figure` with its drawings and, if it likes, a `legend` in it. All drawings are `WIDTH` units wide, about
what they measure on a phone, so that letters have one size: put several side by side where there is room.
"""

from pathlib import Path

from markupsafe import Markup

from difflex.report.drawing.elements import WIDTH, Drawing, element
from difflex.report.drawing.heat import HeatCell, HeatMap, HeatStrips, heat_map, ramp, strips
from difflex.report.drawing.legend import LegendEntry, legend
from difflex.report.drawing.plots import Plot, PlotCurve, PlotPoint, SeriesStyle, plot
from difflex.report.drawing.rows import ChartRow, RowChart, RowEntry, rows
from difflex.report.drawing.scales import Axis, AxisTick

__all__ = [
    "WIDTH",
    "Axis",
    "AxisTick",
    "ChartRow",
    "Drawing",
    "HeatCell",
    "HeatMap",
    "HeatStrips",
    "LegendEntry",
    "Plot",
    "PlotCurve",
    "PlotPoint",
    "RowChart",
    "RowEntry",
    "SeriesStyle",
    "element",
    "heat_map",
    "legend",
    "plot",
    "ramp",
    "rows",
    "script",
    "strips",
    "style",
]


def style() -> Markup:
    """The style sheet of drawings and legends."""
    return Markup((Path(__file__).parent / "drawing.css").read_text(encoding="utf-8"))


def script() -> Markup:
    """What makes points tell their numbers, and legends hide and show."""
    return Markup((Path(__file__).parent / "drawing.js").read_text(encoding="utf-8"))
