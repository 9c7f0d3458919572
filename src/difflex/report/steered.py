"""What is known of steering with a dictionary's features: how well edits do, and which concepts it has a feature for."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

from difflex.effects import ImageStrip, SteeringResults, StrengthCurve
from difflex.evaluation.concepts import ConceptMatches
from difflex.study import DictionaryRef

__all__ = ["DETECTS", "GroupCoverage", "SteeringFacts", "SteeringSummary", "has_numbers", "known", "summary"]

DETECTS = 0.8
"""From this average precision on a feature detects a concept, and is held to what it says."""


class GroupCoverage(NamedTuple):
    """The concepts of a group, and those of them that a steered feature stands for."""

    concepts: int
    rare: int
    """So many of them are shown too rarely to tell what detects them; they count as without a feature."""
    detected: frozenset[str]
    """Those that a feature detects; of concepts told in words all, each steered with the feature told."""


class SteeringSummary(NamedTuple):
    """Medians over concepts, each at the strength that is best for it; None where no strength will do for any."""

    features: int
    gain: float
    """Success over that without the edit, 0 where no strength will do."""
    without: float
    success: float | None
    kept: float | None
    loss: float | None
    strength: float | None


@dataclass(frozen=True, kw_only=True)
class SteeringFacts:
    """A dictionary whose features were steered with."""

    place: DictionaryRef
    kind: str
    judged: SteeringResults
    known: Mapping[str, GroupCoverage]
    """By group of concepts."""
    strips: tuple[tuple[ImageStrip, Path], ...]
    """To be looked at, each with its image."""

    @property
    def is_told(self) -> bool:
        """Whether its concepts were told in words, and not those of the drawn world."""
        return _is_told(self.judged)

    @property
    def methods(self) -> list[str]:
        """What was judged, the dictionary's own features first."""
        return list(dict.fromkeys(curve.method for curve in self.judged.curves))

    @property
    def groups(self) -> list[str]:
        """The groups in which some concept has a feature."""
        return [group for group, known in self.known.items() if known.detected]

    def curves(self, method: str, *groups: str) -> list[StrengthCurve]:
        """Those of a method for the concepts of these groups that the dictionary has a feature for."""
        return [
            curve
            for curve in self.judged.of(method)
            if curve.group in groups and curve.concept in self.known[curve.group].detected
        ]


def _is_told(judged: SteeringResults) -> bool:
    return bool(judged.made_from.get("told"))


def known(matches: ConceptMatches | None, judged: SteeringResults, place: DictionaryRef) -> dict[str, GroupCoverage] | None:
    """By group: how many concepts there are, and which the features that were steered with detect; None where that is not
    known. What was told in words is known by that alone."""
    steered = {curve.concept: curve.told for curve in judged.of("feature")}
    if _is_told(judged):
        groups = {group: frozenset(curve.concept for curve in judged.curves if curve.group == group) for group in _groups(judged)}
        return {group: GroupCoverage(len(names), 0, names) for group, names in groups.items()}
    if matches is None:
        return None
    findings = matches.clearest.findings
    made = {}
    asked = [group for group in str(judged.made_from.get("groups", "")).split(",") if group]
    for group in dict.fromkeys([*asked, *_groups(judged)]):
        there = [finding for finding in findings if finding.concept.group == group]
        detected = [
            finding.concept.name
            for finding in there
            if finding.best.ap.value >= DETECTS and steered.get(finding.concept.name) == f"{place} {finding.best.features[0]}"
        ]
        rare = sum(concept.group == group for concept in matches.left_out)
        made[group] = GroupCoverage(len(there) + rare, rare, frozenset(detected))
    return made


def _groups(judged: SteeringResults) -> list[str]:
    """Those of the concepts that were steered towards."""
    return list(dict.fromkeys(curve.group for curve in judged.curves))


def summary(curves: Iterable[StrengthCurve]) -> SteeringSummary | None:
    """What came of steering towards each concept, in the middle; None for no concept."""
    listed = list(curves)
    if not listed:
        return None
    best = [point for curve in listed if (point := curve.best()) is not None]
    middle = lambda values: median(values) if values else None  # noqa: E731
    return SteeringSummary(
        features=len(listed),
        gain=median([curve.gain() for curve in listed]),
        without=median([curve.without for curve in listed]),
        success=middle([point.success for point in best]),
        kept=middle([point.specificity for point in best]),
        loss=middle([point.quality for point in best]),
        strength=middle([point.strength for point in best]),
    )


def has_numbers(judged: SteeringResults) -> bool:
    """Whether all that should be a number is one, and there is something to tell."""
    points = [point for curve in judged.curves for point in curve.points]
    figures = [
        figure
        for point in points
        for figure in (point.strength, point.success, point.specificity, point.quality, point.confidence)
    ]
    figures += [curve.without for curve in judged.curves]
    return all(isinstance(figure, int | float) and math.isfinite(figure) for figure in figures)
