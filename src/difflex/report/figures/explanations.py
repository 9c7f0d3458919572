"""How well features are explained in words (figure 7 of arXiv 2505.24360)."""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from markupsafe import Markup

from difflex.explanation.comparison import (
    ExplainedMethod,
    MeanEstimate,
    MethodComparison,
    MethodDifference,
    compare_methods,
    read_methods,
)
from difflex.features import Book
from difflex.report.drawing import Axis, Drawing, element
from difflex.report.drawing.charts import ChartRow, PlotCurve, PlotPoint, Series, SeriesStyle, plot, row_chart
from difflex.report.facts import StudyFacts, group_by
from difflex.report.figures import MissingFigure, ReportFigure, ReportSection, html_table
from difflex.report.style import count, kind_of, kind_styles, number, percent
from difflex.study import DictionaryRef, Study

GRID = tuple(i / 50 for i in range(51))
UNTRAINED = ", untrained model"
"""The suffix of the names of the control's dictionaries."""
CHANCE = 0.5
"""The accuracy of a judge that knows nothing."""
PAPER = Series("paper", "judged on what the explainer saw (paper)", SeriesStyle(1, "diamond"), line=False)
HELDOUT = Series("heldout", "judged on held-out images", SeriesStyle(0, "circle"), line=False)
SURFACES = {"none": "none of it", "some": "some of it", "all": "all of it"}
ACCURACY = Axis(label="mean accuracy", low=0.0, high=1.0)
LITTLE = 0.6
"""Below it, an accuracy is little better than chance."""
LISTED = 12
"""Differences in the table, at most; those from the untrained model come first."""


def explanations(facts: StudyFacts) -> ReportSection:
    """Return the section about explanations in words."""
    explained = explained_methods(facts.study, facts.books)
    if facts.control is not None:
        control = explained_methods(facts.control, facts.control_books)
        explained += [replace(method, dictionary=f"{method.dictionary}{UNTRAINED}") for method in control]
    comparison, missing = compare_methods(explained), MissingFigure("Explanations and their scores", "difflex explain STUDY")
    table, file = _differences(comparison)
    return ReportSection(
        name="explanations",
        title="How accurate explanations are",
        lead="A vision-language model says what the images of a feature share; a judge that knows only this explanation says of "
        f"other images whether the feature fires there. Accuracy {CHANCE} is chance. {_near_chance(comparison)}",
        body=table,
        parts=[*file, _distributions(comparison), _falls(comparison), _surfaces(comparison)] if explained else [missing],
    )


def rated(mean: MeanEstimate) -> str:
    """Return how a mean accuracy compares with chance; empty where it is clearly better."""
    if mean.low <= CHANCE:
        return "worse than chance" if mean.high < CHANCE else "no better than chance"
    return "little better than chance" if mean.value < LITTLE else ""


def is_heldout(method: ExplainedMethod) -> bool:
    """Return whether the judge's images were held out from the explainer."""
    return method.protocol.startswith("heldout")


def _near_chance(comparison: MethodComparison) -> str:
    """Return a sentence for each rating that explanations judged on held-out images have."""
    ratings = group_by((m for m in comparison.methods if is_heldout(m)), lambda method: rated(method.accuracy))
    return " ".join(
        f"On held-out images, explanations are {rating} for {', '.join(f'{m.dictionary} ({m.accuracy.value:.2f})' for m in own)}."
        for rating, own in ratings.items()
        if rating
    )


def _differences(comparison: MethodComparison) -> tuple[Markup, list[ReportFigure]]:
    """Return the differences between dictionaries with their p-values, as a folded table and as a file; nothing without pairs."""
    pairs = sorted(comparison.differences, key=lambda pair: (not _is_with_control(pair), pair.p))
    if not pairs:
        return Markup(), []
    rows = [
        (pair.first.dictionary, pair.second.dictionary, pair.first.backend, pair.first.protocol, pair.difference, pair.p)
        for pair in pairs
    ]
    caption = "Differences between dictionaries, with p-values by permutation tests, corrected by Holm for all pairs"
    heads = ("explanations of", "against those of", "backend", "protocol", "difference of mean accuracies", "p")
    texts = [(*row[:4], f"{row[4]:+.3f}", f"{row[5]:.2g}") for row in rows[:LISTED]]
    table = element("details", element("summary", caption), html_table(heads, texts, caption, words=4))
    return table, [ReportFigure(name="p_values", caption="All pairs of the table above.", columns=heads, rows=rows)]


def explained_methods(study: Study, refs: Iterable[DictionaryRef]) -> list[ExplainedMethod]:
    """Return the judged explanations in the books of these dictionaries."""
    explained = []
    for ref in refs:
        with Book.open(study.book(*ref)) as book:
            explained += [method for method in read_methods(book, study.folder) if method.accuracies]
    return explained


