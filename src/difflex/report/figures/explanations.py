"""How well features are explained in words: figure 7 of arXiv 2505.24360, and what moves such scores besides meaning."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import replace

from difflex.explanation import ExplainedMethod, MethodComparison, MethodDifference, compare, methods
from difflex.features import Book
from difflex.report.drawing import (
    Axis,
    ChartRow,
    Drawing,
    LegendEntry,
    Plot,
    PlotCurve,
    PlotPoint,
    RowChart,
    RowEntry,
    SeriesStyle,
    plot,
    rows,
)
from difflex.report.facts import StudyFacts
from difflex.report.kinds import looks
from difflex.report.sections import FigureTable, MissingFigure, ReportFigure, ReportSection
from difflex.report.telling import count, number, percent
from difflex.study import DictionaryRef, Study

__all__ = ["explanations"]

GRID = tuple(i / 50 for i in range(51))
UNTRAINED = ", untrained model"
"""What the names of the control's dictionaries end in."""
CHANCE = 0.5
"""The accuracy of a judge that knows nothing."""
PAPER = LegendEntry("paper", "judged on what the explainer saw (paper)", SeriesStyle(colour=1, marker="diamond"), line=False)
HELDOUT = LegendEntry("heldout", "judged on held-out images", SeriesStyle(colour=0, marker="circle"), line=False)
SURFACES = {"none": "none of it", "some": "some of it", "all": "all of it"}


def explanations(facts: StudyFacts) -> ReportSection:
    """The section about explanations in words."""
    found = _methods(facts.study, facts.books)
    if facts.control is not None:
        others = _methods(facts.control, facts.control_books)
        found += [replace(method, dictionary=f"{method.dictionary}{UNTRAINED}") for method in others]
    compared = compare(found)
    return ReportSection(
        name="explanations",
        title="How true explanations are",
        lead="A model that sees says what the images of a feature share; a judge that knows only these words says of other "
        f"images whether the feature fires there. Accuracy {CHANCE} is chance.",
        figures=(explained(compared), falls(compared), surfaces(compared)) if found else (),
        missing=() if found else (MissingFigure("Explanations and their scores", "difflex explain STUDY"),),
    )


def _methods(study: Study, places: Iterable[DictionaryRef]) -> list[ExplainedMethod]:
    """What the books of these dictionaries know of explanations."""
    found = []
    for place in places:
        with Book.open(study.book(*place)) as book:
            found += [method for method in methods(book, study.folder) if method.accuracies]
    return found


def explained(compared: MethodComparison) -> ReportFigure:
    """The distribution of accuracy over features, for every method, by backend and protocol."""
    asked = dict.fromkeys((method.backend, method.protocol) for method in compared.methods)
    alike = {each: [method for method in compared.methods if (method.backend, method.protocol) == each] for each in asked}
    names = {method.dictionary: _kind(method) for method in compared.methods}
    keys = {name: LegendEntry(name, name, look) for name, look in looks(names).items()}
    table = [
        (method.backend, method.protocol, method.dictionary, accuracy, share, method.accuracy.value)
        for method in compared.methods
        for accuracy, share in _distribution(method)
    ]
    told = "; ".join(
        f"{each.one.dictionary} against {each.other.dictionary} ({each.one.protocol}) {each.difference:+.3f}, p {each.p:.2g}"
        for each in sorted(compared.differences, key=_is_control, reverse=True)[:3]
    )
    return ReportFigure(
        name="explained",
        title="Features by the accuracy of their explanations",
        caption="How many features reach an accuracy: figure 7 of arXiv 2505.24360 as curves. "
        + (f"Differences of means, permutation tests corrected by Holm: {told}." if told else ""),
        formula="accuracy: mean over judged images of s where the feature fires, 1 - s where not; s is the judge's score",
        table=FigureTable(
            ("backend", "protocol", "dictionary", "accuracy at least", "share of features", "mean accuracy"), tuple(table)
        ),
        drawings=tuple(_explained(f"{protocol}, {backend}", each, keys) for (backend, protocol), each in alike.items()),
        keys=tuple(keys.values()),
    )


def _kind(method: ExplainedMethod) -> str:
    is_untrained = method.dictionary.endswith(UNTRAINED)
    return "untrained" if is_untrained else method.dictionary.rpartition("/")[2].split("-")[0]


def _is_control(pair: MethodDifference) -> bool:
    """Whether a dictionary is held against its like of the untrained model: these pairs are told first."""
    return pair.other.dictionary == f"{pair.one.dictionary}{UNTRAINED}"


