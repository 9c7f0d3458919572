"""The evaluation of a dictionary on held-out tokens: reconstruction quality and sparsity, in one pass over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, reduce
from pathlib import Path
from typing import ClassVar, NamedTuple, final

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor
from torch.nn import functional as F

from difflex.devices import find_device
from difflex.dictionaries import Dictionary, NormalisedDictionary, fingerprint
from difflex.dictionaries.sparse import sparse_matmul
from difflex.errors import BadInput, NonFinite
from difflex.evaluation.effect import ModelEffect
from difflex.json_records import JsonRecord
from difflex.progress import ProgressBar
from difflex.records import ActivationBatch, Codes, Shot
from difflex.store import require_split

TOKENS = 1_000_000
"""With fewer tokens, rare features look dead."""
CONSTANT = 1e-12
"""An axis whose standard deviation is below this share of its mean is constant up to float64 rounding."""


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


def evaluate(
    dictionary: Dictionary,
    batches: Iterator[ActivationBatch],
    shot: Callable[[int], Shot],
    *,
    tokens: int = TOKENS,
    fingerprint: str = "",
    data: str = "",
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Evaluation:
    """Evaluate `dictionary` on the first `tokens` rows of `batches`, or on all if there are fewer; `effect` is left None.

    `batches` must be of the split `held-out`; `shot` returns the shot with a given number. `fingerprint` (of the dictionary's
    files, taken before loading them) and `data` (a description of the tokens) go into the record. `device` defaults to the GPU
    if there is one.
    """
    if tokens < 1:
        raise BadInput(f"An evaluation on {tokens} tokens is not possible: ask for 1 or more.")
    tally = _EvaluationTally(dictionary.to(find_device(device)), shot)
    with ProgressBar(total=tokens, unit=" tokens", unit_scale=True, show=progress, desc=dictionary.name) as bar:
        for rows in _first_rows(require_split(batches, "held-out"), tokens):
            tally.add(rows)
            bar.update(len(rows.values))
    if not tally.timesteps:
        raise BadInput(
            f"There are no held-out tokens to evaluate {dictionary.name} on. Harvest more prompts: a tenth is held out."
        )
    return tally.evaluation(fingerprint, data)


def _first_rows(batches: Iterator[ActivationBatch], tokens: int) -> Iterator[ActivationBatch]:
    """Yield `batches` up to `tokens` rows, without reading further ones."""
    while tokens > 0 and (rows := next(batches, None)) is not None:
        yield ActivationBatch(*(column[:tokens] for column in rows))
        tokens -= len(rows.values)


class JointMoments(NamedTuple):
    """Mergeable moments of activations x and reconstructions y on each axis, centred so that offsets cost no digits."""

    tokens: int
    x: Float64[Tensor, " width"]
    """Mean."""
    y: Float64[Tensor, " width"]
    xx: Float64[Tensor, " width"]
    """Sum of squared deviations from the mean; `xy` and `yy` likewise."""
    yy: Float64[Tensor, " width"]
    xy: Float64[Tensor, " width"]
    ee: Float64[Tensor, " width"]
    """The same for the error x - y; computing it from the other three would cancel for a good reconstruction."""
    cosine: float
    """Sum over tokens."""

    @classmethod
    def of(cls, x: Float[Tensor, "token width"], y: Float[Tensor, "token width"]) -> JointMoments:
        """Compute the moments of these rows."""
        cosine = float(F.cosine_similarity(x, y, dim=1).sum(dtype=torch.float64))
        a, b = x.double(), y.double()
        x_mean, y_mean = a.mean(0), b.mean(0)
        a, b = a - x_mean, b - y_mean
        xx, yy, xy = (torch.linalg.vecdot(*pair, dim=0) for pair in ((a, a), (b, b), (a, b)))
        return cls(len(x), x_mean, y_mean, xx, yy, xy, (a - b).square_().sum(0), cosine)

    def merge(self, other: JointMoments) -> JointMoments:
        """Return the moments of the rows of both (Chan, Golub & LeVeque 1983)."""
        tokens = self.tokens + other.tokens
        share, weight = other.tokens / tokens, self.tokens * other.tokens / tokens
        x, y = other.x - self.x, other.y - self.y
        return JointMoments(
            tokens,
            self.x + share * x,
            self.y + share * y,
            self.xx + other.xx + weight * x.square(),
            self.yy + other.yy + weight * y.square(),
            self.xy + other.xy + weight * x * y,
            self.ee + other.ee + weight * (x - y).square(),
            self.cosine + other.cosine,
        )

    def metrics(self) -> ReconstructionMetrics:
        """Return the metrics of the reconstruction; constant axes are left out of means over axes."""
        error = float((self.ee + self.tokens * (self.x - self.y).square()).sum())
        variance, length = float(self.xx.sum()), float((self.xx + self.tokens * self.x.square()).sum())
        x_varies, y_varies = self._varies(self.xx, self.x), self._varies(self.yy, self.y)
        # A constant reconstruction of a varying axis has correlation 0, not 0 / 0.
        r2 = torch.where(y_varies, self.xy.square() / (self.xx * self.yy), 0.0)[x_varies]
        ev = 1 - self.ee[x_varies] / self.xx[x_varies]
        return ReconstructionMetrics(
            fvu=error / variance if len(ev) else None,
            fvu_raw=error / length if length else None,
            r2=float(r2.mean()) if len(r2) else None,
            ev=float(ev.mean()) if len(ev) else None,
            cosine=self.cosine / self.tokens,
        )

    def _varies(self, squares: Float64[Tensor, " width"], mean: Float64[Tensor, " width"]) -> Bool[Tensor, " width"]:
        return squares > self.tokens * (CONSTANT * mean).square()


class _TokenStatistics(NamedTuple):
    """Sparsity and moments over some tokens."""

    active: int
    """Number of non-zero codes."""
    negative: int
    spaces: tuple[JointMoments, ...]
    """Model space, then the normalised space if there is one."""

    def merge(self, other: _TokenStatistics) -> _TokenStatistics:
        spaces = tuple(map(JointMoments.merge, self.spaces, other.spaces))
        return _TokenStatistics(self.active + other.active, self.negative + other.negative, spaces)

    def quality(self) -> ReconstructionQuality:
        model, *normalised = (moments.metrics() for moments in self.spaces)
        tokens = self.spaces[0].tokens
        return ReconstructionQuality(
            tokens=tokens,
            l0=self.active / tokens,
            negative=self.negative / max(self.active, 1),
            model_space=model,
            normalised_space=normalised[0] if normalised else None,
        )


@final
class _EvaluationTally:
    """Sums over batches: a few numbers for each axis, timestep and feature."""

    def __init__(self, dictionary: Dictionary, shot: Callable[[int], Shot]) -> None:
        self.timesteps: dict[float, _TokenStatistics] = {}
        self._dictionary = dictionary
        self._timestep = cache(lambda number: shot(number).timestep or 0.0)
        self._firing_counts = torch.zeros(dictionary.size, dtype=torch.int64, device=dictionary.constant.device)

    def add(self, rows: ActivationBatch) -> None:
        by_row, order = self._timesteps(rows.shots).sort(descending=True, stable=True)
        x = rows.values[order].to(self._firing_counts.device, torch.float32)
        codes = self._dictionary.encode(x)
        self._firing_counts += torch.bincount(codes.indices[codes.values > 0], minlength=self._dictionary.size)
        spaces, start = _spaces(self._dictionary, x, codes), 0
        timesteps, counts = by_row.unique_consecutive(return_counts=True)
        for timestep, count in zip(timesteps.tolist(), counts.tolist(), strict=True):
            part = slice(start, start := start + count)
            values = codes.values[part]
            moments = tuple(JointMoments.of(original[part], rebuilt[part]) for original, rebuilt in spaces)
            statistics = _TokenStatistics(int(values.count_nonzero()), int((values < 0).sum()), moments)
            before = self.timesteps.get(timestep)
            self.timesteps[timestep] = before.merge(statistics) if before else statistics

    def _timesteps(self, shots: Int[Tensor, " token"]) -> Float64[Tensor, " token"]:
        numbers, positions = shots.unique(return_inverse=True)
        return torch.tensor([self._timestep(number) for number in numbers.tolist()], dtype=torch.float64)[positions]

    def evaluation(self, fingerprint: str, data: str) -> Evaluation:
        total = reduce(_TokenStatistics.merge, self.timesteps.values())
        if not all(bool(torch.isfinite(space.ee).all()) for space in total.spaces):
            raise NonFinite(f"The reconstruction by {self._dictionary.name} holds NaN or infinity: train or copy it again.")
        overall = total.quality()
        counts = self._firing_counts[self._firing_counts > 0].cpu()
        edges = torch.tensor(Evaluation.edges, dtype=torch.float64)
        bins = torch.bucketize((counts / overall.tokens).double().log10(), edges[1:-1], right=True)
        return Evaluation(
            dictionary=self._dictionary.name,
            fingerprint=fingerprint,
            data=data,
            size=self._dictionary.size,
            overall=overall,
            timesteps={timestep: self.timesteps[timestep].quality() for timestep in sorted(self.timesteps, reverse=True)},
            dead=self._dictionary.size - len(counts),
            density=tuple(torch.bincount(bins, minlength=len(edges) - 1).tolist()),
        )


def _spaces(
    dictionary: Dictionary, x: Float[Tensor, "token width"], codes: Codes
) -> list[tuple[Float[Tensor, "token width"], Float[Tensor, "token width"]]]:
    """Return pairs of activations and reconstructions: in model space, then in the normalised space if there is one."""
    if not isinstance(dictionary, NormalisedDictionary) or (
        dictionary.normalisation.method == "none" and dictionary.normalisation.clip is None
    ):
        return [(x, dictionary.decode(codes))]
    # The two halves of `decode`, so that the sum over features is computed once.
    z = sparse_matmul(codes, dictionary.atoms) + dictionary.bias
    return [(x, dictionary.normalisation.restore(z)), (dictionary.normalisation.apply(x), z)]
