"""The SQLite schema of a book, and connections to books; docs/books.md describes the tables."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from difflex.errors import BadInput, BrokenFile, OutOfSpace, UnknownName
from difflex.records import Split

__all__ = ["BookInfo"]

FORMAT = 3
"""Stored as `PRAGMA user_version`. Format 1 had no default strengths; format 2 had other column names."""
APPLICATION = 0x64666C78
"""Stored as `PRAGMA application_id`: the letters dflx."""
LOCK_TIMEOUT = 30.0
"""Seconds that a writer waits for another one."""
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
        connection = _connection(path, writable)
        try:
            _check_format(path, connection)
        except BaseException:
            connection.close()
            raise
    return connection


def _connection(path: Path, writable: bool) -> sqlite3.Connection:
    connection = _open_uri(path, "rw" if writable else "ro")
    try:
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    except sqlite3.OperationalError:
        connection.close()
        if writable:
            raise
        # In WAL mode a reader creates a file next to the book, which fails in a read-only folder.
        connection = _open_uri(path, "ro&immutable=1")
    return connection


def _open_uri(path: Path, mode: str) -> sqlite3.Connection:
    uri = f"{path.resolve().as_uri()}?mode={mode}"
    return sqlite3.connect(uri, uri=True, timeout=LOCK_TIMEOUT, isolation_level=None, check_same_thread=False)


def _check_format(path: Path, connection: sqlite3.Connection) -> None:
    """Raise an error unless the file is a finished book of the current format."""
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application != APPLICATION:
        raise BrokenFile(f"{path} is not a finished book: its application id is {application:#x}. {ADVICE}")
    if version < FORMAT:
        raise BrokenFile(f"{path} is of format {version}, which this difflex no longer reads. {ADVICE}")
    if version != FORMAT:
        raise BrokenFile(f"{path} is of format {version}; this difflex reads format {FORMAT}. Use the difflex that wrote it.")


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
    with sqlite_errors(path):
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")


def write_info(connection: sqlite3.Connection, info: BookInfo) -> None:
    """Write the table `about`."""
    rows = [(name, json.dumps(value)) for name, value in asdict(info).items()]
    connection.executemany("INSERT INTO about VALUES (?, ?)", rows)


def read_info(path: Path, connection: sqlite3.Connection) -> BookInfo:
    """Read the table `about`."""
    with sqlite_errors(path):
        entries = {name: json.loads(value) for name, value in connection.execute("SELECT name, value FROM about")}
    names = {field.name for field in fields(BookInfo)}
    if entries.keys() != names:
        raise BrokenFile(
            f"{path}: the table about lacks, or should not have, {', '.join(sorted(entries.keys() ^ names))}. {ADVICE}"
        )
    entries["grid"] = None if entries["grid"] is None else tuple(entries["grid"])
    entries["timesteps"] = tuple(entries["timesteps"])
    return BookInfo(**entries)
