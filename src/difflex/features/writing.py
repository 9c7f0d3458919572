"""`BookWriter` writes a new book, and replaces the older one without losing what `difflex explain` wrote into it."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import fields
from itertools import count
from pathlib import Path
from typing import NamedTuple, final

from difflex.errors import BrokenFile, StaleWork
from difflex.features.entries import AtomImage, Example, ExampleKind, FeatureNeighbour, FeatureStats, ImageFile
from difflex.features.tables import (
    ADVICE,
    APPLICATION,
    FORMAT,
    INDEXES,
    TABLES,
    BookInfo,
    connect,
    read_info,
    verify,
    write_info,
)
from difflex.files import disk_errors, replacing
from difflex.records import Shot, Split
from difflex.sqlite import sqlite_errors

REPLACE_TIMEOUT = 5.0
"""Seconds to wait for a writer of a book that is replaced."""
CARRIED_OVER = """
INSERT INTO explanations SELECT * FROM former.explanations;
INSERT INTO scores SELECT * FROM former.scores;
INSERT INTO usage SELECT * FROM former.usage;
INSERT INTO judgements SELECT judgements.id, explanation, (
    SELECT min(own.id) FROM examples AS own JOIN shots AS own_shots ON own_shots.id = own.shot
    WHERE (own.feature, own.kind, own_shots.shot) = (examples.feature, examples.kind, shots.shot)
), fires, score
FROM former.judgements LEFT JOIN former.examples ON examples.id = example LEFT JOIN former.shots ON shots.id = examples.shot;
"""
"""A judgement stays with the example of the same feature, kind and shot; without one its example is NULL."""


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
        return cls(**{**{name: getattr(example, name) for name in cls._fields}, "map": example.map.packed()})


@final
class BookWriter:
    """Writes the tables of a new book."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    @classmethod
    @contextmanager
    def open(cls, path: Path | str, about: BookInfo, log: Callable[[str], None] = print) -> Iterator[BookWriter]:
        """Yield a writer; at the end of the block its book replaces the one at `path`, unless there was an error.

        Explanations of the same dictionary are carried over. A book that holds explanations of another one, is damaged or of an
        older format is moved aside, and `log` gets a sentence about it; a book of a newer format is an error.
        """
        path = Path(path)
        with ExitStack() as former, replacing(path) as temporary, sqlite_errors(path, ADVICE):
            with closing(_connect(temporary)) as connection:
                connection.executescript(f"{TABLES} BEGIN;")
                yield cls(connection)
                connection.execute("COMMIT")
                connection.executescript(INDEXES)
            with closing(_connect(temporary)) as connection:
                connection.execute("BEGIN")
                write_info(temporary, connection, about)
                connection.execute("COMMIT")
                connection.executescript(f"PRAGMA user_version = {FORMAT}; PRAGMA application_id = {APPLICATION};")
                _make_way(path, about, connection, former, log)

    def add_images(self, images: Iterable[ImageFile]) -> None:
        """Add images."""
        self._connection.executemany("INSERT INTO images VALUES (?, ?, ?, ?)", images)

    def add_shots(self, shots: Iterable[tuple[int, int, Shot]]) -> None:
        """Add shots, each with its number and the number of its image."""
        rows = ((number, image, shot.split, json.dumps(shot.as_json())) for number, image, shot in shots)
        self._connection.executemany("INSERT INTO shots VALUES (?, ?, ?, ?)", rows)

    def add_features(self, features: Iterable[FeatureStats]) -> None:
        """Add the statistics of features."""
        values = ", ".join(f":{field.name}" for field in fields(FeatureStats))
        rows = (
            {
                **vars(row),
                "histogram": json.dumps([row.histogram.first, *row.histogram.counts]),
                "activity": json.dumps(row.activity),
            }
            for row in features
        )
        self._connection.executemany(f"INSERT INTO features VALUES ({values})", rows)

    def add_examples(self, examples: Iterable[Example | PackedExample]) -> None:
        """Add examples, numbered in their order."""
        rows = (example if isinstance(example, PackedExample) else PackedExample.of(example) for example in examples)
        self._connection.executemany("INSERT INTO examples VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def add_neighbours(self, feature: int, neighbours: Iterable[FeatureNeighbour]) -> None:
        """Add the neighbours of a feature, those of each kind nearest first."""
        ranks: dict[str, int] = {}
        for neighbour, kind, value in neighbours:
            rank = ranks[kind] = ranks.get(kind, -1) + 1
            self._connection.execute("INSERT INTO neighbours VALUES (?, ?, ?, ?, ?)", (feature, kind, rank, neighbour, value))

    def add_patch(self, patch: AtomImage) -> None:
        """Add the image patch of an ITDA atom."""
        row = (patch.feature, patch.token, patch.image and patch.image.id, json.dumps(patch.shot.as_json()))
        self._connection.execute("INSERT INTO patches VALUES (?, ?, ?, ?)", row)


def _connect(temporary: Path) -> sqlite3.Connection:
    """Connect to a book that is being written: a killed writer starts again, so nothing of it needs to survive."""
    connection = sqlite3.connect(temporary, isolation_level=None)
    connection.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;")
    return connection


def _make_way(path: Path, about: BookInfo, connection: sqlite3.Connection, former: ExitStack, log: Callable[[str], None]) -> None:
    """Carry explanations over from the book at `path`, which stays locked until `former` is closed; or move it aside."""
    if not path.is_file():
        return
    try:
        older = former.enter_context(closing(connect(path, writable=True)))
        info = read_info(path, older)
        verify(path, older)
    except (BrokenFile, StaleWork) as error:
        former.close()
        aside = move_aside(path, "damaged" if isinstance(error, BrokenFile) else "older")
        log(f"{error} It is kept as {aside}; explanations in it are not in the new book.")
        return
    older.execute(f"PRAGMA busy_timeout = {round(1000 * REPLACE_TIMEOUT)}")
    older.execute("BEGIN IMMEDIATE")
    (is_explained,) = older.execute("SELECT EXISTS (SELECT 1 FROM explanations) OR EXISTS (SELECT 1 FROM usage)").fetchone()
    if is_explained and info.fingerprint == about.fingerprint:
        connection.execute("ATTACH ? AS former", (str(path),))
        connection.executescript(f"BEGIN; {CARRIED_OVER} COMMIT; DETACH former;")
    elif is_explained:
        aside = move_aside(path, f"former-{info.fingerprint[:8]}")
        log(f"{path} holds explanations of other weights of {info.dictionary}: it is kept as {aside}.")


def move_aside(path: Path, word: str) -> Path:
    """Move a book to a free name beside it, with what SQLite keeps next to it, and return the name."""
    logs = [ending for ending in ("-journal", "-wal") if Path(f"{path}{ending}").exists()]
    names = (path.with_name(f"{path.stem}.{word}-{number}.sqlite") for number in count(1))
    # After a kill between the moves, a log has the name already: the book joins it.
    aside = next(name for name in names if not any(Path(f"{name}{ending}").exists() for ending in ("", *logs)))
    with disk_errors(path):
        for ending in logs:
            os.replace(f"{path}{ending}", f"{aside}{ending}")
        os.replace(path, aside)
        Path(f"{path}-shm").unlink(missing_ok=True)
    return aside
