"""The SQLite tables of a book (see docs/books.md), connections to it, and `BookWriter`, which writes a new one."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple, final

from difflex.errors import BadInput, BrokenFile, OutOfSpace, UnknownName
from difflex.features.entries import AtomImage, Example, ExampleKind, FeatureNeighbour, FeatureStats, ImageFile
from difflex.records import Shot, Split

FORMAT = 3
"""Stored as `PRAGMA user_version`. Format 1 had no default strengths; format 2 had other column names."""
APPLICATION = 0x64666C78
"""Stored as `PRAGMA application_id`: the letters dflx."""
LOCK_TIMEOUT = 30.0
"""Seconds that a writer waits for another one."""
REPLACE_TIMEOUT = 5.0
"""Seconds to wait for readers and a writer of a book that is replaced."""
ADVICE = "Delete it and run difflex collect again."

TABLES = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE images (id INTEGER PRIMARY KEY, file TEXT NOT NULL UNIQUE, width INTEGER NOT NULL, height INTEGER NOT NULL);
CREATE TABLE shots (
    id INTEGER PRIMARY KEY,
    image INTEGER NOT NULL REFERENCES images (id),
    split TEXT NOT NULL CHECK (split IN ('train', 'held-out')),
    shot TEXT NOT NULL
);
CREATE TABLE features (
    feature INTEGER PRIMARY KEY, firings INTEGER NOT NULL, shots INTEGER NOT NULL, density REAL NOT NULL,
    peak REAL NOT NULL, mean REAL NOT NULL, negative_share REAL NOT NULL, negative_peak REAL NOT NULL,
    area REAL, spread REAL, concentration REAL, border REAL, position REAL, coverage REAL, strength REAL,
    histogram TEXT NOT NULL, activity TEXT NOT NULL
);
CREATE TABLE examples (
    id INTEGER PRIMARY KEY,
    feature INTEGER NOT NULL REFERENCES features (feature),
    kind TEXT NOT NULL CHECK (kind IN ('top', 'quantile', 'silent')),
    split TEXT NOT NULL CHECK (split IN ('train', 'held-out')),
    rank INTEGER NOT NULL,
    shot INTEGER NOT NULL REFERENCES shots (id),
    peak REAL NOT NULL, quantile REAL, map BLOB NOT NULL
);
CREATE TABLE neighbours (
    feature INTEGER NOT NULL REFERENCES features (feature),
    kind TEXT NOT NULL CHECK (kind IN ('firing', 'direction')),
    rank INTEGER NOT NULL,
    neighbour INTEGER NOT NULL REFERENCES features (feature),
    value REAL NOT NULL,
    PRIMARY KEY (feature, kind, rank)
) WITHOUT ROWID;
CREATE TABLE patches (
    feature INTEGER PRIMARY KEY REFERENCES features (feature),
    token INTEGER NOT NULL, image INTEGER REFERENCES images (id), shot TEXT NOT NULL
);
CREATE TABLE explanations (
    id INTEGER PRIMARY KEY,
    feature INTEGER NOT NULL REFERENCES features (feature),
    backend TEXT NOT NULL, protocol TEXT NOT NULL, text TEXT NOT NULL, descriptions TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('done', 'failed')),
    reason TEXT NOT NULL DEFAULT '',
    UNIQUE (feature, backend, protocol)
);
CREATE TABLE judgements (
    id INTEGER PRIMARY KEY,
    explanation INTEGER NOT NULL REFERENCES explanations (id) ON DELETE CASCADE,
    example INTEGER NOT NULL REFERENCES examples (id),
    fires INTEGER NOT NULL CHECK (fires IN (0, 1)),
    score REAL NOT NULL
);
CREATE TABLE scores (
    explanation INTEGER NOT NULL REFERENCES explanations (id) ON DELETE CASCADE,
    measure TEXT NOT NULL, value REAL NOT NULL, low REAL, high REAL, judgements INTEGER NOT NULL,
    PRIMARY KEY (explanation, measure)
) WITHOUT ROWID;
CREATE TABLE usage (
    id INTEGER PRIMARY KEY,
    explanation INTEGER REFERENCES explanations (id) ON DELETE SET NULL,
    backend TEXT NOT NULL, role TEXT NOT NULL, calls INTEGER NOT NULL,
    tokens_in INTEGER NOT NULL, tokens_out INTEGER NOT NULL, cost REAL, seconds REAL NOT NULL
);
"""
INDEXES = """
CREATE UNIQUE INDEX examples_of_a_feature ON examples (feature, kind, split, rank);
CREATE INDEX examples_of_a_shot ON examples (shot);
CREATE INDEX features_by_density ON features (density);
CREATE INDEX features_by_peak ON features (peak);
CREATE INDEX shots_of_an_image ON shots (image);
CREATE INDEX judgements_of_an_explanation ON judgements (explanation);
CREATE INDEX scores_by_measure ON scores (measure, value);
"""


