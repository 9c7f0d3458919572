"""Figures of place, from the maps that were kept; and features that fire together, or add the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from difflex.features.book import SHOWN, FeatureNeighbour
from difflex.features.firing import ranges
from difflex.features.sightings import LEVELS, FeatureMaps

__all__ = ["MapShape", "coverage", "fellows", "nearest", "shapes"]

SLICE = 1 << 16
"""Sightings looked at once."""
NEIGHBOURS = 8
CHANCE = 3
"""How many times its density a feature must fire beside another one to be told as its fellow."""
ROWS = 1024
"""Directions compared at once with all others."""


class MapShape(NamedTuple):
    """Means over the maps of every feature; NaN where it has none."""

    spread: Float[Tensor, " size"]
    concentration: Float[Tensor, " size"]


class MapEntries(NamedTuple):
    """The maps of some sightings, mark by mark."""

    of: Int[Tensor, " mark"]
    """The place of each mark's sighting among these."""
    tokens: Int[Tensor, " mark"]
    shares: Float[Tensor, " mark"]
    """Values in parts of the sighting's peak."""
    sightings: slice


def shapes(kept: FeatureMaps, size: int, grid: tuple[int, int]) -> MapShape:
    """How far the maps of every feature spread, and how much of their sum lies in their strongest quarter."""
    sums, counts = torch.zeros(2, size, dtype=torch.float64), torch.zeros(size)
    for marks in _marks(kept):
        features = kept.groups[marks.sightings].long() // 2
        sums[0].index_add_(0, features, _spread(marks, len(features), grid))
        sums[1].index_add_(0, features, _concentration(marks, len(features)))
        counts += torch.bincount(features, minlength=size)
    return MapShape(*(sums / counts).float())


def coverage(kept: FeatureMaps, peaks: Float[Tensor, " size"], tokens: int) -> Float[Tensor, " size"]:
    """The share of the tokens that every feature covers in the shots kept of it, mean over these; NaN where there are none."""
    sums, counts = torch.zeros(len(peaks)), torch.zeros(len(peaks))
    for marks in _marks(kept):
        features = kept.groups[marks.sightings].long() // 2
        values = marks.shares * kept.peaks[marks.sightings][marks.of]
        covered = (values >= SHOWN * peaks[features][marks.of]).float()
        sums.index_add_(0, features[marks.of], covered / tokens)
        counts += torch.bincount(features, minlength=len(peaks))
    return sums / counts


def fellows(kept: FeatureMaps, density: Float[Tensor, " size"]) -> dict[int, list[FeatureNeighbour]]:
    """The features that fire at the strongest tokens of each, more often than by chance; the most frequent first."""
    size = len(density)
    features = (kept.groups // 2).long()
    looked = torch.bincount(features, minlength=size)
    pairs = features[:, None] * size + kept.beside
    pairs, counts = pairs[kept.beside >= 0].unique(return_counts=True)
    one, other = pairs // size, pairs % size
    shares = counts / looked[one]
    likely = (counts > 1) & (shares > CHANCE * density[other])
    one, other, shares = one[likely], other[likely], shares[likely]
    order = torch.argsort(shares, descending=True, stable=True)
    order = order[torch.argsort(one[order], stable=True)]
    found: dict[int, list[FeatureNeighbour]] = {}
    for feature, fellow, share in zip(one[order].tolist(), other[order].tolist(), shares[order].tolist(), strict=True):
        mine = found.setdefault(feature, [])
        if len(mine) < NEIGHBOURS:
            mine.append(FeatureNeighbour(fellow, "firing", share))
    return found


def nearest(directions: Float[Tensor, "size width"]) -> Iterator[list[FeatureNeighbour]]:
    """For every feature in turn those whose directions are nearest, of a cosine above 0."""
    size = len(directions)
    for first in range(0, size, ROWS):
        cosines = directions[first : first + ROWS] @ directions.T
        rows = torch.arange(len(cosines), device=cosines.device)
        cosines[rows, rows + first] = -2.0
        best = cosines.topk(min(NEIGHBOURS, size), dim=1)
        for values, others in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            yield [
                FeatureNeighbour(other, "direction", min(value, 1.0))
                for value, other in zip(values, others, strict=True)
                if value > 0
            ]


def _marks(kept: FeatureMaps) -> Iterator[MapEntries]:
    starts = (kept.counts.cumsum(0) - kept.counts).long()
    for first in range(0, len(kept.groups), SLICE):
        here = slice(first, first + SLICE)
        counts = kept.counts[here].long()
        places = ranges(starts[here], counts)
        of = torch.repeat_interleave(torch.arange(len(counts)), counts)
        # Kept as 16 bits with a sign that means nothing.
        tokens, levels = kept.tokens[places].int() & 0xFFFF, kept.levels[places].int() & 0xFFFF
        yield MapEntries(of, tokens.long(), levels.float() / LEVELS, here)


def _spread(marks: MapEntries, count: int, grid: tuple[int, int]) -> Float[Tensor, " sighting"]:
    """The distance of the marks from their middle, weighted, as a share of the diagonal between the outermost tokens."""
    at = torch.stack([marks.tokens // grid[1], marks.tokens % grid[1]]).double()
    weights = marks.shares.double()
    whole = _summed(weights, marks.of, count)
    middle = torch.stack([_summed(each * weights, marks.of, count) / whole for each in at])
    distance = (at - middle[:, marks.of]).square().sum(0).sqrt()
    diagonal = max(1.0, ((grid[0] - 1) ** 2 + (grid[1] - 1) ** 2) ** 0.5)
    return _summed(distance * weights, marks.of, count) / whole / diagonal


def _concentration(marks: MapEntries, count: int) -> Float[Tensor, " sighting"]:
    """The share of the sum of each sighting's marks that lies in the strongest quarter of them."""
    order = torch.argsort(marks.shares, descending=True, stable=True)
    order = order[torch.argsort(marks.of[order], stable=True)]
    of, weights = marks.of[order], marks.shares[order].double()
    counts = torch.bincount(of, minlength=count)
    ranks = torch.arange(len(of)) - (counts.cumsum(0) - counts)[of]
    strongest = ranks < (counts[of] + 3) // 4
    return _summed(weights * strongest, of, count) / _summed(weights, of, count)


def _summed(values: Tensor, of: Tensor, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.float64).index_add_(0, of, values.double())