def _distribution(method: ExplainedMethod) -> list[tuple[float, float]]:
    """From each accuracy of the grid: the share of features that reach it; ended by the first that none does."""
    ordered = sorted(method.accuracies)
    shares = [(accuracy, 1 - bisect_left(ordered, accuracy - 1e-9) / len(ordered)) for accuracy in GRID]
    return [(accuracy, share) for accuracy, share in shares if share > 0]


def _explained(title: str, found: Sequence[ExplainedMethod], keys: dict[str, LegendEntry]) -> Drawing:
    curves = tuple(
        PlotCurve(
            series=method.dictionary,
            look=keys[method.dictionary].look,
            marks=tuple(
                PlotPoint(x=accuracy, y=share, tip=f"{method.dictionary}\naccuracy ≥ {accuracy:g}: {percent(share)} of features")
                for accuracy, share in _distribution(method)
            ),
            dots=False,
        )
        for method in found
    )
    about = f"Curves of {count(len(found), 'dictionary', 'dictionaries')}, falling from all features to the few best explained."
    x, y = Axis(label="accuracy, at least", low=0.0, high=1.0), Axis(label="share of features", percent=True, low=0.0, high=1.0)
    return plot(Plot(title=title, description=about, x=x, y=y, curves=curves))


def falls(compared: MethodComparison) -> ReportFigure:
    """Mean accuracy by both protocols, over the features that were judged by both."""
    table, listed = [], []
    for method in compared.methods:
        key = PAPER if method.protocol.startswith("paper") else HELDOUT
        mean = method.accuracy
        table.append((method.dictionary, method.backend, method.protocol, mean.of, mean.value, mean.low, mean.high))
        tip = f"{method.dictionary}, {method.protocol}\n{number(mean.value)} ({number(mean.low)} to {number(mean.high)})"
        mark = PlotPoint(x=mean.value, y=0, tip=tip, low=mean.low, high=mean.high)
        listed.append((f"{method.dictionary}, {method.backend}", RowEntry(series=key.series, look=key.look, mark=mark)))
    said = "; ".join(
        f"{each.paper.dictionary} {each.fall.value:.3f} ({each.fall.low:.3f} to {each.fall.high:.3f})" for each in compared.falls
    )
    named = dict.fromkeys(name for name, _ in listed)
    drawn = tuple(ChartRow(name=name, entries=tuple(entry for own, entry in listed if own == name)) for name in named)
    about = f"{count(len(drawn), 'dictionary', 'dictionaries')}, each with its mean accuracy by one or both protocols."
    axis = Axis(label="mean accuracy", low=0.0, high=1.0)
    return ReportFigure(
        name="falls",
        title="What held-out images change",
        caption="Mean accuracy with its 95 % interval over features. "
        + (f"How far it falls, for the same features, where the explainer never saw the judge's images: {said}." if said else ""),
        formula="chance is 0.5 by both protocols",
        table=FigureTable(("dictionary", "backend", "protocol", "features", "accuracy", "low", "high"), tuple(table)),
        drawings=(rows(RowChart(title="mean accuracy", description=about, x=axis, rows=drawn)),),
        keys=(PAPER, HELDOUT),
    )


def surfaces(compared: MethodComparison) -> ReportFigure:
    """Accuracy by how much of an explanation speaks of colour or place alone."""
    table, drawn = [], []
    for method in compared.methods:
        key = PAPER if method.protocol.startswith("paper") else HELDOUT
        for bias in method.biases:
            mean, said = bias.accuracy, SURFACES[bias.surface]
            table.append(
                (method.dictionary, method.backend, method.protocol, bias.surface, mean.of, mean.value, mean.low, mean.high)
            )
            tip = f"{method.dictionary}, {method.protocol}, {said}\n{number(mean.value)}, {count(mean.of, 'feature')}"
            mark = PlotPoint(x=mean.value, y=0, tip=tip, low=mean.low, high=mean.high)
            entry = RowEntry(series=key.series, look=key.look, mark=mark)
            drawn.append(ChartRow(name=f"{method.dictionary}: {said}", note=count(mean.of, "feature"), entries=(entry,)))
    axis = Axis(label="mean accuracy", low=0.0, high=1.0)
    about = "Rows by dictionary and by how many words of the explanations are colours or places."
    return ReportFigure(
        name="surfaces",
        title="How much of an explanation is only colour or place",
        caption="Mean accuracy with its 95 % interval, by whether none, some or all of the words that mean something are colours "
        "or places: what a model falls back on when it finds no meaning.",
        formula="",
        table=FigureTable(
            ("dictionary", "backend", "protocol", "colour or place", "features", "accuracy", "low", "high"), tuple(table)
        ),
        drawings=(rows(RowChart(title="mean accuracy", description=about, x=axis, rows=tuple(drawn))),),
        keys=(PAPER, HELDOUT),
    )
