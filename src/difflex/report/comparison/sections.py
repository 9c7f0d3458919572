"""The sections of the page about two studies."""

from collections.abc import Callable, Iterable, Sequence

from markupsafe import Markup

from difflex.report.comparison.pairs import DetectionPair, MetricPair, StudyComparison
from difflex.report.drawing import Axis, ChartRow, Drawing, LegendEntry, PlotPoint, RowChart, RowEntry, SeriesStyle, element, rows
from difflex.report.sections import FigureTable, MissingFigure, ReportFigure, ReportSection
from difflex.report.telling import count, number, percent

__all__ = ["SECTIONS"]

LOOKS = (SeriesStyle(colour=0, marker="circle"), SeriesStyle(colour=1, marker="ring"))
"""The second is seen around the first where both lie on one spot."""
SERIES = ("one", "other")
DRAWN = ("FVU", "dead", "v / mean")
"""The figures that are drawn; the table has all."""
SHARES = {"dead", "v / mean"}
MINUS = "\N{MINUS SIGN}"
MOST = 40
"""Rows of a drawing."""


def asked(comparison: StudyComparison) -> ReportSection:
    """What was asked of the two, as far as it differs."""
    lines = [
        element("tr", element("th", line.verb, scope="row"), *(element("td", each, class_="word") for each in line[1:]))
        for line in comparison.asked
    ]
    heads = ("command", "flag", *comparison.names)
    return ReportSection(
        name="asked",
        title="What was asked",
        lead="What is true of the whole studies, and the flags of their commands, where they differ. A command without a flag "
        "is one that only that study has."
        if lines
        else "The same was asked of both studies, as far as their diaries know.",
        body=(_boxed(heads, lines, "Differences of the recipes") if lines else Markup("")) + _troubles(comparison),
    )


def held(comparison: StudyComparison) -> ReportSection:
    """Which dictionaries are in both, and which in one."""
    told = {
        "In both": [pair.name for pair in comparison.pairs],
        **{f"Only in {name}": [each.name for each in only] for name, only in zip(comparison.names, comparison.only, strict=True)},
    }
    entries = [
        element("div", element("dt", f"{name}: {len(names)}"), element("dd", ", ".join(names) or "none"))
        for name, names in told.items()
    ]
    return ReportSection(
        name="dictionaries",
        title="Dictionaries",
        lead=f"{count(len(comparison.pairs), 'dictionary', 'dictionaries')} of the same site and label in both. Only these are "
        "compared below.",
        body=element("dl", *entries, class_="told"),
    )


def measured(comparison: StudyComparison) -> ReportSection:
    """Each figure of each dictionary in both, side by side."""
    figured = comparison.figured
    drawings = tuple(drawing for name in DRAWN if (drawing := _metric(comparison, figured, name)) is not None)
    figure = ReportFigure(
        name="differences",
        title="Figures of the dictionaries in both",
        caption="Each dictionary at its value in the one study and in the other; those that differ most come first"
        + (f", {MOST} at most." if len(comparison.pairs) > MOST else "."),
        formula="FVU = sum |x - y|² / sum |x - mean x|² in model space; dead: share of features that fired at none of the "
        "tokens; v / mean: squared error of the prediction as a share of that with the mean in the place of x",
        table=FigureTable(
            ("dictionary", "figure", *comparison.names, "difference"),
            tuple((each.pair.name, each.column.name, each.one, each.other, each.difference) for each in figured),
        ),
        drawings=drawings,
        keys=_keys(comparison),
    )
    return ReportSection(
        name="figures",
        title="How well activations are rebuilt",
        lead="The difference is that of the second study less the first.",
        figures=(figure,) if figured else (),
        missing=() if figured else (MissingFigure("Figures of dictionaries that both studies have", "difflex evaluate STUDY"),),
        body=_numbers(comparison, figured) if figured else Markup(""),
    )


def concepts(comparison: StudyComparison) -> ReportSection:
    """What features detect, side by side."""
    detected = comparison.detected
    return ReportSection(
        name="concepts",
        title="What features stand for",
        lead="The share of known concepts that one feature detects (average precision 0.8 or more), and the mean average "
        "precision of the best features by group of concepts.",
        figures=(_coverage(comparison), *_groups(comparison)) if detected else (),
        missing=() if detected else (MissingFigure("Methods held against concepts in both studies", "difflex concepts STUDY"),),
    )


SECTIONS: tuple[Callable[[StudyComparison], ReportSection], ...] = (asked, held, measured, concepts)


def _keys(comparison: StudyComparison) -> tuple[LegendEntry, ...]:
    return tuple(
        LegendEntry(series, name, look, False) for series, name, look in zip(SERIES, comparison.names, LOOKS, strict=True)
    )


def _entries(comparison: StudyComparison, name: str, marks: Sequence[PlotPoint]) -> tuple[RowEntry, ...]:
    return tuple(RowEntry(series=series, look=look, mark=mark) for series, look, mark in zip(SERIES, LOOKS, marks, strict=True))


def _metric(comparison: StudyComparison, figured: Iterable[MetricPair], name: str) -> Drawing | None:
    """A row for each dictionary with its two values; none where no dictionary has both."""
    there = [each for each in figured if each.column.name == name and each.difference is not None]
    there = sorted(there, key=lambda each: -abs(each.difference or 0.0))[:MOST]
    if not there:
        return None
    tell = percent if name in SHARES else number

    def row(each: MetricPair) -> ChartRow:
        marks = [
            PlotPoint(x=float("nan") if value is None else value, y=0, tip=f"{each.pair.name}\n{where}: {name} {tell(value)}")
            for where, value in zip(comparison.names, (each.one, each.other), strict=True)
        ]
        return ChartRow(
            name=each.pair.name,
            note=_signed(each.difference, name in SHARES),
            entries=_entries(comparison, each.pair.name, marks),
        )

    about = f"{len(there)} dictionaries with two values each, the largest difference first."
    axis = Axis(label=name, low=0.0, percent=name in SHARES)
    return rows(RowChart(title=name, description=about, x=axis, rows=tuple(map(row, there))))


