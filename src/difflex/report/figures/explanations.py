"""How well features are explained in words (figure 7 of arXiv 2505.24360), and the images in which they are strongest."""

import base64
import io
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from markupsafe import Markup
from PIL import Image

from difflex.errors import DifflexError
from difflex.explanation.comparison import ExplainedMethod, MethodComparison, MethodDifference, compare_methods, read_methods
from difflex.features import Book, ImageAlbum, overlaid
from difflex.features.entries import FeatureStats
from difflex.report.drawing import Axis, Drawing
from difflex.report.drawing.charts import ChartRow, PlotCurve, PlotPoint, Series, SeriesStyle, plot, row_chart
from difflex.report.facts import StudyFacts, group_by
from difflex.report.figures import MissingFigure, ReportFigure, ReportSection
from difflex.report.style import count, kind_series, kind_styles, number, percent
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
BEST, WORST = 6, 3
"""How many of the best and of the worst features of a dictionary are shown."""
EXAMPLES = 5
"""Images of each feature, as many as the paper gives to its explainer; also the shots that a shown feature must fire in."""
SIDE = 128
EMPTY = "#c8c8c8"
"""The colour of a tile without an image."""


def explanations(facts: StudyFacts) -> ReportSection:
    """Return the section about explanations in words."""
    explained = explained_methods(facts.study, facts.books)
    if facts.control is not None:
        control = explained_methods(facts.control, facts.control_books)
        explained += [replace(method, dictionary=f"{method.dictionary}{UNTRAINED}") for method in control]
    comparison, missing = compare_methods(explained), MissingFigure("Explanations and their scores", "difflex explain STUDY")
    return ReportSection(
        name="explanations",
        title="How accurate explanations are",
        lead="A vision-language model says what the images of a feature share; a judge that knows only this explanation says of "
        f"other images whether the feature fires there. Accuracy {CHANCE} is chance.",
        parts=[_distributions(comparison), _falls(comparison), _surfaces(comparison)] if explained else [missing],
    )


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
    differences = "; ".join(
        f"{pair.first.dictionary} against {pair.second.dictionary} ({pair.first.protocol}) {pair.difference:+.3f}, p {pair.p:.2g}"
        for pair in sorted(comparison.differences, key=_is_with_control, reverse=True)[:3]
    )
    return ReportFigure(
        name="explained",
        title="Features by the accuracy of their explanations",
        caption="How many features reach an accuracy: figure 7 of arXiv 2505.24360 as curves. "
        + (f"Differences of means, permutation tests corrected by Holm: {differences}." if differences else ""),
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
    is_untrained = method.dictionary.endswith(UNTRAINED)
    return "untrained" if is_untrained else method.dictionary.rpartition("/")[2].split("-")[0]


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


class RankedFeature(NamedTuple):
    """A feature and the value it is ranked by."""

    stats: FeatureStats
    value: float
    concept: str
    explanation: str
    is_best: bool


def images(facts: StudyFacts) -> ReportSection:
    """Return the section with the best and worst features in images, as in appendix B of arXiv 2505.24360."""
    sections, rows = [], []
    for ref in facts.books:
        with Book.open(facts.study.book(*ref)) as book:
            measure, features = _ranked(facts, book, ref)
            sections.append(_dictionary(facts, book, ref, measure, features))
        for rank, (stats, value, concept, explanation, _) in enumerate(features):
            values = (concept, explanation, stats.density, stats.peak, stats.coverage)
            rows.append((str(ref), stats.feature, rank, measure, value, *values))
    file = ReportFigure(
        name="images",
        caption="The features above and what they are ranked by: the accuracy of their explanation, else the AP for the "
        "known concept that they detect best, else their peak.",
        columns=("dictionary", "feature", "rank", "measure", "value", "concept", "explanation", "density", "peak", "coverage"),
        rows=rows,
    )
    return ReportSection(
        name="images",
        title="Features in images",
        lead="The best and worst features of each dictionary, with the held-out images in which they are strongest; the bluer "
        "a token, the stronger.",
        body=Markup().join(sections),
        parts=[file if facts.books else MissingFigure("Features in images", "difflex collect STUDY")],
    )


def _ranked(facts: StudyFacts, book: Book, ref: DictionaryRef) -> tuple[str, list[RankedFeature]]:
    """Return what features are ranked by, and those to show: the best in order, then the worst."""
    explained, concepts = _explained(facts, book), _detected_concepts(facts, ref)
    stats = {row.feature: row for row in book.features("peak", descending=True) if row.shots >= EXAMPLES}
    measure = "accuracy of its explanation" if explained else "AP of its concept" if concepts else "peak"
    peaks = {feature: ("", row.peak) for feature, row in stats.items()}
    values = {feature: value for feature, (_, value) in (explained or concepts or peaks).items() if feature in stats}
    order = sorted(values, key=lambda feature: (-values[feature], feature))
    best, worst = order[:BEST], order[BEST:][-WORST:]
    texts, names = ({feature: text for feature, (text, _) in own.items()} for own in (explained, concepts))
    return measure, [RankedFeature(stats[f], values[f], names.get(f, ""), texts.get(f, ""), f in best) for f in (*best, *worst)]


def _explained(facts: StudyFacts, book: Book) -> Mapping[int, tuple[str, float]]:
    """Return the explanation of each feature by one backend and protocol, held-out if possible, and its accuracy."""
    scored = [method for method in read_methods(book, facts.study.folder) if method.accuracies]
    best = min(scored, key=lambda method: not method.protocol.startswith("heldout"), default=None)
    return (
        {f: (text, value) for f, text, value in zip(best.features, best.explanations, best.accuracies, strict=True)}
        if best
        else {}
    )


def _detected_concepts(facts: StudyFacts, ref: DictionaryRef) -> Mapping[int, tuple[str, float]]:
    """Return the concept that each feature detects best, and its average precision."""
    for match in facts.matches:
        matches = match.matches
        if not match.untrained and (matches.site, matches.label) == ref:
            columns = zip(matches.features.features, matches.features.concepts, matches.features.ap, strict=True)
            return {feature: (matches.concepts[concept].name, ap) for feature, concept, ap in columns}
    return {}


def _dictionary(facts: StudyFacts, book: Book, ref: DictionaryRef, measure: str, features: Sequence[RankedFeature]) -> Markup:
    """Return the best and the worst features of a dictionary as cards."""
    album, parts = ImageAlbum(facts.study.images), Markup()
    for title, is_best in (("Best", True), ("Worst", False)):
        cards = Markup().join(_card(book, album, measure, feature) for feature in features if feature.is_best is is_best)
        parts += Markup('<h4>{} by {}</h4><ul class="cards">{}</ul>').format(title, measure, cards) if cards else ""
    return Markup("<h3>{} <small>{}</small></h3>{}").format(str(ref), kind_series(book.about.kind).name, parts)


def _card(book: Book, album: ImageAlbum, measure: str, feature: RankedFeature) -> Markup:
    stats = feature.stats
    name = feature.explanation or feature.concept or "no explanation"
    cover = "" if stats.coverage is None else f", covers {percent(stats.coverage)} of an image"
    text = f"{measure} {number(feature.value)}; fires at {percent(stats.density)} of tokens{cover}"
    strip = Markup().join(_example_images(book, album, stats))
    head = Markup("<p><b>{}</b> {}</p>").format(stats.feature, name)
    return Markup('<li>{}<div class="strip">{}</div><p class="fine">{}</p></li>').format(head, strip, text)


def _example_images(book: Book, album: ImageAlbum, stats: FeatureStats) -> Iterator[Markup]:
    """Yield the images in which a feature is strongest, held-out ones first."""
    top = book.examples(stats.feature, "top")
    chosen = sorted(top, key=lambda example: (example.split != "held-out", example.rank))[:EXAMPLES]
    shots = book.shots(example.shot for example in chosen)
    for example in chosen:
        shot = shots[example.shot]
        description = f"{shot.shot.prompt or 'no prompt'}: {len(example.map.tokens)} tokens"
        try:
            image = album.open(shot.image.file)
        except DifflexError:  # which is in the list of problems
            tile, description = Image.new("RGB", (SIDE, SIDE), EMPTY), f"{description}; the image is missing or damaged"
        else:
            image.thumbnail((2 * SIDE, 2 * SIDE))
            tile = overlaid(image, example.map, book.about.grid, stats.peak, side=SIDE)
        yield Markup('<img src="{}" alt="{}">').format(image_url(tile), description)


def image_url(image: Image.Image) -> str:
    """Return `image` as a data URL."""
    file = io.BytesIO()
    image.save(file, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
