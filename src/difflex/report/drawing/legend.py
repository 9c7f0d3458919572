"""Legends: which series is which, each a button that hides it and shows it again."""

from collections.abc import Iterable
from typing import NamedTuple

from markupsafe import Markup

from difflex.report.drawing.elements import element
from difflex.report.drawing.plots import SeriesStyle, marker

__all__ = ["LegendEntry", "legend"]


class LegendEntry(NamedTuple):
    """An entry of a legend."""

    series: str
    name: str
    look: SeriesStyle
    line: bool = True
    """Whether the series has lines, or points alone."""


def legend(keys: Iterable[LegendEntry]) -> Markup:
    """A list of buttons; those of one figure hide and show all that is drawn of a series in that figure."""
    return element("ul", *(element("li", _button(key)) for key in keys), class_="legend")


def _button(key: LegendEntry) -> Markup:
    dash = key.look.dash or None
    line = element("path", d="M1 7H27", class_="line", stroke_dasharray=dash) if key.line else ""
    inside = element("g", line, marker(key.look, 14, 7, 4.6), class_=f"series c{key.look.colour}")
    swatch = element("svg", inside, viewBox="0 0 28 14", width="28", height="14", aria_hidden="true")
    return element("button", swatch, element("span", key.name), type="button", aria_pressed="true", data_series=key.series)
