"""Two studies compared, as text and as a page: settings, dictionaries and their metrics, block roles, explanations, steering."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from markupsafe import Markup

from difflex.files import write_file
from difflex.report.comparison.dictionaries import describe_dictionaries
from difflex.report.comparison.pairs import DetectionPair, MetricPair, StudyComparison, compare
from difflex.report.comparison.sites import (
    clearest,
    explanations_section,
    found_figure,
    found_lines,
    roles_of,
    roles_section,
    signed,
    steering_section,
    study_chart,
    study_series,
)
from difflex.report.drawing import Axis, Drawing, element
from difflex.report.drawing.charts import PlotPoint
from difflex.report.figures import MissingFigure, ReportFigure, ReportSection, SortableRow, html_table, sortable_table
from difflex.report.page import problem_list, render
from difflex.report.style import count, number, percent
from difflex.tables import text_table

__all__ = ["StudyComparison", "compare", "describe", "describe_dictionaries", "write_comparison"]

DRAWN = {"FVU": number, "dead": percent, "v / mean": percent}
"""The metrics that are drawn and how they are written; the table has all."""
PRINTED = ("FVU", "r2", "L0", "dead", "v / mean", "PSNR")
"""The metrics that are printed; the page has all."""
ROWS = 40
"""Of a drawing, at most."""


def write_comparison(comparison: StudyComparison, path: Path) -> Path:
    """Write a self-contained page about two studies and return its path."""
    sections = [section(comparison) for section in SECTIONS]
    write_file(path, render("comparison.html", sections, names=comparison.names).encode())
    return path


def describe(comparison: StudyComparison) -> str:
    """Return the differences as lines of text: settings, dictionaries, the most important metrics, and concepts by block."""
    first, second = comparison.names
    parts = [f"{first} ({comparison.first.study.model}) and {second} ({comparison.second.study.model})"]
    settings = [(verb, flag, a or "-", b or "-") for verb, flag, a, b in comparison.settings]
    parts += _table("settings", ("", "", first, second), settings) or ["settings: equal"]
    parts.append(f"dictionaries in both: {len(comparison.pairs)}")
    for name, only in zip(comparison.names, comparison.only, strict=True):
        parts += [f"only in {name}: {', '.join(d.name for d in only)}"] if only else []
    studies = roles_of(comparison)
    for what, probe in (("one feature", False), ("a probe", True)):
        heads = ("", *(name for name, _ in studies))
        parts += _table(f"where each group of concepts is clearest to {what}", heads, clearest(studies, probe))
    for name, own in studies:
        heads = ("", *own.groups, "all", "found by a probe")
        parts += _table(f"concepts of {name} that one feature detects", heads, found_lines(own))
    metrics = [
        pair for pair in comparison.metrics if pair.column.name in PRINTED and not (pair.first is None and pair.second is None)
    ]
    shared = {pair.name for pair in comparison.pairs}
    metrics = [pair for pair in metrics if pair.dictionary in shared] or metrics
    lines = [
        (pair.dictionary, pair.column.name, *map(number, (pair.first, pair.second, pair.difference)))
        for pair in metrics
        if pair.difference != 0
    ]
    parts += _table("metrics", ("", "", first, second, "difference"), lines)
    if len(lines) < len(metrics):
        parts.append(f"metrics that are equal: {len(metrics) - len(lines)}")
    coverage = [
        (pair.name, *(percent(level.coverage.value) for level in pair.levels), _interval(pair.coverage))
        for pair in comparison.detections
    ]
    parts += _table("concepts that one feature detects", ("", first, second, "difference"), coverage)
    groups = [
        (pair.name, group, number(a), number(b), number(b - a))
        for pair in comparison.detections
        if pair.first.normalisation is not None
        for group, (a, b) in pair.groups.items()
    ]
    parts += _table("mean AP by group of concepts", ("", "", first, second, "difference"), groups)
    return "\n".join([*parts, *(f"note: {problem}" for problem in comparison.problems)])


def _interval(interval: Iterable[float]) -> str:
    value, low, high = (100 * bound for bound in interval)
    return f"{value:+.0f} ({low:+.0f} to {high:+.0f}) points"


def _table(name: str, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Return a table under its name; nothing for a table without lines."""
    return [f"{name}:\n{text_table([heads, *lines], indent='  ')}"] if lines else []


def _settings(comparison: StudyComparison) -> ReportSection:
    lines = comparison.settings
    lead = (
        "Settings of the whole studies, and flags of their commands, that differ. A command without a flag exists in one study "
        "only."
    )
    heads = ("command", "flag", *comparison.names)
    table = html_table(heads, lines, "Differences of settings", words=len(heads)) if lines else Markup()
    return ReportSection(
        name="settings",
        title="Settings",
        lead=lead if lines else "The settings of both studies are the same, as far as their logs record them.",
        body=table + problem_list("Compare with care", comparison.problems),
    )


def _dictionaries(comparison: StudyComparison) -> ReportSection:
    names = {"In both": [pair.name for pair in comparison.pairs]}
    for name, only in zip(comparison.names, comparison.only, strict=True):
        names[f"Only in {name}"] = [dictionary.name for dictionary in only]
    entries = [
        element("div", element("dt", f"{title}: {len(own)}"), element("dd", ", ".join(own) or "none"))
        for title, own in names.items()
    ]
    return ReportSection(
        name="dictionaries",
        title="Dictionaries",
        lead=f"{count(len(comparison.pairs), 'dictionary', 'dictionaries')} of the same site and label in both."
        " The others are shown with the values of their own study.",
        body=element("dl", *entries, class_="summary"),
    )