@dataclass(frozen=True, kw_only=True)
class BookInfo:
    """What a book describes and what it was made from."""

    dictionary: str
    """`SITE/LABEL`."""
    kind: str
    """Kind of the dictionary: topk, itda, neurons ..."""
    size: int
    k: int
    fingerprint: str
    """Fingerprint of the dictionary when the book was made."""
    model: str
    revision: str | None = None
    data: str
    """Description of the images and of the settings: books with the same description hold the same examples."""
    grid: tuple[int, int] | None
    """Rows and columns of the tokens, in row-major order; None for text."""
    tokens: int
    """Number of tokens that the statistics are about."""
    shots: Mapping[Split, int]
    """Number of shots, by split."""
    images: int
    timesteps: tuple[float, ...] = ()
    """Timesteps of `FeatureStats.activity`, in decreasing order."""
    difflex: str = ""
    """Version of the package that made the book."""


def connect(path: Path, writable: bool) -> sqlite3.Connection:
    """Connect to the book at `path` and check its format."""
    if not path.is_file():
        raise UnknownName(f"There is no book {path}. Run difflex collect to make it.")
    with sqlite_errors(path):
        try:
            return _connection(path, "rw" if writable else "ro")
        except sqlite3.OperationalError:
            if writable:
                raise
            # In WAL mode a reader creates a file next to the book, which fails in a read-only folder.
            return _connection(path, "ro&immutable=1")


def _connection(path: Path, mode: str) -> sqlite3.Connection:
    """Connect to a file, which must be a finished book of the current format."""
    uri = f"{path.resolve().as_uri()}?mode={mode}"
    connection = sqlite3.connect(uri, uri=True, timeout=LOCK_TIMEOUT, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    try:
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if application != APPLICATION:
            raise BrokenFile(f"{path} is not a finished book: its application id is {application:#x}. {ADVICE}")
        if version < FORMAT:
            raise BrokenFile(f"{path} is of format {version}, which this difflex no longer reads. {ADVICE}")
        if version > FORMAT:
            raise BrokenFile(f"{path} is of format {version}; this difflex reads format {FORMAT}. Use the difflex that wrote it.")
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """Turn the errors of SQLite in a block into errors of difflex."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "full" in str(error):
            raise OutOfSpace(f"{path} cannot be written: the disk is full. Free some space and run the command again.") from error
        if "locked" in str(error):
            raise BadInput(f"Another process is writing in {path}. Wait for it to end.") from error
        if "readonly" in str(error):
            raise BadInput(f"{path} is open for reading only. Open it with Book.edit to write.") from error
        raise BrokenFile(f"{path} cannot be read ({error}). {ADVICE}") from error
    except sqlite3.IntegrityError as error:
        raise BadInput(f"{path} does not accept this entry: {error}.") from error
    except sqlite3.DatabaseError as error:
        raise BrokenFile(f"{path} is damaged ({error}). {ADVICE}") from error


@contextmanager
def transaction(path: Path, connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """Write everything in the block or nothing; one writer at a time."""
    with sqlite_errors(path), connection:
        connection.execute("BEGIN IMMEDIATE")
        yield connection


def read_info(path: Path, connection: sqlite3.Connection) -> BookInfo:
    """Read the table `about`."""
    with sqlite_errors(path):
        entries = {name: json.loads(value) for name, value in connection.execute("SELECT name, value FROM about")}
    if difference := entries.keys() ^ {field.name for field in fields(BookInfo)}:
        raise BrokenFile(f"{path}: the table about lacks, or should not have, {', '.join(sorted(difference))}. {ADVICE}")
    grid = None if entries["grid"] is None else tuple(entries["grid"])
    return BookInfo(**{**entries, "grid": grid, "timesteps": tuple(entries["timesteps"])})


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
    def open(cls, path: Path | str, about: BookInfo) -> Iterator[BookWriter]:
        """Yield a writer; at the end of the block its book replaces the one at `path`, unless there was an error."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.part")
        _delete(temporary)
        try:
            with closing(sqlite3.connect(temporary, isolation_level=None)) as connection, sqlite_errors(path):
                # A killed writer starts again, so nothing needs to survive it.
                connection.executescript(f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; {TABLES} BEGIN;")
                rows = [(name, json.dumps(value)) for name, value in asdict(about).items()]
                connection.executemany("INSERT INTO about VALUES (?, ?)", rows)
                yield cls(connection)
                connection.execute("COMMIT")
                connection.executescript(INDEXES)
                connection.executescript(f"PRAGMA user_version = {FORMAT}; PRAGMA application_id = {APPLICATION};")
                connection.execute("PRAGMA journal_mode = WAL")
        except BaseException:
            _delete(temporary)
            raise
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
        row = (patch.feature, patch.token, patch.image and patch.image.id, json.dumps(asdict(patch.shot)))
        self._connection.execute("INSERT INTO patches VALUES (?, ?, ?, ?)", row)


def _replace(temporary: Path, path: Path) -> None:
    """Flush the finished book to the disk and give it its name, while no other process writes in the older book at `path`."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    _delete_logs(temporary)
    if not path.is_file():
        _delete_logs(path)  # SQLite would take a remaining log for that of the new book
        os.replace(temporary, path)
        return
    with closing(sqlite3.connect(path, timeout=REPLACE_TIMEOUT, isolation_level=None)) as connection:
        _lock(path, connection)
        os.replace(temporary, path)
        _delete_logs(path)


def _lock(path: Path, connection: sqlite3.Connection) -> None:
    """Empty the log of a book and keep other writers out."""
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
