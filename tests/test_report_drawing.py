"""The vocabulary of figures: marks stand where their values are, all that is drawn can be told, nothing lies on another."""

import math
import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from markupsafe import Markup

from difflex.report.drawing import (
    Axis,
    AxisTick,
    ChartRow,
    HeatCell,
    HeatMap,
    HeatStrips,
    LegendEntry,
    Plot,
    PlotCurve,
    PlotPoint,
    RowChart,
    RowEntry,
    SeriesStyle,
    element,
    heat_map,
    legend,
    plot,
    rows,
    strips,
    style,
)
from difflex.report.drawing.elements import shortened, wide
from difflex.report.drawing.plots import MARKERS
from difflex.report.drawing.scales import scaled
from difflex.report.kinds import LOOKS
from difflex.report.telling import NONE, number, percent

BLUE = SeriesStyle(colour=0)


def plotted(xs: list[float], ys: list[float], x: Axis, y: Axis) -> tuple[list[tuple[float, float]], int]:
    """Where the marks of a plot stand, and how many were left out."""
    marks = tuple(PlotPoint(x=a, y=b, tip=f"{a} {b}") for a, b in zip(xs, ys, strict=True))
    drawing = plot(Plot(title="t", description="d", x=x, y=y, curves=(PlotCurve(series="s", look=BLUE, marks=marks),)))
    found = re.findall(r"translate\(([\d.-]+) ([\d.-]+)\)[^>]*data-tip", drawing.svg)
    return [(float(a), float(b)) for a, b in found], drawing.left_out


@pytest.mark.parametrize("log", [False, True])
def test_marks_stand_where_their_values_are(log: bool):
    values = [1.0, 10.0, 100.0, 40.0]
    places, left_out = plotted(values, values, Axis(label="x", log=log), Axis(label="y", log=log))
    told = [math.log10(value) for value in values] if log else values
    for axis, sign in ((0, 1), (1, -1)):
        slopes = [(place[axis] - places[0][axis]) / (value - told[0]) for place, value in zip(places[1:], told[1:], strict=True)]
        assert max(slopes) - min(slopes) < 0.02 * abs(slopes[0]) and sign * slopes[0] > 0
    assert left_out == 0


def test_what_has_no_place_is_counted_and_not_drawn():
    places, left_out = plotted([1, 2, 3, 4], [0.1, 0.0, math.nan, math.inf], Axis(label="x"), Axis(label="y", log=True))
    assert len(places) == 1 and left_out == 3
    entries = tuple(RowEntry(series="s", look=BLUE, mark=PlotPoint(x=x, y=0, tip="t")) for x in (0.5, math.nan))
    drawing = rows(RowChart(title="t", description="d", x=Axis(label="x"), rows=(ChartRow(name="r", entries=entries),)))
    assert drawing.left_out == 1 and drawing.svg.count("data-tip") == 1
    cells = ((HeatCell(share=0.5, label="1", tip="t"), HeatCell(share=math.nan, label="2", tip="t"), None),)
    shown = heat_map(HeatMap(title="t", description="d", rows=("r",), columns=("a", "b", "c"), cells=cells, across="x"))
    assert shown.left_out == 1 and shown.svg.count('class="heat"') == 1


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
    scale = scaled(Axis(label="x", log=log), values, 30, 390)
    ticks = scale.ticks(across=True)
    assert 2 <= len(ticks) <= 12
    for one, other in pairwise(ticks):
        assert scale(other.value) - scale(one.value) > (wide(one.label) + wide(other.label)) / 2
    assert all(scale.low * 0.999 <= tick.value <= scale.high * 1.001 for tick in ticks)
    assert all(float(tick.label.replace(",", "")) == pytest.approx(tick.value) for tick in ticks)


def test_given_ticks_are_kept_as_far_as_there_is_room():
    ticks = tuple(AxisTick(value, f"{value:,}") for value in (500, 502, 504, 2048))
    scale = scaled(Axis(label="size", log=True, ticks=ticks), [500, 2048], 30, 390)
    assert [tick.label for tick in scale.ticks(across=True)] == ["500", "2,048"]


def test_a_reversed_axis_has_its_large_values_first():
    scale = scaled(Axis(label="timestep", reversed=True), [0.0, 1000.0], 30, 390)
    assert scale(1000.0) == 30 and scale(0.0) == 390


