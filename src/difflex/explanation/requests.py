"""Requests: the cache of answers on disk, prices and budget, rate limits and retries."""

from __future__ import annotations

import json
import math
import random
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from typing import NamedTuple, final

from difflex.errors import BadInput, BrokenFile, OutOfBudget
from difflex.explanation.questions import ImageView, Instruction, TokenUsage


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How often and after how long what came to nothing is tried again."""

    asked_again: int = 4
    """How often an answer that is malformed or a refusal is asked again, with what was wrong."""
    sent_again: int = 8
    """How often a call that came to nothing on its way is sent again."""
    first: float = 1.0
    """Seconds until the first time; each further one waits twice as long, at random between half of that and all of it."""
    longest: float = 60.0
    """Seconds at most, unless the endpoint asks for more."""
    most_asked: float = 900.0
    """Seconds that an endpoint may ask to be left alone; who asks for more has closed for the day."""

    def __post_init__(self) -> None:
        if min(self.asked_again, self.sent_again, self.first, self.longest) < 0:
            raise BadInput(f"{self} cannot be: nothing of it may be below 0.")


class RequestsStopped(Exception):
    """The work was called off."""


@final
class RateLimiter:
    """The one clock of all threads that ask the same endpoint."""

    def __init__(self, per_minute: float | None, patience: RetryPolicy) -> None:
        """`per_minute`: calls; None for no limit."""
        if per_minute is not None and per_minute <= 0:
            raise BadInput(f"{per_minute:g} calls a minute are none. Allow more.")
        self._apart = 60 / per_minute if per_minute else 0.0
        self._patience, self._lock, self._stop = patience, Lock(), Event()
        self._next = 0.0
        """When the next call may be sent."""
        self._random = random.Random()  # so that many who were turned away together do not come back together

    def stop(self) -> None:
        """Nothing; whoever waits, or would, stops instead."""
        self._stop.set()

    def wait(self) -> None:
        """Nothing; a call may be sent now."""
        while True:
            with self._lock:
                now = time.monotonic()
                left = self._next - now
                if left <= 0:
                    self._next = now + self._apart if self._apart else self._next
            if left <= 0 and not self._stop.is_set():
                return
            self._sleep(left)

    def after(self, reason: str, failures: int, asked: float | None) -> None:
        """Nothing, after the wait that follows so many `failures` in a row; what an endpoint has `asked` for holds for all."""
        if asked is None:
            doubled = self._patience.first * 2 ** (failures - 1)
            self._sleep(min(self._patience.longest, doubled) * self._random.uniform(0.5, 1))
            return
        if asked > self._patience.most_asked:
            raise BadInput(f"The endpoint asks to be left alone for {asked:.0f} s ({reason}). Give the same command again then.")
        with self._lock:
            self._next = max(self._next, time.monotonic() + asked)

    def _sleep(self, seconds: float) -> None:
        if self._stop.wait(max(0.0, seconds)):
            raise RequestsStopped


LETTERS = 4
"""Of a token, about."""


@dataclass(frozen=True, kw_only=True)
class TokenPrice:
    """What a million tokens cost."""

    tokens_in: float = 0.0
    tokens_out: float = 0.0

    def __post_init__(self) -> None:
        if not all(math.isfinite(each) and each >= 0 for each in (self.tokens_in, self.tokens_out)):
            raise BadInput(
                f"A price of {self.tokens_in:g} and {self.tokens_out:g} for a million tokens cannot be. Give it in numbers."
            )

    def of(self, usage: TokenUsage) -> float:
        """The cost of a call: what the endpoint says, or what its tokens cost."""
        if usage.cost is not None:
            return usage.cost
        return (self.tokens_in * usage.tokens_in + self.tokens_out * usage.tokens_out) / 1e6


def expected(views: Sequence[ImageView], instruction: Instruction, image_tokens: int, answer_tokens: int) -> TokenUsage:
    """What a call will take, about: counted where the endpoint does not say, and before anything is sent."""
    return TokenUsage(len(instruction.text) // LETTERS + image_tokens * len(views), answer_tokens)


@final
class CallBudget:
    """What may be spent; threads share one."""

    def __init__(self, most: float | None, spent: float = 0.0) -> None:
        """`most`: None for no limit; `spent`: what is gone already."""
        self._most, self._lock = most, Lock()
        self.spent = spent
        self._reserved = 0.0

    def reserve(self, cost: float) -> None:
        """Nothing; a call of about `cost` may be sent, or else `OutOfBudget`."""
        with self._lock:
            if self._most is not None and self.spent + self._reserved + cost > self._most:
                raise OutOfBudget(
                    f"The budget of {self._most:g} is used up: {self.spent:.4g} is spent, the next call may cost {cost:.2g}. "
                    "Every answer is kept; give the same command with a larger --budget to go on."
                )
            self._reserved += cost

    def settle(self, reserved: float, cost: float) -> None:
        """Nothing; a call for which `reserved` was put aside did cost `cost`."""
        with self._lock:
            self._reserved -= reserved
            self.spent += cost


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
