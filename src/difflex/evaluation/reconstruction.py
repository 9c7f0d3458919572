"""Reconstruction quality and sparsity of a dictionary on held-out tokens, in one pass over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from difflex.devices import find_device
from difflex.dictionaries import Dictionary, NormalisedDictionary
from difflex.dictionaries.sparse import sparse_matmul
from difflex.errors import BadInput, NonFinite
from difflex.evaluation.record import Evaluation, ReconstructionMetrics, ReconstructionQuality
from difflex.records import ActivationBatch, Codes, Shot
from difflex.store import require_split

__all__ = ["TOKENS", "JointMoments", "evaluate"]

TOKENS = 1_000_000
"""With fewer tokens, rare features look dead."""
CONSTANT = 1e-12
"""An axis whose standard deviation is below this share of its mean is constant up to float64 rounding."""


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
    with tqdm(total=tokens, unit=" tokens", unit_scale=True, disable=None if progress else True, desc=dictionary.name) as bar:
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
            fvu=error / variance if bool(x_varies.any()) else None,
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


class _TimestepOrder(NamedTuple):
    """An order of the rows of a batch that groups them by timestep."""

    rows: Int[Tensor, " token"]
    timesteps: list[float]
    counts: list[int]
    """Number of rows of each timestep."""


@final
class _EvaluationTally:
    """Sums over batches: a few numbers for each axis, timestep and feature."""

    def __init__(self, dictionary: Dictionary, shot: Callable[[int], Shot]) -> None:
        self.timesteps: dict[float, _TokenStatistics] = {}
        self._dictionary = dictionary
        self._shot = shot
        self._timestep_of: dict[int, float] = {}
        """Timestep by shot number."""
        self._firing_counts = torch.zeros(dictionary.size, dtype=torch.int64, device=dictionary.constant.device)

    def add(self, rows: ActivationBatch) -> None:
        order = self._by_timestep(rows.shots)
        x = rows.values[order.rows].to(self._firing_counts.device, torch.float32)
        codes = self._dictionary.encode(x)
        self._firing_counts += torch.bincount(codes.indices[codes.values > 0], minlength=self._dictionary.size)
        spaces, start = _spaces(self._dictionary, x, codes), 0
        for timestep, count in zip(order.timesteps, order.counts, strict=True):
            part = slice(start, start := start + count)
            values = codes.values[part]
            moments = tuple(JointMoments.of(original[part], rebuilt[part]) for original, rebuilt in spaces)
            statistics = _TokenStatistics(int(values.count_nonzero()), int((values < 0).sum()), moments)
            before = self.timesteps.get(timestep)
            self.timesteps[timestep] = before.merge(statistics) if before else statistics

    def _by_timestep(self, shots: Int[Tensor, " token"]) -> _TimestepOrder:
        numbers, positions = shots.unique(return_inverse=True)
        for number in numbers.tolist():
            if number not in self._timestep_of:
                self._timestep_of[number] = self._shot(number).timestep or 0.0
        by_shot = [self._timestep_of[number] for number in numbers.tolist()]
        timesteps = sorted(set(by_shot), reverse=True)
        by_row = torch.tensor([timesteps.index(timestep) for timestep in by_shot])[positions]
        return _TimestepOrder(by_row.argsort(stable=True), timesteps, by_row.bincount().tolist())

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
    if not isinstance(dictionary, NormalisedDictionary):
        return [(x, dictionary.decode(codes))]
    normalisation = dictionary.normalisation
    if normalisation.method == "none" and normalisation.clip is None:
        return [(x, dictionary.decode(codes))]
    # The two halves of `decode`, so that the sum over features is computed once.
    z = sparse_matmul(codes, dictionary.atoms) + dictionary.bias
    return [(x, normalisation.restore(z)), (normalisation.apply(x), z)]
