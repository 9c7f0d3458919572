"""Matches of features to concepts, as they are written to disk, read again, and printed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from difflex.errors import BadInput
from difflex.json_records import JsonRecord
from difflex.records import Site
from difflex.tables import text_table
from difflex.values import check_fields, shown

__all__ = [
    "ConceptDetector",
    "ConceptMatches",
    "ConceptResult",
    "ConfidenceInterval",
    "FeatureMatches",
    "MatchInputs",
    "MatchingConfig",
    "NoiseLevelResult",
    "count_detected",
    "matches_table",
]

DETECTED = 0.8
"""Average precision from which a feature detects a concept."""
MOST = 10**6
"""Images of a source."""
FINDABLE = 0.9
"""Average precision of a linear probe from which a concept is findable."""
LABEL_BYTES, CODE_BYTES, SORTING_BYTES = 24, 12, 48
"""For each token its image, level and split; for each code its token, feature and value; and what sorting it takes."""
PROBE_ROWS = 1 << 17
"""Activations that probes are fitted to, at all noise levels."""
PROBE = "a linear probe"
SUMMARY = ["", "detected (AP >= 0.8)", "of those the probe finds", "mean AP", "combined", "monosemantic", "split", "absorbed"]


class Concept(NamedTuple):
    """Something that an image can show at a place."""

    name: str
    group: str
    """Colour, shape, background, or the like."""


@dataclass(frozen=True, kw_only=True)
class MatchingConfig:
    """How features are matched to concepts."""

    max_features: int = 4
    """Maximum number of features that detect a concept together."""
    min_images: int = 8
    """Images that must show a concept, among the held-out ones and among the others; a rarer concept is left out."""
    bootstrap_samples: int = 200
    """Bootstrap samples of held-out images for the confidence intervals."""
    ridge: float = 1e-4
    """L2 penalty on the weights of the linear probe, whose inputs are whitened."""
    seed: int = 0
    """Seed of the bootstrap samples, and of the tokens that the probe is trained on."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name, least, most in (
            ("max_features", 1, 100),
            ("min_images", 1, MOST),
            ("bootstrap_samples", 1, 10**5),
            ("ridge", 0, 1e9),
        ):
            if not least <= getattr(self, name) <= most:
                raise BadInput(f"{name} {getattr(self, name):g} is not possible: choose {least} to {most:,}.")


@dataclass(frozen=True, kw_only=True)
class ConceptsConfig:
    """How labelled images are harvested, labelled and matched."""

    images: int = 1000
    """Number of labelled images."""
    held_out: float = 0.1
    """Share of the images that concepts are measured on; features are chosen on the others."""
    noise: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Noise levels between 0 (the image) and 1 (pure noise)."""
    pixels: tuple[int, int] | None = None
    """Height and width that the images are resized to."""
    empty_prompts: bool = False
    """Whether images are harvested with empty prompts."""
    present_above: float = 0.5
    """A token shows a concept from this covered share of its area on."""
    absent_below: float = 0.0
    """A token does not show a concept up to this share; between the two it is ignored."""
    matching: MatchingConfig = field(default_factory=MatchingConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        if not 1 <= self.images <= MOST:
            raise BadInput(f"{self.images:,} images are not possible. Ask for 1 to {MOST:,}.")
        if not 0 < self.held_out < 1:
            raise BadInput(f"{self.held_out:g} of the images cannot be held out. Give a share between 0 and 1, such as 0.5.")
        if not 0 < len(self.noise) <= 100 or not all(0 <= level <= 1 for level in self.noise):
            raise BadInput(f"The noise levels {shown(self.noise)} are not possible. Give 1 to 100 numbers from 0 to 1.")
        if self.pixels is not None and not all(0 < side <= 16_384 for side in self.pixels):
            raise BadInput(
                f"Images of {self.pixels[0]} x {self.pixels[1]} pixels are not possible. Ask for 1 to 16,384 on a side."
            )
        if not 0 <= self.absent_below <= self.present_above <= 1 or not self.present_above:
            raise BadInput(
                f"A concept cannot be absent up to a share of {self.absent_below:g} and present from {self.present_above:g} on. "
                "Choose 0 <= absent_below <= present_above <= 1, present_above above 0."
            )

    def streaming_bytes(self, tokens: int, width: int, concepts: int, ks: Sequence[int]) -> int:
        """Return the memory that matching takes without the activations, at `tokens` an image: labels, codes, and to sort them.

        `ks` are the numbers of active features of the methods.
        """
        codes = CODE_BYTES * sum(ks) + SORTING_BYTES * max(ks, default=1)
        return self.images * len(self.noise) * tokens * (concepts + LABEL_BYTES + codes) + 4 * PROBE_ROWS * width


@dataclass(frozen=True, kw_only=True)
class MatchInputs:
    """What matches were computed from; with other inputs they are computed again."""

    model: str
    revision: str | None
    images: str
    """Source of the labelled images."""
    config: ConceptsConfig
    fingerprint: str | None = None
    """Fingerprint of the dictionary; None for a baseline."""
    precision: str | None = None
    """Of the model's weights; None if the study does not say."""
    text_length: int | None = None
    """Of a prompt; None for the model's own."""

    @property
    def settings(self) -> tuple[str, ConceptsConfig]:
        """Images and configuration: matches with equal settings are comparable."""
        return self.images, self.config


