"""`Book`: what is asked of a book, and what a writer adds to it after it was made."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, final

from difflex.errors import BadInput, UnknownName
from difflex.features.book.entries import (
    AtomImage,
    BookInfo,
    Example,
    ExampleKind,
    Explanation,
    ExplanationScore,
    FeatureNeighbour,
    FeatureStats,
    Histogram,
    ImageFile,
    Judgement,
    RecordedUsage,
    ShotRow,
    TokenMap,
)
from difflex.features.book.opening import connected, read_about, told, transaction
from difflex.records import Shot, Split

__all__ = ["SORTS", "Book", "CoverageSummary", "FeatureFilter"]

COLUMNS = (
    "feature, fired, shots, density, peak, mean, negative_share, negative_peak, area, spread, concentration, border, position, "
    "coverage, strength, histogram, activity"
)
SORTS = tuple(COLUMNS.split(", ")[:-2])
"""The columns of figures: what features can be sorted by, and conditions be about."""
EXAMPLE = "id, feature, kind, split, rank, shot, peak, quantile, map"
IMAGE = "images.id, file, width, height"
SCORE = (
    "(SELECT max(value) FROM scores JOIN explanations ON explanations.id = explanation "
    "WHERE explanations.feature = features.feature AND state = 'done' AND measure = ?)"
)


class FeatureFilter(NamedTuple):
    """What a figure of a feature must be."""

    column: str
    sign: Literal["<", "<=", ">", ">=", "="]
    value: float

    @classmethod
    def parse(cls, text: str) -> FeatureFilter:
        """The condition written as `text`, as in `density<0.01`."""
        found = re.fullmatch(r"\s*(\w+)\s*(<=|>=|<|>|=)\s*(-?\d+\.?\d*(?:[eE]-?\d+)?)\s*", text)
        if not found:
            raise BadInput(f"'{text}' is not a condition. Write a column, one of < <= > >= = and a number: density<0.01.")
        if found[1] not in SORTS:
            raise UnknownName.among("The column", found[1], SORTS)
        sign = found[2]
        assert sign in ("<", "<=", ">", ">=", "=")
        return cls(found[1], sign, float(found[3]))


class CoverageSummary(NamedTuple):
    """How much of their top images the features of a dictionary cover (`FeatureStats.coverage`)."""

    features: int
    """Over how many features: those that fire in enough images."""
    mean: float
    quartiles: tuple[float, float, float]
    """A quarter, half and three quarters of the features cover less."""
    area: float
    """The share of an image's tokens at which they fire, however weakly, mean over all images in which they do."""