def test_a_bar_begins_at_nothing_and_ends_at_its_value():
    entry = RowEntry(series="s", look=BLUE, mark=PlotPoint(x=0.25, y=0, tip="t"), bar=True)
    axis = Axis(label="x", low=0.0, high=1.0)
    drawn = rows(RowChart(title="t", description="d", x=axis, rows=(ChartRow(name="r", entries=(entry,)),))).svg
    [(start, width)] = re.findall(r'<rect x="([\d.]+)"[^>]* width="([\d.]+)"', drawn)
    assert float(start) == 12 and float(width) == pytest.approx((400 - 24) / 4)


def test_intervals_reach_from_their_low_to_their_high_end():
    mark = PlotPoint(x=0.5, y=0, tip="t", low=0.25, high=1.0)
    axis = Axis(label="x", low=0.0, high=1.0)
    entries = (RowEntry(series="s", look=BLUE, mark=mark),)
    drawn = rows(RowChart(title="t", description="d", x=axis, rows=(ChartRow(name="r", entries=entries),))).svg
    [(start, end)] = re.findall(r'<line x1="([\d.]+)" x2="([\d.]+)"[^>]*whisker', drawn)
    assert float(start) == pytest.approx(12 + 376 / 4) and float(end) == 388


def test_strips_fill_the_whole_width():
    cells = (tuple(HeatCell(share=i / 4, label="", tip=f"{i}") for i in range(4)),)
    asked = HeatStrips(title="t", description="d", names=("n",), notes=("",), cells=cells, ticks=((0.0, "1 %"),), across="x")
    places = [float(x) for x in re.findall(r'<rect class="heat"[^>]* x="([\d.]+)"', strips(asked).svg)]
    assert places == [0, 100, 200, 300]


def test_every_drawing_says_what_it_shows_and_escapes_what_it_is_told():
    evil = '<b onload="x">&'
    marks = (PlotPoint(x=1, y=1, tip=evil),)
    curve = PlotCurve(series=evil, look=BLUE, marks=marks)
    drawn = plot(Plot(title=evil, description=evil, x=Axis(label=evil), y=Axis(label=evil), curves=(curve,))).svg
    root = ET.fromstring(drawn)
    assert root.find("title") is not None and root.findtext("title") == evil == root.get("aria-label")
    assert "<b " not in drawn and "<b " not in legend([LegendEntry(evil, evil, BLUE)])
    assert element("p", evil, Markup("<i>so</i>")) == "<p>&lt;b onload=&#34;x&#34;&gt;&amp;<i>so</i></p>"


def test_a_long_name_is_shortened_in_its_middle():
    name = "transformer.single_transformer_blocks.18:update/topk-65536-k64"
    short = shortened(name, 200)
    assert wide(short) <= 200 and short.startswith("transf") and short.endswith("k64") and "…" in short
    assert shortened("short", 200) == "short"


def test_series_differ_in_more_than_colour():
    looks = [*LOOKS.values()]
    assert len({(look.marker, look.dash) for look in looks}) == len(looks) == len({look.colour for look in looks})
    assert all(MARKERS[look.marker] for look in looks)


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1])
def test_colours_stand_out_from_their_ground(theme: int):
    told = dict(re.findall(r"--(\w+): (#\w{6})", str(style()).split("@media")[theme]))
    grounds = [luminance(told[name]) for name in ("paper", "card")]

    def contrast(name: str) -> float:
        return min((max(luminance(told[name]), g) + 0.05) / (min(luminance(told[name]), g) + 0.05) for g in grounds)

    assert all(contrast(name) >= 4.5 for name in ("ink", "soft", "link"))
    assert all(contrast(f"c{i}") >= 3 for i in range(9))


def test_numbers_are_told_as_they_are():
    assert [number(value) for value in (0.05104, 0.2, 1234567.0, 1e-9, 0.0, 16.0)] == [
        "0.0510",
        "0.200",
        "1.23e+06",
        "1.00e-09",
        "0",
        "16.0",
    ]
    assert [number(value) for value in (None, math.nan, math.inf, -math.inf)] == [NONE, "NaN", "∞", "-∞"]
    assert [percent(value) for value in (0.5, 0.0123, 0.0, 0.9981, 1.0, math.nan, None)] == [
        "50 %",
        "1.2 %",
        "0 %",
        "99.8 %",
        "100 %",
        "NaN",
        NONE,
    ]
