"""What is known of one dictionary's features while images stream by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Int
from torch import Tensor

from difflex.dictionaries import Dictionary
from difflex.errors import BadInput
from difflex.features.drawing import drawn
from difflex.features.firing import FeatureShots, FiringBatch, ImageBatch, fired, ranges
from difflex.features.sightings import LEVELS, FeatureMaps, TopMaps
from difflex.features.silence import SilentPool
from difflex.features.tally import FeatureTotals
from difflex.records import Activations

__all__ = ["CollectConfig", "FeatureCollector"]

MOST_TOKENS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """How many examples of each feature are kept, of each split."""

    top: int = 32
    """Images in which it fires most strongly."""
    sampled: int = 16
    """Images drawn at random from all in which it fires; those among the top are left out in the end."""
    silent: int = 8
    """Images drawn at random in which it does not fire."""
    pool: int = 256
    """Images from which the silent ones are drawn."""
    beside: int = 16
    """How many features beside it, the strongest, are noted at its strongest token in each image drawn."""
    seed: int = 0
    """Of all drawing."""

    def __post_init__(self) -> None:
        if min(self.top, self.sampled, self.silent, self.pool, self.beside) < 1:
            raise BadInput("Of each kind of example, and for the pool, 1 or more must be kept.")


@final
class FeatureCollector:
    """Figures and examples of all features of one dictionary, in memory that grows with its size alone."""

    def __init__(self, dictionary: Dictionary, settings: CollectConfig) -> None:
        self.dictionary, self.settings = dictionary, settings
        self.grid: tuple[int, int] | None = None
        groups = 2 * dictionary.size
        self.top = TopMaps(groups, settings.top, "peak")
        self.sampled = TopMaps(groups, settings.sampled, "draw", settings.beside)
        self.pool = SilentPool(dictionary.size, settings.pool, settings.seed)
        self.tally: FeatureTotals | None = None
        self.tokens = 0
        """Of each shot."""

    def meet(self, seen: Sequence[Activations], arrivals: ImageBatch) -> list[int]:
        """Which images of a batch are shown by some feature, as things stand; `seen` at each timestep of the batch."""
        if self.tally is None:
            self._begin(seen[0])
        assert self.tally is not None
        if any(each.grid != self.grid or each.values.shape[1] != self.tokens for each in seen):
            raise BadInput(
                f"Images of several sizes: {self.tokens} tokens at {seen[0].site} before, {seen[0].values.shape[1]} now. "
                "A book is about images of one size; collect them apart."
            )
        batch = fired(self.dictionary.encode, [each.values for each in seen])
        self.tally.add(batch, [_moment(each) for each in seen], len(arrivals.keys))
        wanted = set(self.pool.add(batch, arrivals))
        return sorted(wanted | self._keep(batch, arrivals))

    def _begin(self, seen: Activations) -> None:
        self.grid, self.tokens = seen.grid, seen.values.shape[1]
        if self.tokens > MOST_TOKENS:
            raise BadInput(f"Maps of {self.tokens} tokens do not fit a book: {MOST_TOKENS} is the most. Collect smaller images.")
        self.tally = FeatureTotals(self.dictionary.size, self.grid)

    def _keep(self, batch: FiringBatch, arrivals: ImageBatch) -> set[int]:
        """The images of what may be among the examples."""
        timesteps = arrivals.shots.shape[1]
        spots = batch.spots if timesteps == 1 else _strongest(batch.spots, timesteps)
        images = spots.shots // timesteps
        groups = 2 * spots.features + arrivals.held_out[images]
        draws = drawn(arrivals.keys[images], spots.features, self.settings.seed)
        shown: set[int] = set()
        for kept in (self.top, self.sampled):
            chosen = kept.wants(groups, spots.peaks, draws).nonzero()[:, 0]
            if len(chosen):
                here = FeatureShots(*(column[chosen] for column in spots))
                numbers = arrivals.shots.flatten()[here.shots]
                beside = self.settings.beside if kept is self.sampled else 0
                kept.add(_sightings(batch, here, groups[chosen], numbers, draws[chosen], beside), arrivals.may_repeat)
                shown.update(images[chosen].unique().tolist())
        return shown

    def shots(self) -> Int[Tensor, " shot"]:
        """The numbers of all shots that are kept, in order."""
        pool = self.pool.shots
        kept = [kept.settle().shots.long() for kept in (self.top, self.sampled)]
        return torch.cat([*kept, pool[pool >= 0]]).unique()

    def tensors(self) -> dict[str, Tensor]:
        """All that is known, by name."""
        parts = {
            f"{name}.{key}": value for name in ("top", "sampled") for key, value in getattr(self, name).settle()._asdict().items()
        }
        parts |= {f"pool.{key}": value for key, value in self.pool.tensors().items()}
        if self.tally is None:
            return parts
        shape = torch.tensor([self.tokens, *(self.grid or ())])
        return {**parts, "shape": shape, **{f"tally.{key}": value for key, value in self.tally.tensors().items()}}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing; what is known is what `tensors` gave."""

        def part(name: str) -> dict[str, Tensor]:
            return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}

        self.top.restore(part("top"))
        self.sampled.restore(part("sampled"))
        self.pool.restore(part("pool"))
        if "shape" in tensors:
            self.tokens, *grid = tensors["shape"].tolist()
            self.grid = (grid[0], grid[1]) if grid else None
            self.tally = FeatureTotals(self.dictionary.size, self.grid)
            self.tally.restore(part("tally"))


