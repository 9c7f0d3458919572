"""The features that mean most, and least, with the images in which they are strongest: appendix B of arXiv 2505.24360."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup
from PIL import Image

from difflex.explanation import methods
from difflex.features import Book, ImageAlbum, overlaid
from difflex.features.entries import Example, FeatureStats
from difflex.report.facts import StudyFacts
from difflex.report.figures.embedding import address
from difflex.report.kinds import key
from difflex.report.sections import FigureTable, MissingFigure, ReportFigure, ReportSection
from difflex.report.telling import number, percent
from difflex.study import DictionaryRef

__all__ = ["images"]

MANY, FEW = 6, 3
"""How many of the best features of a dictionary are shown, and of the worst."""
SHOWN = 5
"""Images of each: as many as the paper shows to those who explain."""
SIDE = 128
OFTEN = SHOWN
"""Shots that a feature must fire in to be shown among the worst."""
LEAD = (
    "Of each dictionary the features that stand for something best, and those that do so least, with the held-out images in "
    "which they are strongest; the bluer a token, the stronger."
)
COLUMNS = ("dictionary", "feature", "rank", "measure", "value", "concept", "explanation", "density", "peak", "coverage")


class RankedFeature(NamedTuple):
    """A feature, and what it is ranked by."""

    row: FeatureStats
    value: float
    concept: str
    explanation: str
    is_best: bool


def images(facts: StudyFacts) -> ReportSection:
    """The section with the images of features."""
    if not facts.books:
        missing = (MissingFigure("Features in images", "difflex collect STUDY"),)
        return ReportSection(name="images", title="Features in images", lead=LEAD, missing=missing)
    parts, rows = [], []
    for place in facts.books:
        with Book.open(facts.study.book(*place)) as book:
            measure, ranked = _ranked(facts, book, place)
            parts.append(_part(facts, book, place, measure, ranked))
            rows += [_line(place, measure, each, i) for i, each in enumerate(ranked)]
    figure = ReportFigure(
        name="images",
        title="",
        caption="The features shown, and what they were chosen by: the score of their explanation, else the average precision on "
        "the known concept that they detect best, else their peak.",
        formula="",
        table=FigureTable(COLUMNS, tuple(rows)),
        drawings=(),
    )
    return ReportSection(name="images", title="Features in images", lead=LEAD, body=Markup("").join(parts), figures=(figure,))


def _ranked(facts: StudyFacts, book: Book, place: DictionaryRef) -> tuple[str, list[RankedFeature]]:
    """By what features are ranked, and those to be shown: the best from the best down, then the worst."""
    texts, scores = _explained(facts, book)
    concepts = _concepts(facts, place)
    rows = {row.feature: row for row in book.features("peak", descending=True) if row.shots >= OFTEN}
    if scores:
        measure, values = "accuracy of its explanation", scores
    elif concepts:
        measure, values = "AP of its concept", {feature: ap for feature, (_, ap) in concepts.items()}
    else:
        measure, values = "peak", {feature: row.peak for feature, row in rows.items()}
    order = sorted((feature for feature in values if feature in rows), key=lambda feature: (-values[feature], feature))
    best, worst = order[:MANY], order[MANY:][-FEW:]
    name = lambda feature: concepts.get(feature, ("", 0.0))[0]  # noqa: E731
    return measure, [
        RankedFeature(rows[feature], values[feature], name(feature), texts.get(feature, ""), feature in best)
        for feature in (*best, *worst)
    ]


def _explained(facts: StudyFacts, book: Book) -> tuple[Mapping[int, str], Mapping[int, float]]:
    """Of one backend and protocol, a held-out one where there is one: the explanations, and their accuracies."""
    found = sorted(
        (each for each in methods(book, facts.study.folder) if each.accuracies), key=lambda each: each.protocol[:7] != "heldout"
    )
    if not found:
        return {}, {}
    best = found[0]
    return dict(zip(best.features, best.explanations, strict=True)), dict(zip(best.features, best.accuracies, strict=True))


def _concepts(facts: StudyFacts, place: DictionaryRef) -> Mapping[int, tuple[str, float]]:
    """The concept that each feature detects best, and its average precision."""
    for judged in facts.judged:
        matches = judged.matches
        if not judged.untrained and (matches.site, matches.label) == place:
            columns = zip(matches.features.features, matches.features.concepts, matches.features.ap, strict=True)
            return {feature: (matches.concepts[concept].name, ap) for feature, concept, ap in columns}
    return {}


def _part(facts: StudyFacts, book: Book, place: DictionaryRef, measure: str, ranked: Sequence[RankedFeature]) -> Markup:
    """A dictionary's features, best and worst."""
    album, kind = ImageAlbum(facts.study.images), key(book.about.kind).name
    cards = {
        said: Markup("").join(_card(book, album, measure, each) for each in ranked if each.is_best is is_best)
        for said, is_best in (("Best", True), ("Worst", False))
    }
    lists = [
        Markup('<h4>{} by {}</h4><ul class="cards">{}</ul>').format(said, measure, inside)
        for said, inside in cards.items()
        if inside
    ]
    return Markup("<h3>{} <small>{}</small></h3>{}").format(str(place), kind, Markup("").join(lists))


def _card(book: Book, album: ImageAlbum, measure: str, ranked: RankedFeature) -> Markup:
    row = ranked.row
    said = ranked.explanation or ranked.concept or "no name yet"
    cover = "" if row.coverage is None else f", covers {percent(row.coverage)} of an image"
    told = f"{measure} {number(ranked.value)}; fires at {percent(row.density)} of tokens{cover}"
    strip = Markup("").join(_images(book, album, row))
    head = Markup("<p><b>{}</b> {}</p>").format(row.feature, said)
    return Markup('<li>{}<div class="strip">{}</div><p class="fine">{}</p></li>').format(head, strip, told)


def _images(book: Book, album: ImageAlbum, row: FeatureStats) -> Iterator[Markup]:
    """The images in which a feature is strongest, of the held-out split as far as there are any."""
    top = book.examples(row.feature, "top")
    chosen = sorted(top, key=lambda example: (example.split != "held-out", example.rank))[:SHOWN]
    shots = book.shots(example.shot for example in chosen)
    for example in chosen:
        shot = shots[example.shot]
        image = overlaid(_small(album.open(shot.image.file)), example.map, book.about.grid, row.peak, side=SIDE)
        yield Markup('<img src="{}" alt="{}">').format(address(image), _alternative(example, shot.shot.prompt))


def _small(image: Image.Image) -> Image.Image:
    """`image` no larger than it is shown, as the page holds it."""
    image.thumbnail((2 * SIDE, 2 * SIDE))
    return image


def _alternative(example: Example, prompt: str) -> str:
    return f"{prompt or 'no prompt'}: {len(example.map.tokens)} tokens"


def _line(place: DictionaryRef, measure: str, each: RankedFeature, rank: int) -> tuple[str | float | None, ...]:
    row = each.row
    return (
        str(place),
        row.feature,
        rank,
        measure,
        each.value,
        each.concept,
        each.explanation,
        row.density,
        row.peak,
        row.coverage,
    )
