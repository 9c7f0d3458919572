"""What is known of all `train` rows of a store: a running tally of each shard, which can be merged."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from jaxtyping import Float, Float64
from torch import Tensor

__all__ = ["MomentsTally", "RowMoments", "StoreStatistics", "covariance", "merged", "sample_size"]

BLOCK = 2**19
"""Entries that are added up in float32 before float64 takes over: few enough to stay in the cache."""
SAMPLE = 16
"""Rows in the sample for the covariance, as a multiple of the width."""
WIDEST = 8192
STRIP = 256


class RowMoments(NamedTuple):
    """Sums that describe rows, and that those of other rows can be merged with."""

    mean: Float64[Tensor, " width"]
    squares: Float64[Tensor, " width"]
    """The sum of squared deviations from the mean."""
    totals: Float64[Tensor, "3"]
    """Count of the rows, sum of their Euclidean norms, largest norm."""


@dataclass(frozen=True, kw_only=True)
class StoreStatistics:
    """Moments of all `train` rows, as a reader sees them."""

    count: int
    mean: Float64[Tensor, " width"]
    variance: Float64[Tensor, " width"]
    """Of the population: divided by the count."""
    mean_norm: float
    peak_norm: float
    """The largest Euclidean norm of a row."""
    covariance: Float64[Tensor, "width width"] | None
    """Of an even sample of at most 16 x width rows, about the sample's own mean; None where the width is over 8192."""
    sampled: int
    """Rows in that sample."""


@final
class MomentsTally:
    """Moments of rows that come in blocks.

    A block is added up in float32 about an origin that lies within the data, blocks are added up in float64: axes whose mean is
    far from zero lose nothing.
    """

    def __init__(self, width: int) -> None:
        self._origin = torch.zeros(width)
        self._block = torch.empty(max(1, BLOCK // width), width)
        self._sum = torch.zeros(width, dtype=torch.float64)
        self._squares = torch.zeros(width, dtype=torch.float64)
        self._count, self._norms, self._peak = 0, 0.0, 0.0

    def add(self, rows: Float[Tensor, "row width"]) -> bool:
        """Whether all of `rows`, which are taken in, are finite."""
        for block in rows.split(len(self._block)):
            if not self._count:
                self._origin = block[0].float().clone()
            x = self._block[: len(block)].copy_(block).sub_(self._origin)
            ones = torch.ones(len(x))
            along = x @ self._origin
            self._sum += ones @ x
            x.square_()
            self._squares += ones @ x
            norms = (x.sum(1) + 2 * along + self._origin.dot(self._origin)).clamp_min_(0).sqrt_()
            self._norms += float(norms.sum(dtype=torch.float64))
            self._peak = max(self._peak, float(norms.max()))
            self._count += len(x)
        return math.isfinite(self._norms)

    def moments(self) -> RowMoments:
        """Of all rows so far."""
        count = max(self._count, 1)
        squares = (self._squares - self._sum.square() / count).clamp_min(0)
        totals = torch.tensor([self._count, self._norms, self._peak], dtype=torch.float64)
        return RowMoments(self._origin.double() + self._sum / count, squares, totals)


def merged(one: RowMoments, other: RowMoments) -> RowMoments:
    """The moments of the rows of both (Chan, Golub & LeVeque 1983)."""
    here, there = float(one.totals[0]), float(other.totals[0])
    both = max(here + there, 1.0)
    apart = other.mean - one.mean
    squares = one.squares + other.squares + apart.square() * (here * there / both)
    totals = torch.stack([*(one.totals[:2] + other.totals[:2]), torch.maximum(one.totals[2], other.totals[2])])
    return RowMoments(one.mean + apart * (there / both), squares, totals)


def sample_size(count: int, width: int) -> int:
    """How many of `count` rows the covariance is taken from."""
    return min(count, SAMPLE * width) if width <= WIDEST else 0


def covariance(chunks: Iterable[Float[Tensor, "row width"]], mean: Float64[Tensor, " width"]) -> Float64[Tensor, "width width"]:
    """The covariance of all rows in `chunks` about their own mean, `mean` being near it."""
    products = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    total, count = torch.zeros_like(mean), 0
    for chunk in chunks:
        x = chunk.double() - mean
        for start in range(0, len(mean), STRIP):
            # What lies below the diagonal is the mirror of what lies above it.
            products[start : start + STRIP, start:].addmm_(x[:, start : start + STRIP].T, x[:, start:])
        total += x.sum(0)
        count += len(x)
    total /= count
    return (products.triu() + products.triu(1).T) / count - torch.outer(total, total)