@final
class Book:
    """The book of one dictionary: one SQLite file, read by many while one writes."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self.about: BookInfo = read_about(path, connection)
        self._connection = connection

    @classmethod
    def open(cls, path: Path | str) -> Book:
        """The book at `path`, to be read."""
        return cls(Path(path), connected(Path(path), writable=False))

    @classmethod
    def edit(cls, path: Path | str) -> Book:
        """The book at `path`, to be read and added to; writers wait for one another."""
        return cls(Path(path), connected(Path(path), writable=True))

    def close(self) -> None:
        """Nothing; the file is let go of."""
        self._connection.close()

    def __enter__(self) -> Book:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def feature(self, feature: int) -> FeatureStats:
        """One feature in figures."""
        rows = self._asked(f"SELECT {COLUMNS} FROM features WHERE feature = ?", feature)
        if not rows:
            raise UnknownName(
                f"{self.about.dictionary} has no feature {feature}: they are numbered from 0 to {self.about.size - 1}."
            )
        return _feature(rows[0])

    def features(
        self,
        sort: str = "feature",
        *,
        descending: bool = False,
        where: Iterable[FeatureFilter] = (),
        limit: int | None = None,
        measure: str = "accuracy",
    ) -> list[FeatureStats]:
        """Features in the order of a column of `SORTS`, or of `score`, their explanations' best of `measure`.

        What has no value comes last.
        """
        if sort != "score" and sort not in SORTS:
            raise UnknownName.among("The column", sort, ("score", *SORTS))
        given, conditions = [], []
        for condition in where:
            conditions.append(f"{condition.column} {condition.sign} ?")
            given.append(condition.value)
        key = SCORE if sort == "score" else sort
        filtered = f" WHERE {' AND '.join(conditions)}" if conditions else ""
        order = f" ORDER BY {key} {'DESC' if descending else 'ASC'} NULLS LAST, feature LIMIT ?"
        given += [measure] * (sort == "score") + [-1 if limit is None else limit]
        return [_feature(row) for row in self._asked(f"SELECT {COLUMNS} FROM features{filtered}{order}", *given)]

    def covering(self, shots: int = 8) -> CoverageSummary | None:
        """How much of their top images features cover that fire in so many shots or more; None where there are none."""
        rows = self._asked(
            "SELECT coverage, area FROM features WHERE shots >= ? AND coverage IS NOT NULL ORDER BY coverage", shots
        )
        if not rows:
            return None
        covered, areas = [row[0] for row in rows], [row[1] for row in rows]
        quarter, half, most = (covered[len(covered) * part // 4] for part in (1, 2, 3))
        return CoverageSummary(len(rows), sum(covered) / len(rows), (quarter, half, most), sum(areas) / len(rows))

    def count_firing(self) -> int:
        """How many features fire at some token."""
        return int(self._asked("SELECT count(*) FROM features WHERE fired > 0")[0][0])

    def examples(self, feature: int, kind: ExampleKind | None = None, split: Split | None = None) -> list[Example]:
        """The examples of a feature in the order of kind, split and rank."""
        asked = f"SELECT {EXAMPLE} FROM examples WHERE feature = ? AND kind = ifnull(?, kind) AND split = ifnull(?, split)"
        kinds = "CASE kind WHEN 'top' THEN 0 WHEN 'quantile' THEN 1 ELSE 2 END"
        return [_example(row) for row in self._asked(f"{asked} ORDER BY {kinds}, split = 'held-out', rank", feature, kind, split)]

    def example(self, example: int) -> Example:
        """The example of this number."""
        rows = self._asked(f"SELECT {EXAMPLE} FROM examples WHERE id = ?", example)
        if not rows:
            raise UnknownName(f"{self.path} has no example {example}.")
        return _example(rows[0])

    def examples_at(self, shot: int) -> list[Example]:
        """The examples of all features that fire in a shot."""
        return [_example(row) for row in self._asked(f"SELECT {EXAMPLE} FROM examples WHERE shot = ? AND kind != 'silent'", shot)]

    def shots(self, numbers: Iterable[int]) -> dict[int, ShotRow]:
        """The shots of these numbers, with their images."""
        wanted = json.dumps(sorted(set(numbers)))
        joined = "shots JOIN images ON images.id = image WHERE shots.id IN (SELECT value FROM json_each(?))"
        rows = self._asked(f"SELECT shots.id, shot, {IMAGE} FROM {joined}", wanted)
        return {number: ShotRow(number, ImageFile(*image), _shot(told)) for number, told, *image in rows}

    def images(self) -> list[ImageFile]:
        """All images that the book shows."""
        return [ImageFile(*row) for row in self._asked(f"SELECT {IMAGE} FROM images ORDER BY id")]

    def neighbours(self, feature: int) -> list[FeatureNeighbour]:
        """The features that fire together with this one, and those whose decoder is nearest, each the nearest first."""
        asked = "SELECT other, kind, value FROM neighbours WHERE feature = ? ORDER BY kind = 'direction', rank"
        return [FeatureNeighbour(*row) for row in self._asked(asked, feature)]

    def patch(self, feature: int) -> AtomImage | None:
        """The patch of the data that an ITDA atom is; None for other dictionaries, or where nobody knows."""
        joined = "patches LEFT JOIN images ON images.id = image WHERE feature = ?"
        rows = self._asked(f"SELECT feature, token, shot, {IMAGE} FROM {joined}", feature)
        if not rows:
            return None
        number, token, told, *image = rows[0]
        return AtomImage(number, token, None if image[0] is None else ImageFile(*image), _shot(told))

    def explanations(self, feature: int | None = None) -> list[Explanation]:
        """The explanations of a feature, or of all."""
        columns = "id, feature, backend, protocol, text, descriptions, state, reason"
        asked = f"SELECT {columns} FROM explanations WHERE feature = ifnull(?, feature) ORDER BY id"
        return [_explanation(*row) for row in self._asked(asked, feature)]

    def judgements(self, explanation: int) -> list[Judgement]:
        """How well examples fit an explanation, in the order in which they were judged."""
        asked = "SELECT example, wanted, score FROM judgements WHERE explanation = ? ORDER BY id"
        return [Judgement(example, bool(wanted), score) for example, wanted, score in self._asked(asked, explanation)]

    def scores(self, explanation: int) -> list[ExplanationScore]:
        """How well an explanation tells its feature's examples from others, by measure."""
        asked = "SELECT measure, value, low, high, count FROM scores WHERE explanation = ? ORDER BY measure"
        return [ExplanationScore(*row) for row in self._asked(asked, explanation)]

    def best_scores(self, measure: str = "accuracy") -> dict[int, float]:
        """The best score of each feature that has one."""
        joined = "scores JOIN explanations ON explanations.id = explanation WHERE state = 'done' AND measure = ?"
        return dict(self._asked(f"SELECT feature, max(value) FROM {joined} GROUP BY feature", measure))

    def explain(
        self,
        explanation: Explanation,
        judgements: Sequence[Judgement] = (),
        scores: Sequence[ExplanationScore] = (),
        usage: Sequence[RecordedUsage] = (),
    ) -> int:
        """The number of the explanation, which the book now holds with all that belongs to it, in place of an older one.

        It replaces what the same backend said of the feature by the same protocol; what that took stays in the table of usage.
        """
        same = (explanation.feature, explanation.backend, explanation.protocol)
        words = (explanation.text, json.dumps(explanation.descriptions), explanation.state, explanation.reason)
        with transaction(self.path, self._connection) as writer:
            writer.execute("DELETE FROM explanations WHERE (feature, backend, protocol) = (?, ?, ?)", same)
            columns = "feature, backend, protocol, text, descriptions, state, reason"
            done = writer.execute(f"INSERT INTO explanations ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", (*same, *words))
            number = done.lastrowid
            assert number is not None
            judged = [(number, *judgement) for judgement in judgements]
            writer.executemany("INSERT INTO judgements (explanation, example, wanted, score) VALUES (?, ?, ?, ?)", judged)
            writer.executemany("INSERT INTO scores VALUES (?, ?, ?, ?, ?, ?)", [(number, *score) for score in scores])
            writer.executemany(_USED, [_used(each, number) for each in usage])
        return number

    def use(self, usage: Iterable[RecordedUsage]) -> None:
        """Nothing; the book says what these answers took."""
        with transaction(self.path, self._connection) as writer:
            writer.executemany(_USED, [_used(each, each.explanation) for each in usage])

    def usage(self) -> Iterator[RecordedUsage]:
        """What answers took, in the order in which it was written down."""
        columns = "explanation, backend, role, asked, tokens_in, tokens_out, cost, seconds"
        names = columns.split(", ")
        for row in self._asked(f"SELECT {columns} FROM usage ORDER BY id"):
            yield RecordedUsage(**dict(zip(names, row, strict=True)))

    def _asked(self, query: str, *given: object) -> list[tuple]:
        with told(self.path):
            return self._connection.execute(query, given).fetchall()


