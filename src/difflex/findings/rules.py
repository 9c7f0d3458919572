"""When a claim holds, by numbers of several concepts: a mean within its standard error of the threshold decides nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import fmean, stdev
from typing import NamedTuple

from difflex.findings.record import Line, Verdict
from difflex.steering import Curve, Point

__all__ = ["KEPT", "Ruling", "both", "gain", "is_above", "line", "line_of", "rises_above_one", "ruled", "under_half"]

KEPT = 0.8
"""A gain is the best that keeps so much of all else; less than for a single edit that is to be used."""
LEAST = 0.1
"""A mean gain under this is no effect, of which a half could be lost."""
FEWEST = 3
"""Concepts of which a mean is taken."""


class Ruling(NamedTuple):
    """A verdict, and the numbers behind it as a sentence."""

    verdict: Verdict
    because: str


def is_above(values: Sequence[float], threshold: float = 0.0) -> bool | None:
    """Whether the mean is above a threshold; None where it is within its standard error of it, or of too few values."""
    if len(values) < FEWEST:
        return None
    far = fmean(values) - threshold
    return far > 0 if abs(far) > standard_error(values) else None


def ruled(answer: bool | None, told: str) -> Ruling:
    """The verdict of an answer."""
    if answer is None:
        return Ruling(
            "cannot be said", f"{told}: within the standard error of the threshold, or of fewer than {FEWEST} concepts."
        )
    return Ruling("holds here" if answer else "does not hold here", f"{told}.")


def both(first: bool | None, second: bool | None) -> bool | None:
    """Whether both are so: not, if one is not; None, if one of them cannot be said."""
    if first is False or second is False:
        return False
    return None if first is None or second is None else True


def under_half(full: Sequence[float], other: Sequence[float], names: tuple[str, str]) -> Ruling:
    """Whether `other` is under half of `full`, concept by concept, where `full` is an effect at all."""
    told = (
        f"{names[0]} {fmean(full):.2f}, {names[1]} {fmean(other):.2f}, over {len(full)} concepts"
        if full
        else "nothing was judged"
    )
    if not full or fmean(full) < LEAST:
        return Ruling("cannot be said", f"{told}: of an effect under {LEAST} no half can be told.")
    return ruled(is_above([one / 2 - two for one, two in zip(full, other, strict=True)]), told)


def rises_above_one(curves: Sequence[Curve]) -> Ruling:
    """Whether the loss is above that of unedited pictures at every strength and rises from each to the next."""
    table = [[point.quality for point in curve.points] for curve in curves]
    columns = list(zip(*table, strict=True))
    above = [is_above(column, 1.0) for column in columns]
    rising = [is_above([b - a for a, b in zip(*pair, strict=True)]) for pair in pairwise(columns)]
    strengths = [point.strength for point in curves[0].points]
    told = "loss over that of unedited pictures " + ", ".join(
        f"{fmean(column):.2f} at {strength:g}" for strength, column in zip(strengths, columns, strict=True)
    )
    answers = above + rising
    return ruled(False if False in answers else (None if None in answers else True), told)


def gain(curve: Curve, strengths: Sequence[float] | None = None) -> float:
    """What the best of its strengths, or of those, adds to success."""
    points = curve.points if strengths is None else tuple(point for point in curve.points if point.strength in strengths)
    return replace(curve, points=points).gain(KEPT)


def line(name: str, curves: Sequence[Curve], of: Callable[[Curve, Point], float]) -> Line:
    """A number of points over strengths: its mean over curves of the same strengths."""
    columns = list(zip(*([of(curve, point) for point in curve.points] for curve in curves), strict=True))
    return line_of(name, [point.strength for point in curves[0].points] if curves else [], columns)


def line_of(name: str, x: Sequence[float], columns: Sequence[Sequence[float]]) -> Line:
    """A line through the mean of each column."""
    y, errors = (tuple(map(each, columns)) for each in (fmean, standard_error))
    return Line(name, tuple(x), y, errors, len(columns[0]) if columns else 0)


def standard_error(values: Sequence[float]) -> float:
    """Of their mean; 0 for a single value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