def _coverage(comparison: StudyComparison) -> ReportFigure:
    def row(each: DetectionPair) -> ChartRow:
        marks = [
            PlotPoint(
                x=c.value,
                y=0,
                tip=f"{each.name}\n{where}: {percent(c.value)} ({percent(c.low)} to {percent(c.high)})",
                low=c.low,
                high=c.high,
            )
            for where, c in zip(comparison.names, (level.coverage for level in each.levels), strict=True)
        ]
        return ChartRow(
            name=each.name, note=_signed(each.coverage.value, share=True), entries=_entries(comparison, each.name, marks)
        )

    table = tuple(
        (each.name, *(bound for level in each.levels for bound in level.coverage), *each.coverage) for each in comparison.detected
    )
    sides = tuple(f"{name}{bound}" for name in comparison.names for bound in ("", ", low", ", high"))
    drawn = sorted(comparison.detected, key=lambda each: -abs(each.coverage.value))[:MOST]
    about = f"{len(drawn)} methods with two shares each, the largest difference first."
    axis = Axis(label="share of concepts", low=0.0, high=1.0, percent=True)
    return ReportFigure(
        name="coverage",
        title="Concepts that one feature detects",
        caption="With 95 % intervals from drawing the held-out images again. The interval of a difference, in the CSV, takes "
        "the two for independent: where both saw the same images it is wider than it need be.",
        formula="detected: AP ≥ 0.8 of one feature; all levels of noise together",
        table=FigureTable(("method", *sides, "difference", "low", "high"), table),
        drawings=(rows(RowChart(title="coverage", description=about, x=axis, rows=tuple(map(row, drawn)))),),
        keys=_keys(comparison),
    )


def _groups(comparison: StudyComparison) -> list[ReportFigure]:
    """By group of concepts, for the methods of learned dictionaries; for all where none was learned."""
    learned = [each for each in comparison.detected if each.one.normalisation is not None] or list(comparison.detected)
    with_groups = [each for each in learned if each.groups]
    if not with_groups:
        return []

    def drawing(each: DetectionPair) -> Drawing:
        made = []
        for group, values in each.groups.items():
            marks = [
                PlotPoint(x=value, y=0, tip=f"{group}\n{where}: mean AP {number(value)}")
                for where, value in zip(comparison.names, values, strict=True)
            ]
            made.append(ChartRow(name=group, note=_signed(values[1] - values[0]), entries=_entries(comparison, group, marks)))
        axis = Axis(label="mean AP of the best features", low=0.0, high=1.0)
        return rows(RowChart(title=each.name, description=f"{len(made)} groups of concepts.", x=axis, rows=tuple(made)))

    table = tuple((each.name, group, a, b, b - a) for each in with_groups for group, (a, b) in each.groups.items())
    return [
        ReportFigure(
            name="groups",
            title="By group of concepts",
            caption="For each dictionary in both, the mean average precision of the best feature of each concept of a group.",
            formula="mean over the concepts of a group of AP, all levels of noise together",
            table=FigureTable(("method", "group", *comparison.names, "difference"), table),
            drawings=tuple(map(drawing, with_groups)),
            keys=_keys(comparison),
        )
    ]


def _numbers(comparison: StudyComparison, figured: Iterable[MetricPair]) -> Markup:
    """All figures of all dictionaries in both; sorts like the table of a report."""
    lines = []
    for each in figured:
        words = [element("th", each.pair.name, scope="row", data_value=each.pair.name)]
        words.append(element("td", each.column.name, data_value=each.column.name, class_="word", title=each.column.meaning))
        numbers = [(value, each.column.tell(value)) for value in (each.one, each.other)]
        numbers.append((each.difference, _signed(each.difference)))
        cells = [element("td", said, data_value="" if value is None else repr(float(value))) for value, said in numbers]
        lines.append(element("tr", *words, *cells))
    heads = [
        element("th", element("button", name, type="button"), scope="col")
        for name in ("dictionary", "figure", *comparison.names, "difference")
    ]
    table = element("table", element("thead", element("tr", *heads)), element("tbody", *lines), class_="sortable")
    box = element("div", table, class_="box", tabindex="0", role="region", aria_label="Figures of all dictionaries in both")
    return element("details", element("summary", f"All {count(len(lines), 'figure')} as a table"), box)


def _boxed(heads: Iterable[str], lines: Iterable[Markup], label: str) -> Markup:
    table = element(
        "table",
        element("thead", element("tr", *(element("th", head, scope="col", class_="word") for head in heads))),
        element("tbody", *lines),
    )
    return element("div", table, class_="box", tabindex="0", role="region", aria_label=label)


def _troubles(comparison: StudyComparison) -> Markup:
    if not comparison.troubles:
        return Markup("")
    items = [element("li", trouble) for trouble in comparison.troubles]
    return element("aside", element("h3", "Compare with care"), element("ul", *items), class_="troubles")


def _signed(value: float | None, share: bool = False) -> str:
    """A difference with its sign; that of two shares in points of a per cent."""
    if value is None or value != value:
        return number(value)
    sign = "+" if value > 0 else MINUS if value < 0 else "±"
    return f"{sign}{number(100 * abs(value))} points" if share else f"{sign}{number(abs(value))}"
