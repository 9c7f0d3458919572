"""The end of a pass: statistics of maps, neighbours and examples, written into a book."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from difflex._version import __version__
from difflex.dictionaries import Dictionary
from difflex.errors import BadInput
from difflex.features.collector import FeatureCollector
from difflex.features.entries import (
    COVER_THRESHOLD,
    LEVELS,
    AtomImage,
    ExampleKind,
    FeatureNeighbour,
    FeatureStats,
    Histogram,
    ImageFile,
)
from difflex.features.examples import FeatureMaps
from difflex.features.firing import FIRST_BIN, FeatureTotals, image_key, ranges
from difflex.features.images import StoredImage
from difflex.features.registry import ShotRegistry
from difflex.features.schema import BookInfo
from difflex.features.writer import BookWriter, PackedExample
from difflex.records import Shot, Split

__all__ = ["AtomLocation", "CollectTarget", "write_book"]

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
    if collector.totals is None:
        raise BadInput(f"There were no images to collect examples of {target.name} from. Give at least one.")
    numbers = collector.shots().tolist()
    files = dict.fromkeys(registry.entries[number].image for number in numbers)
    patches = [registry.patches.get(image_key(location.shot)) for location in target.patches.values()]
    files |= dict.fromkeys(stored for stored in patches if stored)
    images = {stored: ImageFile(number, *stored) for number, stored in enumerate(files)}
    with BookWriter.open(target.book, _info(target, collector, registry, data)) as writer:
        writer.add_images(images.values())
        entries = ((number, registry.entries[number]) for number in numbers)
        writer.add_shots((number, images[entry.image].id, entry.shot) for number, entry in entries)
        writer.add_features(_features(collector, target.strengths))
        writer.add_examples(_examples(collector))
        writer.add_patches(_patches(target, registry, images))
        firing = firing_neighbours(collector.random.merged(), collector.totals.firings / collector.totals.tokens)
        for feature, neighbours in enumerate(direction_neighbours(target.dictionary.directions)):
            writer.add_neighbours(feature, [*firing.get(feature, ()), *neighbours])
    return target.book


def _info(target: CollectTarget, collector: FeatureCollector, registry: ShotRegistry, data: str) -> BookInfo:
    dictionary, totals = target.dictionary, collector.totals
    assert totals is not None
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
        shots=dict(registry.shots),
        images=registry.images,
        timesteps=tuple(sorted(totals.timestep_tokens, reverse=True)),
        difflex=__version__,
    )


def _features(collector: FeatureCollector, strengths: Sequence[float]) -> Iterator[FeatureStats]:
    """Yield the statistics of all features."""
    totals = collector.totals
    assert totals is not None
    columns = {
        "firings": totals.firings,
        "shots": totals.shots,
        "density": totals.firings / totals.tokens,
        "peak": totals.peaks,
        "mean": totals.sums / totals.firings.clamp_min(1),
        "negative_share": totals.negatives / totals.tokens,
        "negative_peak": totals.lowest,
    }
    spatial = {} if collector.grid is None else _spatial_statistics(collector, totals, collector.grid)
    rows = {name: column.tolist() for name, column in (columns | spatial).items()}
    timesteps = sorted(totals.timestep_tokens, reverse=True)
    activity = torch.stack([totals.timestep_firings[each] / totals.timestep_tokens[each] for each in timesteps], dim=1).tolist()
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


def _spatial_statistics(collector: FeatureCollector, totals: FeatureTotals, grid: tuple[int, int]) -> dict[str, Tensor]:
    shape = map_shapes(collector.random.merged(), totals.size, grid)
    return {
        "area": totals.firings / totals.shots.clamp_min(1) / collector.tokens,
        "spread": shape.spread,
        "concentration": shape.concentration,
        "border": totals.border,
        "position": totals.position,
        "coverage": mean_coverage(collector.top.merged(), totals.peaks, collector.tokens),
    }


def _histogram(counts: Tensor) -> Histogram:
    filled = counts.nonzero()[:, 0]
    if not len(filled):
        return Histogram(0, ())
    first, last = int(filled[0]), int(filled[-1])
    return Histogram(FIRST_BIN + first, tuple(counts[first : last + 1].tolist()))


class _ExampleColumn(NamedTuple):
    """The maps of one kind of examples, as plain lists."""

    starts: list[int]
    """First map of each group, and the end."""
    shots: list[int]
    peaks: list[float]
    draws: list[int]
    entries: list[int]
    """First entry of each map, and the end."""
    tokens: bytes
    levels: bytes

    @classmethod
    def of(cls, maps: FeatureMaps, groups: int) -> _ExampleColumn:
        starts = torch.searchsorted(maps.groups.long(), torch.arange(groups + 1))
        entries = torch.cat([torch.zeros(1, dtype=torch.int64), maps.counts.long().cumsum(0)])
        return cls(
            starts=starts.tolist(),
            shots=maps.shots.tolist(),
            peaks=maps.peaks.tolist(),
            draws=maps.draws.tolist(),
            entries=entries.tolist(),
            tokens=maps.tokens.numpy().tobytes(),
            levels=maps.levels.numpy().tobytes(),
        )

    def group(self, group: int) -> range:
        """The places of the maps of a group."""
        return range(self.starts[group], self.starts[group + 1])

    def example(self, group: int, kind: ExampleKind, rank: int, place: int, quantile: float | None = None) -> PackedExample:
        """The example with the map at this place."""
        part = slice(2 * self.entries[place], 2 * self.entries[place + 1])
        packed = self.tokens[part] + self.levels[part]
        feature, split = group // 2, SPLITS[group % 2]
        return PackedExample(feature, kind, split, rank, self.shots[place], self.peaks[place], quantile, packed)


def _examples(collector: FeatureCollector) -> Iterator[PackedExample]:
    """Yield the examples of all features, feature by feature."""
    size, limit = collector.dictionary.size, collector.config.silent_examples
    top, random = (_ExampleColumn.of(examples.merged(), 2 * size) for examples in (collector.top, collector.random))
    silent = [collector.pool.silent(held_out, limit).tolist() for held_out in (False, True)]
    for group in range(2 * size):
        feature, split = group // 2, SPLITS[group % 2]
        yield from (top.example(group, "top", rank, place) for rank, place in enumerate(top.group(group)))
        yield from _random_examples(random, group, {top.draws[place] for place in top.group(group)})
        shots = [shot for shot in silent[group % 2][feature] if shot >= 0]
        yield from (PackedExample(feature, "silent", split, rank, shot, 0.0, None, b"") for rank, shot in enumerate(shots))


def _random_examples(random: _ExampleColumn, group: int, top_draws: set[int]) -> Iterator[PackedExample]:
    """Yield the random examples of a group, strongest first, without those that are top examples."""
    places = sorted(random.group(group), key=lambda place: (-random.peaks[place], random.draws[place]))
    rank = 0
    for number, place in enumerate(places):
        if random.draws[place] not in top_draws:
            yield random.example(group, "quantile", rank, place, quantile=1 - (number + 0.5) / len(places))
            rank += 1


def _patches(target: CollectTarget, registry: ShotRegistry, images: Mapping[StoredImage, ImageFile]) -> Iterator[AtomImage]:
    for feature, (shot, token) in sorted(target.patches.items()):
        stored = registry.patches.get(image_key(shot))
        yield AtomImage(feature, token, None if stored is None else images[stored], shot)


class MapShape(NamedTuple):
    """Means over the maps of every feature; NaN where it has none."""

    spread: Float[Tensor, " size"]
    concentration: Float[Tensor, " size"]


def map_shapes(maps: FeatureMaps, size: int, grid: tuple[int, int]) -> MapShape:
    """Return the mean spread and concentration of the maps of every feature."""
    sums, counts = torch.zeros(2, size, dtype=torch.float64), torch.zeros(size)
    for part in _map_entries(maps):
        features = maps.groups[part.maps].long() // 2
        sums[0].index_add_(0, features, _spread(part, len(features), grid))
        sums[1].index_add_(0, features, _concentration(part, len(features)))
        counts += torch.bincount(features, minlength=size)
    return MapShape(*(sums / counts).float())


def mean_coverage(maps: FeatureMaps, peaks: Float[Tensor, " size"], tokens: int) -> Float[Tensor, " size"]:
    """Return the mean share of tokens that every feature covers in its maps; NaN where it has none."""
    sums, counts = torch.zeros(len(peaks)), torch.zeros(len(peaks))
    for part in _map_entries(maps):
        features = maps.groups[part.maps].long() // 2
        values = part.shares * maps.peaks[part.maps][part.owners]
        covered = (values >= COVER_THRESHOLD * peaks[features][part.owners]).float()
        sums.index_add_(0, features[part.owners], covered / tokens)
        counts += torch.bincount(features, minlength=len(peaks))
    return sums / counts


def firing_neighbours(maps: FeatureMaps, density: Float[Tensor, " size"]) -> dict[int, list[FeatureNeighbour]]:
    """Return the features that fire at the peak tokens of each more often than by chance, most frequent first."""
    size = len(density)
    owners = (maps.groups // 2).long()
    totals = torch.bincount(owners, minlength=size)
    pairs = owners[:, None] * size + maps.coactive
    pairs, counts = pairs[maps.coactive >= 0].unique(return_counts=True)
    owners, features = pairs // size, pairs % size
    shares = counts / totals[owners]
    chosen = (counts > 1) & (shares > CHANCE_FACTOR * density[features])
    owners, features, shares = owners[chosen], features[chosen], shares[chosen]
    order = torch.argsort(shares, descending=True, stable=True)
    order = order[torch.argsort(owners[order], stable=True)]
    neighbours: dict[int, list[FeatureNeighbour]] = {}
    for owner, feature, share in zip(owners[order].tolist(), features[order].tolist(), shares[order].tolist(), strict=True):
        own = neighbours.setdefault(owner, [])
        if len(own) < NEIGHBOURS:
            own.append(FeatureNeighbour(feature, "firing", share))
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
    """The entries of some maps."""

    owners: Int[Tensor, " entry"]
    """Place of each entry's map among these maps."""
    tokens: Int[Tensor, " entry"]
    shares: Float[Tensor, " entry"]
    """Values as shares of the map's peak."""
    maps: slice


