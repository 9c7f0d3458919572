"""Two dictionaries side by side: by the concepts that they detect, or what fires in the images of a feature."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, NamedTuple

import numpy as np
from fastapi import FastAPI, Path, Query
from fastapi.responses import Response

from difflex.errors import BadInput
from difflex.features import Book
from difflex.features.entries import Example, ShotRow
from difflex.study import DictionaryRef
from difflex.web.answers import Answer, TileAnswer, covered_bits
from difflex.web.catalogue import DETECTS, Catalogue
from difflex.web.pages import Pages

MOST_CONCEPTS, IMAGES, MATCHES = 80, 8, 5
"""Rows of concepts, images of a feature, and features that fit it best."""
EXAMPLES, CANDIDATES = 40, 100
"""Examples of a feature that are looked up in the other book, and features there whose maps are compared: those with examples in
most of the images."""

OTHER = "against/"
"""What the names of dictionaries of the other study begin with in addresses."""

Name = Annotated[str, Query(max_length=200)]
Feature = Annotated[int, Path(ge=0, le=10**9)]


class ComparedDictionary(Answer):
    """One of two dictionaries."""

    site: str
    label: str
    study: str
    """Name of the folder of its study, if that is the other one of `difflex serve --against`; else empty."""
    grid: tuple[int, int] | None


class ComparedConcept(Answer):
    """The features of two dictionaries that detect a concept best."""

    concept: str
    left: TileAnswer | None
    right: TileAnswer | None


class DictionaryComparison(Answer):
    """The concepts that one of two dictionaries detects, best detected first."""

    left: ComparedDictionary
    right: ComparedDictionary
    concepts: list[ComparedConcept]


class ComparedImage(Answer):
    """An image in which a feature of the left dictionary fires."""

    image: str
    width: int
    height: int
    prompt: str
    left_shot: int
    right_shot: int
    covered: str
    """The tokens that the feature covers, as in a tile."""


class MatchedFeature(Answer):
    """A feature of the right dictionary that fires where one of the left does."""

    similarity: float
    """Cosine of the two features' values over all tokens of the images, between 0 and 1."""
    tile: TileAnswer
    covered: list[str | None]
    """The tokens that it covers in each image; null where the book has no example of it."""


class FeatureComparison(Answer):
    """A feature of the left dictionary, and the features of the right one that fire at the same places of its images."""

    left: ComparedDictionary
    right: ComparedDictionary
    tile: TileAnswer
    images: list[ComparedImage]
    """Its strongest ones that are in both books."""
    matches: list[MatchedFeature]
    """Most similar first."""


class _Pair(NamedTuple):
    """An example of a feature, and the shot of the same image in the other book."""

    example: Example
    own: ShotRow
    other: ShotRow


class _Side(NamedTuple):
    """A dictionary, and the catalogue of its study."""

    catalogue: Catalogue
    ref: DictionaryRef
    is_other: bool
    """Whether it is of the other study."""

    @property
    def name(self) -> str:
        """What addresses call it."""
        return f"{OTHER}{self.ref}" if self.is_other else str(self.ref)

    @property
    def title(self) -> str:
        """What pages call it."""
        return f"{self.ref} of {self.catalogue.study.folder.resolve().name}" if self.is_other else str(self.ref)

    def answer(self) -> ComparedDictionary:
        """Return what is known of it."""
        study = self.catalogue.study.folder.resolve().name if self.is_other else ""
        site, label = self.ref
        return ComparedDictionary(site=str(site), label=label, study=study, grid=self.catalogue.grid(self.ref))


def add_comparing(app: FastAPI, catalogue: Catalogue, pages: Pages, other: Catalogue | None = None) -> None:
    """Add the page that compares two dictionaries, of the study or of the `other` one, and its JSON twins."""

    def find(name: str) -> _Side:
        if other is not None and name.startswith(OTHER):
            return _Side(other, other.study.find_dictionary(name.removeprefix(OTHER)), True)
        return _Side(catalogue, catalogue.study.find_dictionary(name), False)

    @app.get("/api/compare")
    def concepts(left: Name, right: Name) -> DictionaryComparison:
        """Two dictionaries (SITE/LABEL) by the concepts that one of them detects: the best feature of each.

        Those of the study of `difflex serve --against` are called against/SITE/LABEL.
        """
        return compare_concepts(find(left), find(right))

    @app.get("/api/compare/{feature}")
    def feature(feature: Feature, left: Name, right: Name) -> FeatureComparison:
        """A feature of the left dictionary in its strongest images, and what fires at the same places in the right one."""
        return compare_feature(find(left), find(right), feature)

    @app.get("/compare", include_in_schema=False)
    def page(left: Name = "", right: Name = "", feature: Annotated[int | None, Query(ge=0, le=10**9)] = None) -> Response:
        own = [_Side(catalogue, ref, False) for ref in catalogue.by_concepts()]
        others = [] if other is None else [_Side(other, ref, True) for ref in other.by_concepts()]
        if not own:
            return pages.render("empty.html", title="Nothing to compare yet")
        first = find(left) if left else own[0]
        second = find(right) if right else next((side for side in (*others, *own) if side != first), first)
        concepts = compare_concepts(first, second) if feature is None else None
        match = None if feature is None else compare_feature(first, second, feature)
        sides = {"left": first, "right": second, "sides": [*own, *others]}
        return pages.render("compare.html", title=f"{first.title} and {second.title}", concepts=concepts, match=match, **sides)


