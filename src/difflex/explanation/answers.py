"""`answers.sqlite`: every answer of a VLM, which was paid, and every call; what can be read of a damaged file is kept."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import sqlite3
import warnings
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, final

from difflex.errors import BrokenFile, OutOfSpace
from difflex.explanation.requests import Spending
from difflex.files import disk_errors, replacing
from difflex.sqlite import sqlite_errors, transaction

__all__ = ["AnswerCache"]

FORMAT = 2
"""Format 1 had no checksums. It is brought up to date, because its answers were paid."""
TABLES = """
CREATE TABLE answers (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, answer TEXT NOT NULL, checksum TEXT NOT NULL DEFAULT ''
) WITHOUT ROWID;
CREATE TABLE calls (
    number INTEGER PRIMARY KEY, key TEXT NOT NULL, model TEXT NOT NULL, outcome TEXT NOT NULL,
    tokens_in INTEGER NOT NULL, tokens_out INTEGER NOT NULL, cost REAL NOT NULL, seconds REAL NOT NULL,
    at TEXT NOT NULL DEFAULT (datetime('now')), booked INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX calls_by_key ON calls (key);
"""
"""`booked` is 1 for calls whose usage is recorded in a book."""
RECOVERED = "CREATE TABLE recovered (file TEXT PRIMARY KEY);"
"""Damaged files whose readable rows are in this one."""
CALL_COLUMNS = 10
RAW_ANSWER = re.compile(rb"(?=([0-9a-f]{64})([^{\0]{1,800}?)(\{[^\0]{1,4000}?\})([0-9a-f]{16}))")
"""The bytes of a row of the table `answers` in a damaged file."""
DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
LOCK_TIMEOUT = 30.0
"""Seconds to wait for another process."""
SPACE = 8_000_000
"""Bytes that must be free before a question is sent, so that its answer can be saved."""
ADVICE = "Run the same command again: it keeps every answer that can be read, and moves the damaged file aside."


@final
class AnswerCache:
    """Answers and calls in an SQLite file; threads may share it, and a kill at any moment loses no answer."""

    def __init__(self, path: Path) -> None:
        """Open the file `path`, or create it; a damaged one is moved aside, and what can be read of it is kept."""
        self.path, self._lock = path, Lock()
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._connection = _open(path)
        except _DamagedAnswers as error:
            _move_aside(path)
            self._connection = _open(path)
            reason = " ".join(str(error).split())
        else:
            reason = ""
        try:
            with sqlite_errors(path, ADVICE):
                self._carry_over(reason)
        except BaseException:
            self.close()
            raise

    def _carry_over(self, reason: str) -> None:
        """Copy what can be read of damaged files; one that an earlier process had no time for is done now."""
        known, kept = {file for [file] in self._connection.execute("SELECT file FROM recovered")}, 0
        copies = sorted(self.path.parent.glob(f"{self.path.stem}.damaged-*{self.path.suffix}"))
        for damaged in (files := [copy for copy in copies if copy.name not in known]):
            with transaction(self._connection) as connection:
                kept += _copy_rows(damaged, connection)
                connection.execute("INSERT INTO recovered VALUES (?)", (damaged.name,))
        if files:
            warnings.warn(
                f"{self.path} was damaged{f' ({reason})' if reason else ''}. It is now {files[-1].name}; {kept:,} answers that "
                "could be read are kept. Other questions are asked again.",
                stacklevel=4,
            )

    def get(self, key: str) -> str | None:
        """Return the valid answer of a content key as JSON; None if there is none yet."""
        row = self._row("SELECT answer, checksum FROM answers WHERE key = ?", key)
        if row is None or row[1] == _checksum(key, row[0]):
            return row and row[0]
        warnings.warn(f"An answer in {self.path} does not match its checksum; its question is asked again.", stacklevel=2)
        return None

    def unrecorded(self, keys: Iterable[str]) -> Spending:
        """Return what the calls for `keys` took, failed ones included, that is not recorded in a book yet."""
        query = (
            "SELECT tokens_in, tokens_out, cost, seconds FROM calls WHERE key IN (SELECT value FROM json_each(?)) AND NOT booked"
        )
        with self._lock, sqlite_errors(self.path, ADVICE):
            rows = self._connection.execute(query, (json.dumps([*keys]),)).fetchall()
        tokens_in, tokens_out, costs, seconds = zip(*rows, strict=True) if rows else ((), (), (), ())
        # Exact sums, which do not depend on the order in which threads wrote the calls.
        return Spending(len(rows), sum(tokens_in), sum(tokens_out), math.fsum(costs), math.fsum(seconds))

    def mark_recorded(self, keys: Iterable[str]) -> None:
        """Mark the calls for `keys` as recorded in a book."""
        update = "UPDATE calls SET booked = 1 WHERE key IN (SELECT value FROM json_each(?))"
        with self._writing() as connection:
            connection.execute(update, (json.dumps([*keys]),))

    def cost(self, model: str) -> float:
        """Return what all calls to a model cost."""
        return float(self._row("SELECT coalesce(sum(cost), 0) FROM calls WHERE model = ?", model)[0])

    def add(self, key: str, model: str, outcome: str, spending: Spending, answer: str | None) -> None:
        """Write a call and, if it is valid, its answer, in one transaction."""
        insertion = "INSERT INTO calls (key, model, outcome, tokens_in, tokens_out, cost, seconds) VALUES (?, ?, ?, ?, ?, ?, ?)"
        usage = (spending.tokens_in, spending.tokens_out, spending.cost, spending.seconds)
        with self._writing() as connection:
            connection.execute(insertion, (key, model, outcome, *usage))
            if answer is not None:
                row = (key, model, answer, _checksum(key, answer))
                connection.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)", row)

    def check_space(self) -> None:
        """Raise an error if an answer, once it is paid, might not fit on the disk."""
        with disk_errors(self.path):
            free = shutil.disk_usage(self.path.parent).free
        if free < SPACE:
            raise OutOfSpace(
                f"The disk of {self.path} has {free / 1e6:.1f} MB left. No question is sent whose answer might not be saved. "
                f"Free {SPACE / 1e6:.0f} MB or more and run the same command again to continue."
            )

    @property
    def is_empty(self) -> bool:
        """Whether there is no answer."""
        return self._row("SELECT 1 FROM answers LIMIT 1") is None

    def _row(self, query: str, *values: str) -> Any:
        with self._lock, sqlite_errors(self.path, ADVICE):
            return self._connection.execute(query, values).fetchone()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock, sqlite_errors(self.path, ADVICE), transaction(self._connection) as connection:
            yield connection

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()


class _DamagedAnswers(Exception):
    """A file that is proven to be damaged; its text says how."""


def _open(path: Path) -> sqlite3.Connection:
    """Open or create a file of the present format; raise `_DamagedAnswers` only if SQLite proves that it is damaged."""
    try:
        with sqlite_errors(path, ADVICE):
            connection = sqlite3.connect(path, timeout=LOCK_TIMEOUT, isolation_level=None, check_same_thread=False)
            try:
                _prepare(path, connection)
            except BaseException:
                connection.close()
                raise
    except BrokenFile as error:
        if getattr(error.__cause__, "sqlite_errorcode", 0) & 0xFF in DAMAGED:
            raise _DamagedAnswers(str(error.__cause__)) from error
        raise
    return connection


def _prepare(path: Path, connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA journal_mode = WAL")
    # A kill loses nothing that was committed. A loss of power may lose the last answers, but no call waits for the disk.
    connection.execute("PRAGMA synchronous = NORMAL")
    [problem] = connection.execute("PRAGMA integrity_check(1)").fetchone()
    if problem != "ok":
        raise _DamagedAnswers(problem)
    with transaction(connection):
        [version] = connection.execute("PRAGMA user_version").fetchone()
        [tables] = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if version not in (0, 1, FORMAT) or (version == 0 and tables):
            raise BrokenFile(
                f"{path} has format {version}, and this difflex reads format {FORMAT} of a cache of answers. Use the version "
                "that wrote it, or move it away (it is not deleted)."
            )
        if version == 1:
            connection.execute("ALTER TABLE answers ADD COLUMN checksum TEXT NOT NULL DEFAULT ''")
            connection.create_function("checksum_of", 2, _checksum, deterministic=True)
            connection.execute("UPDATE answers SET checksum = checksum_of(key, answer)")
        for statement in {0: TABLES + RECOVERED, 1: RECOVERED, FORMAT: ""}[version].split(";")[:-1]:
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {FORMAT}")


def _checksum(key: str, answer: str) -> str:
    return hashlib.sha256(f"{key}\n{answer}".encode()).hexdigest()[:16]


def _move_aside(path: Path) -> None:
    """Copy a damaged file with its log to another name, then remove it; a kill in between loses nothing."""
    number = 1
    while (copy := path.with_name(f"{path.stem}.damaged-{number}{path.suffix}")).exists():
        number += 1
    log = path.with_name(f"{path.name}-wal")
    with disk_errors(path):
        for source, target in ((log, copy.with_name(f"{copy.name}-wal")), (path, copy)):  # the copy is complete once it is there
            if source.exists():
                with replacing(target) as temporary:
                    shutil.copyfile(source, temporary)
        # The log first: SQLite would take it for that of the file that follows.
        for old in (log, path.with_name(f"{path.name}-shm"), path):
            old.unlink(missing_ok=True)


def _copy_rows(damaged: Path, target: sqlite3.Connection) -> int:
    """Copy all rows of a damaged file that can be read; return the number of answers."""
    answers, calls = dict[str, tuple[Any, ...]](), dict[Any, tuple[Any, ...]]()
    with _until_damage(), closing(sqlite3.connect(f"{damaged.resolve().as_uri()}?mode=ro", uri=True)) as source:
        source.text_factory = lambda content: content.decode(errors="replace")
        answers |= _readable(source, "answers", "key")
        calls |= _readable(source, "calls", "number")
        for key in sorted({str(call[1]) for call in calls.values()} - answers.keys()):  # those between two damaged places
            with _until_damage():
                for row in source.execute("SELECT * FROM answers WHERE key = ?", (key,)):
                    answers[key] = row
    answers = {key: row for key, row in [*_raw_answers(damaged).items(), *answers.items()] if _is_intact(row)}
    rows = [(key, model, answer, _checksum(key, answer)) for key, model, answer, *_ in answers.values()]
    target.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?)", rows)
    valid = [call for call in calls.values() if len(call) == CALL_COLUMNS and isinstance(call[6], float)]
    target.executemany(f"INSERT OR IGNORE INTO calls VALUES ({', '.join('?' * CALL_COLUMNS)})", valid)
    return len(rows)


def _raw_answers(damaged: Path) -> dict[str, tuple[str, ...]]:
    """Return the rows of answers that stand in the bytes of a file or its log; their checksums tell which are intact."""
    rows: dict[str, tuple[str, ...]] = {}
    for path in (damaged, damaged.with_name(f"{damaged.name}-wal")):
        for match in RAW_ANSWER.finditer(path.read_bytes() if path.is_file() else b""):
            row = tuple(text.decode(errors="replace") for text in match.groups())
            if _is_intact(row):
                rows[row[0]] = row
    return rows


def _readable(source: sqlite3.Connection, table: str, order: str) -> dict[Any, tuple[Any, ...]]:
    """Return the rows of a table from both ends up to the first that cannot be read, by their key."""
    rows: dict[Any, tuple[Any, ...]] = {}
    for direction in ("ASC", "DESC"):
        with _until_damage():
            for row in source.execute(f"SELECT * FROM {table} ORDER BY {order} {direction}"):
                rows[row[0]] = row
    return rows


def _is_intact(row: tuple[Any, ...]) -> bool:
    """Return whether a row of `answers` is as it was written; the rows of format 1 have no checksum."""
    key, model, answer, *checksum = row
    if not all(isinstance(text, str) and "\ufffd" not in text for text in (key, model, answer)):
        return False
    try:
        json.loads(answer)
    except (ValueError, RecursionError):
        return False
    return not checksum or checksum == [_checksum(key, answer)]


@contextmanager
def _until_damage() -> Iterator[None]:
    """End the block at the first place of a file that is damaged."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF not in (*DAMAGED, sqlite3.SQLITE_ERROR):
            raise
