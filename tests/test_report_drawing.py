"""Drawings: points are at their values, everything drawn has a tooltip, and nothing overlaps."""

import math
import re
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path

import pytest
from markupsafe import Markup

from difflex.report import drawing
from difflex.report.drawing import Axis, AxisTick, element, shortened, text_width
from difflex.report.drawing.charts import (
    MARKERS,
    ChartRow,
    PlotCurve,
    PlotPoint,
    Series,
    SeriesStyle,
    legend,
    plot,
    row_chart,
)
from difflex.report.drawing.heat import HeatCell, HeatStrip, heat_map, heat_strips
from difflex.report.style import KINDS, number, percent

BLUE = Series("s", "s", SeriesStyle(0))


def plotted(xs: list[float], ys: list[float], x: Axis, y: Axis) -> tuple[list[tuple[float, float]], int]:
    """Return the places of the points of a plot, and the number of those left out."""
    points = [PlotPoint(a, b, f"{a} {b}") for a, b in zip(xs, ys, strict=True)]
    result = plot("t", "d", x, y, [PlotCurve(BLUE, points)])
    places = re.findall(r"translate\(([\d.-]+) ([\d.-]+)\)[^>]*data-tip", result.svg)
    return [(float(a), float(b)) for a, b in places], result.left_out


@pytest.mark.parametrize("log", [False, True])
def test_points_are_placed_at_their_values(log: bool):
    values = [1.0, 10.0, 100.0, 40.0]
    places, left_out = plotted(values, values, Axis(label="x", log=log), Axis(label="y", log=log))
    positions = [math.log10(value) for value in values] if log else values
    for axis, sign in ((0, 1), (1, -1)):
        slopes = [
            (place[axis] - places[0][axis]) / (value - positions[0])
            for place, value in zip(places[1:], positions[1:], strict=True)
        ]
        assert max(slopes) - min(slopes) < 0.02 * abs(slopes[0]) and sign * slopes[0] > 0
    assert left_out == 0


def test_values_without_a_place_are_counted_and_not_drawn():
    places, left_out = plotted([1, 2, 3, 4], [0.1, 0.0, math.nan, math.inf], Axis(label="x"), Axis(label="y", log=True))
    assert len(places) == 1 and left_out == 3
    row = ChartRow("r", [(BLUE, PlotPoint(x, tip="t")) for x in (0.5, math.nan, None)])
    chart = row_chart("t", "d", Axis(label="x"), [row])
    assert chart.left_out == 2 and chart.svg.count("data-tip") == 1
    cells = [[HeatCell(0.5, "1", "t"), HeatCell(math.nan, "2", "t"), None]]
    heat = heat_map("t", "d", rows=["r"], columns=["a", "b", "c"], cells=cells, label="x")
    assert heat.left_out == 1 and heat.svg.count('class="heat"') == 1


@pytest.mark.parametrize("values", [[], [0.0], [3.0, 3.0], [math.nan], [-5.0, 5.0], [1e-30, 1e30], [0.1234, 0.1235]])
@pytest.mark.parametrize("log", [False, True])
def test_any_values_can_be_drawn(values: list[float], log: bool):
    axis = Axis(label="x", log=log)
    places, left_out = plotted(values, values, axis, axis)
    assert len(places) + left_out == len(values)
    assert all(0 <= x <= 400 and 0 <= y <= 250 for x, y in places)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [(1.0, 2.0), (0.0017, 0.93), (3.0, 70000.0), (1e-7, 1.0)])
def test_ticks_are_round_inside_and_apart(values: tuple[float, float], log: bool):
    scale = Axis(label="x", log=log).scale(values, 30, 390)
    ticks = scale.ticks(across=True)
    assert 2 <= len(ticks) <= 12
    for left, right in pairwise(ticks):
        assert scale(right.value) - scale(left.value) > (text_width(left.label) + text_width(right.label)) / 2
    assert all(scale.low * 0.999 <= tick.value <= scale.high * 1.001 for tick in ticks)
    assert all(float(tick.label.replace(",", "")) == pytest.approx(tick.value) for tick in ticks)


def test_ticks_of_an_axis_are_drawn_as_far_as_there_is_room():
    ticks = tuple(AxisTick(value, f"{value:,}") for value in (500, 502, 504, 2048))
    scale = Axis(label="size", log=True, ticks=ticks).scale([500, 2048], 30, 390)
    assert [tick.label for tick in scale.ticks(across=True)] == ["500", "2,048"]


