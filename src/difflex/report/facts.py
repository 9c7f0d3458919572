"""The facts of a study, from which every section of its report is made."""

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import NamedTuple, TypeVar

from difflex.effects import ImageStrip, SteeringResults, StrengthCurve
from difflex.effects.addition_findings import AdditionFindings
from difflex.effects.edit_bench import EditBenchResults
from difflex.effects.findings import Findings
from difflex.effects.removal import RemovalResults
from difflex.evaluation import Evaluation
from difflex.evaluation.anatomy import Anatomy
from difflex.evaluation.concepts import ConceptsConfig
from difflex.evaluation.concepts.results import ConceptMatches, NoiseLevelResult
from difflex.evaluation.transfer import TransferResults
from difflex.measures import BlockRoleResults, FeatureMeasures
from difflex.records import Site
from difflex.study import CommandRecord, DictionaryRef, Study


class StoreFacts(NamedTuple):
    """The activations of a site."""

    site: Site
    tokens: int
    complete: bool


@dataclass(frozen=True, kw_only=True)
class DictionaryFacts:
    """A dictionary and its evaluation."""

    ref: DictionaryRef
    kind: str
    size: int
    k: int
    normalisation: str
    """The method: `standardise`, `whiten`, `scale` or `none`."""
    variant: str
    """The rest of its label after kind, size and k."""
    data: str
    """The training data, as its config describes them."""
    evaluation: Evaluation | None
    """None without an evaluation of its present weights."""

    @property
    def name(self) -> str:
        """`SITE/LABEL`."""
        return str(self.ref)

    @property
    def metrics(self) -> Evaluation:
        """The evaluation of a dictionary that has one."""
        assert self.evaluation is not None, f"{self.name} has no evaluation"
        return self.evaluation

    @property
    def fvu(self) -> float | None:
        """Its FVU in model space."""
        return self.metrics.overall.model_space.fvu


@dataclass(frozen=True, kw_only=True)
class MatchFacts:
    """The features of one method, compared with known concepts."""

    matches: ConceptMatches
    kind: str
    """Of a dictionary, or `pca`, `random`, `neurons`."""
    normalisation: str | None
    """Of a dictionary that was trained; None for neurons and axes."""
    untrained: bool
    """Whether the model is the untrained control."""
    k: int
    note: str = ""
    """What its images have of their own: their number, if it is not that of the others."""

    @property
    def path(self) -> str:
        """The block and the stream: the neurons and the residual of a block are compared."""
        return str(Site(self.matches.site.path, stream=self.matches.site.stream))

    @property
    def name(self) -> str:
        """The label; the kind of site unless it is the residual or the method's own; and whether the model is untrained."""
        site = self.matches.site
        unusual = (
            [site.kind] * (site.kind not in ("residual", self.kind)) + ["smooth"] * site.smooth + [self.note] * bool(self.note)
        )
        name = f"{self.matches.label} ({', '.join(unusual)})" if unusual else self.matches.label
        return f"{name}, untrained model" if self.untrained else name

    @property
    def is_trained(self) -> bool:
        """Whether it is a trained dictionary of the trained model."""
        return self.normalisation is not None and not self.untrained

    @property
    def overall(self) -> NoiseLevelResult:
        """The results over all noise levels together."""
        return self.matches.levels[0]

    @property
    def settings(self) -> tuple[str, ConceptsConfig] | None:
        """What the matches depend on besides the dictionary and the model, such as the images and the noise levels."""
        return self.matches.inputs and self.matches.inputs.settings


class GroupCoverage(NamedTuple):
    """How many concepts of a group have a feature among those that were steered with."""

    concepts: int
    rare: int
    """Concepts that too few images show to say which feature detects them; they count as without a feature."""
    detected: frozenset[str]
    """The concepts whose steered feature detects them; all concepts that come from a file."""


