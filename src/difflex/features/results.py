"""The results of a pass: statistics, examples and neighbours of all features, written as a book."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from difflex._version import __version__
from difflex.dictionaries import Dictionary
from difflex.errors import BadInput
from difflex.features.collector import FeatureCollector, FeatureMaps
from difflex.features.entries import COVER_THRESHOLD, LEVELS, AtomImage, FeatureNeighbour, FeatureStats, Histogram, ImageFile
from difflex.features.firing import FIRST_BIN, image_key, ranges, strongest_first
from difflex.features.registry import ShotRegistry
from difflex.features.tables import BookInfo
from difflex.features.writing import BookWriter, PackedExample
from difflex.records import Shot, Split

SPLITS: tuple[Split, Split] = ("train", "held-out")
MAPS_AT_ONCE = 1 << 16
DIRECTIONS_AT_ONCE = 1024
NEIGHBOURS = 8
CHANCE_FACTOR = 3
"""How many times its density a feature must fire together with another one to count as its neighbour."""


class AtomLocation(NamedTuple):
    """The token in the data that an ITDA atom was taken from."""

    shot: Shot
    token: int


@dataclass(frozen=True, kw_only=True)
class CollectTarget:
    """A dictionary whose book is to be made."""

    dictionary: Dictionary
    name: str
    """`SITE/LABEL`, its name in the study."""
    fingerprint: str
    """Fingerprint of its files."""
    book: Path
    """Path of the book."""
    patches: Mapping[int, AtomLocation] = field(default_factory=dict)
    """For an ITDA dictionary, where its atoms come from."""
    strengths: Sequence[float] = ()
    """Default steering strength of each feature, in peaks; empty if unknown."""


def write_book(target: CollectTarget, collector: FeatureCollector, registry: ShotRegistry, data: str) -> Path:
    """Write the book of a dictionary and return its path."""
    if not collector.tokens:
        raise BadInput(f"There were no images to collect examples of {target.name} from. Give at least one.")
    numbers = collector.shots().tolist()
    files = dict.fromkeys(registry.entries[number].image for number in numbers)
    patches = {feature: registry.patches.get(image_key(shot)) for feature, (shot, _) in target.patches.items()}
    files |= dict.fromkeys(filter(None, patches.values()))
    images = {stored: ImageFile(number, *stored) for number, stored in enumerate(files)}
    with BookWriter.open(target.book, _info(target, collector, registry, data)) as writer:
        writer.add_images(images.values())
        entries = ((number, registry.entries[number]) for number in numbers)
        writer.add_shots((number, images[entry.image].id, entry.shot) for number, entry in entries)
        writer.add_features(_features(collector, target.strengths))
        writer.add_examples(_examples(collector))
        for feature, stored in sorted(patches.items()):
            shot, token = target.patches[feature]
            writer.add_patch(AtomImage(feature, token, stored and images[stored], shot))
        firing = firing_neighbours(collector.random.merged(), collector.totals.firings / collector.totals.tokens)
        for feature, neighbours in enumerate(direction_neighbours(target.dictionary.directions)):
            writer.add_neighbours(feature, [*firing.get(feature, ()), *neighbours])
    return target.book


def _info(target: CollectTarget, collector: FeatureCollector, registry: ShotRegistry, data: str) -> BookInfo:
    dictionary, totals = target.dictionary, collector.totals
    shot = next(iter(registry.entries.values())).shot
    return BookInfo(
        dictionary=target.name,
        kind=dictionary.kind,
        size=dictionary.size,
        k=dictionary.k,
        fingerprint=target.fingerprint,
        model=shot.model,
        revision=shot.revision,
        data=data,
        grid=collector.grid,
        tokens=totals.tokens,
        shots={**registry.shots},
        images=registry.images,
        timesteps=tuple(sorted(totals.timestep_tokens, reverse=True)),
        difflex=__version__,
    )


def _features(collector: FeatureCollector, strengths: Sequence[float]) -> Iterator[FeatureStats]:
    """Yield the statistics of all features."""
    totals = collector.totals
    columns = {
        "firings": totals.firings,
        "shots": totals.shots,
        "density": totals.firings / totals.tokens,
        "peak": totals.peaks,
        "mean": totals.sums / totals.firings.clamp_min(1),
        "negative_share": totals.negatives / totals.tokens,
        "negative_peak": totals.lowest,
    }
    spatial = {} if collector.grid is None else _spatial_statistics(collector, collector.grid)
    rows = {name: column.tolist() for name, column in (columns | spatial).items()}
    timesteps = sorted(totals.timestep_tokens, reverse=True)
    shares = [totals.timestep_firings[timestep] / totals.timestep_tokens[timestep] for timestep in timesteps]
    activity = torch.stack(shares, dim=1).tolist()
    for feature in range(totals.size):
        row = {name: column[feature] for name, column in rows.items()}
        for name in spatial:
            row[name] = None if not row["firings"] or math.isnan(row[name]) else row[name]
        yield FeatureStats(
            feature=feature,
            **row,
            strength=strengths[feature] if strengths else None,
            histogram=_histogram(totals.histogram[feature]),
            activity=tuple(activity[feature]),
        )


def _spatial_statistics(collector: FeatureCollector, grid: tuple[int, int]) -> dict[str, Tensor]:
    totals = collector.totals
    shape = map_shapes(collector.random.merged(), totals.size, grid)
    return {
        "area": totals.firings / totals.shots.clamp_min(1) / collector.tokens,
        "spread": shape.spread,
        "concentration": shape.concentration,
        "border": totals.border(grid),
        "position": totals.position(grid),
        "coverage": mean_coverage(collector.top.merged(), totals.peaks, collector.tokens),
    }


def _histogram(counts: Tensor) -> Histogram:
    filled = counts.nonzero()[:, 0]
    if not len(filled):
        return Histogram(0, ())
    first, last = int(filled[0]), int(filled[-1])
    return Histogram(FIRST_BIN + first, tuple(counts[first : last + 1].tolist()))


class _PackedMap(NamedTuple):
    shot: int
    peak: float
    draw: int
    map: bytes


def _packed_maps(maps: FeatureMaps, groups: int) -> Iterator[list[_PackedMap]]:
    """Yield the maps of each group, packed as in a book."""
    tokens, levels = (column.numpy().tobytes() for column in (maps.tokens, maps.levels))
    ends = pairwise([0, *(2 * maps.counts.long().cumsum(0)).tolist()])
    columns = (maps.shots.tolist(), maps.peaks.tolist(), maps.draws.tolist(), (slice(*end) for end in ends))
    rows = zip(*columns, strict=True)
    for count in torch.bincount(maps.groups, minlength=groups).tolist():
        yield [_PackedMap(shot, peak, draw, tokens[part] + levels[part]) for shot, peak, draw, part in islice(rows, count)]


def _examples(collector: FeatureCollector) -> Iterator[PackedExample]:
    """Yield the examples of all features, feature by feature."""
    size, limit = collector.dictionary.size, collector.config.silent_examples
    top, random = (_packed_maps(maps.merged(), 2 * size) for maps in (collector.top, collector.random))
    silent = [collector.pool.silent(held_out, limit).tolist() for held_out in (False, True)]
    for group, (strongest, sampled) in enumerate(zip(top, random, strict=True)):
        feature, split = group // 2, SPLITS[group % 2]
        for rank, (shot, peak, _, packed) in enumerate(strongest):
            yield PackedExample(feature, "top", split, rank, shot, peak, None, packed)
        sampled.sort(key=lambda entry: (-entry.peak, entry.draw))
        quantiles = {entry.draw: 1 - (number + 0.5) / len(sampled) for number, entry in enumerate(sampled)}
        others = quantiles.keys() - {entry.draw for entry in strongest}
        for rank, (shot, peak, draw, packed) in enumerate(entry for entry in sampled if entry.draw in others):
            yield PackedExample(feature, "quantile", split, rank, shot, peak, quantiles[draw], packed)
        shots = (shot for shot in silent[group % 2][feature] if shot >= 0)
        yield from (PackedExample(feature, "silent", split, rank, shot, 0.0, None, b"") for rank, shot in enumerate(shots))


class MapShape(NamedTuple):
    """Means over the maps of every feature; NaN where it has none."""

    spread: Float[Tensor, " size"]
    concentration: Float[Tensor, " size"]


def map_shapes(maps: FeatureMaps, size: int, grid: tuple[int, int]) -> MapShape:
    """Return the mean spread and concentration of the maps of every feature."""
    sums, counts = torch.zeros(2, size, dtype=torch.float64), torch.zeros(size)
    for part in _map_entries(maps):
        sums[0].index_add_(0, part.features, _spread(part, grid))
        sums[1].index_add_(0, part.features, _concentration(part))
        counts += torch.bincount(part.features, minlength=size)
    return MapShape(*(sums / counts).float())


def mean_coverage(maps: FeatureMaps, peaks: Float[Tensor, " size"], tokens: int) -> Float[Tensor, " size"]:
    """Return the mean share of tokens that every feature covers in its maps; NaN where it has none."""
    sums, counts = torch.zeros(len(peaks)), torch.zeros(len(peaks))
    for part in _map_entries(maps):
        features = part.features[part.owners]
        covered = (part.shares * part.peaks[part.owners] >= COVER_THRESHOLD * peaks[features]).float()
        sums.index_add_(0, features, covered / tokens)
        counts += torch.bincount(part.features, minlength=len(peaks))
    return sums / counts


def firing_neighbours(maps: FeatureMaps, density: Float[Tensor, " size"]) -> dict[int, list[FeatureNeighbour]]:
    """Return for every feature those that fire at its peak tokens more often than by chance, most frequent first."""
    size = len(density)
    owners = (maps.groups // 2).long()
    totals = torch.bincount(owners, minlength=size)
    pairs = owners[:, None] * size + maps.coactive
    pairs, counts = pairs[maps.coactive >= 0].unique(return_counts=True)
    owners, features = pairs // size, pairs % size
    shares = counts / totals[owners]
    chosen = (counts > 1) & (shares > CHANCE_FACTOR * density[features])
    owners, features, shares = owners[chosen], features[chosen], shares[chosen]
    order = strongest_first(shares, owners)
    neighbours: dict[int, list[FeatureNeighbour]] = {}
    for owner, feature, share in zip(*(column[order].tolist() for column in (owners, features, shares)), strict=True):
        entries = neighbours.setdefault(owner, [])
        if len(entries) < NEIGHBOURS:
            entries.append(FeatureNeighbour(feature, "firing", share))
    return neighbours


def direction_neighbours(directions: Float[Tensor, "size width"]) -> Iterator[list[FeatureNeighbour]]:
    """Yield for every feature in turn those of the highest positive cosine, highest first."""
    size = len(directions)
    for first in range(0, size, DIRECTIONS_AT_ONCE):
        cosines = directions[first : first + DIRECTIONS_AT_ONCE] @ directions.T
        rows = torch.arange(len(cosines), device=cosines.device)
        cosines[rows, rows + first] = -2.0
        best = cosines.topk(min(NEIGHBOURS, size), dim=1)
        for values, features in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            pairs = zip(features, values, strict=True)
            yield [FeatureNeighbour(feature, "direction", min(value, 1.0)) for feature, value in pairs if value > 0]


class MapEntries(NamedTuple):
    """Some maps and their entries."""

    features: Int[Tensor, " map"]
    peaks: Float[Tensor, " map"]
    owners: Int[Tensor, " entry"]
    """Place of each entry's map among these maps."""
    tokens: Int[Tensor, " entry"]
    shares: Float[Tensor, " entry"]
    """Values as shares of the map's peak."""

    def sums(self, values: Tensor) -> Float[Tensor, " map"]:
        """Return the sum of `values` of the entries of each map."""
        return torch.zeros(len(self.features), dtype=torch.float64).index_add_(0, self.owners, values.double())