class ConfidenceInterval(NamedTuple):
    """A value with its 95 % bootstrap interval over images."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class ConceptDetector:
    """One or several features that detect a concept: chosen on training images, measured on held-out ones."""

    features: tuple[int, ...]
    """The best first."""
    ap: ConfidenceInterval
    """Average precision."""
    iou: float
    """Intersection over union at the threshold that was best on training images."""
    precision: float
    """At that threshold."""
    recall: float
    """At that threshold."""


@dataclass(frozen=True, kw_only=True)
class ConceptResult:
    """How well the features of a method detect one concept."""

    concept: Concept
    tokens: int
    """Number of held-out tokens that show it."""
    chance: float
    """Their share, which is the average precision of a random ranking."""
    probe: ConfidenceInterval
    """Average precision of a linear probe on the same activations, the ceiling."""
    best: ConceptDetector
    """The single feature with the highest average precision."""
    segmenting: ConceptDetector
    """The single feature with the highest IoU."""
    combined: ConceptDetector
    """The best few features together."""
    unrelated: str | None
    """The unrelated concept that `best` detects best."""
    monosemanticity: float
    """How much better `best` detects its concept than that one, both above chance: 1 for a feature with a single meaning."""
    split_features: tuple[int, ...]
    """The features that the concept is split into, if it is."""
    absorbing_features: tuple[int, ...]
    """The features that fire instead of `best` at some of the concept's tokens."""


@dataclass(frozen=True, kw_only=True)
class FeatureMatches:
    """The concepts of every feature that fires at training tokens, as columns; scores are of held-out images."""

    features: tuple[int, ...]
    concepts: tuple[int, ...]
    """Index in `ConceptMatches.concepts` of the concept with the highest average precision."""
    ap: tuple[float, ...]
    iou_concepts: tuple[int, ...]
    """Index of the concept with the highest IoU."""
    iou: tuple[float, ...]
    unrelated: tuple[float, ...]
    """The highest average precision for a concept unrelated to the best one."""
    monosemanticity: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class NoiseLevelResult:
    """The results at one noise level, or at all of them together."""

    noise: float | None
    """Between 0 (the image) and 1 (pure noise); None for all levels together."""
    results: tuple[ConceptResult, ...]
    coverage: ConfidenceInterval
    """Share of concepts that a single feature detects (AP >= 0.8)."""
    coverage_of_findable: ConfidenceInterval | None
    """The same among concepts that a linear probe finds (AP >= 0.9); None if there are none."""

    def of(self, group: str) -> list[ConceptResult]:
        """Return the results for the concepts of a group."""
        return [result for result in self.results if result.concept.group == group]

    @property
    def monosemanticity(self) -> float:
        """The monosemanticity of the best features, averaged over concepts."""
        return sum(result.monosemanticity for result in self.results) / len(self.results)


class DetectedCount(NamedTuple):
    """How many of some concepts are detected."""

    detected: int
    total: int


def count_detected(results: Collection[ConceptResult], findable: bool = False) -> DetectedCount:
    """Count the concepts that a single feature detects; with `findable`, only among those that a linear probe finds."""
    counted = [result for result in results if not findable or result.probe.value >= FINDABLE]
    return DetectedCount(sum(result.best.ap.value >= DETECTED for result in counted), len(counted))


