"""A book in the making: written under another name, put in place of an older one when all of it is there."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple, final

from difflex.errors import BadInput
from difflex.features.book.entries import AtomImage, BookInfo, Example, ExampleKind, FeatureNeighbour, FeatureStats, ImageFile
from difflex.features.book.opening import told, write_about
from difflex.features.book.schema import APPLICATION, FORMAT, INDEXES, TABLES
from difflex.records import Shot, Split

__all__ = ["BookWriter", "PackedExample"]

PATIENCE = 5.0
"""Seconds to wait for readers and a writer of the book that is replaced."""


class PackedExample(NamedTuple):
    """An example as it stands in its table, without its number."""

    feature: int
    kind: ExampleKind
    split: Split
    rank: int
    shot: int
    peak: float
    quantile: float | None
    map: bytes

    @classmethod
    def of(cls, example: Example) -> PackedExample:
        """The example, packed."""
        quantile, packed = example.quantile, example.map.packed()
        return cls(example.feature, example.kind, example.split, example.rank, example.shot, example.peak, quantile, packed)


@final
class BookWriter:
    """A book that nobody sees before it is finished."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self._path, self._connection = path, connection

    @classmethod
    @contextmanager
    def of(cls, path: Path | str, about: BookInfo) -> Iterator[BookWriter]:
        """A block in which the book at `path` is written: an older one gives way at its end, and stays if it fails."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        _removed(part)
        connection = sqlite3.connect(part, isolation_level=None)
        try:
            with told(path):
                # Nothing of it need survive a kill.
                connection.executescript(f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; {TABLES} BEGIN;")
                write_about(connection, about)
                yield cls(path, connection)
                connection.execute("COMMIT")
                connection.executescript(INDEXES)
                connection.executescript(f"PRAGMA user_version = {FORMAT}; PRAGMA application_id = {APPLICATION};")
                connection.execute("PRAGMA journal_mode = WAL")
        except BaseException:
            connection.close()
            _removed(part)
            raise
        connection.close()
        _put(part, path)

    def images(self, images: Iterable[ImageFile]) -> None:
        """Nothing; the book knows these images."""
        self._connection.executemany("INSERT INTO images VALUES (?, ?, ?, ?)", images)

    def shots(self, shots: Iterable[tuple[int, int, Shot]]) -> None:
        """Nothing; the book knows these shots, each with its number and that of its image."""
        rows = ((number, image, shot.split, json.dumps(asdict(shot))) for number, image, shot in shots)
        self._connection.executemany("INSERT INTO shots VALUES (?, ?, ?, ?)", rows)

    def features(self, features: Iterable[FeatureStats]) -> None:
        """Nothing; the book knows the figures of these features."""
        self._connection.executemany(f"INSERT INTO features VALUES ({', '.join('?' * 17)})", map(_figures, features))

    def examples(self, examples: Iterable[Example | PackedExample]) -> None:
        """Nothing; the book has these examples, numbered as they come."""
        columns = "feature, kind, split, rank, shot, peak, quantile, map"
        rows = (each if isinstance(each, PackedExample) else PackedExample.of(each) for each in examples)
        self._connection.executemany(f"INSERT INTO examples ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def neighbours(self, feature: int, neighbours: Iterable[FeatureNeighbour]) -> None:
        """Nothing; the book knows the neighbours of a feature, each kind in its order."""
        ranks: dict[str, int] = {}
        for other, kind, value in neighbours:
            rank = ranks[kind] = ranks.get(kind, -1) + 1
            self._connection.execute("INSERT INTO neighbours VALUES (?, ?, ?, ?, ?)", (feature, kind, rank, other, value))

    def patches(self, patches: Iterable[AtomImage]) -> None:
        """Nothing; the book knows which patches these features are."""
        rows = ((each.feature, each.token, each.image and each.image.id, json.dumps(asdict(each.shot))) for each in patches)
        self._connection.executemany("INSERT INTO patches VALUES (?, ?, ?, ?)", rows)


def _figures(row: FeatureStats) -> tuple[object, ...]:
    place = (row.area, row.spread, row.concentration, row.border, row.position, row.coverage, row.strength)
    told = (json.dumps([row.histogram.first, *row.histogram.counts]), json.dumps(row.activity))
    counts = (row.feature, row.fired, row.shots, row.density, row.peak, row.mean, row.negative_share, row.negative_peak)
    return *counts, *place, *told


def _put(part: Path, path: Path) -> None:
    """Nothing; the finished book is at `path`, flushed to the disk."""
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    _beside(part)
    with _emptied(path):
        os.replace(part, path)
        _beside(path)


@contextmanager
def _emptied(path: Path) -> Iterator[None]:
    """A block within which nobody writes in the older book at `path`, and nothing of it stands in its log.

    A log that is left lying would be taken for the new book's.
    """
    if not path.is_file():
        _beside(path)
        yield
        return
    connection = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None)
    try:
        _claim(path, connection)
        yield
    finally:
        connection.close()


def _claim(path: Path, connection: sqlite3.Connection) -> None:
    try:
        busy, *_ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        connection.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError as error:
        raise BadInput(f"Another process is writing in {path}, which is to be replaced. Wait for it to end.") from error
    except sqlite3.DatabaseError:
        return  # damaged: nothing of it is worth keeping
    log = path.with_name(f"{path.name}-wal")
    if busy or (log.is_file() and log.stat().st_size):
        raise BadInput(f"Another process is at work with {path}, which is to be replaced. Wait for it to end.")


def _removed(path: Path) -> None:
    path.unlink(missing_ok=True)
    _beside(path)


def _beside(path: Path) -> None:
    """Nothing; the files that SQLite keeps beside a book are gone."""
    for ending in ("-wal", "-shm", "-journal"):
        with suppress(FileNotFoundError):
            path.with_name(path.name + ending).unlink()
