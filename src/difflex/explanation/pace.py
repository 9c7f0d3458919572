"""When calls may be sent: so many a minute, later after faults, and none while an endpoint asks to be left alone."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from threading import Event, Lock
from typing import final

from difflex.errors import BadInput

__all__ = ["RateLimiter", "RequestsStopped", "RetryPolicy"]


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
