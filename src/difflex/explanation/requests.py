"""Requests to a VLM: their policy, and the rate limit and the budget that threads share."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from operator import add
from threading import Event, Lock
from typing import final

from difflex.errors import BadInput, OutOfBudget
from difflex.explanation.questions import Instruction, TokenUsage, VLMAnswer

LETTERS_PER_TOKEN = 4
LOWEST_RATE = 0.01
"""Fewest requests per minute: one in 100 minutes."""
HIGHEST: Mapping[str, float] = {
    "per_minute": 1e6,
    "budget": 1e9,
    "image_tokens": 1e7,
    "answer_tokens": 1e7,
    "answer_retries": 1000,
    "send_retries": 1000,
    "first_wait": 86_400,
    "longest_wait": 86_400,
    "longest_retry_after": 86_400,
}
"""The highest value of each setting."""


@dataclass(frozen=True, kw_only=True)
class RequestPolicy:
    """Limits on requests to a VLM, their price, and retries."""

    per_minute: float | None = None
    """Requests per minute; None for no limit."""
    price: tuple[float, float] = (0.0, 0.0)
    """Price of a million tokens, in and out, for endpoints that do not report the cost of a call."""
    budget: float | None = None
    """What all calls to this backend may cost together, those of earlier runs in the same cache included; None for no limit."""
    image_tokens: int = 300
    """Estimated tokens of an image, for endpoints that do not report them and before a call is sent."""
    answer_tokens: int = 150
    """Estimated tokens of an answer."""
    answer_retries: int = 4
    """How often a question is repeated after a malformed answer or a refusal, with the reason."""
    send_retries: int = 8
    """How often a call is sent again after a failure of the connection or the endpoint."""
    first_wait: float = 1.0
    """Seconds until the first retry; each further wait doubles, and half of it is random."""
    longest_wait: float = 60.0
    """Longest wait in seconds, unless the endpoint asks for more."""
    longest_retry_after: float = 900.0
    """Longest wait in seconds that an endpoint may ask for; if it asks for more, the work stops."""

    def __post_init__(self) -> None:
        if len(self.price) != 2:
            raise BadInput(f"A price is two numbers, of a million tokens in and out, not {self.price}.")
        values = [(f"price {way}", value) for way, value in zip(("in", "out"), self.price, strict=True)]
        values += [(name, value) for name in HIGHEST if (value := getattr(self, name)) is not None]
        for name, value in values:
            lowest, highest = LOWEST_RATE if name == "per_minute" else 0, HIGHEST.get(name, HIGHEST["budget"])
            if not (isinstance(value, int | float) and lowest <= value <= highest):  # false for NaN
                raise BadInput(f"The policy of requests has {name} = {value}. Give a number from {lowest:g} to {highest:g}.")

    def cost(self, usage: TokenUsage) -> float:
        """Return the cost of a call: as reported by the endpoint, or else by the price of its tokens."""
        if usage.cost is not None:
            return usage.cost
        return (self.price[0] * usage.tokens_in + self.price[1] * usage.tokens_out) / 1e6

    def estimate(self, images: int, instruction: Instruction[VLMAnswer]) -> TokenUsage:
        """Estimate the tokens of a call."""
        return TokenUsage(len(instruction.text) // LETTERS_PER_TOKEN + self.image_tokens * images, self.answer_tokens)


class RequestsStopped(Exception):
    """Requests were stopped because the work ends."""


@final
class RateLimiter:
    """The waits of all threads that ask the same endpoint."""

    def __init__(self, policy: RequestPolicy) -> None:
        self._policy, self._lock, self._stop = policy, Lock(), Event()
        self._interval = 60 / policy.per_minute if policy.per_minute else 0.0
        self._next = 0.0
        """Time at which the next call may be sent."""
        self._random = random.Random()  # so that threads that were turned away together do not come back together

    def stop(self) -> None:
        """Raise `RequestsStopped` in all threads that wait, now or later."""
        self._stop.set()

    def wait(self) -> None:
        """Wait until a call may be sent."""
        while True:
            with self._lock:
                now = time.monotonic()
                remaining = self._next - now
                if remaining <= 0 and self._interval:
                    self._next = now + self._interval
            if remaining <= 0 and not self._stop.is_set():
                return
            self._sleep(remaining)

    def back_off(self, reason: str, failures: int, retry_after: float | None) -> None:
        """Wait after a number of failures in a row; a `retry_after` of the endpoint delays all threads instead."""
        if retry_after is None:
            seconds = self._policy.first_wait * 2 ** (failures - 1)
            self._sleep(min(self._policy.longest_wait, seconds) * self._random.uniform(0.5, 1))
            return
        if retry_after > self._policy.longest_retry_after:
            raise BadInput(f"The endpoint asks to wait for {retry_after:.0f} s ({reason}). Run the same command again then.")
        with self._lock:
            self._next = max(self._next, time.monotonic() + retry_after)

    def _sleep(self, seconds: float) -> None:
        if self._stop.wait(max(0.0, seconds)):
            raise RequestsStopped


@final
class CallBudget:
    """A budget that threads share."""

    def __init__(self, limit: float | None, spent: float) -> None:
        """Start with what is `spent` already; no `limit` if None."""
        self._limit, self._spent, self._reserved, self._lock = limit, spent, 0.0, Lock()

    def reserve(self, cost: float) -> None:
        """Reserve the estimated cost of a call; raise `OutOfBudget` if it exceeds the limit."""
        with self._lock:
            if self._limit is not None and self._spent + self._reserved + cost > self._limit:
                raise OutOfBudget(
                    f"The budget of {self._limit:g} is used up: {self._spent:.4g} is spent, the next call may cost {cost:.2g}. "
                    "All answers are cached; run the same command with a larger --budget to continue."
                )
            self._reserved += cost

    def settle(self, reserved: float, cost: float) -> None:
        """Replace what was reserved for a call by its cost."""
        with self._lock:
            self._reserved -= reserved
            self._spent += cost


@dataclass(frozen=True)
class Spending:
    """What calls took together."""

    calls: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Spending) -> Spending:
        return Spending(*map(add, astuple(self), astuple(other)))
