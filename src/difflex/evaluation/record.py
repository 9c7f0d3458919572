"""The record of an evaluation, and the JSON file that holds it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from difflex._version import __version__
from difflex.dictionaries.files import fingerprint
from difflex.errors import BadInput, BrokenFile
from difflex.files import write_file

__all__ = ["Evaluation", "ModelEffect", "ReconstructionMetrics", "ReconstructionQuality", "ReplacementEffect"]

FORMAT = 1
AGAIN = "Delete it and evaluate again."


@dataclass(frozen=True, kw_only=True)
class ReconstructionMetrics:
    """How near reconstructions y come to activations x, in one space; a figure that has no meaning there is None."""

    fvu: float | None
    """sum |x - y|^2 / sum |x - mean x|^2: the fraction of variance unexplained. None where x does not vary."""
    fvu_raw: float | None
    """sum |x - y|^2 / sum |x|^2: the mean counts as something explained."""
    r2: float | None
    """Squared correlation of x and y on each axis, mean over axes: "variance explained" of arXiv 2505.24360. It is blind to scale
    and offset: y = x / 10 + 5 gives 1."""
    ev: float | None
    """1 - var(x - y) / var(x) on each axis, mean over axes: explained variance of arXiv 2410.22366, blind to offset."""
    cosine: float
    """Of x and y, mean over tokens."""


@dataclass(frozen=True, kw_only=True)
class ReconstructionQuality:
    """How well some tokens are rebuilt, and with how many features."""

    tokens: int
    l0: float
    """Codes other than 0 for a token."""
    negative: float
    """The share of these that are below 0; they do not count as firing."""
    model_space: ReconstructionMetrics
    normalised_space: ReconstructionMetrics | None
    """In the space that the dictionary was trained in; None where that is model space."""


@dataclass(frozen=True, kw_only=True)
class ReplacementEffect:
    """One measure of what changes where the activation of a site gives way to something else."""

    reconstruction: float
    """To what the dictionary makes of it."""
    mean: float
    """To the mean of the training tokens: nothing is left but what all tokens share."""
    zero: float

    @property
    def of_mean(self) -> float:
        """The change by the reconstruction as a share of that by mean ablation; NaN where that changes nothing."""
        return self.reconstruction / self.mean if self.mean else math.nan

    @property
    def of_zero(self) -> float:
        """The change by the reconstruction as a share of that by zero ablation; NaN where that changes nothing."""
        return self.reconstruction / self.zero if self.zero else math.nan


@dataclass(frozen=True, kw_only=True)
class ModelEffect:
    """What becomes of the model where a site's activation is replaced, in the conditional half under guidance."""

    shots: int
    """At how many the denoiser's prediction was compared."""
    prediction: ReplacementEffect
    """sum |v' - v|^2 / sum |v|^2, where v is what the denoiser predicts and v' what it predicts after the replacement."""
    timesteps: dict[float, ReplacementEffect]
    """The same at the shots of each timestep."""
    images: int
    """How many finished images were compared; the site is replaced at every step of them."""
    image_error: ReplacementEffect | None
    """Mean squared difference of pixels between 0 and 1; None without images."""
    similarity: dict[str, ReplacementEffect]
    """`ssim`, and whatever else was asked of the finished images, by name; means over images."""

    @property
    def psnr(self) -> ReplacementEffect | None:
        """Peak signal-to-noise ratio in decibels, of the error over all images; infinite where no pixel changes."""
        error = self.image_error
        return error and ReplacementEffect(
            reconstruction=_psnr(error.reconstruction), mean=_psnr(error.mean), zero=_psnr(error.zero)
        )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a dictionary is worth on held-out tokens."""

    format: int = FORMAT
    difflex: str = __version__
    """The version that measured."""
    dictionary: str
    """`SITE/LABEL`."""
    checksum: str
    """Of its files when it was evaluated."""
    data: str
    """What it was evaluated on."""
    size: int
    """Features."""
    overall: ReconstructionQuality
    timesteps: dict[float, ReconstructionQuality]
    """The same for the tokens of each timestep."""
    dead: int
    """Features that fired at none of the tokens."""
    density: tuple[int, ...]
    """How many features fire at what share of the tokens, in the bins of log10 that `edges` bounds; dead ones are in none."""
    effect: ModelEffect | None = None
    """None where it was not measured."""

    edges: ClassVar[tuple[float, ...]] = tuple(step / 4 for step in range(-32, 1))
    """Bounds of the bins of `density`; what fires more rarely than the first is in the first bin."""

    @property
    def tokens(self) -> int:
        """How many it was evaluated on."""
        return self.overall.tokens

    @property
    def dead_share(self) -> float:
        """The share of features that fired at none of the tokens: the more tokens, the fewer."""
        return self.dead / self.size

    def is_of(self, folder: Path | str) -> bool:
        """Whether the dictionary in `folder` still is what was evaluated."""
        return self.checksum == fingerprint(folder)

    def save(self, path: Path | str) -> Path:
        """`path`, which now holds the evaluation: all of it or, after a kill, what it held before."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, (json.dumps(asdict(self), indent=1, allow_nan=False) + "\n").encode())
        return path

    @classmethod
    def kept(cls, path: Path | str, folder: Path | str, data: str) -> Evaluation | None:
        """The evaluation in `path`, if there is one and it is of what the dictionary in `folder` now is, on this `data`."""
        if not Path(path).exists():
            return None
        kept = cls.load(path)
        return kept if kept.data == data and kept.is_of(folder) else None

    @classmethod
    def load(cls, path: Path | str) -> Evaluation:
        """The evaluation in `path`."""
        try:
            entries = json.loads(Path(path).read_bytes())
        except FileNotFoundError as error:
            raise BadInput(f"There is no {path}: the dictionary has not been evaluated. difflex evaluate does it.") from error
        except ValueError as error:
            raise BrokenFile(f"{path} is not JSON ({error}): it is damaged. {AGAIN}") from error
        found = entries.get("format") if isinstance(entries, dict) else None
        if found != FORMAT:
            raise BrokenFile(f"{path} is of format {found!r}; this difflex reads format {FORMAT}. Use the difflex that wrote it.")
        try:
            return cls(**{**entries, **_restored(entries)})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BrokenFile(f"{path} is not an evaluation ({error}): it is damaged. {AGAIN}") from error


def _psnr(error: float) -> float:
    return -10 * math.log10(error) if error else math.inf


def _restored(entries: dict[str, Any]) -> dict[str, Any]:
    """Those of the `entries` of a JSON file that are more than numbers and words."""
    return {
        "overall": _quality(entries["overall"]),
        "timesteps": {float(timestep): _quality(each) for timestep, each in entries["timesteps"].items()},
        "density": tuple(entries["density"]),
        "effect": entries["effect"] and _effect(entries["effect"]),
    }


def _quality(entries: dict[str, Any]) -> ReconstructionQuality:
    spaces = ("model_space", "normalised_space")
    return ReconstructionQuality(
        **{**entries, **{space: entries[space] and ReconstructionMetrics(**entries[space]) for space in spaces}}
    )


def _effect(entries: dict[str, Any]) -> ModelEffect:
    made = {
        "prediction": ReplacementEffect(**entries["prediction"]),
        "timesteps": {float(timestep): ReplacementEffect(**each) for timestep, each in entries["timesteps"].items()},
        "image_error": entries["image_error"] and ReplacementEffect(**entries["image_error"]),
        "similarity": {name: ReplacementEffect(**each) for name, each in entries["similarity"].items()},
    }
    return ModelEffect(**{**entries, **made})