@dataclass(frozen=True, kw_only=True)
class ConceptMatches(JsonRecord):
    """The matches of the features of one method to concepts."""

    FORMAT: ClassVar[int] = 2
    COMMAND: ClassVar[str] = "concepts"
    INDENT: ClassVar[int | None] = None

    site: Site
    label: str
    size: int
    concepts: tuple[Concept, ...]
    rare_concepts: tuple[Concept, ...]
    """Concepts that too few images show; they are left out."""
    levels: tuple[NoiseLevelResult, ...]
    """All noise levels together, then, if there are several, each of them."""
    features: FeatureMatches
    """At all levels together."""
    inputs: MatchInputs | None = None

    @property
    def clearest_level(self) -> NoiseLevelResult:
        """The noise level at which a linear probe finds the most concepts."""
        return max(self.levels, key=lambda level: count_detected(level.results, findable=True).total)

    @property
    def fingerprint(self) -> str | None:
        """Fingerprint of the dictionary; None for a baseline."""
        return self.inputs.fingerprint if self.inputs else None


def matches_table(matches: Sequence[ConceptMatches]) -> str:
    """Return a text table of what each method detects: in total, by group of concepts, and by noise level; one per site."""
    sites: dict[tuple[Site, str | None], list[ConceptMatches]] = {}
    for method in matches:
        sites.setdefault((method.site, method.inputs.revision if method.inputs else None), []).append(method)
    return "\n\n".join(_site_table(site, revision, methods) for (site, revision), methods in sites.items())


def _site_table(site: Site, revision: str | None, matches: Sequence[ConceptMatches]) -> str:
    overall, *levels = matches[0].levels
    rare = ", ".join(concept.name for concept in matches[0].rare_concepts)
    title = (
        f"{site}{f' {revision}' if revision else ''}: {PROBE} finds {count_detected(overall.results, findable=True).total} of "
        f"{len(overall.results)} concepts (AP >= 0.9){f'; too rare: {rare}' if rare else ''}"
    )
    groups = dict.fromkeys(result.concept.group for result in overall.results)
    tables = [
        [SUMMARY, *map(_summary, matches)],
        _mean_aps("AP by group", matches, {group: lambda method, group=group: method.levels[0].of(group) for group in groups}),
    ]
    if levels:
        by_level = {f"{level.noise:g}": lambda method, i=i: method.levels[i].results for i, level in enumerate(levels, 1)}
        tables.append(_mean_aps("AP by noise", matches, by_level))
    return "\n\n".join([title, *map(text_table, tables)])


def _summary(matches: ConceptMatches) -> list[str]:
    """Return the row of one method in the table with the columns `SUMMARY`."""
    level = matches.levels[0]
    results = level.results
    return [
        matches.label,
        _shares(level.coverage, count_detected(results)),
        _shares(level.coverage_of_findable, count_detected(results, findable=True)),
        _mean(result.best.ap for result in results),
        _mean(result.combined.ap for result in results),
        f"{level.monosemanticity:.2f}",
        str(sum(bool(result.split_features) for result in results)),
        str(sum(bool(result.absorbing_features) for result in results)),
    ]


def _shares(share: ConfidenceInterval | None, count: DetectedCount) -> str:
    return f"{count.detected}/{count.total} [{share.low:.0%}, {share.high:.0%}]" if share else "-"


def _mean_aps(
    title: str, matches: Sequence[ConceptMatches], columns: Mapping[str, Callable[[ConceptMatches], Sequence[ConceptResult]]]
) -> list[list[str]]:
    """Return the mean average precision of the probe and of the best features; each column is of some of the results."""
    probe = [_mean(result.probe for result in select(matches[0])) for select in columns.values()]
    best = [
        [method.label, *(_mean(result.best.ap for result in select(method)) for select in columns.values())] for method in matches
    ]
    return [[title, *columns], [PROBE, *probe], *best]


def _mean(intervals: Iterable[ConfidenceInterval]) -> str:
    values = [interval.value for interval in intervals]
    return f"{sum(values) / max(1, len(values)):.2f}"
