"""The record of findings, and the rules by which a claim holds: statistics of means over concepts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist, fmean, stdev
from typing import ClassVar, Literal, NamedTuple, final

from difflex.effects.drawn_world import CAPTION_GROUPS
from difflex.effects.inputs import Provenance, check_images
from difflex.effects.judging import StrengthCurve, StrengthPoint
from difflex.errors import BadInput
from difflex.json_records import JsonRecord
from difflex.miniature.world import CONCEPTS
from difflex.values import check_fields

KEPT = 0.8
"""A gain is the best that keeps this share of all else, less than a single edit should keep."""
MIN_GAIN = 0.1
"""A mean gain below this is no effect."""
MIN_CONCEPTS = 3
"""A mean is over this number of concepts at least."""
LEVEL = 0.05
"""How often a rule may decide by chance where its means lie at their thresholds."""
POWER = 0.8
"""How often the number of concepts that is asked for decides, if the means are what they seem to be."""
CERTAINTY = (
    "Decided by means over concepts whose 95 % intervals (Student's t; wider where a rule has several conditions: Bonferroni) "
    "leave the threshold out."
)
Verdict = Literal["holds here", "does not hold here", "cannot be said"]


def concepts_of(group: str, count: int) -> list[str]:
    """Return `count` concepts of a group, evenly spread over it; all, if it has no more."""
    if group not in CAPTION_GROUPS:
        raise BadInput(f"There is no experiment with the group '{group}'. Name one of {', '.join(CAPTION_GROUPS)}.")
    names = CONCEPTS[group]
    if count < 1:
        raise BadInput(f"{count} concepts of the group {group} leave nothing to try. Ask for 1 or more.")
    count = min(count, len(names))
    return [names[(2 * i + 1) * len(names) // (2 * count)] for i in range(count)]


@final
@dataclass(frozen=True, kw_only=True)
class FindingsConfig:
    """The concepts, images and strengths of the experiments."""

    groups: tuple[str, ...] = ("colour", "texture", "background", "style")
    concepts_per_group: int = 2
    trials: int = 8
    """Images for each concept and condition."""
    pairs: tuple[int, ...] = (1, 2, 5, 10, 20, 40, 80, 160)
    """Numbers of pairs for contrasts, rising."""
    strengths: tuple[float, ...] = (0.1, 0.2, 0.35, 0.6, 1.0)
    """Rising; in norms of a mean activation."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.trials < 1 or not self.pairs or min(self.pairs) < 1 or not self.strengths or min(self.strengths) <= 0:
            raise BadInput(
                f"{self.trials} trials, contrasts of {self.pairs} pairs and the strengths {self.strengths} leave nothing to try. "
                "Give numbers above 0."
            )
        if not self.groups or list(self.pairs) != sorted(set(self.pairs)) or list(self.strengths) != sorted(set(self.strengths)):
            raise BadInput(f"Name one or more groups, and pairs {self.pairs} and strengths {self.strengths} in rising order.")
        of_concept = self.trials * (1 + len(self.strengths)) * (10 + len(self.pairs)) + 2 * max(self.pairs)
        check_images(len(self.concepts()) * of_concept)

    def concepts(self, groups: Sequence[str] | None = None) -> list[str]:
        """Return the concepts of the groups; of those that are in `groups`, too, if given."""
        chosen = [group for group in self.groups if groups is None or group in groups]
        return [concept for group in chosen for concept in concepts_of(group, self.concepts_per_group)]

    @property
    def inner(self) -> tuple[float, ...]:
        """The strengths without the first and the last, if there are three or more."""
        return self.strengths[1:-1] or self.strengths


class FindingLine(NamedTuple):
    """A line of a figure: means over concepts with their standard errors."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    errors: tuple[float, ...]
    concepts: int


@final
@dataclass(frozen=True, kw_only=True)
class Finding:
    """A claim of a paper, the rule by which it holds, and the result of an experiment."""

    name: str
    claim: str
    paper: str
    rule: str
    verdict: Verdict
    reason: str
    """The numbers that decided, or what was missing, as a sentence."""
    numbers: dict[str, float]
    x: str
    """The axis title of the lines."""
    y: str
    lines: tuple[FindingLine, ...]
    curves: tuple[StrengthCurve, ...]
    """All results; `method` is the condition. Where kinds of captions are compared, `quality` is over the largest loss of the
    unedited images of any kind."""
    config: FindingsConfig
    provenance: Provenance


@final
@dataclass(frozen=True, kw_only=True)
class Findings(JsonRecord):
    """The findings at one site of a model."""

    FORMAT: ClassVar[int] = 2
    COMMAND: ClassVar[str] = "findings"

    model: str
    revision: str | None
    site: str
    parameters: int
    """Of the denoiser."""
    findings: tuple[Finding, ...]

    def of(self, name: str) -> Finding | None:
        """Return the finding of an experiment; None if it was not made."""
        return next((finding for finding in self.findings if finding.name == name), None)


class RuleCondition(NamedTuple):
    """A condition of a rule: the mean of values is above a threshold."""

    values: Sequence[float]
    threshold: float = 0.0


class Ruling(NamedTuple):
    """A verdict, and the numbers behind it as a sentence."""

    verdict: Verdict
    reason: str


def evaluate_conditions(conditions: Sequence[RuleCondition]) -> bool | None:
    """Return whether all conditions are true; None if chance may have decided one of them, or if there are too few values."""
    answers = [_is_above(condition, LEVEL / len(conditions)) for condition in conditions]
    return False if False in answers else (None if None in answers else True)


def _is_above(condition: RuleCondition, level: float) -> bool | None:
    """Return whether the mean is above the threshold, if it differs from it at this level of significance."""
    values, threshold = condition
    if len(values) < MIN_CONCEPTS:
        return None
    difference, error = fmean(values) - threshold, standard_error(values)
    is_significant = difference != 0 if error == 0 else t_tail(difference / error, len(values) - 1) < level
    return difference > 0 if is_significant else None


def concepts_needed(conditions: Sequence[RuleCondition]) -> int | None:
    """Return with how many concepts all undecided `conditions` would be decided with the probability POWER.

    The number is (z + z')² s² / d²: d is the distance of the mean from its threshold and s the standard deviation over concepts,
    both as they are now; z and z' are the normal quantiles of the level and of the power. None where d is 0, or s unknown.
    """
    level, needed = LEVEL / len(conditions), MIN_CONCEPTS
    quantiles = NormalDist().inv_cdf(1 - level / 2) + NormalDist().inv_cdf(POWER)
    for condition in conditions:
        values, threshold = condition
        if _is_above(condition, level) is not None:
            continue
        difference = abs(fmean(values) - threshold) if values else 0.0
        if difference < 1e-9 or len(values) < 2:
            return None
        needed = max(needed, math.ceil((quantiles * stdev(values) / difference) ** 2))
    return needed


def t_tail(t: float, freedom: int) -> float:
    """Return how often Student's t is farther from 0 than `t` (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    angle = math.atan(abs(t) / math.sqrt(freedom))
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for i in range(1 + odd, freedom, 2):
        total += term
        term *= math.cos(angle) ** 2 * i / (i + 1)
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return max(0.0, 1 - inside)


def t_quantile(level: float, freedom: int) -> float:
    """Return the distance from 0 beyond which Student's t is with the probability `level`."""
    low, high = 0.0, 1.0
    while t_tail(high, freedom) > level:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, freedom) > level else (low, middle)
    return high