def _moment(seen: Activations) -> float:
    """The timestep of a batch; 0 where nobody says."""
    return float(seen.shots[0].timestep or 0.0)


def _strongest(spots: FeatureShots, timesteps: int) -> FeatureShots:
    """Of each feature in each image the spot of the highest peak, the first among equals."""
    images = spots.shots // timesteps
    order = torch.argsort(spots.peaks, descending=True, stable=True)
    order = order[torch.argsort(images[order], stable=True)]
    order = order[torch.argsort(spots.features[order], stable=True)]
    first = torch.ones(len(order), dtype=torch.bool)
    features, images = spots.features[order], images[order]
    first[1:] = (features[1:] != features[:-1]) | (images[1:] != images[:-1])
    return FeatureShots(*(column[order[first]] for column in spots))


def _sightings(
    batch: FiringBatch, spots: FeatureShots, groups: Tensor, numbers: Tensor, draws: Tensor, beside: int
) -> FeatureMaps:
    """These spots with their maps."""
    places = ranges(spots.starts, spots.counts)
    values = batch.fired.values[places]
    shares = values / torch.repeat_interleave(spots.peaks, spots.counts)
    return FeatureMaps(
        groups=groups.int(),
        shots=numbers.int(),
        peaks=spots.peaks,
        draws=draws,
        counts=spots.counts.int(),
        beside=_beside(batch, spots, shares, places, beside),
        tokens=batch.fired.tokens[places].to(torch.int16),
        levels=(shares * LEVELS).round_().clamp_(min=1).int().to(torch.int16),
    )


def _beside(batch: FiringBatch, spots: FeatureShots, shares: Tensor, places: Tensor, most: int) -> Int[Tensor, "spot other"]:
    """The features that fire most strongly at the token of each spot's peak, but for its own."""
    found = torch.full((len(spots.features), most), -1, dtype=torch.int32)
    if not most:
        return found
    firsts = spots.counts.cumsum(0) - spots.counts
    peaks = (shares == 1).nonzero()[:, 0]
    tokens = batch.fired.tokens[places[peaks[torch.searchsorted(peaks, firsts)]]]
    steps = len(batch.codes)
    rows, step = spots.shots // steps * batch.tokens + tokens, spots.shots % steps
    for number, codes in enumerate(batch.codes):
        here = (step == number).nonzero()[:, 0]
        # Codes come strongest first; the own one is among them, and gives way.
        values, others = (column[:, : most + 1][rows[here]] for column in codes)
        others = torch.where((values > 0) & (others != spots.features[here, None]), others, -1).int()
        order = (others < 0).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
        found[here, : order.shape[1]] = others.gather(1, order)
    return found
