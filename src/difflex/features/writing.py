"""From what was gathered to the book."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from difflex._version import __version__
from difflex.dictionaries import Dictionary
from difflex.errors import BadInput
from difflex.features.book import (
    AtomImage,
    BookInfo,
    BookWriter,
    ExampleKind,
    FeatureStats,
    Histogram,
    ImageFile,
    PackedExample,
    StoredImage,
)
from difflex.features.drawing import key_of
from difflex.features.figures import MapShape, coverage, fellows, nearest, shapes
from difflex.features.gathering import FeatureCollector
from difflex.features.roll import ShotRegistry
from difflex.features.sightings import FeatureMaps
from difflex.features.tally import FIRST_BIN, FeatureTotals
from difflex.records import Shot, Split

__all__ = ["AtomLocation", "CollectTarget", "write"]

SPLITS: tuple[Split, Split] = ("train", "held-out")


class AtomLocation(NamedTuple):
    """Where in the data an atom comes from."""

    shot: Shot
    token: int


@dataclass(frozen=True, kw_only=True)
class CollectTarget:
    """A dictionary whose book is made."""

    dictionary: Dictionary
    name: str
    """`SITE/LABEL`, as the study calls it."""
    checksum: str
    """Of its files."""
    book: Path
    """Where its book goes."""
    patches: Mapping[int, AtomLocation] = field(default_factory=dict)
    """For an ITDA dictionary, what its atoms are."""
    strengths: Sequence[float] = ()
    """How strongly each feature is added where no strength is named, in peaks; none where nobody knows."""


def write(subject: CollectTarget, gathered: FeatureCollector, roll: ShotRegistry, data: str) -> Path:
    """The book of a dictionary, finished."""
    if gathered.tally is None:
        raise BadInput(f"No image was shown to {subject.name}. Give some.")
    numbers = gathered.shots().tolist()
    files = dict.fromkeys(roll.seats[number].filed for number in numbers)
    files |= dict.fromkeys(filed for at in subject.patches.values() if (filed := roll.patches.get(key_of(at.shot))))
    images = {filed: ImageFile(number, *filed) for number, filed in enumerate(files)}
    with BookWriter.of(subject.book, _about(subject, gathered, roll, data)) as draft:
        draft.images(images.values())
        draft.shots((number, images[(seat := roll.seats[number]).filed].id, seat.shot) for number in numbers)
        draft.features(_features(gathered, subject.strengths))
        draft.examples(_examples(gathered))
        draft.patches(_patches(subject, roll, images))
        together = fellows(gathered.sampled.settle(), gathered.tally.fired / gathered.tally.tokens)
        for feature, near in enumerate(nearest(subject.dictionary.directions)):
            draft.neighbours(feature, [*together.get(feature, ()), *near])
    return subject.book


def _about(subject: CollectTarget, gathered: FeatureCollector, roll: ShotRegistry, data: str) -> BookInfo:
    dictionary, tally = subject.dictionary, gathered.tally
    assert tally is not None
    first = next(iter(roll.seats.values())).shot
    return BookInfo(
        dictionary=subject.name,
        kind=dictionary.kind,
        size=dictionary.size,
        k=dictionary.k,
        checksum=subject.checksum,
        model=first.model,
        revision=first.revision,
        data=data,
        grid=gathered.grid,
        tokens=tally.tokens,
        shots=dict(roll.shots),
        images=roll.images,
        timesteps=_timesteps(tally),
        difflex=__version__,
    )


def _timesteps(tally: FeatureTotals) -> tuple[float, ...]:
    return tuple(sorted(tally.seen, reverse=True))


def _features(gathered: FeatureCollector, strengths: Sequence[float]) -> Iterator[FeatureStats]:
    """The figures of all features."""
    tally = gathered.tally
    assert tally is not None
    top, sampled = gathered.top.settle(), gathered.sampled.settle()
    nothing = torch.full((tally.size,), torch.nan)
    shape = MapShape(nothing, nothing) if gathered.grid is None else shapes(sampled, tally.size, gathered.grid)
    fires = tally.fired.clamp_min(1)
    placed = {
        "area": tally.fired / tally.shots.clamp_min(1) / gathered.tokens,
        "spread": shape.spread,
        "concentration": shape.concentration,
        "border": nothing if gathered.grid is None else tally.border,
        "position": nothing if gathered.grid is None else tally.position,
        "coverage": coverage(top, tally.peak, gathered.tokens),
    }
    plain = {
        "fired": tally.fired,
        "shots": tally.shots,
        "density": tally.fired / tally.tokens,
        "peak": tally.peak,
        "mean": tally.total / fires,
        "negative_share": tally.negative / tally.tokens,
        "negative_peak": tally.lowest,
    }
    known = {name: column.tolist() for name, column in {**plain, **placed}.items()}
    active = torch.stack([tally.timesteps[moment] / tally.seen[moment] for moment in _timesteps(tally)], dim=1).tolist()
    for feature in range(tally.size):
        here = {name: column[feature] for name, column in known.items()}
        silent = not here["fired"] or gathered.grid is None
        for name in placed:
            here[name] = None if silent or math.isnan(here[name]) else here[name]
        yield FeatureStats(
            feature=feature,
            **here,
            strength=strengths[feature] if strengths else None,
            histogram=_histogram(tally.bins[feature]),
            activity=tuple(active[feature]),
        )


def _histogram(bins: Tensor) -> Histogram:
    filled = bins.nonzero()[:, 0]
    if not len(filled):
        return Histogram(0, ())
    first, last = int(filled[0]), int(filled[-1])
    return Histogram(FIRST_BIN + first, tuple(bins[first : last + 1].tolist()))


class _ExampleColumn(NamedTuple):
    """The sightings of a kind, to be read group by group."""

    starts: list[int]
    """The first sighting of each group, and the end."""
    shots: list[int]
    peaks: list[float]
    draws: list[int]
    marks: list[int]
    """The first mark of each sighting, and the end."""
    tokens: bytes
    levels: bytes

    @classmethod
    def of(cls, kept: FeatureMaps, groups: int) -> _ExampleColumn:
        starts = torch.searchsorted(kept.groups.long(), torch.arange(groups + 1))
        marks = torch.cat([torch.zeros(1, dtype=torch.int64), kept.counts.long().cumsum(0)])
        return cls(
            starts=starts.tolist(),
            shots=kept.shots.tolist(),
            peaks=kept.peaks.tolist(),
            draws=kept.draws.tolist(),
            marks=marks.tolist(),
            tokens=kept.tokens.numpy().tobytes(),
            levels=kept.levels.numpy().tobytes(),
        )

    def map(self, place: int) -> bytes:
        """The map of a sighting as it stands in the book."""
        here = slice(2 * self.marks[place], 2 * self.marks[place + 1])
        return self.tokens[here] + self.levels[here]


def _examples(gathered: FeatureCollector) -> Iterator[PackedExample]:
    """The examples of all features, feature by feature."""
    size, settings = gathered.dictionary.size, gathered.settings
    top, sampled = (_ExampleColumn.of(kept.settle(), 2 * size) for kept in (gathered.top, gathered.sampled))
    silent = [gathered.pool.silent(held_out, settings.silent) for held_out in (False, True)]
    for feature in range(size):
        for side, split in enumerate(SPLITS):
            group = 2 * feature + side
            best = range(top.starts[group], top.starts[group + 1])
            for rank, place in enumerate(best):
                yield _packed(top, feature, "top", split, rank, place, None)
            shown = {top.draws[place] for place in best}
            yield from _drawn(sampled, feature, split, group, shown)
            quiet = [shot for shot in silent[side][feature].tolist() if shot >= 0]
            yield from (PackedExample(feature, "silent", split, rank, shot, 0.0, None, b"") for rank, shot in enumerate(quiet))


def _drawn(sampled: _ExampleColumn, feature: int, split: Split, group: int, shown: set[int]) -> Iterator[PackedExample]:
    """The images drawn at random, strongest first, but for those that are shown already."""
    places = range(sampled.starts[group], sampled.starts[group + 1])
    strongest = sorted(places, key=lambda place: (-sampled.peaks[place], sampled.draws[place]))
    rank = 0
    for number, place in enumerate(strongest):
        if sampled.draws[place] not in shown:
            quantile = 1 - (number + 0.5) / len(strongest)
            yield _packed(sampled, feature, "quantile", split, rank, place, quantile)
            rank += 1


def _packed(
    kept: _ExampleColumn, feature: int, kind: ExampleKind, split: Split, rank: int, place: int, quantile: float | None
) -> PackedExample:
    return PackedExample(feature, kind, split, rank, kept.shots[place], kept.peaks[place], quantile, kept.map(place))


def _patches(subject: CollectTarget, roll: ShotRegistry, images: Mapping[StoredImage, ImageFile]) -> Iterator[AtomImage]:
    for feature, (shot, token) in sorted(subject.patches.items()):
        filed = roll.patches.get(key_of(shot))
        yield AtomImage(feature, token, None if filed is None else images[filed], shot)
