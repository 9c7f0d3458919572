"""Features in images: a wall of the cleanest of a study, and the best and worst of each dictionary (appendix B of the paper)."""

import base64
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from markupsafe import Markup
from PIL import Image

from difflex.dictionary_config import read_config
from difflex.errors import DifflexError
from difflex.explanation.comparison import read_methods
from difflex.features import Book, FeatureFilter, ImageAlbum, overlaid
from difflex.features.entries import FeatureStats
from difflex.report.drawing import element
from difflex.report.facts import StudyFacts
from difflex.report.figures import MissingFigure, ReportFigure, ReportSection
from difflex.report.figures.explanations import is_heldout
from difflex.report.style import count, kind_series, number, percent
from difflex.study import DictionaryRef

AP, SCORE, PEAK = "AP", "accuracy of its explanation", "peak"
"""What features are ranked by: the first that is known."""
SHORT = {AP: "AP", SCORE: "accuracy", PEAK: "peak"}
WALL, SCANNED = 12, 400
"""Features on the wall, and how many of the best of a dictionary are looked at for features of different names."""
BEST, WORST = 4, 2
"""How many of the best and of the worst features of a dictionary are shown."""
EXAMPLES = 5
"""Images of each feature, as many as the paper gives to its explainer; also the shots that a shown feature must fire in."""
LARGE, SMALL = 256, 128
"""The side of images on the wall and in the gallery, at least."""
EMPTY = "#c8c8c8"
"""The colour of a tile without an image."""
OUTLINE = "A line surrounds the tokens that have at least a fifth of the largest value in the image."
CSV = ("dictionary", "feature", "rank", "measure", "value", "concept", "explanation", "density", "peak", "coverage")


class RankedFeature(NamedTuple):
    """A feature and the value it is ranked by."""

    ref: DictionaryRef
    measure: str
    value: float
    stats: FeatureStats
    concept: str
    explanation: str

    @property
    def name(self) -> str:
        """The known concept that it detects best where it is ranked by that, else its explanation; empty without either."""
        return self.concept if self.measure == AP else self.explanation or self.concept

    def row(self, rank: int) -> tuple[str | float | None, ...]:
        """Return the row of a file with the columns `CSV`."""
        stats = self.stats
        place, texts = (str(self.ref), stats.feature, rank, self.measure, self.value), (self.concept, self.explanation)
        return (*place, *texts, stats.density, stats.peak, stats.coverage)


def short_name(facts: StudyFacts, ref: DictionaryRef) -> str:
    """Return the label of a dictionary where all of the study are of one site, else its whole name."""
    return ref.label if len({d.ref.site for d in facts.dictionaries}) == 1 else str(ref)


class FeatureRanking:
    """The features of a dictionary in the order of AP for a known concept, else the accuracy of explanations, else peak."""

    def __init__(self, facts: StudyFacts, book: Book, ref: DictionaryRef) -> None:
        self._book, self._ref = book, ref
        self._excluded = read_config(facts.study.dictionary(*ref)).excluded
        self._concepts, self._explained = _detected_concepts(facts, ref), _explained(facts, book)
        self.measure = AP if self._concepts else SCORE if self._explained else PEAK

    def features(self, worst: bool = False) -> Iterator[RankedFeature]:
        """Yield features that fire in enough shots, best or worst first; of equal ones those of the highest peak first."""
        known, size = (self._concepts or self._explained).items(), self._book.about.size
        values = {feature: value for feature, (_, value) in known if feature < size and feature not in self._excluded}
        if not values:
            fires = FeatureFilter("shots", ">=", EXAMPLES)
            rows = self._book.features("peak", descending=not worst, where=[fires], limit=SCANNED)
            yield from (self._ranked(row) for row in rows if row.feature not in self._excluded)
            return
        for _, equal in groupby(sorted(values, key=values.__getitem__, reverse=not worst), key=values.__getitem__):
            rows = sorted(map(self._book.feature, equal), key=lambda row: (-row.peak, row.feature))
            yield from (self._ranked(row) for row in rows if row.shots >= EXAMPLES)

    def _ranked(self, stats: FeatureStats) -> RankedFeature:
        concept, ap = self._concepts.get(stats.feature, ("", 0.0))
        text, accuracy = self._explained.get(stats.feature, ("", 0.0))
        value = {AP: ap, SCORE: accuracy, PEAK: stats.peak}[self.measure]
        return RankedFeature(self._ref, self.measure, value, stats, concept, text)


