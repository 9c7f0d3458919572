"""`Catalogue`: reads from a study what the browser shows, always its present state."""

from __future__ import annotations

import operator
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple, final

import numpy as np

from difflex.dictionary_config import read_config
from difflex.errors import BadInput, DifflexError, UnknownName
from difflex.explore.search import search
from difflex.features import BestConcept, Book, FeatureFilter
from difflex.features.detected import DetectedConcepts
from difflex.features.entries import FeatureStats
from difflex.features.votes import vote
from difflex.records import Site
from difflex.study import DictionaryRef, Study
from difflex.web.answers import (
    Ballot,
    DictionaryAnswer,
    FeatureAnswer,
    FoundAnswer,
    MapAnswer,
    NeighbourAnswer,
    ShownExplanation,
    TileAnswer,
    WallAnswer,
    covered_bits,
)
from difflex.web.books import BookPool
from difflex.web.feature import average_map, new_vote, shown_examples, shown_explanations
from difflex.web.mapping import COLOURS, DictionaryMaps, MapBox, colour_levels, map_answer

__all__ = ["Catalogue", "WallQuery"]

FIGURES = ("density", "peak", "mean", "area", "spread", "position", "coverage", "shots", "firings")
SORTS = ("ap", "score", *FIGURES, "feature")
"""What a wall can be sorted and filtered by."""
SIGNS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "=": operator.eq}
DETECTS, DETECTED = 0.5, 0.8
"""Average precisions: from which a feature is called by a concept, and from which it detects it."""
FOUND = 200
"""Most features that words find."""
MOST_TILES = 120
SAMPLE = 60
"""Shots that are looked through for a prompt."""
MOST_KEPT = 20_000
"""Tiles of a dictionary that are kept in memory."""


class WallQuery(NamedTuple):
    """Which features a wall shows, in which order."""

    sort: str = "ap"
    ascending: bool = False
    where: tuple[str, ...] = ()
    """Conditions such as `density<0.01`; all must be true."""
    concept: str = ""
    """Only features that detect this concept best."""
    words: str = ""
    """Only features that are found by these words."""
    like: int | None = None
    """Only this feature and its neighbours, nearest first."""
    within: MapBox | None = None
    """Only features in this rectangle of the map."""


class _Stamp(NamedTuple):
    """When the files behind a table were last written, and how long they are."""

    times: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, *paths: Path) -> _Stamp:
        return cls(tuple(_time_and_size(path) for path in paths))


def _time_and_size(path: Path) -> tuple[int, int]:
    try:
        state = path.stat()
    except FileNotFoundError:  # it may be removed at any time
        return 0, 0
    return state.st_mtime_ns, state.st_size


@final
@dataclass(frozen=True, eq=False)
class _FeatureTable:
    """The figures of all features of a dictionary in memory, to sort and filter by."""

    ref: DictionaryRef
    stamp: _Stamp
    grid: tuple[int, int] | None
    columns: dict[str, np.ndarray]
    concepts: dict[int, BestConcept]
    texts: dict[int, str]
    """The best explanation of each feature."""
    choices: tuple[str, ...]
    """Concepts that some feature detects best."""
    tiles: dict[int, TileAnswer] = field(default_factory=dict)
    """Tiles that were shown, to show them again."""

    @cached_property
    def detected(self) -> int:
        """How many concepts a feature detects with an average precision of 0.8 or more."""
        return len({best.concept for best in self.concepts.values() if best.ap >= DETECTED})

    def label(self, feature: int) -> str:
        """Return what a feature stands for in words: a concept that it detects, else its explanation, else nothing."""
        best = self.concepts.get(feature)
        return best.concept if best is not None and best.ap >= DETECTS else self.texts.get(feature, "")

    def select(self, query: WallQuery, found: Sequence[int] | None, inside: np.ndarray | None) -> np.ndarray:
        """Return the numbers of the features of a query in its order; without a value they come last."""
        if query.sort not in SORTS:
            raise UnknownName.among("The column", query.sort, SORTS)
        keep = np.ones(len(self.columns["density"]), dtype=bool)
        if inside is not None:
            keep &= inside
        for text in query.where:
            column, sign, value = FeatureFilter.parse(text, SORTS)
            with np.errstate(invalid="ignore"):
                keep &= SIGNS[sign](self.columns[column], value)
        if query.concept:
            if query.concept not in self.choices:
                raise UnknownName.among("The concept", query.concept, self.choices)
            keep &= [
                (best := self.concepts.get(feature)) is not None and best.concept == query.concept for feature in range(len(keep))
            ]
        if found is not None:
            return np.array([feature for feature in found if keep[feature]], dtype=int)
        features = np.flatnonzero(keep)
        values = self.columns[query.sort][features]
        order = np.argsort(values if query.ascending else -values, kind="stable")  # NaN comes last in both
        return features[order]


