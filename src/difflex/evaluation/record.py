"""The record of an evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from difflex.dictionaries import fingerprint
from difflex.records import JsonRecord

__all__ = ["Evaluation", "ModelEffect", "ReconstructionMetrics", "ReconstructionQuality", "ReplacementEffect"]


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
class Evaluation(JsonRecord):
    """The evaluation of a dictionary on held-out tokens."""

    FORMAT: ClassVar[int] = 2
    COMMAND: ClassVar[str] = "evaluate"

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

    @classmethod
    def load_current(cls, path: Path, folder: Path, data: str) -> Evaluation | None:
        """Return the evaluation in `path` if it is of the dictionary now in `folder` on `data`, else None."""
        evaluation = cls.load(path) if path.exists() else None
        return evaluation if evaluation and evaluation.data == data and evaluation.is_of(folder) else None


def _psnr(error: float) -> float:
    return -10 * math.log10(error) if error else math.inf
