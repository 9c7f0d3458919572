"""Sums over all tokens for every feature: how often it fires, how strongly, when and where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from difflex.features.firing import FiringBatch

__all__ = ["BINS", "FIRST_BIN", "PARTS", "FeatureTotals"]

BINS, FIRST_BIN = 128, -64
"""Of the histogram of values: from 2^-16 to 2^16, four for each doubling; what lies beyond is in the outermost."""
PARTS = 4
"""Rows and columns of the parts of an image by which position is told."""


@final
class FeatureTotals:
    """What is summed up for each of `size` features."""

    def __init__(self, size: int, grid: tuple[int, int] | None) -> None:
        self.size = size
        self.fired, self.shots, self.negative = (torch.zeros(size, dtype=torch.int64) for _ in range(3))
        self.total, self.edge = (torch.zeros(size, dtype=torch.float64) for _ in range(2))
        self.peak, self.lowest = torch.zeros(size), torch.zeros(size)
        self.bins = torch.zeros(size, BINS, dtype=torch.int32)
        self.parts = torch.zeros(size, PARTS * PARTS, dtype=torch.float64)
        self.timesteps: dict[float, Int[Tensor, " size"]] = {}
        """At how many tokens of each timestep every feature fired."""
        self.seen: dict[float, int] = {}
        """How many tokens of each timestep there were."""
        self._places = None if grid is None else _places(*grid)

    def add(self, batch: FiringBatch, timesteps: Sequence[float], images: int) -> None:
        """Nothing; a batch of `images` at these timesteps is counted."""
        features, values, spots = batch.fired.features, batch.fired.values, batch.spots
        self.fired += torch.bincount(features, minlength=self.size)
        self.total.index_add_(0, spots.features, _sums(batch))
        self.shots += torch.bincount(spots.features, minlength=self.size)
        self.peak.scatter_reduce_(0, spots.features, spots.peaks, "amax")
        self.bins.view(-1).index_add_(0, features * BINS + _bin(values), torch.ones(len(values), dtype=torch.int32))
        self._add_places(batch)
        self._add_timesteps(batch, timesteps, images)
        below = batch.negative
        if len(below.features):
            self.negative += torch.bincount(below.features, minlength=self.size)
            self.lowest.scatter_reduce_(0, below.features, below.values, "amin")

    def _add_places(self, batch: FiringBatch) -> None:
        if self._places is None:
            return
        part, border = self._places
        features, token, values = batch.fired.features, batch.fired.tokens, batch.fired.values
        self.parts.view(-1).index_add_(0, features * PARTS**2 + part[token], values.double())
        self.edge.index_add_(0, features, (values * border[token]).double())

    def _add_timesteps(self, batch: FiringBatch, timesteps: Sequence[float], images: int) -> None:
        step = batch.fired.shots % len(timesteps) if len(timesteps) > 1 else None
        for number, timestep in enumerate(timesteps):
            here = batch.fired.features if step is None else batch.fired.features[step == number]
            counts = self.timesteps.setdefault(timestep, torch.zeros(self.size, dtype=torch.int64))
            counts += torch.bincount(here, minlength=self.size)
            self.seen[timestep] = self.seen.get(timestep, 0) + images * batch.tokens

    @property
    def tokens(self) -> int:
        """How many were looked at."""
        return sum(self.seen.values())

    @property
    def position(self) -> Float[Tensor, " size"]:
        """The share of each feature's sum that would have to move for all parts of the image to get the same."""
        shares = self.parts / self.parts.sum(1, keepdim=True).clamp_min(1e-300)
        return (shares - self._even()).clamp_min(0).sum(1)

    @property
    def border(self) -> Float[Tensor, " size"]:
        """How much of each feature's sum lies in the outermost tokens, over their share of the grid."""
        assert self._places is not None
        return self.edge / self.total.clamp_min(1e-300) / self._places[1].mean()

    def _even(self) -> Float[Tensor, " part"]:
        """The shares of the parts of the grid."""
        assert self._places is not None
        return torch.bincount(self._places[0], minlength=PARTS**2) / len(self._places[0])

    def tensors(self) -> dict[str, Tensor]:
        """All sums, by name."""
        names = ("fired", "shots", "negative", "total", "edge", "peak", "lowest", "bins", "parts")
        moments = sorted(self.seen)
        return {
            **{name: getattr(self, name) for name in names},
            "moments": torch.tensor(moments, dtype=torch.float64),
            "seen": torch.tensor([self.seen[moment] for moment in moments], dtype=torch.int64),
            "by moment": torch.stack([self.timesteps[moment] for moment in moments]) if moments else torch.zeros(0, self.size),
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing; the sums are those that `tensors` gave."""
        moments = tensors["moments"].tolist()
        self.seen = dict(zip(moments, tensors["seen"].tolist(), strict=True))
        self.timesteps = dict(zip(moments, (counts.clone() for counts in tensors["by moment"]), strict=True))
        for name, known in tensors.items():
            if name not in ("moments", "seen", "by moment"):
                getattr(self, name).copy_(known)


def _bin(values: Float[Tensor, " pair"]) -> Int[Tensor, " pair"]:
    """The bin of each value, from its exponent and the first two bits after it."""
    quarters = (values.view(torch.int32) >> 21) - 4 * 127
    return (quarters - FIRST_BIN).clamp_(0, BINS - 1)


def _places(rows: int, columns: int) -> tuple[Int[Tensor, " token"], Float[Tensor, " token"]]:
    """The part of the image that each token is in, and 1 for those that are outermost."""
    row, column = torch.arange(rows)[:, None].expand(rows, columns), torch.arange(columns).expand(rows, columns)
    part = row * PARTS // rows * PARTS + column * PARTS // columns
    border = (row == 0) | (column == 0) | (row == rows - 1) | (column == columns - 1)
    return part.flatten().int(), border.flatten().float()


def _sums(batch: FiringBatch) -> Float[Tensor, " spot"]:
    if not len(batch.spots.starts):
        return torch.zeros(0, dtype=torch.float64)
    return torch.segment_reduce(batch.fired.values, "sum", lengths=batch.spots.counts).double()
