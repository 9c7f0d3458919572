"""`Book`: queries on the book of one dictionary, and additions of explanations to it."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar, final

from difflex.errors import BadInput, StaleWork, UnknownName
from difflex.features.detected import BestConcept
from difflex.features.entries import (
    AtomImage,
    CaptionedShot,
    CoverageSummary,
    Example,
    ExampleKind,
    FeatureNeighbour,
    FeatureStats,
    Histogram,
    ImageFile,
    ShotRow,
    TokenMap,
)
from difflex.features.explanations import Explanation, ExplanationScore, Judgement, RecordedUsage
from difflex.features.tables import ADVICE, BookInfo, connect, read_info, seal_row, verify
from difflex.files import parsing
from difflex.json_records import from_json
from difflex.records import Shot, Split
from difflex.sqlite import sqlite_errors, transaction

SORT_COLUMNS = tuple(field.name for field in fields(FeatureStats) if field.name not in ("histogram", "activity"))
"""Numeric columns, by which features can be sorted and filtered."""
T = TypeVar("T")
EXAMPLE_COLUMNS = ", ".join(field.name for field in fields(Example) if field.name != "peak")
IMAGE_COLUMNS = "images.id, file, width, height"
BEST_SCORE = (
    "(SELECT max(value) FROM scores JOIN explanations ON explanations.id = explanation "
    "WHERE explanations.feature = features.feature AND state = 'done' AND measure = ?)"
)


class FeatureFilter(NamedTuple):
    """A condition on a column of the features."""

    column: str
    sign: Literal["<", "<=", ">", ">=", "="]
    value: float

    @classmethod
    def parse(cls, text: str, columns: Sequence[str] = SORT_COLUMNS) -> FeatureFilter:
        """Parse a condition on one of `columns`, such as `density<0.01`."""
        match = re.fullmatch(r"\s*(\w+)\s*(<=|>=|<|>|=)\s*(-?\d+\.?\d*(?:[eE]-?\d+)?)\s*", text)
        if not match:
            raise BadInput(f"'{text}' is not a condition. Write a column, one of < <= > >= = and a number: density<0.01.")
        column, sign, value = match.groups()
        if column not in columns:
            raise UnknownName.among("The column", column, columns)
        assert sign in ("<", "<=", ">", ">=", "=")
        return cls(column, sign, float(value))


@final
class Book:
    """The book of one dictionary, an SQLite file with many readers and one writer at a time."""

    def __init__(self, path: Path, writable: bool) -> None:
        self.path, self._writable = path, writable
        self._connection = connect(path, writable)
        try:
            self.about: BookInfo = read_info(path, self._connection)
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, path: Path | str) -> Book:
        """Open the book at `path` for reading."""
        return cls(Path(path), writable=False)

    @classmethod
    def edit(cls, path: Path | str) -> Book:
        """Open the book at `path` for reading and adding explanations; writers wait for each other."""
        return cls(Path(path), writable=True)

    def verify(self, fingerprint: str | None = None) -> None:
        """Raise `BrokenFile` unless all of the file is as it was written, `StaleWork` for a dictionary of another fingerprint."""
        if fingerprint not in (None, self.about.fingerprint):
            raise StaleWork(f"{self.about.dictionary} has changed since {self.path} was made. Run difflex collect again.")
        verify(self.path, self._connection)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def __enter__(self) -> Book:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def feature(self, feature: int) -> FeatureStats:
        """Return the statistics of one feature."""
        if not 0 <= feature < self.about.size:
            numbers = f"they are numbered from 0 to {self.about.size - 1}"
            raise UnknownName(f"{self.about.dictionary} has no feature {feature}: {numbers}.")
        [row] = self._read(_feature, "SELECT * FROM features WHERE feature = ?", feature)
        return row

    def features(
        self,
        sort: str = "feature",
        *,
        descending: bool = False,
        where: Iterable[FeatureFilter] = (),
        limit: int | None = None,
        measure: str = "accuracy",
    ) -> list[FeatureStats]:
        """Return features sorted by a column of `SORT_COLUMNS`, or by `score`, the best `measure` of their explanations.

        Features without a value come last.
        """
        if sort != "score" and sort not in SORT_COLUMNS:
            raise UnknownName.among("The column", sort, ("score", *SORT_COLUMNS))
        filters = list(where)
        conditions = " AND ".join(f"{column} {sign} ?" for column, sign, _ in filters)
        selection = f"SELECT * FROM features WHERE {conditions or 'true'}"
        key = BEST_SCORE if sort == "score" else sort
        order = f"ORDER BY {key} {'DESC' if descending else 'ASC'} NULLS LAST, feature LIMIT ?"
        values = [condition.value for condition in filters] + [measure] * (sort == "score") + [-1 if limit is None else limit]
        return self._read(_feature, f"{selection} {order}", *values)

    def columns(self, *names: str) -> list[tuple[float | None, ...]]:
        """Return some of `SORT_COLUMNS` for all features in their order: far quicker than whole statistics."""
        if unknown := [name for name in names if name not in SORT_COLUMNS]:
            raise UnknownName.among("The column", unknown[0], SORT_COLUMNS)
        return [tuple(row) for row in self._query(f"SELECT {', '.join(names)} FROM features ORDER BY feature")]

    def coverage_summary(self, min_shots: int = 8) -> CoverageSummary | None:
        """Summarise the coverage of features that fire in at least `min_shots` shots; None if there are none."""
        rows = self._query(
            "SELECT coverage, area FROM features WHERE shots >= ? AND coverage IS NOT NULL ORDER BY coverage", min_shots
        )
        if not rows:
            return None
        coverages, areas = [row[0] for row in rows], [row[1] for row in rows]
        low, median, high = (coverages[len(rows) * part // 4] for part in (1, 2, 3))
        return CoverageSummary(len(rows), sum(coverages) / len(rows), (low, median, high), sum(areas) / len(rows))

    def count_firing(self) -> int:
        """Count the features that fire at all."""
        return int(self._query("SELECT count(*) FROM features WHERE firings > 0")[0][0])

    def examples(self, feature: int, kind: ExampleKind | None = None, split: Split | None = None) -> list[Example]:
        """Return the examples of a feature, sorted by kind, split and rank."""
        condition = "feature = ? AND kind = ifnull(?, kind) AND split = ifnull(?, split)"
        order = "CASE kind WHEN 'top' THEN 0 WHEN 'quantile' THEN 1 ELSE 2 END, split = 'held-out', rank"
        return self._examples(f"{condition} ORDER BY {order}", feature, kind, split)

    def examples_by_number(self, numbers: Iterable[int]) -> dict[int, Example]:
        """Return the examples of these numbers, by number."""
        condition = "id IN (SELECT value FROM json_each(?))"
        return {example.id: example for example in self._examples(condition, json.dumps(sorted(set(numbers))))}

    def strongest(self, features: Iterable[int]) -> dict[int, Example]:
        """Return the example with the highest peak of each of `features` that has any."""
        condition = "feature IN (SELECT value FROM json_each(?)) AND kind = 'top' AND rank = 0 GROUP BY feature"
        # With one max() SQLite takes the other columns from the row that has it.
        query = f"SELECT {EXAMPLE_COLUMNS}, max(peak) AS peak FROM examples WHERE {condition}"
        return {example.feature: example for example in self._read(_example, query, json.dumps(sorted(set(features))))}

    def examples_at(self, shot: int) -> list[Example]:
        """Return the examples of all features that fire in a shot."""
        return self._examples("shot = ? AND kind != 'silent'", shot)

    def features_in(self, shots: Iterable[int], limit: int) -> list[int]:
        """Return the features with examples in some shots in which they fire: those of most shots first, then the strongest."""
        table = "examples WHERE shot IN (SELECT value FROM json_each(?)) AND kind != 'silent'"
        query = f"SELECT feature FROM {table} GROUP BY feature ORDER BY count(*) DESC, sum(rank), feature LIMIT ?"
        return [feature for (feature,) in self._query(query, json.dumps(sorted(set(shots))), limit)]

    def examples_in(self, shots: Iterable[int], features: Iterable[int]) -> list[Example]:
        """Return the examples of some features in some shots in which they fire."""
        condition = (
            "feature IN (SELECT value FROM json_each(?)) AND +shot IN (SELECT value FROM json_each(?)) AND kind != 'silent'"
        )
        return self._examples(condition, json.dumps(sorted(set(features))), json.dumps(sorted(set(shots))))

    def packed_maps(self, shot: int) -> list[tuple[int, float, bytes]]:
        """Return the feature of each example in a shot in which it fires, its peak there, and its map (`TokenMap.packed`)."""
        query = "SELECT feature, peak, map FROM examples WHERE shot = ? AND kind != 'silent'"
        return [(feature, peak, packed) for feature, peak, packed in self._query(query, shot)]

    def shots(self, numbers: Iterable[int]) -> dict[int, ShotRow]:
        """Return the shots of these numbers with their images, by number."""
        table = "shots JOIN images ON images.id = image WHERE shots.id IN (SELECT value FROM json_each(?))"
        query = f"SELECT shots.id, shot, {IMAGE_COLUMNS} FROM {table}"
        return {row.id: row for row in self._read(_shot_row, query, json.dumps(sorted(set(numbers))))}

    def shots_of(self, file: str) -> list[ShotRow]:
        """Return the shots whose image is this file of the album."""
        table = "shots JOIN images ON images.id = image WHERE file = ? ORDER BY shots.id"
        return self._read(_shot_row, f"SELECT shots.id, shot, {IMAGE_COLUMNS} FROM {table}", file)

    def images(self) -> list[ImageFile]:
        """Return all images of the book."""
        return [ImageFile(*row) for row in self._query(f"SELECT {IMAGE_COLUMNS} FROM images ORDER BY id")]

    def neighbours(self, feature: int) -> list[FeatureNeighbour]:
        """Return the features that fire together with this one, then those of the nearest directions, nearest first."""
        query = "SELECT neighbour, kind, value FROM neighbours WHERE feature = ? ORDER BY kind = 'direction', rank"
        return [FeatureNeighbour(*row) for row in self._query(query, feature)]

    def neighbour_pairs(self) -> Iterator[tuple[int, int, float, bool]]:
        """Yield each feature with each neighbour, the value, and whether it is of the kind `direction`."""
        with sqlite_errors(self.path, ADVICE):
            yield from map(
                tuple, self._connection.execute("SELECT feature, neighbour, value, kind = 'direction' FROM neighbours")
            )

    def patch(self, feature: int) -> AtomImage | None:
        """Return the image patch of an ITDA atom; None for other dictionaries, or if it is unknown."""
        table = "patches LEFT JOIN images ON images.id = image WHERE feature = ?"
        rows = self._read(_atom_image, f"SELECT feature, token, shot, {IMAGE_COLUMNS} FROM {table}", feature)
        return rows[0] if rows else None

    def explanations(self, feature: int | None = None, containing: str = "") -> list[Explanation]:
        """Return the explanations of a feature, or of all, whose text contains some letters in lower case."""
        columns = ", ".join(field.name for field in fields(Explanation))
        condition = "feature = ifnull(?, feature) AND instr(lower(text), ?)"
        return self._read(
            lambda row: Explanation(**{**row, "descriptions": tuple(json.loads(row["descriptions"]))}),
            f"SELECT {columns} FROM explanations WHERE {condition} ORDER BY id",
            feature,
            containing,
        )

    def captions(self, containing: str = "") -> list[CaptionedShot]:
        """Return the prompts of all shots that contain some letters in lower case."""
        prompt = "json_extract(shot, '$.prompt')"
        query = f"SELECT id, image, {prompt} FROM shots WHERE instr(lower({prompt}), ?) ORDER BY id"
        return self._read(lambda row: CaptionedShot(*row), query, containing)

    def top_images(self) -> Iterator[tuple[int, int]]:
        """Yield the feature and the shot of each top example: a pass over the whole file."""
        with sqlite_errors(self.path, ADVICE):
            cursor = self._connection.cursor()
            cursor.row_factory = None
            yield from cursor.execute("SELECT feature, shot FROM examples WHERE kind = 'top'")

    def judgements(self, explanation: int) -> list[Judgement]:
        """Return the judgements of an explanation in their order."""
        rows = self._query("SELECT example, fires, score FROM judgements WHERE explanation = ? ORDER BY id", explanation)
        return [Judgement(example, bool(fires), score) for example, fires, score in rows]

    def scores(self, explanation: int) -> list[ExplanationScore]:
        """Return the scores of an explanation, sorted by measure."""
        query = "SELECT measure, value, low, high, judgements FROM scores WHERE explanation = ? ORDER BY measure"
        return [ExplanationScore(*row) for row in self._query(query, explanation)]

    def best_scores(self, measure: str = "accuracy") -> dict[int, float]:
        """Return the best score of each feature that has one."""
        table = "scores JOIN explanations ON explanations.id = explanation WHERE state = 'done' AND measure = ?"
        rows = self._query(f"SELECT feature, max(value) FROM {table} GROUP BY feature", measure)
        return {feature: value for feature, value in rows}

    def usage(self) -> Iterator[RecordedUsage]:
        """Yield all records of usage in the order of writing."""
        columns = ", ".join(field.name for field in fields(RecordedUsage))
        yield from (RecordedUsage(**row) for row in self._query(f"SELECT {columns} FROM usage ORDER BY id"))

    def add_explanation(
        self,
        explanation: Explanation,
        judgements: Sequence[Judgement] = (),
        scores: Sequence[ExplanationScore] = (),
        usage: Sequence[RecordedUsage] = (),
    ) -> int:
        """Add an explanation with everything that belongs to it and return its number.

        It replaces an older one of the same feature, backend and protocol, whose usage is kept.
        """
        key = (explanation.feature, explanation.backend, explanation.protocol)
        content = (explanation.text, json.dumps(explanation.descriptions), explanation.state, explanation.reason)
        with self._writing() as connection:
            connection.execute("DELETE FROM explanations WHERE (feature, backend, protocol) = (?, ?, ?)", key)
            insertion = "INSERT INTO explanations VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, '')"
            number = connection.execute(insertion, (*key, *content)).lastrowid
            assert number is not None
            insertion = "INSERT INTO judgements VALUES (NULL, ?, ?, ?, ?)"
            connection.executemany(insertion, [(number, *judgement) for judgement in judgements])
            connection.executemany("INSERT INTO scores VALUES (?, ?, ?, ?, ?, ?)", [(number, *score) for score in scores])
            seal_row(connection, "explanations", number)
            _insert_usage(connection, [replace(entry, explanation=number) for entry in usage])
        return number

    def add_usage(self, usage: Iterable[RecordedUsage]) -> None:
        """Add records of usage."""
        with self._writing() as connection:
            _insert_usage(connection, usage)

    def discard_explanations(self) -> int:
        """Delete all explanations with their judgements, scores and usage; return how many explanations there were."""
        with self._writing() as connection:
            connection.execute("DELETE FROM usage")
            return connection.execute("DELETE FROM explanations").rowcount

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """Write everything in the block or nothing."""
        if not self._writable:
            raise BadInput(f"{self.path} is open for reading only. Open it with Book.edit to write.")
        with sqlite_errors(self.path, ADVICE), transaction(self._connection) as connection:
            yield connection

    def _examples(self, condition: str, *values: object) -> list[Example]:
        return self._read(_example, f"SELECT * FROM examples WHERE {condition}", *values)

    def _read(self, parse: Callable[[sqlite3.Row], T], query: str, *values: object) -> list[T]:
        """Return the rows of a query as `parse` reads them."""
        rows = self._query(query, *values)
        with parsing(self.path, "a book", ADVICE):
            return [parse(row) for row in rows]

    def _query(self, query: str, *values: object) -> list[sqlite3.Row]:
        with sqlite_errors(self.path, ADVICE):
            return self._connection.execute(query, values).fetchall()


def select_features(
    book: Book,
    conditions: Sequence[str],
    *,
    sort: str,
    ascending: bool = False,
    measure: str = "accuracy",
    concepts: Mapping[int, BestConcept],
) -> list[FeatureStats]:
    """Return the features that fulfil all conditions, such as `peak>3` or `concept=star`.

    `sort` is a column of `Book.features` or `concept`, the average precision of the best of the known `concepts`.
    """
    if sort not in (columns := ("concept", "score", *SORT_COLUMNS)):
        raise UnknownName.among("The column", sort, columns)
    names = [match[1] for text in conditions if (match := re.fullmatch(r"\s*concept\s*=\s*(.*?)\s*", text))]
    if (sort == "concept" or names) and not concepts:
        raise UnknownName(f"{book.about.dictionary} was not matched to concepts. Run difflex concepts first.")
    filters = [FeatureFilter.parse(text) for text in conditions if not re.match(r"\s*concept\s*=", text)]
    column = "feature" if sort == "concept" else sort
    rows = book.features(column, descending=not ascending, where=filters, measure=measure)
    for name in names:
        if name not in (choices := sorted({best.concept for best in concepts.values()})):
            raise UnknownName.among("The concept", name, choices)
        rows = [row for row in rows if row.feature in concepts and concepts[row.feature].concept == name]
    if sort != "concept":
        return rows
    rows = sorted((row for row in rows if row.feature in concepts), key=lambda row: concepts[row.feature].ap)
    return rows if ascending else rows[::-1]


@lru_cache(4096)
def _shot(text: str) -> Shot:
    """Return the shot written as JSON in `text`; kept, since the same images are those of many features."""
    return from_json(Shot, json.loads(text), "a shot")


def _shot_row(row: sqlite3.Row) -> ShotRow:
    number, text, *image = row
    return ShotRow(number, ImageFile(*image), _shot(text))


def _atom_image(row: sqlite3.Row) -> AtomImage:
    feature, token, text, *image = row
    return AtomImage(feature, token, None if image[0] is None else ImageFile(*image), _shot(text))


def _feature(row: sqlite3.Row) -> FeatureStats:
    first, *counts = map(int, json.loads(row["histogram"]))
    activity = tuple(map(float, json.loads(row["activity"])))
    return FeatureStats(**{**row, "histogram": Histogram(first, tuple(counts)), "activity": activity})


def _example(row: sqlite3.Row) -> Example:
    return Example(**{**row, "map": TokenMap.unpacked(row["map"], row["peak"])})


def _insert_usage(connection: sqlite3.Connection, usage: Iterable[RecordedUsage]) -> None:
    names = [field.name for field in fields(RecordedUsage)]
    insertion = f"INSERT INTO usage ({', '.join(names)}) VALUES ({', '.join(f':{name}' for name in names)})"
    for entry in usage:
        seal_row(connection, "usage", connection.execute(insertion, asdict(entry)).lastrowid)