def wall(facts: StudyFacts) -> ReportSection:
    """Return the section with the cleanest features of all dictionaries."""
    chosen = _cleanest(facts)
    several = len({feature.ref for feature in chosen}) > 1
    of = "" if several or not chosen else f" of {chosen[0].ref}"
    measure = SHORT[chosen[0].measure] if chosen else ""
    lead = {
        AP: "The features that detect known concepts best, one for each concept, each in the image in which it is strongest. "
        "AP is average precision over held-out tokens: 1 is perfect.",
        SCORE: "The features with the most accurate explanations; 0.5 is chance.",
        PEAK: "The features with the highest peaks of each dictionary: they are neither explained nor compared with concepts "
        "yet.",
    }
    file = ReportFigure(
        name="wall",
        caption=f"{OUTLINE} Click an image for large ones.",
        columns=CSV,
        rows=[feature.row(rank) for rank, feature in enumerate(chosen)],
    )
    return ReportSection(
        name="wall",
        title=f"The cleanest features{of}",
        lead=lead[chosen[0].measure] if chosen else "",
        body=element("ul", *_wall_cards(facts, chosen, measure, several), class_="wall") if chosen else Markup(),
        parts=[file] if chosen else [MissingFigure("Features in images", "difflex collect STUDY")],
    )


def _cleanest(facts: StudyFacts) -> list[RankedFeature]:
    """Return the best features of all dictionaries of the best known measure, each name once."""
    by_measure: dict[str, list[tuple[int, RankedFeature]]] = {}
    for ref in facts.books:
        with Book.open(facts.study.book(*ref)) as book:
            ranking = FeatureRanking(facts, book, ref)
            by_measure.setdefault(ranking.measure, []).extend(enumerate(_distinct(ranking.features())))
    candidates = next((by_measure[measure] for measure in (AP, SCORE, PEAK) if measure in by_measure), [])
    # Peaks of different sites do not compare: the first of each dictionary come first.
    candidates.sort(key=lambda pair: (pair[0] if pair[1].measure == PEAK else 0, -pair[1].value, -pair[1].stats.peak))
    return _distinct(feature for _, feature in candidates)


def _distinct(features: Iterable[RankedFeature]) -> list[RankedFeature]:
    """Return the first features of different names; those without a name differ."""
    chosen: dict[object, RankedFeature] = {}
    for i, feature in enumerate(features):
        chosen.setdefault(feature.name or (feature.ref, feature.stats.feature), feature)
        if len(chosen) == WALL or i == SCANNED:
            break
    return [*chosen.values()]


def _wall_cards(facts: StudyFacts, features: Sequence[RankedFeature], measure: str, several: bool) -> Iterator[Markup]:
    album = ImageAlbum(facts.study.images)
    for feature in features:
        ref, stats = feature.ref, feature.stats
        with Book.open(facts.study.book(*ref)) as book:
            first, *others = _example_images(book, album, stats, LARGE)
        title = f"{feature.name or 'feature'}: {stats.feature} of {ref}"
        button = element("button", first, element("template", *others), type="button", class_="zoom", data_title=title)
        value = element(
            "span",
            f"{measure} {number(feature.value) if feature.measure == PEAK else format(feature.value, '.2f')}",
            class_="value",
        )
        head = element("p", element("b", feature.name or f"feature {stats.feature}"), " ", value, class_="name")
        fine = (str(stats.feature), *([short_name(facts, ref)] if several else ()), f"{percent(stats.density)} of tokens")
        yield element("li", button, head, element("p", " · ".join(fine), class_="fine"))


def gallery(facts: StudyFacts) -> ReportSection:
    """Return the section with the best and worst features of each dictionary in images."""
    album, shown = ImageAlbum(facts.study.images), []
    for ref in facts.books:
        with Book.open(facts.study.book(*ref)) as book:
            ranking = FeatureRanking(facts, book, ref)
            best = [feature for feature, _ in zip(ranking.features(), range(BEST), strict=False)]
            taken = {feature.stats.feature for feature in best}
            others = (feature for feature in ranking.features(worst=True) if feature.stats.feature not in taken)
            worst = [feature for feature, _ in zip(others, range(WORST), strict=False)][::-1]
            shown.append((best, worst, _dictionary(book, album, ref, {"Best": best, "Worst": worst})))
    shown.sort(key=lambda own: _quality(own[0]), reverse=True)
    rows = [feature.row(rank) for best, worst, _ in shown for rank, feature in enumerate([*best, *worst])]
    parts = [element("details", part, open=None if i else "open", class_="dictionary") for i, (*_, part) in enumerate(shown)]
    file = ReportFigure(
        name="images",
        caption="The features above and what they are ranked by: the AP for the known concept that they detect best, else the "
        "accuracy of their explanation, else their peak; of equal ones those of the highest peak first.",
        columns=CSV,
        rows=rows,
    )
    return ReportSection(
        name="images",
        title="Features of each dictionary",
        lead=f"The best and worst features of each dictionary in the held-out images in which they are strongest. {OUTLINE}",
        body=Markup().join(parts),
        parts=[file] if parts else [MissingFigure("Features in images", "difflex collect STUDY")],
    )


