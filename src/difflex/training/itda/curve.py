"""The growth curve: how many tokens a growing dictionary found over its threshold, and what that says of tokens to come."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["GrowthInterval", "expected_over", "thinned"]


class GrowthInterval(NamedTuple):
    """A stretch of growth."""

    tokens: int
    """Seen so far, those of the stretch included."""
    over: int
    """Tokens of the stretch that were over the threshold when they came."""
    size: int
    """Atoms at its end."""
    watched: int = 0
    """Tokens of the stretch whose shots are kept out of growth."""
    missed: int = 0
    """Those of them that were over the threshold when they came."""


def thinned(curve: Sequence[GrowthInterval], most: int = 256) -> list[GrowthInterval]:
    """The same curve in at most `most` stretches of about equally many tokens."""
    if len(curve) <= most:
        return list(curve)
    step = curve[-1].tokens / most
    kept: list[GrowthInterval] = []
    over = watched = missed = 0
    for place, moment in enumerate(curve):
        over, watched, missed = over + moment.over, watched + moment.watched, missed + moment.missed
        if place + 1 == len(curve) or moment.tokens >= step * (len(kept) + 1):
            kept.append(GrowthInterval(moment.tokens, over, moment.size, watched, missed))
            over = watched = missed = 0
    return kept


def expected_over(curve: Sequence[GrowthInterval]) -> float | None:
    """The share of the tokens of new images that should be over the threshold at the end of `curve`; None if nobody knows.

    Known from shots that are kept out of growth: other tokens are mostly of images that the dictionary has atoms of. The share
    falls as a power of the dictionary's size; the power is fitted to what came once it had half its atoms.
    """
    sizes = [0, *(moment.size for moment in curve)]
    last = sizes[-1]
    points = [
        CurvePoint(math.log(max(size, 1) / max(last, 1)), moment.watched, moment.missed)
        for size, moment in zip(sizes, curve, strict=False)
        if moment.watched and 2 * size >= last
    ]
    return _at_zero(points) if points else None


class CurvePoint(NamedTuple):
    """What was seen of a share at a place."""

    x: float
    tokens: int
    hits: int


def _at_zero(points: Sequence[CurvePoint]) -> float:
    """The share at x = 0 of the most likely `exp(a + b x)` that does not rise: Newton's method on Poisson's likelihood."""
    count, hits = sum(point.tokens for point in points), sum(point.hits for point in points)
    if not hits:
        return 0.0
    level = a = math.log(hits / count)
    b = 0.0
    for _ in range(30):
        means = [point.tokens * math.exp(a + b * point.x) for point in points]
        m, mx = sum(means), sum(mean * point.x for mean, point in zip(means, points, strict=True))
        mxx = sum(mean * point.x**2 for mean, point in zip(means, points, strict=True))
        off = hits - m
        off_x = sum((point.hits - mean) * point.x for mean, point in zip(means, points, strict=True))
        bend = m * mxx - mx * mx
        if bend <= 1e-9 * m * m:
            break
        a, b = a + (mxx * off - mx * off_x) / bend, b + (m * off_x - mx * off) / bend
    return min(1.0, math.exp(a if b < 0 else level))
