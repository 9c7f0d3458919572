"""When a claim holds, by numbers of several concepts: a mean whose interval holds the threshold decides nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean, stdev
from typing import NamedTuple

from difflex.effects import StrengthCurve, StrengthPoint
from difflex.effects.findings.record import FindingLine, Verdict

__all__ = [
    "KEPT",
    "SURELY",
    "RuleCondition",
    "Ruling",
    "are_above",
    "chance",
    "gain",
    "line",
    "line_of",
    "rises_above_one",
    "ruled",
    "under_half",
]

KEPT = 0.8
"""A gain is the best that keeps so much of all else; less than for a single edit that is to be used."""
LEAST = 0.1
"""A mean gain under this is no effect, of which a half could be lost."""
FEWEST = 3
"""Concepts of which a mean is taken."""
CHANCE = 0.05
"""So often may a rule decide where its means lie at their thresholds."""
SURELY = (
    "Decided by means over concepts whose 95 % intervals (Student's t; wider where a rule has several conditions: Bonferroni) "
    "leave the threshold out."
)
"""What every rule says besides."""


class RuleCondition(NamedTuple):
    """A condition of a rule: the mean of these is above a threshold."""

    values: Sequence[float]
    threshold: float = 0.0


class Ruling(NamedTuple):
    """A verdict, and the numbers behind it as a sentence."""

    verdict: Verdict
    because: str


def are_above(conditions: Sequence[RuleCondition]) -> bool | None:
    """Whether all conditions are so; None where chance may have made one of them so or not, or where there are too few values."""
    answers = [_is_above(each, CHANCE / len(conditions)) for each in conditions]
    return False if False in answers else (None if None in answers else True)


def _is_above(condition: RuleCondition, share: float) -> bool | None:
    """Whether it is so, if such a mean comes up by chance in less than this share of cases."""
    values, threshold = condition
    if len(values) < FEWEST:
        return None
    far, error = fmean(values) - threshold, standard_error(values)
    sure = far != 0 if error == 0 else chance(far / error, len(values) - 1) < share
    return far > 0 if sure else None


def chance(t: float, freedom: int) -> float:
    """How often Student's t of so many degrees of freedom is farther from 0 than `t` (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    angle = math.atan(abs(t) / math.sqrt(freedom))
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for i in range(1 + odd, freedom, 2):
        total += term
        term *= math.cos(angle) ** 2 * i / (i + 1)
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return max(0.0, 1 - inside)


def ruled(answer: bool | None, told: str) -> Ruling:
    """The verdict of an answer."""
    if answer is None:
        why = f"a 95 % interval holds the threshold, or there are fewer than {FEWEST} concepts"
        return Ruling("cannot be said", f"{told}: {why}.")
    return Ruling("holds here" if answer else "does not hold here", f"{told}.")


def under_half(name: str, full: Sequence[float], others: Mapping[str, Sequence[float]]) -> Ruling:
    """Whether each of `others` is under half of `full`, concept by concept, where `full` is an effect at all."""
    if not full:
        return Ruling("cannot be said", "nothing was judged.")
    told = ", ".join([f"{name} {fmean(full):.2f}", *(f"{fmean(values):.2f} {where}" for where, values in others.items())])
    told += f", over {len(full)} concepts"
    if fmean(full) < LEAST:
        return Ruling("cannot be said", f"{told}: of an effect under {LEAST} no half can be told.")
    lost = [RuleCondition([one / 2 - two for one, two in zip(full, values, strict=True)]) for values in others.values()]
    return ruled(are_above(lost), told)


def rises_above_one(curves: Sequence[StrengthCurve]) -> Ruling:
    """Whether the loss is above that of unedited images at every strength and rises from each to the next."""
    table = [[point.quality for point in curve.points] for curve in curves]
    columns = list(zip(*table, strict=True))
    above = [RuleCondition(column, 1.0) for column in columns]
    rising = [RuleCondition([b - a for a, b in zip(*pair, strict=True)]) for pair in pairwise(columns)]
    strengths = [point.strength for point in curves[0].points]
    told = "loss over that of unedited images " + ", ".join(
        f"{fmean(column):.2f} at {strength:g}" for strength, column in zip(strengths, columns, strict=True)
    )
    return ruled(are_above(above + rising), told)


def gain(curve: StrengthCurve, kept: float = KEPT) -> float:
    """What the best of its strengths that keep so much of all else adds to success."""
    return curve.gain(kept)


def line(name: str, curves: Sequence[StrengthCurve], of: Callable[[StrengthCurve, StrengthPoint], float]) -> FindingLine:
    """A number of points over strengths: its mean over curves of the same strengths."""
    columns = list(zip(*([of(curve, point) for point in curve.points] for curve in curves), strict=True))
    return line_of(name, [point.strength for point in curves[0].points] if curves else [], columns)


def line_of(name: str, x: Sequence[float], columns: Sequence[Sequence[float]]) -> FindingLine:
    """A line through the mean of each column."""
    y, errors = (tuple(map(each, columns)) for each in (fmean, standard_error))
    return FindingLine(name, tuple(x), y, errors, len(columns[0]) if columns else 0)


def standard_error(values: Sequence[float]) -> float:
    """Of their mean; 0 for a single value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
