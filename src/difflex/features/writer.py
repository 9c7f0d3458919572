"""`BookWriter`: writes a new book under a temporary name and replaces the older one when it is complete."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple, final

from difflex.errors import BadInput
from difflex.features.entries import AtomImage, Example, ExampleKind, FeatureNeighbour, FeatureStats, ImageFile
from difflex.features.schema import APPLICATION, FORMAT, INDEXES, TABLES, BookInfo, sqlite_errors, write_info
from difflex.records import Shot, Split

__all__ = ["BookWriter", "PackedExample"]

REPLACE_TIMEOUT = 5.0
"""Seconds to wait for readers and a writer of the book that is replaced."""


class PackedExample(NamedTuple):
    """A row of the table of examples, without its number."""

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
        """Pack an example."""
        quantile, packed = example.quantile, example.map.packed()
        return cls(example.feature, example.kind, example.split, example.rank, example.shot, example.peak, quantile, packed)


@final
class BookWriter:
    """Writes the tables of a new book."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    @classmethod
    @contextmanager
    def open(cls, path: Path | str, about: BookInfo) -> Iterator[BookWriter]:
        """Yield a writer; at the end of the block its book replaces the one at `path`, unless there was an error."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.part")
        _delete(temporary)
        connection = sqlite3.connect(temporary, isolation_level=None)
        try:
            with sqlite_errors(path):
                # A killed writer starts again, so nothing needs to survive it.
                connection.executescript(f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; {TABLES} BEGIN;")
                write_info(connection, about)
                yield cls(connection)
                connection.execute("COMMIT")
                connection.executescript(INDEXES)
                connection.executescript(f"PRAGMA user_version = {FORMAT}; PRAGMA application_id = {APPLICATION};")
                connection.execute("PRAGMA journal_mode = WAL")
        except BaseException:
            connection.close()
            _delete(temporary)
            raise
        connection.close()
        _replace(temporary, path)

    def add_images(self, images: Iterable[ImageFile]) -> None:
        """Add images."""
        self._connection.executemany("INSERT INTO images VALUES (?, ?, ?, ?)", images)

    def add_shots(self, shots: Iterable[tuple[int, int, Shot]]) -> None:
        """Add shots, each with its number and the number of its image."""
        rows = ((number, image, shot.split, json.dumps(asdict(shot))) for number, image, shot in shots)
        self._connection.executemany("INSERT INTO shots VALUES (?, ?, ?, ?)", rows)

    def add_features(self, features: Iterable[FeatureStats]) -> None:
        """Add the statistics of features."""
        self._connection.executemany(f"INSERT INTO features VALUES ({', '.join('?' * 17)})", map(_feature_row, features))

    def add_examples(self, examples: Iterable[Example | PackedExample]) -> None:
        """Add examples, numbered in their order."""
        columns = "feature, kind, split, rank, shot, peak, quantile, map"
        rows = (example if isinstance(example, PackedExample) else PackedExample.of(example) for example in examples)
        self._connection.executemany(f"INSERT INTO examples ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def add_neighbours(self, feature: int, neighbours: Iterable[FeatureNeighbour]) -> None:
        """Add the neighbours of a feature, those of each kind nearest first."""
        ranks: dict[str, int] = {}
        for neighbour, kind, value in neighbours:
            rank = ranks[kind] = ranks.get(kind, -1) + 1
            self._connection.execute("INSERT INTO neighbours VALUES (?, ?, ?, ?, ?)", (feature, kind, rank, neighbour, value))

    def add_patches(self, patches: Iterable[AtomImage]) -> None:
        """Add the image patches of ITDA atoms."""
        rows = ((each.feature, each.token, each.image and each.image.id, json.dumps(asdict(each.shot))) for each in patches)
        self._connection.executemany("INSERT INTO patches VALUES (?, ?, ?, ?)", rows)


def _feature_row(row: FeatureStats) -> tuple[object, ...]:
    counts = (row.feature, row.firings, row.shots, row.density, row.peak, row.mean, row.negative_share, row.negative_peak)
    spatial = (row.area, row.spread, row.concentration, row.border, row.position, row.coverage)
    distributions = (json.dumps([row.histogram.first, *row.histogram.counts]), json.dumps(row.activity))
    return *counts, *spatial, row.strength, *distributions


def _replace(temporary: Path, path: Path) -> None:
    """Flush the finished book to the disk and give it its name."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    _delete_logs(temporary)
    with _exclusive(path):
        os.replace(temporary, path)
        _delete_logs(path)


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Keep other writers out of the older book at `path`, if any, and empty its log.

    SQLite would take a remaining log for that of the new book.
    """
    if not path.is_file():
        _delete_logs(path)
        yield
        return
    connection = sqlite3.connect(path, timeout=REPLACE_TIMEOUT, isolation_level=None)
    try:
        _lock(path, connection)
        yield
    finally:
        connection.close()


def _lock(path: Path, connection: sqlite3.Connection) -> None:
    try:
        busy, *_ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        connection.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError as error:
        raise BadInput(f"Another process is writing in {path}, which is to be replaced. Wait for it to end.") from error
    except sqlite3.DatabaseError:
        return  # a damaged book is simply replaced
    log = path.with_name(f"{path.name}-wal")
    if busy or (log.is_file() and log.stat().st_size):
        raise BadInput(f"Another process is using {path}, which is to be replaced. Wait for it to end.")


def _delete(path: Path) -> None:
    path.unlink(missing_ok=True)
    _delete_logs(path)


def _delete_logs(path: Path) -> None:
    """Delete the files that SQLite keeps next to a book."""
    for ending in ("-wal", "-shm", "-journal"):
        path.with_name(path.name + ending).unlink(missing_ok=True)