def _quality(features: Sequence[RankedFeature]) -> tuple[float, float]:
    """Return how clean the best features of a dictionary are: the measure they are known by, and its sum."""
    if not features:
        return -3.0, 0.0
    measure = features[0].measure
    return -float((AP, SCORE, PEAK).index(measure)), sum(feature.value for feature in features) if measure != PEAK else 0.0


def _explained(facts: StudyFacts, book: Book) -> Mapping[int, tuple[str, float]]:
    """Return the explanation of each feature by one backend and protocol, held-out if possible, and its accuracy."""
    scored = [method for method in read_methods(book, facts.study.folder) if method.accuracies]
    best = min(scored, key=lambda method: not is_heldout(method), default=None)
    if best is None:
        return {}
    return {f: (text, value) for f, text, value in zip(best.features, best.explanations, best.accuracies, strict=True)}


def _detected_concepts(facts: StudyFacts, ref: DictionaryRef) -> Mapping[int, tuple[str, float]]:
    """Return the concept that each feature detects best, and its average precision."""
    for match in facts.matches:
        matches = match.matches
        if not match.untrained and (matches.site, matches.label) == ref:
            columns = zip(matches.features.features, matches.features.concepts, matches.features.ap, strict=True)
            return {feature: (matches.concepts[concept].name, ap) for feature, concept, ap in columns if ap == ap}
    return {}


def _dictionary(book: Book, album: ImageAlbum, ref: DictionaryRef, features: Mapping[str, Sequence[RankedFeature]]) -> Markup:
    """Return the best and the worst features of a dictionary as cards under its name."""
    parts = Markup()
    for title, own in features.items():
        cards = [_card(book, album, feature) for feature in own]
        parts += element("h4", f"{title} by {own[0].measure}") + element("ul", *cards, class_="cards") if own else Markup()
    kind = element("small", kind_series(book.about.kind).name)
    return element("summary", element("b", str(ref)), " ", kind) + parts


def _card(book: Book, album: ImageAlbum, feature: RankedFeature) -> Markup:
    stats = feature.stats
    name = feature.name or "no explanation"
    cover = "" if stats.coverage is None else f", covers {percent(stats.coverage)} of an image"
    text = f"{SHORT[feature.measure]} {number(feature.value)}; fires at {percent(stats.density)} of tokens{cover}"
    if feature.explanation and feature.explanation != name:
        text = f"explained as \N{LEFT DOUBLE QUOTATION MARK}{feature.explanation}\N{RIGHT DOUBLE QUOTATION MARK}; {text}"
    title = f"{name}: {stats.feature} of {feature.ref}"
    strip = element("button", *_example_images(book, album, stats, SMALL), type="button", class_="zoom strip", data_title=title)
    head = element("p", element("b", str(stats.feature)), " ", name)
    return element("li", head, strip, element("p", text, class_="fine"))


def _example_images(book: Book, album: ImageAlbum, stats: FeatureStats, side: int) -> list[Markup]:
    """Return the images in which a feature is strongest, held-out ones first, with a line around the tokens where it fires."""
    top = book.examples(stats.feature, "top")
    chosen = sorted(top, key=lambda example: (example.split != "held-out", example.rank))[:EXAMPLES]
    shots, images = book.shots(example.shot for example in chosen), []
    for example in chosen:
        shot = shots[example.shot]
        description = f"{shot.shot.prompt or 'no prompt'}: {count(len(example.map.tokens), 'token')}"
        try:
            image = album.open(shot.image.file)
        except DifflexError:  # which is in the list of problems
            tile, description = Image.new("RGB", (side, side), EMPTY), f"{description}; the image is missing or damaged"
        else:
            image.thumbnail((1.5 * side, 1.5 * side))
            tile = overlaid(image, example.map, book.about.grid, example.peak or 1.0, style="outline", side=side)
        images.append(Markup('<img src="{}" alt="{}">').format(image_url(tile), description))
    return images


def image_url(image: Image.Image) -> str:
    """Return `image` as a data URL; small images without loss."""
    file, is_small = io.BytesIO(), image.width * image.height <= SMALL**2
    image.save(file, "WEBP", lossless=is_small, quality=80)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
