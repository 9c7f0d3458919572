"""Errors of SQLite: each cause has its own sentence, and only what is damaged is called damaged."""

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from difflex.errors import BadInput, BrokenFile, DifflexError, DiskError, OutOfSpace
from difflex.sqlite import sqlite_errors, transaction

ADVICE = "Run difflex collect."


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with a table of numbers."""
    path = tmp_path / "file.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript("CREATE TABLE numbers (number INTEGER NOT NULL) STRICT; INSERT INTO numbers VALUES (1);")
    return path


def connect(path: Path, uri: str = "") -> sqlite3.Connection:
    return sqlite3.connect(f"{path.as_uri()}{uri}", uri=True, timeout=0.05, isolation_level=None)


def read(path: Path) -> None:
    with closing(connect(path)) as connection:
        connection.execute("SELECT * FROM numbers").fetchall()


def write(path: Path) -> None:
    with closing(connect(path)) as connection, transaction(connection):
        connection.execute("INSERT INTO numbers VALUES (2)")


def foreign(path: Path) -> None:
    path.write_bytes(b"not a database" * 1000)
    read(path)


def garbled(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
    read(path)


def without_table(path: Path) -> None:
    with closing(connect(path)) as connection:
        connection.execute("SELECT * FROM letters")


def full(path: Path) -> None:
    with closing(connect(path)) as connection:
        connection.execute("PRAGMA max_page_count = 1")
        connection.execute("CREATE TABLE letters (letter TEXT)")


def locked(path: Path) -> None:
    with closing(connect(path)) as other:
        other.execute("BEGIN IMMEDIATE")
        write(path)


def replaced(path: Path) -> None:
    with closing(connect(path)) as connection:
        connection.execute("SELECT * FROM numbers").fetchall()
        os.replace(path, path.with_name("older.sqlite"))
        with transaction(connection):
            connection.execute("INSERT INTO numbers VALUES (2)")


def for_reading_only(path: Path) -> None:
    with closing(connect(path, "?mode=ro")) as connection, transaction(connection):
        connection.execute("INSERT INTO numbers VALUES (2)")


def of_wrong_type(path: Path) -> None:
    with closing(connect(path)) as connection:
        connection.execute("INSERT INTO numbers VALUES ('two')")


def closed(path: Path) -> None:
    connection = connect(path)
    connection.close()
    connection.execute("SELECT * FROM numbers")


@pytest.mark.parametrize(
    ("cause", "error", "message"),
    [
        (foreign, BrokenFile, "is damaged .*Run difflex collect"),
        (garbled, BrokenFile, "is damaged .*Run difflex collect"),
        (without_table, BrokenFile, "is not as this version of difflex writes it .*Run difflex collect"),
        (full, OutOfSpace, "the disk is full"),
        (locked, BadInput, "Another process is writing in"),
        (replaced, BadInput, "was replaced by another process"),
        (for_reading_only, DiskError, "may be read-only"),
        (lambda path: read(path.parent), DiskError, "cannot be used"),
        (lambda path: read(path / "below"), DiskError, "cannot be used"),
        (of_wrong_type, BadInput, "does not accept this entry"),
        (closed, BadInput, "was closed"),
    ],
)
def test_every_cause_has_its_own_sentence(path: Path, cause: Callable[[Path], None], error: type[DifflexError], message: str):
    with pytest.raises(error, match=message), sqlite_errors(path, ADVICE):
        cause(path)


def test_a_mistake_in_the_call_stays_what_it_is(path: Path):
    with pytest.raises(sqlite3.ProgrammingError), sqlite_errors(path, ADVICE), closing(connect(path)) as connection:
        connection.execute("SELECT ?", ())


def test_a_failed_transaction_leaves_nothing(path: Path):
    with pytest.raises(BadInput), sqlite_errors(path, ADVICE), closing(connect(path)) as connection, transaction(connection):
        connection.execute("INSERT INTO numbers VALUES (2)")
        connection.execute("INSERT INTO numbers VALUES (NULL)")
    with closing(connect(path)) as connection:
        assert connection.execute("SELECT * FROM numbers").fetchall() == [(1,)]