def _map_entries(maps: FeatureMaps) -> Iterator[MapEntries]:
    starts = (maps.counts.cumsum(0) - maps.counts).long()
    for first in range(0, len(maps.groups), MAPS_AT_ONCE):
        part = slice(first, first + MAPS_AT_ONCE)
        counts = maps.counts[part].long()
        places = ranges(starts[part], counts)
        owners = torch.repeat_interleave(torch.arange(len(counts)), counts)
        # Unsigned numbers, stored as int16.
        tokens, levels = maps.tokens[places].int() & 0xFFFF, maps.levels[places].int() & 0xFFFF
        yield MapEntries(owners, tokens.long(), levels.float() / LEVELS, part)


def _spread(entries: MapEntries, count: int, grid: tuple[int, int]) -> Float[Tensor, " map"]:
    """Return the weighted mean distance of each map's entries from their centre, over the grid's diagonal."""
    positions = torch.stack([entries.tokens // grid[1], entries.tokens % grid[1]]).double()
    weights = entries.shares.double()
    totals = _sums(weights, entries.owners, count)
    centre = torch.stack([_sums(axis * weights, entries.owners, count) / totals for axis in positions])
    distance = (positions - centre[:, entries.owners]).square().sum(0).sqrt()
    diagonal = max(1.0, ((grid[0] - 1) ** 2 + (grid[1] - 1) ** 2) ** 0.5)
    return _sums(distance * weights, entries.owners, count) / totals / diagonal


def _concentration(entries: MapEntries, count: int) -> Float[Tensor, " map"]:
    """Return the share of each map's sum that lies in the strongest quarter of its entries."""
    order = torch.argsort(entries.shares, descending=True, stable=True)
    order = order[torch.argsort(entries.owners[order], stable=True)]
    owners, weights = entries.owners[order], entries.shares[order].double()
    counts = torch.bincount(owners, minlength=count)
    ranks = torch.arange(len(owners)) - (counts.cumsum(0) - counts)[owners]
    strongest = ranks < (counts[owners] + 3) // 4
    return _sums(weights * strongest, owners, count) / _sums(weights, owners, count)


def _sums(values: Tensor, owners: Tensor, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.float64).index_add_(0, owners, values.double())
