"""Answers on disk, by the hash of what was asked, and what every call took: nothing is ever paid twice, and nothing forgotten."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import NamedTuple, final

from difflex.errors import BrokenFile

__all__ = ["AnswerCache", "Spending"]

FORMAT = 1
TABLES = """
CREATE TABLE answers (key TEXT PRIMARY KEY, model TEXT NOT NULL, answer TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE calls (
    number INTEGER PRIMARY KEY, key TEXT NOT NULL, model TEXT NOT NULL, outcome TEXT NOT NULL,
    tokens_in INTEGER NOT NULL, tokens_out INTEGER NOT NULL, cost REAL NOT NULL, seconds REAL NOT NULL,
    at TEXT NOT NULL DEFAULT (datetime('now')), booked INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX calls_by_key ON calls (key);
"""


class Spending(NamedTuple):
    """What calls took."""

    calls: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0
    seconds: float = 0.0

    def plus(self, other: Spending) -> Spending:
        """Both together."""
        return Spending(
            self.calls + other.calls,
            self.tokens_in + other.tokens_in,
            self.tokens_out + other.tokens_out,
            self.cost + other.cost,
            self.seconds + other.seconds,
        )


@final
class AnswerCache:
    """The answers in one file; threads may share it. What is in it survives a kill at any moment."""

    def __init__(self, path: Path) -> None:
        """The answers in the file `path`, which is begun if it is not there."""
        self.path, self._lock = path, Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            self._begin()
        except sqlite3.DatabaseError as error:
            self._file.close()
            raise BrokenFile(
                f"{path} is no file of answers ({error}): it is damaged. Delete it; what it held is asked anew."
            ) from error

    def _begin(self) -> None:
        self._file.execute("PRAGMA journal_mode = WAL")
        # A kill loses nothing that was committed. A loss of power may lose the last answers, but waits for no disk at each.
        self._file.execute("PRAGMA synchronous = NORMAL")
        with self._transaction():
            [found] = self._file.execute("PRAGMA user_version").fetchone()
            if found == 0:
                for statement in TABLES.split(";")[:-1]:
                    self._file.execute(statement)
                self._file.execute(f"PRAGMA user_version = {FORMAT}")
        if found not in (0, FORMAT):
            raise BrokenFile(
                f"{self.path} is of format {found}; this difflex reads format {FORMAT}. Use the difflex that wrote it."
            )

    def get(self, key: str) -> str | None:
        """The valid answer to what has the hash `key`, as JSON; None if there is none yet."""
        with self._lock:
            found = self._file.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return found and found[0]

    def spent(self, keys: Iterable[str], unbooked: bool = False) -> Spending:
        """What the calls for `keys` took, those included that came to nothing; with `unbooked`, only what is not yet booked."""
        sums = ", ".join(f"coalesce(sum({name}), 0)" for name in ("tokens_in", "tokens_out", "cost", "seconds"))
        among = "key IN (SELECT value FROM json_each(?)) AND booked <= ?"
        with self._lock:
            row = self._file.execute(
                f"SELECT count(*), {sums} FROM calls WHERE {among}", (json.dumps([*keys]), 0 if unbooked else 1)
            ).fetchone()
        return Spending(*row)

    def cost(self, model: str) -> float:
        """What all calls to a model cost."""
        with self._lock:
            [cost] = self._file.execute("SELECT coalesce(sum(cost), 0) FROM calls WHERE model = ?", (model,)).fetchone()
        return float(cost)

    def book(self, keys: Iterable[str]) -> None:
        """Nothing; what the calls for `keys` took is told elsewhere by now."""
        with self._lock, self._transaction():
            self._file.execute(
                "UPDATE calls SET booked = 1 WHERE key IN (SELECT value FROM json_each(?))", (json.dumps([*keys]),)
            )

    def keep(self, key: str, model: str, outcome: str, spent: Spending, answer: str | None = None) -> None:
        """Nothing; what a call took is on disk and, if it was valid, its answer, both or neither."""
        with self._lock, self._transaction():
            self._file.execute(
                "INSERT INTO calls (key, model, outcome, tokens_in, tokens_out, cost, seconds) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (key, model, outcome, spent.tokens_in, spent.tokens_out, spent.cost, spent.seconds),
            )
            if answer is not None:
                self._file.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", (key, model, answer))

    @property
    def is_empty(self) -> bool:
        """Whether nothing was ever answered."""
        with self._lock:
            return self._file.execute("SELECT 1 FROM answers LIMIT 1").fetchone() is None

    def close(self) -> None:
        """Nothing; the file is closed."""
        with self._lock:
            self._file.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._file.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._file.execute("ROLLBACK")
            raise
        self._file.execute("COMMIT")
