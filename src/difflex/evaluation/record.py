"""The record of an evaluation, and the conversion of records to and from JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import EllipsisType, UnionType
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from difflex.dictionaries import fingerprint
from difflex.errors import BadInput
from difflex.files import Json, parsing, read_json, write_json
from difflex.records import Site

__all__ = [
    "Evaluation",
    "ModelEffect",
    "ReconstructionMetrics",
    "ReconstructionQuality",
    "ReplacementEffect",
    "from_json",
    "to_json",
]

FORMAT = 2
ADVICE = "Delete it and run difflex evaluate again."
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ReconstructionMetrics:
    """How close reconstructions y are to activations x, in one space; a metric that is undefined there is None."""

    fvu: float | None
    """Fraction of variance unexplained: sum |x - y|^2 / sum |x - mean x|^2. None if x is constant."""
    fvu_raw: float | None
    """sum |x - y|^2 / sum |x|^2, where the mean counts as explained."""
    r2: float | None
    """Squared correlation of x and y on each axis, averaged over axes: "variance explained" of arXiv 2505.24360. It ignores scale
    and offset: y = x / 10 + 5 gives 1."""
    ev: float | None
    """1 - var(x - y) / var(x) on each axis, averaged over axes: explained variance of arXiv 2410.22366. It ignores offset."""
    cosine: float
    """Cosine similarity of x and y, averaged over tokens."""


@dataclass(frozen=True, kw_only=True)
class ReconstructionQuality:
    """Reconstruction metrics and sparsity over a number of tokens."""

    tokens: int
    l0: float
    """Mean number of non-zero codes per token."""
    negative: float
    """Share of the non-zero codes that are negative; a negative code does not count as firing."""
    model_space: ReconstructionMetrics
    normalised_space: ReconstructionMetrics | None
    """Metrics in the space that the dictionary was trained in; None if that is model space."""


@dataclass(frozen=True, kw_only=True)
class ReplacementEffect:
    """How much one measure changes when a site's activations are replaced."""

    reconstruction: float
    """Change when they are replaced by the dictionary's reconstruction."""
    mean: float
    """Change under mean ablation: every activation becomes the mean of the training tokens."""
    zero: float
    """Change under zero ablation."""

    @property
    def of_mean(self) -> float:
        """The change by the reconstruction relative to mean ablation; NaN if mean ablation changes nothing."""
        return self.reconstruction / self.mean if self.mean else math.nan

    @property
    def of_zero(self) -> float:
        """The change by the reconstruction relative to zero ablation; NaN if zero ablation changes nothing."""
        return self.reconstruction / self.zero if self.zero else math.nan


