"""The SQLite tables of a book (see docs/books.md), connections to it, and the checksums that cover it."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from difflex.errors import BadInput, BrokenFile, DifflexError, StaleWork, UnknownName
from difflex.files import disk_errors
from difflex.json_records import from_json
from difflex.sqlite import sqlite_errors

FORMAT = 4
"""Stored as `PRAGMA user_version`. Formats 1 to 3 had no checksums."""
APPLICATION = 0x64666C78
"""Stored as `PRAGMA application_id`: the letters dflx."""
LOCK_TIMEOUT = 30.0
"""Seconds that a writer waits for another one."""
ADVICE = "Run difflex collect: it moves this file aside, deletes nothing of it, and makes the book again."
CHUNK = 1 << 22

TABLES = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE images (id INTEGER PRIMARY KEY, file TEXT NOT NULL UNIQUE, width INTEGER NOT NULL, height INTEGER NOT NULL) STRICT;
CREATE TABLE shots (
    id INTEGER PRIMARY KEY,
    image INTEGER NOT NULL REFERENCES images (id),
    split TEXT NOT NULL CHECK (split IN ('train', 'held-out')),
    shot TEXT NOT NULL
) STRICT;
CREATE TABLE features (
    feature INTEGER PRIMARY KEY, firings INTEGER NOT NULL, shots INTEGER NOT NULL, density REAL NOT NULL,
    peak REAL NOT NULL, mean REAL NOT NULL, negative_share REAL NOT NULL, negative_peak REAL NOT NULL,
    area REAL, spread REAL, concentration REAL, border REAL, position REAL, coverage REAL, strength REAL,
    histogram TEXT NOT NULL, activity TEXT NOT NULL
) STRICT;
CREATE TABLE examples (
    id INTEGER PRIMARY KEY,
    feature INTEGER NOT NULL REFERENCES features (feature),
    kind TEXT NOT NULL CHECK (kind IN ('top', 'quantile', 'silent')),
    split TEXT NOT NULL CHECK (split IN ('train', 'held-out')),
    rank INTEGER NOT NULL,
    shot INTEGER NOT NULL REFERENCES shots (id),
    peak REAL NOT NULL, quantile REAL, map BLOB NOT NULL
) STRICT;
CREATE TABLE neighbours (
    feature INTEGER NOT NULL REFERENCES features (feature),
    kind TEXT NOT NULL CHECK (kind IN ('firing', 'direction')),
    rank INTEGER NOT NULL,
    neighbour INTEGER NOT NULL REFERENCES features (feature),
    value REAL NOT NULL,
    PRIMARY KEY (feature, kind, rank)
) STRICT, WITHOUT ROWID;
CREATE TABLE patches (
    feature INTEGER PRIMARY KEY REFERENCES features (feature),
    token INTEGER NOT NULL, image INTEGER REFERENCES images (id), shot TEXT NOT NULL
) STRICT;
CREATE TABLE explanations (
    id INTEGER PRIMARY KEY,
    feature INTEGER NOT NULL REFERENCES features (feature),
    backend TEXT NOT NULL, protocol TEXT NOT NULL, text TEXT NOT NULL, descriptions TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('done', 'failed')),
    reason TEXT NOT NULL, checksum TEXT NOT NULL DEFAULT '',
    UNIQUE (feature, backend, protocol)
) STRICT;
CREATE TABLE judgements (
    id INTEGER PRIMARY KEY,
    explanation INTEGER NOT NULL REFERENCES explanations (id) ON DELETE CASCADE,
    example INTEGER REFERENCES examples (id),
    fires INTEGER NOT NULL CHECK (fires IN (0, 1)),
    score REAL NOT NULL
) STRICT;
CREATE TABLE scores (
    explanation INTEGER NOT NULL REFERENCES explanations (id) ON DELETE CASCADE,
    measure TEXT NOT NULL, value REAL NOT NULL, low REAL, high REAL, judgements INTEGER NOT NULL,
    PRIMARY KEY (explanation, measure)
) STRICT, WITHOUT ROWID;
CREATE TABLE usage (
    id INTEGER PRIMARY KEY,
    explanation INTEGER REFERENCES explanations (id) ON DELETE SET NULL,
    backend TEXT NOT NULL, role TEXT NOT NULL, calls INTEGER NOT NULL,
    tokens_in INTEGER NOT NULL, tokens_out INTEGER NOT NULL, cost REAL, seconds REAL NOT NULL,
    checksum TEXT NOT NULL DEFAULT ''
) STRICT;
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


CHANGING = ("about", "explanations", "judgements", "scores", "usage")
"""The tables that may change after `difflex collect`, or are written last; the pages of all others never change."""
CHECKED_ROWS = {
    "explanations": (
        "SELECT feature, backend, protocol, text, descriptions, state, reason FROM explanations WHERE id = ?",
        "SELECT fires, score FROM judgements WHERE explanation = ? ORDER BY id",
        "SELECT measure, value, low, high, judgements FROM scores WHERE explanation = ? ORDER BY measure",
    ),
    "usage": ("SELECT backend, role, calls, tokens_in, tokens_out, cost, seconds FROM usage WHERE id = ?",),
}
"""What the checksum of a row covers; numbers of examples change when a book is made again."""


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
    shots: dict[str, int]
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
    with sqlite_errors(path, ADVICE):
        # Also for reading: what a killed writer left half done must be rolled back first.
        uri = f"{path.resolve().as_uri()}?mode=rw"
        connection = sqlite3.connect(uri, uri=True, timeout=LOCK_TIMEOUT, isolation_level=None, check_same_thread=False)
        connection.row_factory = sqlite3.Row
        try:
            connection.execute(f"PRAGMA query_only = {not writable}")
            connection.execute("PRAGMA foreign_keys = ON")
            _check_format(path, connection)
        except BaseException:
            connection.close()
            raise
    return connection


def _check_format(path: Path, connection: sqlite3.Connection) -> None:
    """Raise `BrokenFile` for a file that is no book, `StaleWork` for an older format and `BadInput` for a newer one."""
    connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application != APPLICATION:
        raise BrokenFile(f"{path} is not a finished book: its application id is {application:#x}. {ADVICE}")
    if version < FORMAT:
        raise StaleWork(f"{path} is of format {version}, which this difflex no longer reads. {ADVICE}")
    if version > FORMAT:
        raise BadInput(
            f"{path} is of format {version}; this difflex reads format {FORMAT}. Use the difflex that wrote it, or move the file "
            "away to collect it again."
        )


def read_info(path: Path, connection: sqlite3.Connection) -> BookInfo:
    """Read the table `about`, which must match its checksum."""
    entries = _about(path, connection)
    if entries.pop("checksum", None) != _checksum(entries):
        raise BrokenFile(f"{path} does not match its checksum: it is damaged, or was changed by another program. {ADVICE}")
    del entries["content"]
    try:
        return from_json(BookInfo, entries, "the table about")
    except (DifflexError, RecursionError) as error:
        raise BrokenFile(f"{path} cannot be read as a book: {error} {ADVICE}") from error


def write_info(path: Path, connection: sqlite3.Connection, about: BookInfo) -> None:
    """Write the table `about`, with the checksum of everything that never changes."""
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    seal(connection, {**json.loads(json.dumps(asdict(about))), "content": [pages, _content(path, connection, pages)]})


def seal(connection: sqlite3.Connection, entries: dict[str, object]) -> None:
    """Write the entries of the table `about` with a checksum over them."""
    rows = [(name, json.dumps(value)) for name, value in {**entries, "checksum": _checksum(entries)}.items()]
    connection.executemany("INSERT OR REPLACE INTO about VALUES (?, ?)", rows)


def verify(path: Path, connection: sqlite3.Connection) -> None:
    """Raise `BrokenFile` unless the book at `path` is as it was written; no transaction may be open in this process."""
    pages, checksum = _about(path, connection).get("content", (0, ""))
    if _content(path, connection, pages) != checksum:
        raise BrokenFile(f"{path} does not match its checksum: it is damaged, or was changed by another program. {ADVICE}")
    with sqlite_errors(path, ADVICE):
        for table in ("sqlite_schema", *CHANGING):
            problems = [text for (text,) in connection.execute(f"PRAGMA integrity_check('{table}')")]
            if problems != ["ok"]:
                raise BrokenFile(f"{path} is damaged ({problems[0]}). {ADVICE}")
        if connection.execute("PRAGMA foreign_key_check(judgements)").fetchone():
            raise BrokenFile(f"{path} is damaged (judgements of no example). {ADVICE}")
        for table in CHECKED_ROWS:
            for number, expected in connection.execute(f"SELECT id, checksum FROM {table}").fetchall():
                if expected != _row_checksum(connection, table, number):
                    raise BrokenFile(f"{path}: row {number} of {table} does not match its checksum: it is damaged. {ADVICE}")


def seal_row(connection: sqlite3.Connection, table: str, number: int | None) -> None:
    """Write the checksum of a row of `CHECKED_ROWS`."""
    checksum = _row_checksum(connection, table, number)
    connection.execute(f"UPDATE {table} SET checksum = ? WHERE id = ?", (checksum, number))


def _row_checksum(connection: sqlite3.Connection, table: str, number: int | None) -> str:
    return _checksum([[*row] for query in CHECKED_ROWS[table] for row in connection.execute(query, (number,))])


def _about(path: Path, connection: sqlite3.Connection) -> dict[str, Any]:
    with sqlite_errors(path, ADVICE):
        rows = connection.execute("SELECT name, value FROM about ORDER BY name").fetchall()
    try:
        return {name: json.loads(value) for name, value in rows}
    except (ValueError, RecursionError) as error:
        raise BrokenFile(f"{path}: the table about is not JSON ({error}): it is damaged. {ADVICE}") from error


def _checksum(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _content(path: Path, connection: sqlite3.Connection, pages: int) -> str:
    """Return the SHA-256 of the first `pages` of the file, without the first one and the root pages of `CHANGING` tables.

    Rows that are added later go to the roots of their tables and to new pages at the end, so this checksum stays. It is ten times
    as fast as one over rows, and covers the indexes as well.
    """
    with sqlite_errors(path, ADVICE):
        (size,) = connection.execute("PRAGMA page_size").fetchone()
        names = json.dumps(CHANGING)
        query = "SELECT rootpage FROM sqlite_schema WHERE tbl_name IN (SELECT value FROM json_each(?)) ORDER BY rootpage"
        roots = [root for (root,) in connection.execute(query, (names,)) if root <= pages]
    checksum = hashlib.sha256()
    with disk_errors(path, "read"), path.open("rb", buffering=0) as file:
        for first, end in pairwise([1, *roots, pages + 1]):  # numbered from 1
            _add_bytes(checksum, file, first * size, (end - 1) * size)
    return checksum.hexdigest()


def _add_bytes(checksum: Any, file: BinaryIO, start: int, end: int) -> None:
    """Add the bytes of `file` from `start` to `end` to a checksum, as far as there are any."""
    file.seek(start)
    while start < end and (content := file.read(min(CHUNK, end - start))):
        checksum.update(content)
        start += len(content)
