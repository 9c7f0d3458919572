"""What measures of features are: their definitions, configuration, records and table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar, Literal, NamedTuple, final

from difflex.choices import Unit
from difflex.effects import Provenance
from difflex.errors import BadInput
from difflex.explanation.comparison import MeanEstimate, estimate_mean
from difflex.json_records import JsonRecord
from difflex.measures.image_aspects import SSIM, check_similarity
from difflex.tables import text_table
from difflex.values import check_fields

MeasureName = Literal[
    "specificity",
    "known-specificity",
    "sensitivity",
    "causality",
    "known-causality",
    "texture",
    "colour",
    "locality",
]
MEASURES: Mapping[MeasureName, str] = MappingProxyType(
    {
        "specificity": "similarity of the top images",
        "known-specificity": "pairs of top images that share the concept",
        "sensitivity": "fires in images of its explanation",
        "causality": "similarity of a feature alone to its top images",
        "known-causality": "images of the feature alone that show its concept",
        "texture": "share of an edit that is texture",
        "colour": "mean change of colour in the region of an edit",
        "locality": "share of an edit inside its region",
    }
)
"""What each measure is, in a few words."""
BY_SIMILARITY = ("specificity", "causality")
"""Measures that depend on the image similarity."""
MOST_IMAGES = 256


@final
@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """Which features are measured, on how many images, and how strongly they are edited."""

    features: tuple[int, ...] = ()
    """Numbers of the features; without any, a random sample."""
    sample: int = 64
    """Features of the sample."""
    images: int = 8
    """Images for each feature and measure."""
    similarity: str = SSIM
    """`ssim`, `lpips`, or `clip:` and a folder or hub name."""
    strength: float = 1.0
    """Of the feature alone, in `unit`."""
    unit: Unit | None = None
    """None for the mean where the site is an update, which it replaces, and for the peak elsewhere, where it is added."""
    edit_strength: float = 0.5
    """Of edits in a region, in norms of a mean activation: the same length for all features."""
    seed: int = 0
    """Seed of the sample, and of all that is random."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_similarity(self.similarity)
        if self.sample < 1 or not 2 <= self.images <= MOST_IMAGES or self.edit_strength <= 0 or self.strength <= 0:
            raise BadInput(
                f"{self.sample} features, {self.images} images and strengths of {self.strength:g} and {self.edit_strength:g} "
                f"leave nothing to measure. Ask for 1 feature or more, 2 to {MOST_IMAGES} images, and strengths above 0."
            )


class FeatureValue(NamedTuple):
    """A measure of one feature."""

    feature: int
    value: float
    baseline: float
    """The same of a random feature."""


class MeasureEstimate(NamedTuple):
    """A measure over features: means with their 95 % bootstrap intervals over features."""

    value: MeanEstimate
    baseline: MeanEstimate
    gain: MeanEstimate
    """Of the value above the baseline, feature by feature."""

    @classmethod
    def of(cls, values: Sequence[FeatureValue]) -> MeasureEstimate:
        """Return the estimates of a measure."""
        columns = [[row.value for row in values], [row.baseline for row in values], [row.value - row.baseline for row in values]]
        return cls(*map(estimate_mean, columns))


@final
@dataclass(frozen=True, kw_only=True)
class FeatureMeasures(JsonRecord):
    """The measures of features of a dictionary; while they are made, of those that are done."""

    FORMAT: ClassVar[int] = 1
    COMMAND: ClassVar[str] = "measure"
    INDENT: ClassVar[int | None] = None

    model: str
    dictionary: str
    """SITE/LABEL."""
    config: MeasureConfig
    provenance: Provenance
    features: tuple[int, ...]
    """Those that are measured, in this order."""
    values: dict[str, tuple[FeatureValue, ...]] = field(default_factory=dict)
    """By measure; only of features that can be measured so."""
    done: dict[str, int] = field(default_factory=dict)
    """How many of `features` each measure has been through."""
    missing: dict[str, str] = field(default_factory=dict)
    """Why a measure cannot be made, as a sentence."""
    estimates: dict[str, MeasureEstimate] = field(default_factory=dict)

    def is_complete(self, measure: str) -> bool:
        """Return whether a measure has been through all features, or cannot be made."""
        return measure in self.missing or self.done.get(measure) == len(self.features)


def measures_table(records: Sequence[FeatureMeasures]) -> str:
    """Return a text table with a row for each dictionary and measure."""
    rows: list[Sequence[str]] = [("dictionary", "measure", "features", "value", "random feature", "above it", "")]
    for record in records:
        for measure, text in MEASURES.items():
            estimate = record.estimates.get(measure)
            if estimate is not None:
                cells = (interval_text(part) for part in estimate)
                rows.append((record.dictionary, measure, str(estimate.value.size), *cells, text))
            elif measure in record.missing:
                rows.append((record.dictionary, measure, "-", "-", "-", "-", record.missing[measure]))
    return text_table(rows, right_align={2})


def interval_text(estimate: MeanEstimate) -> str:
    """Return a mean and its interval, as in `0.71 [0.65, 0.77]`."""
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