@dataclass(frozen=True, kw_only=True)
class ModelEffect:
    """The effect of replacing a site's activations on the model's output; under guidance in the conditional half."""

    shots: int
    """Number of shots at which the denoiser's predictions were compared."""
    prediction: ReplacementEffect
    """sum |v' - v|^2 / sum |v|^2 for the denoiser's prediction v and its prediction v' after the replacement."""
    timesteps: dict[float, ReplacementEffect]
    """The same for the shots of each timestep."""
    images: int
    """Number of generated images that were compared; the site is replaced at every denoising step."""
    image_error: ReplacementEffect | None
    """Mean squared difference of pixels between 0 and 1; None without images."""
    similarity: dict[str, ReplacementEffect]
    """`ssim` and every other image measure by name, averaged over images."""

    @property
    def psnr(self) -> ReplacementEffect | None:
        """Peak signal-to-noise ratio in decibels over all images; infinite if no pixel changes."""
        error = self.image_error
        return error and ReplacementEffect(
            reconstruction=_psnr(error.reconstruction), mean=_psnr(error.mean), zero=_psnr(error.zero)
        )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The evaluation of a dictionary on held-out tokens."""

    dictionary: str
    """`SITE/LABEL`."""
    fingerprint: str
    """Fingerprint of the dictionary when it was evaluated."""
    data: str
    """Description of the held-out tokens."""
    size: int
    """Number of features."""
    overall: ReconstructionQuality
    timesteps: dict[float, ReconstructionQuality]
    """The same for the tokens of each timestep."""
    dead: int
    """Number of features that fired at none of the tokens."""
    density: tuple[int, ...]
    """Histogram of log10 firing frequencies: number of features in each bin of `edges`; dead features are in no bin."""
    effect: ModelEffect | None = None
    """None if it was not measured."""

    edges: ClassVar[tuple[float, ...]] = tuple(step / 4 for step in range(-32, 1))
    """Bin edges of `density`; the first bin also holds everything rarer."""

    @property
    def tokens(self) -> int:
        """Number of tokens evaluated."""
        return self.overall.tokens

    @property
    def dead_share(self) -> float:
        """Share of features that fired at none of the tokens; it falls with the number of tokens."""
        return self.dead / self.size

    def is_of(self, folder: Path | str) -> bool:
        """Whether the dictionary in `folder` is unchanged since this evaluation."""
        return self.fingerprint == fingerprint(folder)

    def save(self, path: Path | str) -> Path:
        """Write the evaluation to the JSON file `path`."""
        return write_json(Path(path), FORMAT, to_json(self))

    @classmethod
    def load_current(cls, path: Path, folder: Path, data: str) -> Evaluation | None:
        """Return the evaluation in `path` if it is of the dictionary now in `folder` on `data`, else None."""
        evaluation = cls.load(path) if path.exists() else None
        return evaluation if evaluation and evaluation.data == data and evaluation.is_of(folder) else None

    @classmethod
    def load(cls, path: Path | str) -> Evaluation:
        """Read the evaluation in the JSON file `path`."""
        path = Path(path)
        if not path.exists():
            raise BadInput(f"There is no {path}: the dictionary has not been evaluated. Run difflex evaluate.")
        entries = read_json(path, FORMAT, ADVICE)
        with parsing(path, "an evaluation", ADVICE):
            return from_json(cls, entries)


def _psnr(error: float) -> float:
    return -10 * math.log10(error) if error else math.inf


def to_json(record: object) -> Any:
    """Convert a record to JSON: dataclasses become objects, tuples become lists, sites become text."""
    if isinstance(record, Site):
        return str(record)
    if is_dataclass(record):
        return {field.name: to_json(getattr(record, field.name)) for field in fields(record)}
    if isinstance(record, Mapping):
        return {str(key): to_json(value) for key, value in record.items()}
    return [to_json(value) for value in record] if isinstance(record, tuple | list) else record


def from_json(kind: type[T], entries: Mapping[str, Json]) -> T:
    """Build the dataclass `kind` from the JSON that `to_json` made of it.

    An unknown entry raises KeyError, a missing one or one of another type TypeError.
    """
    return _parse(kind, entries)


_type_hints = cache(get_type_hints)


def _parse(kind: Any, entry: Any) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind in (int, float, str, bool):
        if not isinstance(entry, int | float if kind is float else kind):
            raise TypeError(f"{entry!r} is not of type {kind.__name__}")
        return entry
    if entry is None or origin is Literal:
        return entry
    if origin is UnionType:
        return _parse(arguments[0], entry)  # X | None
    if kind is Site:
        return Site.parse(entry)
    if origin is dict:
        to_key = Site.parse if arguments[0] is Site else arguments[0]
        return {to_key(key): _parse(arguments[1], value) for key, value in entry.items()}
    if origin is tuple:
        kinds = arguments[:1] * len(entry) if isinstance(arguments[-1], EllipsisType) else arguments
        return tuple(_parse(*pair) for pair in zip(kinds, entry, strict=True))
    hints = _type_hints(kind)
    if is_dataclass(kind):
        return kind(**{name: _parse(hints[name], value) for name, value in entry.items()})  # pyright: ignore[reportCallIssue]
    return kind(*(_parse(*pair) for pair in zip(hints.values(), entry, strict=True)))  # a NamedTuple