def _map_entries(maps: FeatureMaps) -> Iterator[MapEntries]:
    starts = (maps.counts.cumsum(0) - maps.counts).long()
    for first in range(0, len(maps.groups), MAPS_AT_ONCE):
        part = slice(first, first + MAPS_AT_ONCE)
        counts = maps.counts[part].long()
        places = ranges(starts[part], counts)
        owners = torch.repeat_interleave(torch.arange(len(counts)), counts)
        # Unsigned numbers, stored as int16.
        tokens, levels = maps.tokens[places].int() & 0xFFFF, maps.levels[places].int() & 0xFFFF
        yield MapEntries(maps.groups[part].long() // 2, maps.peaks[part], owners, tokens.long(), levels.float() / LEVELS)


def _spread(maps: MapEntries, grid: tuple[int, int]) -> Float[Tensor, " map"]:
    """Return the weighted mean distance of each map's entries from their centre, over the grid's diagonal."""
    positions = torch.stack([maps.tokens // grid[1], maps.tokens % grid[1]]).double()
    weights = maps.shares.double()
    totals = maps.sums(weights)
    centre = torch.stack([maps.sums(axis * weights) / totals for axis in positions])
    distance = (positions - centre[:, maps.owners]).square().sum(0).sqrt()
    diagonal = max(1.0, ((grid[0] - 1) ** 2 + (grid[1] - 1) ** 2) ** 0.5)
    return maps.sums(distance * weights) / totals / diagonal


def _concentration(maps: MapEntries) -> Float[Tensor, " map"]:
    """Return the share of each map's sum that lies in the strongest quarter of its entries."""
    order = strongest_first(maps.shares, maps.owners)
    maps = maps._replace(owners=maps.owners[order], shares=maps.shares[order])
    weights, counts = maps.shares.double(), torch.bincount(maps.owners)
    ranks = torch.arange(len(order)) - (counts.cumsum(0) - counts)[maps.owners]
    is_strong = ranks < (counts[maps.owners] + 3) // 4
    return maps.sums(weights * is_strong) / maps.sums(weights)