@final
class Catalogue:
    """What the browser shows of a study. Its methods may be called from several threads."""

    def __init__(self, study: Study) -> None:
        self.study, self.maps = study, DictionaryMaps(self.book)
        self._tables: dict[DictionaryRef, _FeatureTable] = {}
        self._books = BookPool()
        self._lock = threading.Lock()
        self._selected = lru_cache(64)(self._select)

    def dictionaries(self) -> list[DictionaryAnswer]:
        """Return the dictionaries of the study, those with a book first."""
        answers = []
        for ref in self.study.dictionaries():
            size = read_config(self.study.dictionary(*ref)).size
            answers.append(
                DictionaryAnswer(site=str(ref.site), label=ref.label, features=size, has_book=self.study.book(*ref).is_file())
            )
        return sorted(answers, key=lambda answer: not answer.has_book)

    def front(self) -> DictionaryRef | None:
        """Return the dictionary to begin with: of those with a book the one whose features detect most concepts."""
        return next(iter(self.by_concepts()), None)

    def by_concepts(self) -> list[DictionaryRef]:
        """Return the dictionaries with a book, those whose features detect most concepts first."""
        return sorted(self.with_books(), key=lambda ref: -self._table(ref).detected)

    def with_books(self) -> list[DictionaryRef]:
        """Return the dictionaries with a book."""
        return [ref for ref in self.study.dictionaries() if self.study.book(*ref).is_file()]

    def find(self, site: str, label: str) -> DictionaryRef:
        """Return the dictionary of this name."""
        return self.study.find_dictionary(f"{Site.parse(site)}/{label}")

    def grid(self, ref: DictionaryRef) -> tuple[int, int] | None:
        """Return the rows and columns of the tokens of a dictionary in an image; None for text."""
        return self._table(ref).grid

    def columns(self, ref: DictionaryRef) -> Mapping[str, np.ndarray]:
        """Return the figures of all features of a dictionary, by the name of the column."""
        return self._table(ref).columns

    def excluded(self, ref: DictionaryRef) -> frozenset[int]:
        """Return the features that the publisher of the dictionary excludes from lists of what fires."""
        return read_config(self.study.dictionary(*ref)).excluded

    def tiles(self, ref: DictionaryRef, features: Sequence[int]) -> list[TileAnswer]:
        """Return features of a dictionary as tiles."""
        with self.book(ref) as book:
            return self._tiles(self._table(ref), book, features)

    def prompts(self, ref: DictionaryRef) -> list[str]:
        """Return some prompts of the images in the book of a dictionary."""
        with self.book(ref) as book:
            return [row.shot.prompt for row in book.shots(range(SAMPLE)).values()]

    def best_concepts(self, ref: DictionaryRef) -> Mapping[int, BestConcept]:
        """Return the concept that each feature of a dictionary detects best."""
        return self._table(ref).concepts

    def concepts(self, ref: DictionaryRef) -> tuple[str, ...]:
        """Return the concepts that features of a dictionary detect."""
        return self._table(ref).choices

    def wall(self, ref: DictionaryRef, query: WallQuery, offset: int, limit: int) -> WallAnswer:
        """Return `limit` features of a query from `offset` on."""
        if not 0 < limit <= MOST_TILES or offset < 0:
            raise BadInput(f"{limit} tiles from {offset} on are not possible: ask for 1 to {MOST_TILES}, from 0 on.")
        table = self._table(ref)
        features = self._selected(table, query)
        with self.book(ref) as book:
            tiles = self._tiles(table, book, features[offset : offset + limit].tolist())
        return WallAnswer(site=str(ref.site), label=ref.label, grid=table.grid, total=len(features), offset=offset, tiles=tiles)

    def feature(self, ref: DictionaryRef, number: int) -> FeatureAnswer:
        """Return all that is known of a feature."""
        table = self._table(ref)
        with self.book(ref) as book:
            stats, grid, patch = book.feature(number), table.grid, book.patch(number)
            related = book.neighbours(number)
            tiles = {tile.feature: tile for tile in self._tiles(table, book, [entry.feature for entry in related])}
            best, bins, examples = table.concepts.get(number), stats.histogram, book.examples(number)
            return FeatureAnswer(
                site=str(ref.site),
                label=ref.label,
                feature=number,
                name=table.label(number) or f"feature {number}",
                grid=grid,
                figures=_figures(stats),
                concept=best.concept if best else None,
                ap=best.ap if best else None,
                histogram=list(zip(bins.edges[:-1], bins.counts, strict=True)) if bins.counts else [],
                activity=list(zip(book.about.timesteps, stats.activity, strict=True)) if stats.activity else [],
                explanations=list(shown_explanations(book, number, self.study.votes(*ref, number))),
                examples=shown_examples(book, examples, stats.peak, grid),
                average=average_map(examples, grid),
                neighbours=[NeighbourAnswer(kind=entry.kind, value=entry.value, tile=tiles[entry.feature]) for entry in related],
                patch=patch.image.file if patch and patch.image else None,
                patch_token=patch.token if patch else None,
            )

    def vote(self, ref: DictionaryRef, number: int, ballot: Ballot) -> ShownExplanation:
        """Write a vote on an explanation of a feature into the study, and return the explanation with all votes."""
        path = self.study.votes(*ref, number)
        with self.book(ref) as book:
            book.feature(number)  # an unknown one is an error
            vote(path, new_vote(book, number, ballot))
            return next(entry for entry in shown_explanations(book, number, path) if ballot.is_on(entry))

    def search(self, words: str, limit: int = 24) -> list[FoundAnswer]:
        """Return the features of all dictionaries with a book that fit `words`, best first."""
        answers = []
        shown = (found for found in search(self.study, words, limit=FOUND) if self.study.book(*found.place).is_file())
        for found in islice(shown, limit):
            with self.book(found.place) as book:
                table = self._table(found.place)
                [tile] = self._tiles(table, book, [found.feature])
            answers.append(
                FoundAnswer(
                    site=str(found.place.site),
                    label=found.place.label,
                    reason=found.reason,
                    found_score=found.score,
                    grid=table.grid,
                    tile=tile,
                )
            )
        return answers

    def map(self, ref: DictionaryRef) -> MapAnswer:
        """Return the map of a dictionary without its places; while it is computed, how much is done."""
        table, done = self._table(ref), self.maps.done(ref)
        if done < 1:
            size = len(table.columns["density"])
            return MapAnswer(
                site=str(ref.site), label=ref.label, features=size, placed=0, done=done, legend=[], columns=[], concepts=[]
            )
        return map_answer(ref, self.maps.places(ref), table.columns, table.concepts, DETECTS)

    def map_colours(self, ref: DictionaryRef, column: str) -> bytes:
        """Return a byte for each feature: its place on the scale of a column, or its concept."""
        if column not in COLOURS:
            raise UnknownName.among("The column", column, COLOURS)
        table = self._table(ref)
        return colour_levels(column, table.columns.get(column), table.concepts, len(table.columns["density"]))

    def _tiles(self, table: _FeatureTable, book: Book, features: Sequence[int]) -> list[TileAnswer]:
        """Return the tiles of features, out of memory where they were shown before."""
        tiles = {feature: tile for feature in features if (tile := table.tiles.get(feature)) is not None}
        made = {tile.feature: tile for tile in _new_tiles(table, book, [n for n in features if n not in tiles])}
        if len(table.tiles) > MOST_KEPT:
            table.tiles.clear()
        table.tiles.update(made)
        return [made.get(feature) or tiles[feature] for feature in features]

    def _select(self, table: _FeatureTable, query: WallQuery) -> np.ndarray:
        """Return the features of a query; kept for the next part of the same wall."""
        words = query.words.strip()
        found = [hit.feature for hit in search(self.study, words, table.ref, FOUND)] if words else None
        if query.like is not None:
            similar = self._similar(table.ref, query.like)
            found = similar if found is None else [feature for feature in similar if feature in set(found)]
        inside = None if query.within is None else self.maps.inside(table.ref, query.within)
        return table.select(query, found, inside)

    def _similar(self, ref: DictionaryRef, feature: int) -> list[int]:
        """Return a feature and its neighbours, each once, nearest first."""
        with self.book(ref) as book:
            book.feature(feature)  # an unknown one is an error
            nearest = sorted(book.neighbours(feature), key=lambda entry: -entry.value)
        return [*dict.fromkeys([feature, *(entry.feature for entry in nearest)])]

    def _table(self, ref: DictionaryRef) -> _FeatureTable:
        """Return the present table of a dictionary."""
        path = self.study.book(*ref)
        if not path.is_file():
            raise UnknownName(f"{ref} has no book yet: run difflex collect {self.study.folder} --dictionary {ref}.")
        stamp = _Stamp.of(path, path.with_name(f"{path.name}-wal"), self.study.concepts(*ref))
        with self._lock:
            table = self._tables.get(ref)
            if table is None or table.stamp != stamp:
                table = self._tables[ref] = self._read_table(ref, stamp)
                self._selected.cache_clear()  # it would keep the table that is replaced
        return table

    def _read_table(self, ref: DictionaryRef, stamp: _Stamp) -> _FeatureTable:
        with self.book(ref) as book:
            rows = np.array(book.columns(*FIGURES), dtype=float).T
            scores, grid = book.best_scores(), book.about.grid
            texts = {entry.feature: entry.text for entry in book.explanations() if entry.state == "done" and entry.text}
        concepts = _concepts(self.study, ref)
        size = rows.shape[1]
        ap, score = np.full(size, np.nan), np.full(size, np.nan)
        for feature, best in concepts.items():
            ap[feature] = best.ap
        for feature, value in scores.items():
            score[feature] = value
        columns = dict(zip(FIGURES, rows, strict=True)) | {"ap": ap, "score": score, "feature": np.arange(size)}
        choices = tuple(sorted({best.concept for best in concepts.values()}))
        return _FeatureTable(ref, stamp, grid, columns, concepts, texts, choices)

    @contextmanager
    def book(self, ref: DictionaryRef) -> Iterator[Book]:
        """Open the book of a dictionary for the block."""
        with self._books.open(self.study.book(*ref)) as book:
            yield book