class SteeringSummary(NamedTuple):
    """Medians over concepts, each at its best strength; None if no strength is acceptable for any concept."""

    gain: float
    """Success less that without the edit; 0 for a concept at which no strength is acceptable."""
    without: float
    success: float | None
    kept: float | None
    loss: float | None
    strength: float | None


@dataclass(frozen=True, kw_only=True)
class SteeringFacts:
    """The results of steering with the features of a dictionary."""

    ref: DictionaryRef
    kind: str
    results: SteeringResults
    coverage: Mapping[str, GroupCoverage]
    """By group of concepts."""
    strips: tuple[tuple[ImageStrip, Path], ...]
    """Example images with their files."""

    @property
    def is_from_file(self) -> bool:
        """Whether concepts and features came from a file of the user and not from the concepts of the miniature world."""
        return "concepts" in self.results.provenance.files

    @property
    def methods(self) -> list[str]:
        """The methods of steering, the dictionary's own features first."""
        return list(dict.fromkeys(curve.method for curve in self.results.curves))

    @property
    def groups(self) -> list[str]:
        """The groups in which some concept has a feature."""
        return [group for group, coverage in self.coverage.items() if coverage.detected]

    def curves(self, method: str, *groups: str) -> list[StrengthCurve]:
        """Return the curves of a method for the concepts of `groups` that have a feature."""
        return [
            curve
            for curve in self.results.of(method)
            if curve.group in groups and curve.concept in self.coverage[curve.group].detected
        ]

    def summary(self, method: str, *groups: str) -> SteeringSummary | None:
        """Return medians over the concepts of `groups` that have a feature; None if there are none."""
        curves = self.curves(method, *groups)
        if not curves:
            return None
        points = [point for curve in curves if (point := curve.best()) is not None]
        best = [(point.success, point.specificity, point.quality, point.strength) for point in points]
        gain, without = median(curve.gain() for curve in curves), median(curve.without for curve in curves)
        return SteeringSummary(gain, without, *(map(median, zip(*best, strict=True)) if best else (None,) * 4))


@dataclass(frozen=True, kw_only=True)
class StudyFacts:
    """All facts of a study."""

    study: Study
    started: datetime | None
    """When study.json was written."""
    latest: datetime | None
    """When the youngest of the files that the report reads was written."""
    log: tuple[CommandRecord, ...]
    recipe: CommandRecord | None
    """The `difflex run` of the recipe, if the log has one."""
    stores: tuple[StoreFacts, ...]
    dictionaries: tuple[DictionaryFacts, ...]
    matches: tuple[MatchFacts, ...]
    """Of the study and its control; at each block only those that were measured on the same images."""
    anatomy: Anatomy | None
    books: tuple[DictionaryRef, ...]
    """The dictionaries that have a book of their present weights."""
    control: Study | None
    """The study of the same model untrained."""
    control_books: tuple[DictionaryRef, ...]
    steering: tuple[SteeringFacts, ...]
    removals: tuple[RemovalResults, ...]
    findings: tuple[Findings, ...]
    additions: AdditionFindings | None
    """Findings on adding contrasts in a language model."""
    measures: tuple[FeatureMeasures, ...]
    block_roles: BlockRoleResults | None
    edit_benches: tuple[EditBenchResults, ...]
    transfers: tuple[TransferResults, ...]
    problems: tuple[str, ...]
    """Why files are left out, and what to do."""

    @property
    def evaluated(self) -> list[DictionaryFacts]:
        """The dictionaries that have an evaluation."""
        return [dictionary for dictionary in self.dictionaries if dictionary.evaluation is not None]

    @property
    def blocks(self) -> dict[str, list[MatchFacts]]:
        """The matches by block."""
        return group_by(self.matches, lambda match: match.path)


T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


def group_by(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Return the items by their key, both in their order."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def similar_size(size: int, other: int) -> bool:
    """Return whether two sizes count as equal, 10 % apart at most: an ITDA stops where its data end."""
    return abs(size - other) <= 0.1 * max(size, other)
