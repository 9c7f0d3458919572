"""The threshold that lets a stream fill a dictionary of the wanted size: tried, pass by pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["ThresholdTrial", "next_threshold", "settled"]

FIRST = 0.3
LATE = 0.9
"""A dictionary that fills after this share of the stream has the threshold that was sought,"""
NEAR = 0.98
"""and so has one that the whole stream fills to this share."""
MOST = 12
FLATTENING = 0.6
"""Sizes grow about as this power of the tokens seen: only used to guess from a pass that was cut short."""


class ThresholdTrial(NamedTuple):
    """A pass over the stream."""

    threshold: float
    size: int
    """Atoms at its end."""
    share: float
    """How much of the stream it took until the dictionary was full; 1 if it never was."""


def settled(trials: Sequence[ThresholdTrial], size: int) -> bool:
    """Whether the last trial is as good as asked, or no better one can be hoped for."""
    if not trials:
        return False
    last = trials[-1]
    filled = last.size >= size and last.share >= LATE
    nearly = last.size >= NEAR * size and last.share == 1
    return filled or nearly or len(trials) == MOST or last.threshold < 1e-3


def next_threshold(trials: Sequence[ThresholdTrial], size: int) -> float:
    """The threshold to try next: between the nearest one that gave too many atoms and the nearest that gave too few."""
    many = max((trial for trial in trials if _whole(trial) >= size), default=None)
    few = min((trial for trial in trials if _whole(trial) < size), default=None)
    if many is None and few is None:
        return FIRST
    if few is None:
        assert many is not None
        return many.threshold + 0.5 * (1 - many.threshold)
    if many is None:
        return few.threshold / 2
    # Sizes fall about exponentially with the threshold. Aim a little high: a full dictionary is what was asked for.
    high, low = math.log(_whole(many)), math.log(max(1, few.size))
    step = (high - math.log(1.02 * size)) / max(high - low, 1e-9)
    return many.threshold + min(max(step, 0.1), 0.9) * (few.threshold - many.threshold)


def _whole(trial: ThresholdTrial) -> float:
    """About the size that the whole stream would have given."""
    return trial.size / trial.share**FLATTENING