def _distributions(comparison: MethodComparison) -> ReportFigure:
    panels = group_by(comparison.methods, lambda method: (method.backend, method.protocol))
    styles = kind_styles({method.dictionary: _kind(method) for method in comparison.methods})
    series = {name: Series(name, name, style) for name, style in styles.items()}
    return ReportFigure(
        name="explained",
        title="Features by the accuracy of their explanations",
        caption="How many features reach an accuracy: figure 7 of arXiv 2505.24360 as curves.",
        formula="accuracy: mean over judged images of s where the feature fires, 1 - s where not; s is the judge's score",
        columns=("backend", "protocol", "dictionary", "accuracy at least", "share of features", "mean accuracy"),
        rows=[
            (method.backend, method.protocol, method.dictionary, accuracy, share, method.accuracy.value)
            for method in comparison.methods
            for accuracy, share in _distribution(method)
        ],
        drawings=[_distribution_plot(f"{p}, {backend}", own, series) for (backend, p), own in panels.items()],
        legend=list(series.values()),
    )


def _kind(method: ExplainedMethod) -> str:
    return "untrained" if method.dictionary.endswith(UNTRAINED) else kind_of(method.dictionary)


def _is_with_control(pair: MethodDifference) -> bool:
    """Return whether a dictionary is compared with its equal of the untrained model: these pairs come first."""
    return pair.second.dictionary == f"{pair.first.dictionary}{UNTRAINED}"


def _distribution(method: ExplainedMethod) -> list[tuple[float, float]]:
    """Return each accuracy of the grid with the share of features that reach it, as long as one does."""
    ordered = sorted(method.accuracies)
    shares = [(accuracy, 1 - bisect_left(ordered, accuracy - 1e-9) / len(ordered)) for accuracy in GRID]
    return [(accuracy, share) for accuracy, share in shares if share > 0]


def _distribution_plot(title: str, explained: Sequence[ExplainedMethod], series: Mapping[str, Series]) -> Drawing:
    curves = []
    for method in explained:
        points = [
            PlotPoint(accuracy, share, f"{method.dictionary}\naccuracy ≥ {accuracy:g}: {percent(share)} of features")
            for accuracy, share in _distribution(method)
        ]
        curves.append(PlotCurve(series[method.dictionary], points, dots=False))
    about = f"Curves of {count(len(curves), 'dictionary', 'dictionaries')}, falling from all features to the few best explained."
    x, y = Axis(label="accuracy, at least", low=0.0, high=1.0), Axis(label="share of features", percent=True, low=0.0, high=1.0)
    return plot(title, about, x, y, curves)


def _mean_point(method: ExplainedMethod, mean: tuple[float, float, float, int], tip: str) -> tuple[Series, PlotPoint]:
    """Return a mean accuracy with its interval as a point of the series of its protocol."""
    value, low, high, _ = mean
    return PAPER if method.protocol.startswith("paper") else HELDOUT, PlotPoint(value, tip=tip, low=low, high=high)


def _falls(comparison: MethodComparison) -> ReportFigure:
    rows, points = [], []
    for method in comparison.methods:
        mean = method.accuracy
        rows.append((method.dictionary, method.backend, method.protocol, mean.size, *mean[:3]))
        tip = f"{method.dictionary}, {method.protocol}\n{number(mean.value)} ({number(mean.low)} to {number(mean.high)})"
        points.append((f"{method.dictionary}, {method.backend}", _mean_point(method, mean, tip)))
    falls = "; ".join(f"{gap.paper.dictionary} {gap.fall}" for gap in comparison.falls)
    chart = [ChartRow(name, [point for _, point in own]) for name, own in group_by(points, lambda point: point[0]).items()]
    about = f"{count(len(chart), 'dictionary', 'dictionaries')}, each with its mean accuracy by one or both protocols."
    return ReportFigure(
        name="falls",
        title="What held-out images change",
        caption="Mean accuracy with its 95 % interval over features. "
        + (f"Its fall, for the same features, where the explainer never saw the judge's images: {falls}." if falls else ""),
        formula="chance is 0.5 by both protocols",
        columns=("dictionary", "backend", "protocol", "features", "accuracy", "low", "high"),
        rows=rows,
        drawings=[row_chart("mean accuracy", about, ACCURACY, chart)],
        legend=(PAPER, HELDOUT),
    )


def _surfaces(comparison: MethodComparison) -> ReportFigure:
    rows, chart = [], []
    for method, (surface, mean) in ((own, bias) for own in comparison.methods for bias in own.biases.items()):
        amount, features = SURFACES[surface], count(mean.size, "feature")
        rows.append((method.dictionary, method.backend, method.protocol, surface, mean.size, *mean[:3]))
        tip = f"{method.dictionary}, {method.protocol}, {amount}\n{number(mean.value)}, {features}"
        chart.append(ChartRow(f"{method.dictionary}: {amount}", [_mean_point(method, mean, tip)], features))
    about = "Rows by dictionary and by how many words of the explanations are colours or places."
    return ReportFigure(
        name="surfaces",
        title="How much of an explanation is only colour or place",
        caption="Mean accuracy with its 95 % interval, by whether none, some or all of the content words are colours or places: "
        "what a model falls back on when it finds no meaning.",
        columns=("dictionary", "backend", "protocol", "colour or place", "features", "accuracy", "low", "high"),
        rows=rows,
        drawings=[row_chart("mean accuracy", about, ACCURACY, chart)],
        legend=(PAPER, HELDOUT),
    )