def _concepts(study: Study, ref: DictionaryRef) -> dict[int, BestConcept]:
    """Return the best concept of each feature; none where they were matched to other weights or are damaged."""
    try:
        detected = DetectedConcepts.read(study, ref)
    except DifflexError:
        return {}
    return dict(detected.by_feature) if detected is not None and detected.is_current else {}


def _new_tiles(table: _FeatureTable, book: Book, features: Sequence[int]) -> Iterator[TileAnswer]:
    strongest = book.strongest(features) if features else {}
    shots = book.shots(example.shot for example in strongest.values()) if features else {}
    for feature in features:
        example, best, peak = strongest.get(feature), table.concepts.get(feature), float(table.columns["peak"][feature])
        score = float(table.columns["score"][feature])
        yield TileAnswer(
            feature=feature,
            label=table.label(feature),
            ap=best.ap if best else None,
            score=None if np.isnan(score) else score,
            density=float(table.columns["density"][feature]),
            peak=peak,
            image=shots[example.shot].image.file if example else None,
            covered=covered_bits(example.map, example.peak, table.grid) if example else "",
        )


def _figures(stats: FeatureStats) -> dict[str, float | None]:
    entries = asdict(stats)
    return {name: value for name, value in entries.items() if name not in ("feature", "histogram", "activity")}