def _metrics(comparison: StudyComparison) -> ReportSection:
    pairs = comparison.metrics
    figure = ReportFigure(
        name="differences",
        title="Metrics of the dictionaries",
        caption="Each dictionary at its value in the first study and in the second; the largest differences come first, then the "
        f"dictionaries of one study, {ROWS} rows at most.",
        formula="FVU = sum |x - y|² / sum |x - mean x|² in model space; dead: share of features that fired at none of the "
        "tokens; v / mean: squared error of the prediction as a share of that with the mean in place of x",
        columns=("dictionary", "figure", *comparison.names, "difference"),
        rows=[(pair.dictionary, pair.column.name, pair.first, pair.second, pair.difference) for pair in pairs],
        drawings=[chart for name in DRAWN if (chart := _metric_chart(comparison, pairs, name)) is not None],
        legend=study_series(comparison),
    )
    return ReportSection(
        name="figures",
        title="How well activations are reconstructed",
        lead="Differences are the second study less the first.",
        body=_metrics_table(comparison, pairs) if pairs else Markup(),
        parts=[figure if pairs else MissingFigure("Metrics of dictionaries", "difflex evaluate STUDY")],
    )


def _concepts(comparison: StudyComparison) -> ReportSection:
    missing = MissingFigure("Methods compared with concepts", "difflex concepts STUDY")
    both = [_coverage(comparison), *_groups(comparison)] if comparison.detections else []
    return ReportSection(
        name="concepts",
        title="What features stand for",
        lead="The share of known concepts that one feature detects (average precision 0.8 or more), and the mean average "
        "precision of the best features by group of concepts.",
        parts=[*found_figure(comparison), *both] or [missing],
    )


def _metric_chart(comparison: StudyComparison, pairs: Iterable[MetricPair], name: str) -> Drawing | None:
    """Return a row for each dictionary with its values; None where no dictionary has any."""
    write = DRAWN[name]
    points = [
        (i, pair.dictionary, PlotPoint(value, tip=f"{name} {write(value)}"))
        for pair in pairs
        if pair.column.name == name
        for i, value in enumerate((pair.first, pair.second))
        if value is not None
    ]
    axis = Axis(label=name, low=0.0, percent=write is percent)
    return study_chart(comparison, name, axis, points, ROWS) if points else None


def _coverage(comparison: StudyComparison) -> ReportFigure:
    points = []
    for name, i, level in ((pair.name, i, level) for pair in comparison.detections for i, level in enumerate(pair.levels)):
        value, low, high = level.coverage
        tip = f"{percent(value)} ({percent(low)} to {percent(high)})"
        points.append((i, name, PlotPoint(value, tip=tip, low=low, high=high)))
    columns = [f"{name}{bound}" for name in comparison.names for bound in ("", ", low", ", high")]
    axis = Axis(label="share of concepts", low=0.0, high=1.0, percent=True)
    return ReportFigure(
        name="coverage",
        title="Concepts that one feature detects",
        caption="With 95 % intervals from resampling held-out images. The interval of a difference, in the CSV, takes the two "
        "for independent: where both were measured on the same images it is wider than necessary.",
        formula="detected: AP ≥ 0.8 of one feature; all noise levels together",
        columns=("method", *columns, "difference", "low", "high"),
        rows=[
            (pair.name, *(bound for level in pair.levels for bound in level.coverage), *pair.coverage)
            for pair in comparison.detections
        ],
        drawings=[study_chart(comparison, "coverage", axis, points, ROWS)],
        legend=study_series(comparison),
    )


def _groups(comparison: StudyComparison) -> list[ReportFigure]:
    """Return the mean AP by group of concepts for trained dictionaries; for all methods if none was trained."""
    trained = [pair for pair in comparison.detections if pair.first.normalisation is not None] or list(comparison.detections)
    pairs = [pair for pair in trained if pair.groups]
    if not pairs:
        return []

    def chart(pair: DetectionPair) -> Drawing:
        values = [(i, group, ap) for group, aps in pair.groups.items() for i, ap in enumerate(aps)]
        points = [(i, group, PlotPoint(ap, tip=f"mean AP {number(ap)}")) for i, group, ap in values]
        return study_chart(comparison, pair.name, Axis(label="mean AP of the best features", low=0.0, high=1.0), points)

    figure = ReportFigure(
        name="groups",
        title="By group of concepts",
        caption="For each dictionary in both, the mean average precision of the best feature of each concept of a group.",
        formula="mean over the concepts of a group of AP, all noise levels together",
        columns=("method", "group", *comparison.names, "difference"),
        rows=[(pair.name, group, a, b, b - a) for pair in pairs for group, (a, b) in pair.groups.items()],
        drawings=[chart(pair) for pair in pairs],
        legend=study_series(comparison),
    )
    return [figure]


def _metrics_table(comparison: StudyComparison, pairs: Iterable[MetricPair]) -> Markup:
    rows = []
    for pair in pairs:
        values = [(value, pair.column.write(value)) for value in (pair.first, pair.second)]
        values.append((pair.difference, signed(pair.difference)))
        rows.append(SortableRow(pair.dictionary, pair.column.name, values, pair.column.meaning))
    heads = dict.fromkeys(("dictionary", "figure", *comparison.names, "difference"), "")
    table = sortable_table(heads, rows, "Metrics of all dictionaries")
    return element("details", element("summary", f"All {count(len(rows), 'metric')} as a table"), table)


SECTIONS = (_settings, roles_section, _dictionaries, _metrics, _concepts, explanations_section, steering_section)
"""The sections in their order on the page."""
