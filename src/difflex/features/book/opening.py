"""Connections to books: read-only ones beside one writer, and what is said of a file that is no book."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

from difflex.errors import BadInput, BrokenFile, OutOfSpace, UnknownName
from difflex.features.book.entries import BookInfo
from difflex.features.book.schema import APPLICATION, FORMAT

__all__ = ["connected", "read_about", "told", "transaction", "write_about"]

PATIENCE = 30.0
"""Seconds that a writer waits for another one."""
AGAIN = "Delete it; difflex collect makes it again."


def connected(path: Path, writable: bool) -> sqlite3.Connection:
    """A connection to the book at `path`, checked to be one."""
    if not path.is_file():
        raise UnknownName(f"There is no book {path}. difflex collect makes it.")
    with told(path):
        connection = _opened(path, writable)
        try:
            _check(path, connection)
        except BaseException:
            connection.close()
            raise
    return connection


def _opened(path: Path, writable: bool) -> sqlite3.Connection:
    connection = _tried(path, "rw" if writable else "ro")
    try:
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    except sqlite3.OperationalError:
        connection.close()
        if writable:
            raise
        # A reader of a book in WAL mode keeps a file beside it, which it cannot in a folder where nobody may write.
        connection = _tried(path, "ro&immutable=1")
    return connection


def _tried(path: Path, mode: str) -> sqlite3.Connection:
    return sqlite3.connect(
        f"{path.resolve().as_uri()}?mode={mode}", uri=True, timeout=PATIENCE, isolation_level=None, check_same_thread=False
    )


def _check(path: Path, connection: sqlite3.Connection) -> None:
    """Nothing; a file that is not a finished book of our format is an error."""
    (mark,) = connection.execute("PRAGMA application_id").fetchone()
    (form,) = connection.execute("PRAGMA user_version").fetchone()
    if mark != APPLICATION:
        raise BrokenFile(f"{path} is not a finished book: its application id is {mark:#x}. {AGAIN}")
    if form < FORMAT:
        raise BrokenFile(f"{path} is of format {form}, which this difflex no longer reads. {AGAIN}")
    if form != FORMAT:
        raise BrokenFile(f"{path} is of format {form}; this difflex reads format {FORMAT}. Use the difflex that wrote it.")


@contextmanager
def told(path: Path) -> Iterator[None]:
    """A block in which what SQLite complains of is said as our errors."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "full" in str(error):
            raise OutOfSpace(
                f"{path} cannot be written: the disk is full. Free some space and give the command again."
            ) from error
        if "locked" in str(error):
            raise BadInput(f"Another process is writing in {path}. Wait for it to end.") from error
        if "readonly" in str(error):
            raise BadInput(f"{path} was opened to be read. Book.edit opens it for a writer.") from error
        raise BrokenFile(f"{path} cannot be read ({error}). {AGAIN}") from error
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.IntegrityError):
            raise BadInput(f"{path} has no place for that: {error}.") from error
        raise BrokenFile(f"{path} is damaged ({error}). {AGAIN}") from error


@contextmanager
def transaction(path: Path, connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """A block all of whose writing is kept, or nothing of it; one writer at a time."""
    with told(path):
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")


def write_about(connection: sqlite3.Connection, about: BookInfo) -> None:
    """Nothing; the book says what it is about."""
    connection.executemany(
        "INSERT INTO about VALUES (?, ?)", [(name, json.dumps(value)) for name, value in asdict(about).items()]
    )


def read_about(path: Path, connection: sqlite3.Connection) -> BookInfo:
    """What the book says it is about."""
    with told(path):
        said = {name: json.loads(value) for name, value in connection.execute("SELECT name, value FROM about")}
    names = {each.name for each in fields(BookInfo)}
    if said.keys() != names:
        raise BrokenFile(f"{path} does not say its {', '.join(sorted(said.keys() ^ names))}. {AGAIN}")
    said["grid"] = None if said["grid"] is None else (said["grid"][0], said["grid"][1])
    said["timesteps"] = tuple(said["timesteps"])
    return BookInfo(**said)