def test_a_reversed_axis_starts_with_its_large_values():
    scale = Axis(label="timestep", reversed=True).scale([0.0, 1000.0], 30, 390)
    assert scale(1000.0) == 30 and scale(0.0) == 390


def test_a_bar_starts_at_0_and_ends_at_its_value():
    row = ChartRow("r", [(BLUE._replace(bar=True), PlotPoint(0.25, tip="t"))])
    chart = row_chart("t", "d", Axis(label="x", low=0.0, high=1.0), [row])
    [(start, width)] = re.findall(r'<rect x="([\d.]+)"[^>]* width="([\d.]+)"', chart.svg)
    assert float(start) == 12 and float(width) == pytest.approx((400 - 24) / 4)


def test_intervals_are_drawn_from_their_low_to_their_high_end():
    row = ChartRow("r", [(BLUE, PlotPoint(0.5, tip="t", low=0.25, high=1.0))])
    chart = row_chart("t", "d", Axis(label="x", low=0.0, high=1.0), [row])
    [(start, end)] = re.findall(r'<line x1="([\d.]+)" x2="([\d.]+)"[^>]*whisker', chart.svg)
    assert float(start) == pytest.approx(12 + 376 / 4) and float(end) == 388


def test_strips_fill_the_whole_width():
    cells = [HeatCell(i / 4, "", f"{i}") for i in range(4)]
    strips = heat_strips("t", "d", [HeatStrip("n", "", cells)], ticks=[(0.0, "1 %")], label="x")
    places = [float(x) for x in re.findall(r'<rect class="heat"[^>]* x="([\d.]+)"', strips.svg)]
    assert places == [0, 100, 200, 300]


def test_every_drawing_has_a_title_and_escapes_its_texts():
    evil = '<b onload="x">&'
    series = Series(evil, evil, SeriesStyle())
    curve = PlotCurve(series, [PlotPoint(1, 1, evil)])
    svg = plot(evil, evil, Axis(label=evil), Axis(label=evil), [curve]).svg
    root = ET.fromstring(svg)
    assert root.find("title") is not None and root.findtext("title") == evil == root.get("aria-label")
    assert "<b " not in svg and "<b " not in legend([series])
    assert element("p", evil, Markup("<i>so</i>")) == "<p>&lt;b onload=&#34;x&#34;&gt;&amp;<i>so</i></p>"


def test_a_long_name_is_shortened_in_its_middle():
    name = "transformer.single_transformer_blocks.18:update/topk-65536-k64"
    short = shortened(name, 200)
    assert text_width(short) <= 200 and short.startswith("transf") and short.endswith("k64") and "…" in short
    assert shortened("short", 200) == "short"


def test_series_differ_in_more_than_colour():
    styles = [style for _, style in KINDS.values()]
    assert len({(style.marker, style.dash) for style in styles}) == len(styles) == len({style.colour for style in styles})
    assert all(MARKERS[style.marker] for style in styles)


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1])
def test_colours_contrast_with_their_background(theme: int):
    sheet = (Path(drawing.__file__).parent / "drawing.css").read_text(encoding="utf-8")
    colours = dict(re.findall(r"--(\w+): (#\w{6})", sheet.split("@media")[theme]))
    backgrounds = [luminance(colours[name]) for name in ("paper", "card")]

    def contrast(name: str) -> float:
        own = luminance(colours[name])
        return min((max(own, other) + 0.05) / (min(own, other) + 0.05) for other in backgrounds)

    assert all(contrast(name) >= 4.5 for name in ("ink", "soft", "link"))
    assert all(contrast(f"c{i}") >= 3 for i in range(9))


def test_numbers_have_three_digits_and_shares_are_per_cent():
    assert [number(value) for value in (0.05104, 0.2, 1234567.0, 1e-9, 0.0, 16.0)] == [
        "0.0510",
        "0.200",
        "1.23e+06",
        "1.00e-09",
        "0",
        "16.0",
    ]
    assert [number(value) for value in (None, math.nan, math.inf, -math.inf)] == ["\N{EN DASH}", "NaN", "∞", "-∞"]
    assert [percent(value) for value in (0.5, 0.0123, 0.0, 0.9981, 1.0, math.nan, None)] == [
        "50 %",
        "1.2 %",
        "0 %",
        "99.8 %",
        "100 %",
        "NaN",
        "\N{EN DASH}",
    ]
