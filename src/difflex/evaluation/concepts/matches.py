"""What was found out about a dictionary and known concepts, as it is written and read again."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from difflex.evaluation.concepts.labelled import Concept
from difflex.files import parsing, read_json, write_json
from difflex.records import Site

__all__ = ["ConceptDetector", "ConceptMatches", "ConceptResult", "ConfidenceInterval", "FeatureMatches", "NoiseLevelResult"]

FORMAT = 1
AGAIN = "Delete it and run the command that makes it again."
COVERED = 0.8
"""From this average precision on, a feature detects a concept."""
FINDABLE = 0.9
"""From this average precision of a linear probe on, a concept is there to be found."""


class ConfidenceInterval(NamedTuple):
    """A figure and where 95 % of its values lie when images are drawn again."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class ConceptDetector:
    """One or few features that stand for a concept: chosen on training images, measured on held-out ones."""

    features: tuple[int, ...]
    """The best first."""
    ap: ConfidenceInterval
    """Average precision."""
    iou: float
    """Intersection over union, cut at the value that was best on training images."""
    precision: float
    """At that value."""
    recall: float
    """At that value."""


@dataclass(frozen=True, kw_only=True)
class ConceptResult:
    """What is known of one concept."""

    concept: Concept
    tokens: int
    """Held-out tokens that show it."""
    chance: float
    """Their share: the average precision of a ranking by chance."""
    probe: ConfidenceInterval
    """The ceiling: average precision of a linear probe on the same activations."""
    best: ConceptDetector
    """The single feature of the highest average precision."""
    segmenting: ConceptDetector
    """The single feature of the highest IoU."""
    few: ConceptDetector
    """The best few features together."""
    unrelated: str | None
    """The concept that `best` detects best among those that have nothing to do with this one."""
    monosemanticity: float
    """How much better `best` detects its concept than that one, both over chance: 1 for a feature of one meaning, 0 for none."""
    pieces: tuple[int, ...]
    """The features that share the concept among them, where it is split."""
    absorbers: tuple[int, ...]
    """The features at which `best` is silent though its concept is there."""


@dataclass(frozen=True, kw_only=True)
class FeatureMatches:
    """Every feature that fires at training tokens, each entry of a column one feature; figures are of held-out images."""

    features: tuple[int, ...]
    concepts: tuple[int, ...]
    """Of the highest average precision, as a place in `ConceptMatches.concepts`."""
    ap: tuple[float, ...]
    segmented: tuple[int, ...]
    """The concepts of the highest IoU."""
    iou: tuple[float, ...]
    unrelated: tuple[float, ...]
    """The highest average precision for a concept that has nothing to do with the best one."""
    monosemanticity: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class NoiseLevelResult:
    """What is known at one level of noise, or at all of them together."""

    noise: float | None
    """Between 0 (the image) and 1 (pure noise); None for all levels together."""
    findings: tuple[ConceptResult, ...]
    coverage: ConfidenceInterval
    """The share of concepts that one feature detects (AP >= 0.8)."""
    coverage_of_findable: ConfidenceInterval | None
    """The same among concepts that a linear probe finds (AP >= 0.9); None where there are none."""

    def of(self, group: str) -> list[ConceptResult]:
        """The findings about the concepts of a group."""
        return [finding for finding in self.findings if finding.concept.group == group]

    @property
    def monosemanticity(self) -> float:
        """The mean over concepts of that of their best features."""
        return sum(finding.monosemanticity for finding in self.findings) / len(self.findings)


def covered(findings: Collection[ConceptResult], findable: bool = False) -> tuple[int, int]:
    """How many concepts one feature detects, and of how many; with `findable`, of those that a linear probe finds."""
    among = [finding for finding in findings if not findable or finding.probe.value >= FINDABLE]
    return sum(finding.best.ap.value >= COVERED for finding in among), len(among)


@dataclass(frozen=True, kw_only=True)
class ConceptMatches:
    """The features of one method against known concepts."""

    site: Site
    label: str
    size: int
    concepts: tuple[Concept, ...]
    left_out: tuple[Concept, ...]
    """Concepts that too few images show."""
    levels: tuple[NoiseLevelResult, ...]
    """All levels of noise together first, then each where there are several."""
    features: FeatureMatches
    """At all levels together."""
    made_from: Mapping[str, str | int | float] = field(default_factory=dict)
    """What the figures depend on: checksums, images, settings. Work made from something else is done again."""

    @property
    def clearest(self) -> NoiseLevelResult:
        """The level at which a linear probe finds the most concepts: there it is best seen what a site knows."""
        return max(self.levels, key=lambda level: covered(level.findings, findable=True)[1])

    def save(self, path: Path) -> None:
        """Nothing; the matches are in the JSON file `path`, which is replaced in one go."""
        write_json(path, FORMAT, {**asdict(self), "site": str(self.site)}, indent=None)

    @classmethod
    def load(cls, path: Path) -> ConceptMatches:
        """The matches saved in `path`."""
        data = read_json(path, FORMAT, AGAIN)
        with parsing(path, "matches", AGAIN):
            columns = {name: tuple(column) for name, column in data.pop("features").items()}
            return cls(
                site=Site.parse(data.pop("site")),
                concepts=_concepts(data.pop("concepts")),
                left_out=_concepts(data.pop("left_out")),
                levels=tuple(_level(level) for level in data.pop("levels")),
                features=FeatureMatches(**columns),
                **data,
            )


def _concepts(entries: list[list[str]]) -> tuple[Concept, ...]:
    return tuple(Concept(*entry) for entry in entries)


def _level(entries: dict) -> NoiseLevelResult:
    findings = tuple(_finding(each) for each in entries.pop("findings"))
    coverage, of_findable = ConfidenceInterval(*entries.pop("coverage")), entries.pop("coverage_of_findable")
    found = None if of_findable is None else ConfidenceInterval(*of_findable)
    return NoiseLevelResult(findings=findings, coverage=coverage, coverage_of_findable=found, **entries)


def _finding(entries: dict) -> ConceptResult:
    detectors = {name: _detector(entries.pop(name)) for name in ("best", "segmenting", "few")}
    tuples = {name: tuple(entries.pop(name)) for name in ("pieces", "absorbers")}
    concept, probe = Concept(*entries.pop("concept")), ConfidenceInterval(*entries.pop("probe"))
    return ConceptResult(concept=concept, probe=probe, **detectors, **tuples, **entries)


def _detector(entries: dict) -> ConceptDetector:
    features, ap = tuple(entries.pop("features")), ConfidenceInterval(*entries.pop("ap"))
    return ConceptDetector(features=features, ap=ap, **entries)