_USED = (
    "INSERT INTO usage (explanation, backend, role, asked, tokens_in, tokens_out, cost, seconds) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
)


def _used(usage: RecordedUsage, explanation: int | None) -> tuple[object, ...]:
    taken = (usage.asked, usage.tokens_in, usage.tokens_out, usage.cost, usage.seconds)
    return explanation, usage.backend, usage.role, *taken


def _feature(row: tuple) -> FeatureStats:
    *figures, histogram, activity = row
    first, *counts = json.loads(histogram)
    names = dict(zip(SORTS, figures, strict=True))
    return FeatureStats(**names, histogram=Histogram(first, tuple(counts)), activity=tuple(json.loads(activity)))


def _example(row: tuple) -> Example:
    number, feature, kind, split, rank, shot, peak, quantile, blob = row
    return Example(
        id=number,
        feature=feature,
        kind=kind,
        split=split,
        rank=rank,
        shot=shot,
        peak=peak,
        quantile=quantile,
        map=TokenMap.unpacked(blob, peak),
    )


def _explanation(
    number: int,
    feature: int,
    backend: str,
    protocol: str,
    text: str,
    descriptions: str,
    state: Literal["done", "failed"],
    reason: str,
) -> Explanation:
    return Explanation(
        id=number,
        feature=feature,
        backend=backend,
        protocol=protocol,
        text=text,
        descriptions=tuple(json.loads(descriptions)),
        state=state,
        reason=reason,
    )


def _shot(told: str) -> Shot:
    entries = json.loads(told)
    return Shot(**{**entries, "pixels": tuple(entries["pixels"])})
