"""Money: the price of tokens, and a budget that calls are charged to before they are sent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import final

from difflex.errors import BadInput, OutOfBudget
from difflex.explanation.asked import ImageView, Instruction, TokenUsage

__all__ = ["CallBudget", "TokenPrice", "expected"]

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