def interval(condition: RuleCondition, level: float = LEVEL) -> tuple[float, float]:
    """Return the interval of the mean less its threshold; infinite for fewer than two values."""
    values, threshold = condition
    if len(values) < 2:
        return -math.inf, math.inf
    middle, half = fmean(values) - threshold, t_quantile(level, len(values) - 1) * standard_error(values)
    return middle - half, middle + half


def rule(conditions: Sequence[RuleCondition], numbers: str) -> Ruling:
    """Rule by conditions, with `numbers` and the intervals of the means less their thresholds as the reason."""
    answer = evaluate_conditions(conditions)
    if all(condition.values for condition in conditions):
        margins = [(fmean(each.values) - each.threshold, *interval(each, LEVEL / len(conditions))) for each in conditions]
        numbers += "; by condition " + ", ".join(f"{middle:.2g} [{low:.2g}, {high:.2g}]" for middle, low, high in margins)
    if answer is None:
        reason = f"{numbers}: a 95 % interval contains the threshold, or there are fewer than {MIN_CONCEPTS} concepts."
        needed = concepts_needed(conditions)
        if needed is not None:
            reason += f" If the means stay as they are, about {needed:,} concepts would decide it in {POWER:.0%} of runs."
        return Ruling("cannot be said", reason)
    return Ruling("holds here" if answer else "does not hold here", f"{numbers}.")


def rule_half(name: str, full: Sequence[float], others: Mapping[str, Sequence[float]]) -> Ruling:
    """Rule whether each of `others` is under half of `full`, concept by concept, if `full` is an effect at all."""
    if not full:
        return Ruling("cannot be said", "nothing was judged.")
    numbers = ", ".join([f"{name} {fmean(full):.2f}", *(f"{fmean(values):.2f} {where}" for where, values in others.items())])
    numbers += f", over {len(full)} concepts"
    if fmean(full) < MIN_GAIN:
        return Ruling("cannot be said", f"{numbers}: half of an effect under {MIN_GAIN} cannot be measured.")
    conditions = [RuleCondition([a / 2 - b for a, b in zip(full, values, strict=True)]) for values in others.values()]
    return rule(conditions, numbers)


def rule_rising(curves: Sequence[StrengthCurve]) -> Ruling:
    """Rule whether the loss is above that of unedited images at every strength, and rises from each to the next."""
    columns = list(zip(*([point.quality for point in curve.points] for curve in curves), strict=True))
    above = [RuleCondition(column, 1.0) for column in columns]
    rising = [RuleCondition([b - a for a, b in zip(*pair, strict=True)]) for pair in pairwise(columns)]
    strengths = [point.strength for point in curves[0].points]
    means = [f"{fmean(column):.2f} at {strength:g}" for strength, column in zip(strengths, columns, strict=True)]
    return rule(above + rising, f"loss over that of unedited images {', '.join(means)}")


def line_of_curves(
    name: str, curves: Sequence[StrengthCurve], value: Callable[[StrengthCurve, StrengthPoint], float]
) -> FindingLine:
    """Return the line of a value over strengths: its mean over curves of the same strengths."""
    columns = list(zip(*([value(curve, point) for point in curve.points] for curve in curves), strict=True))
    return line_of_columns(name, [point.strength for point in curves[0].points] if curves else [], columns)


def line_of_columns(name: str, x: Sequence[float], columns: Sequence[Sequence[float]]) -> FindingLine:
    """Return the line through the mean of each column."""
    y, errors = (tuple(map(statistic, columns)) for statistic in (fmean, standard_error))
    return FindingLine(name, tuple(x), y, errors, len(columns[0]) if columns else 0)


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean; 0 for a single value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