def compare_concepts(left: _Side, right: _Side) -> DictionaryComparison:
    """Return the concepts that one of two dictionaries detects, with the best feature of each."""
    best = [_best_features(side) for side in (left, right)]
    highest = {concept: max(side[concept][1] for side in best if concept in side) for side in best for concept in side}
    concepts = sorted((name for name, ap in highest.items() if ap >= DETECTS), key=lambda name: (-highest[name], name))
    concepts = concepts[:MOST_CONCEPTS]
    tiles = []
    for side, features in zip((left, right), best, strict=True):
        known = [name for name in concepts if name in features]
        shown = side.catalogue.tiles(side.ref, [features[name][0] for name in known])
        tiles.append(dict(zip(known, shown, strict=True)))
    return DictionaryComparison(
        left=left.answer(),
        right=right.answer(),
        concepts=[ComparedConcept(concept=name, left=tiles[0].get(name), right=tiles[1].get(name)) for name in concepts],
    )


def _best_features(side: _Side) -> dict[str, tuple[int, float]]:
    """Return for each concept the feature that detects it best, with its average precision."""
    best: dict[str, tuple[int, float]] = {}
    for feature, (concept, ap) in side.catalogue.best_concepts(side.ref).items():
        if concept not in best or ap > best[concept][1]:
            best[concept] = feature, ap
    return best


def compare_feature(left: _Side, right: _Side, feature: int) -> FeatureComparison:
    """Return the strongest images of a feature, and the features of another dictionary that fire at the same places."""
    sides = left.answer(), right.answer()
    if (left_grid := sides[0].grid) is None or (right_grid := sides[1].grid) is None:
        name = left.title if sides[0].grid is None else right.title
        raise BadInput(f"The features of {name} fire at text tokens, which have no place in an image to compare.")
    with left.catalogue.book(left.ref) as book:
        book.feature(feature)  # an unknown one is an error
        examples = sorted(book.examples(feature, "top"), key=lambda example: -example.peak)[:EXAMPLES]
        shots = book.shots(example.shot for example in examples)
    with right.catalogue.book(right.ref) as book:
        pairs = list(_pairs(book, [(example, shots[example.shot]) for example in examples]))
        numbers = [pair.other.id for pair in pairs]
        others = book.examples_in(numbers, book.features_in(numbers, CANDIDATES))
        similarity = _similarities({pair.other.id: _resampled(pair.example, left_grid, right_grid) for pair in pairs}, others)
        nearest = sorted(similarity, key=lambda other: (-similarity[other], other))[:MATCHES]
    covered = {(at.feature, at.shot): covered_bits(at.map, at.peak, right_grid) for at in others if at.feature in nearest}
    return FeatureComparison(
        left=sides[0],
        right=sides[1],
        tile=left.catalogue.tiles(left.ref, [feature])[0],
        images=[_compared_image(pair, left_grid) for pair in pairs],
        matches=[
            MatchedFeature(
                similarity=similarity[tile.feature],
                tile=tile,
                covered=[covered.get((tile.feature, pair.other.id)) for pair in pairs],
            )
            for tile in right.catalogue.tiles(right.ref, nearest)
        ],
    )


def _pairs(book: Book, examples: list[tuple[Example, ShotRow]]) -> Iterator[_Pair]:
    """Yield the first examples whose image is in `book`, each image once, with its shot at the nearest timestep."""
    files: set[str] = set()
    for example, own in examples:
        if own.image.file in files or len(files) == IMAGES:
            continue
        if others := book.shots_of(own.image.file):
            files.add(own.image.file)
            time = own.shot.timestep or 0.0
            yield _Pair(example, own, min(others, key=lambda row: abs((row.shot.timestep or 0.0) - time)))


def _similarities(wanted: Mapping[int, np.ndarray], examples: Sequence[Example]) -> dict[int, float]:
    """Return for features the cosine of their values and the `wanted` ones, over all tokens of the shots that `wanted` names."""
    dots: dict[int, float] = {}
    squares: dict[int, float] = {}
    for example in examples:
        tokens, values = np.array(example.map.tokens, dtype=int), np.array(example.map.values)
        dots[example.feature] = dots.get(example.feature, 0.0) + float(wanted[example.shot][tokens] @ values)
        squares[example.feature] = squares.get(example.feature, 0.0) + float(values @ values)
    total = sum(float(values @ values) for values in wanted.values())
    return {feature: dot / (total * squares[feature]) ** 0.5 for feature, dot in dots.items() if dot > 0}


def _resampled(example: Example, own: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """Return the values of an example at all tokens of another grid, by the nearest token."""
    values = np.zeros(own[0] * own[1])
    values[list(example.map.tokens)] = example.map.values
    rows, columns = (((np.arange(to) + 0.5) * size / to).astype(int) for size, to in zip(own, grid, strict=True))
    return values.reshape(own)[rows][:, columns].ravel()


def _compared_image(pair: _Pair, grid: tuple[int, int]) -> ComparedImage:
    image = pair.own.image
    return ComparedImage(
        image=image.file,
        width=image.width,
        height=image.height,
        prompt=pair.own.shot.prompt,
        left_shot=pair.own.id,
        right_shot=pair.other.id,
        covered=covered_bits(pair.example.map, pair.example.peak, grid),
    )
