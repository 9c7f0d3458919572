"""The growth curve: how many tokens a growing dictionary found over its threshold, and what that says of tokens to come."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Moment", "expected_over", "thinned"]


class Moment(NamedTuple):
    """A stretch of growth."""

    tokens: int
    """Seen so far, those of the stretch included."""
    over: int
    """Tokens of the stretch that were over the threshold when they came."""
    size: int
    """Atoms at its end."""


def thinned(curve: Sequence[Moment], most: int = 256) -> list[Moment]:
    """The same curve in at most `most` stretches of about equally many tokens."""
    if len(curve) <= most:
        return list(curve)
    step = curve[-1].tokens / most
    kept: list[Moment] = []
    over = 0
    for place, moment in enumerate(curve):
        over += moment.over
        if place + 1 == len(curve) or moment.tokens >= step * (len(kept) + 1):
            kept.append(Moment(moment.tokens, over, moment.size))
            over = 0
    return kept


def expected_over(curve: Sequence[Moment]) -> float:
    """The share of unseen tokens that should be over the threshold at the end of `curve`.

    The share falls as a power of the tokens seen; the power is fitted to the second half of the stream and followed to its end.
    """
    halves = thinned([moment for moment in curve if moment.tokens > curve[-1].tokens / 2], 16)
    start = max((moment.tokens for moment in curve if moment.tokens <= curve[-1].tokens / 2), default=0)
    points: list[tuple[float, float, float]] = []
    for moment in halves:
        length = moment.tokens - start
        if moment.over:
            points.append((math.log((start + moment.tokens) / 2), math.log(moment.over / length), float(moment.over)))
        start = moment.tokens
    if not points:
        return 0.0
    weight = sum(w for *_, w in points)
    x, y = (sum(w * point[i] for *point, w in points) / weight for i in (0, 1))
    spread = sum(w * (a - x) ** 2 for a, _, w in points)
    slope = sum(w * (a - x) * (b - y) for a, b, w in points) / spread if spread > 0 else 0.0
    return min(1.0, math.exp(y + slope * (math.log(curve[-1].tokens) - x)))
