"""`FeatureCollector`: statistics and examples of the features of one dictionary, updated batch by batch in constant memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int, Int16
from torch import Tensor

from difflex.dictionaries import Dictionary
from difflex.errors import BadInput
from difflex.features.entries import LEVELS
from difflex.features.firing import (
    BatchImages,
    FeatureShots,
    FeatureTotals,
    FiringBatch,
    firing_batch,
    random_numbers,
    ranges,
    strongest_of_each,
)
from difflex.records import Activations

MAX_TOKENS = 1 << 16
COPIED_MAPS = 1 << 18
"""Maps copied at once."""
PENDING_MAPS, PENDING_ENTRIES = 1 << 18, 1 << 22
"""Numbers of pending maps and entries from which on they are merged."""
LAST = torch.iinfo(torch.int64).max
COMPARED_FEATURES = 4096
"""Features whose silent shots are chosen at once."""


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """Numbers of examples for each feature and split."""

    top_examples: int = 32
    """Images in which the feature fires most strongly."""
    random_examples: int = 16
    """Random images in which it fires; those that are also top examples are left out."""
    silent_examples: int = 8
    """Random images in which it does not fire."""
    silent_pool: int = 256
    """Random images from which the silent ones of all features are chosen."""
    coactive: int = 16
    """Number of other features, the strongest, recorded at the peak token of each random image."""
    seed: int = 0
    """Seed of all random choices."""

    def __post_init__(self) -> None:
        if min(self.top_examples, self.random_examples, self.silent_examples, self.silent_pool, self.coactive) < 1:
            raise BadInput(f"{self}: the numbers of examples, of pool images and of co-active features must be at least 1.")


@final
class FeatureCollector:
    """Statistics and examples of all features of a dictionary; memory depends on its size only, not on the images.

    All of it is on the device of the dictionary.
    """

    def __init__(self, dictionary: Dictionary, config: CollectConfig) -> None:
        self.dictionary, self.config = dictionary, config
        groups, device = 2 * dictionary.size, dictionary.device
        self.top = TopMaps(groups, config.top_examples, "peak", device=device)
        self.random = TopMaps(groups, config.random_examples, "draw", config.coactive, device=device)
        self.pool = SilentPool(dictionary.size, config.silent_pool, config.seed, device)
        self.totals = FeatureTotals(dictionary.size, device)
        self.grid: tuple[int, int] | None = None
        self.tokens = 0
        """Number of tokens of a shot; 0 before the first batch."""

    def add(self, activations: Sequence[Activations], images: BatchImages) -> list[int]:
        """Add a batch, with `activations` at each timestep, and return the images that may become examples."""
        if not self.tokens:
            self.grid, self.tokens = activations[0].grid, activations[0].values.shape[1]
        if self.tokens > MAX_TOKENS:
            raise BadInput(f"A book holds maps of at most {MAX_TOKENS} tokens; these have {self.tokens}. Use smaller images.")
        for part in activations:
            if part.grid != self.grid or part.values.shape[1] != self.tokens:
                raise BadInput(
                    f"Images of several sizes: {self.tokens} tokens at {part.site} before, {part.values.shape[1]} now. "
                    "All images of a book must have the same size; collect from them separately."
                )
        batch = firing_batch(self.dictionary.encode, [part.values for part in activations])
        timesteps = [float(part.shots[0].timestep or 0.0) for part in activations]
        self.totals.add(batch, timesteps, len(images.keys), self.grid)
        here = BatchImages(*(column.to(self.dictionary.device) for column in images))
        return sorted({*self.pool.add(batch, images), *self._add_examples(batch, here)})

    def _add_examples(self, batch: FiringBatch, images: BatchImages) -> set[int]:
        """Add the maps that may become examples and return their images."""
        timesteps, runs = images.shots.shape[1], batch.feature_shots
        if timesteps > 1:  # of each feature and image the strongest run
            strongest = strongest_of_each(runs.peaks, runs.shots // timesteps, runs.features)
            runs = FeatureShots(*(column[strongest] for column in runs))
        places = runs.shots // timesteps
        groups = 2 * runs.features + images.held_out[places]
        draws = random_numbers(images.keys[places], runs.features, self.config.seed)
        used: set[int] = set()
        for examples, coactive in ((self.top, 0), (self.random, self.config.coactive)):
            chosen = examples.candidates(groups, runs.peaks, draws).nonzero()[:, 0]
            if len(chosen):
                candidates = FeatureShots(*(column[chosen] for column in runs))
                shots = images.shots.flatten()[candidates.shots]
                examples.add(FeatureMaps.of(batch, candidates, groups[chosen], shots, draws[chosen], coactive))
                used.update(places[chosen].unique().tolist())
        return used

    def shots(self) -> Int[Tensor, " shot"]:
        """Return the numbers of all shots that examples use, sorted."""
        pool = self.pool.shots.to(self.dictionary.device)
        selected = [examples.merged().shots.long() for examples in (self.top, self.random)]
        return torch.cat([*selected, pool[pool >= 0]]).unique()

    def on_cpu(self) -> FeatureCollector:
        """Return the same state on the CPU."""
        if self.dictionary.device.type == "cpu":
            return self
        collector = FeatureCollector(self.dictionary.to("cpu"), self.config)
        collector.restore({name: tensor.cpu() for name, tensor in self.tensors().items()})
        return collector

    def tensors(self) -> dict[str, Tensor]:
        """Return the state by name."""
        parts = {"top": self.top.merged()._asdict(), "random": self.random.merged()._asdict(), "pool": self.pool.tensors()}
        if self.tokens:
            parts |= {"totals": self.totals.tensors(), "shape": {"": torch.tensor([self.tokens, *(self.grid or ())])}}
        return {f"{part}.{name}": value for part, tensors in parts.items() for name, value in tensors.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the state from `tensors`."""
        self.top.restore(with_prefix(tensors, "top."))
        self.random.restore(with_prefix(tensors, "random."))
        self.pool.restore(with_prefix(tensors, "pool."))
        if "shape." in tensors:
            self.tokens, *grid = tensors["shape."].tolist()
            self.grid = (grid[0], grid[1]) if grid else None
            self.totals.restore(with_prefix(tensors, "totals."))


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


class FeatureMaps(NamedTuple):
    """Maps of features in shots; the entries of all maps follow one another."""

    groups: Int[Tensor, " map"]
    """Twice the feature, plus 1 if the shot is held out."""
    shots: Int[Tensor, " map"]
    peaks: Float[Tensor, " map"]
    draws: Int[Tensor, " map"]
    """Random numbers that depend on feature and image alone."""
    counts: Int[Tensor, " map"]
    """Number of entries."""
    coactive: Int[Tensor, "map feature"]
    """Other features that fire at the token of the peak; filled up with -1."""
    tokens: Int16[Tensor, " entry"]
    """Modulo 2^16."""
    levels: Int16[Tensor, " entry"]
    """Values in 65535ths of the peak, modulo 2^16."""

    @classmethod
    def empty(cls, coactive: int, device: torch.device | None = None) -> FeatureMaps:
        """Return no maps, with places for `coactive` co-active features."""
        none, features = (torch.zeros(shape, dtype=torch.int32, device=device) for shape in (0, (0, coactive)))
        return cls(none, none, none.float(), none.long(), none, features, none.short(), none.short())

    @classmethod
    def joined(cls, parts: list[FeatureMaps]) -> FeatureMaps:
        """Concatenate `parts` and empty the list, so that little of it is in memory twice."""
        columns = [list(column) for column in zip(*parts, strict=True)]
        parts.clear()
        return cls(*(torch.cat(columns.pop(0)) for _ in range(len(columns))))

    @classmethod
    def of(
        cls, batch: FiringBatch, runs: FeatureShots, groups: Tensor, shots: Tensor, draws: Tensor, coactive: int
    ) -> FeatureMaps:
        """Return the maps of `runs` of a batch, with `coactive` co-active features each."""
        places = ranges(runs.starts, runs.counts)
        shares = batch.pairs.values[places] / torch.repeat_interleave(runs.peaks, runs.counts)
        return cls(
            groups=groups.int(),
            shots=shots.int(),
            peaks=runs.peaks,
            draws=draws,
            counts=runs.counts.int(),
            coactive=_coactive(batch, runs, shares, places, coactive),
            tokens=batch.pairs.tokens[places].to(torch.int16),
            levels=(shares * LEVELS).round_().clamp_(min=1).int().to(torch.int16),
        )

    def take(self, chosen: Int[Tensor, " chosen"]) -> FeatureMaps:
        """Return the `chosen` maps in this order."""
        groups, shots, peaks, draws, counts, coactive = (column[chosen] for column in self[:6])
        starts = (self.counts.cumsum(0) - self.counts)[chosen]
        total = int(counts.sum())
        tokens, levels = self.tokens.new_empty(total), self.levels.new_empty(total)
        copied = 0
        for first, length in zip(starts.split(COPIED_MAPS), counts.split(COPIED_MAPS), strict=True):
            places = ranges(first.long(), length.long())
            for source, target in ((self.tokens, tokens), (self.levels, levels)):
                torch.index_select(source, 0, places, out=target[copied : copied + len(places)])
            copied += len(places)
        return FeatureMaps(groups, shots, peaks, draws, counts, coactive, tokens, levels)


def _coactive(batch: FiringBatch, runs: FeatureShots, shares: Tensor, places: Tensor, count: int) -> Int[Tensor, "run feature"]:
    """Return the other features that fire most strongly at the token of each run's peak."""
    coactive = torch.full((len(runs.features), count), -1, dtype=torch.int32, device=runs.features.device)
    if not count:
        return coactive
    starts = runs.counts.cumsum(0) - runs.counts
    peaks = (shares == 1).nonzero()[:, 0]
    tokens = batch.pairs.tokens[places[peaks[torch.searchsorted(peaks, starts)]]]
    timesteps = len(batch.codes)
    rows, timestep = runs.shots // timesteps * batch.tokens + tokens, runs.shots % timesteps
    for number, codes in enumerate(batch.codes):
        chosen = (timestep == number).nonzero()[:, 0]
        # Codes come strongest first; the feature's own is among them and is left out.
        values, features = (column[:, : count + 1][rows[chosen]] for column in codes)
        features = torch.where((values > 0) & (features != runs.features[chosen, None]), features, -1).int()
        order = (features < 0).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
        coactive[chosen, : order.shape[1]] = features.gather(1, order)
    return coactive


@final
class TopMaps:
    """The first `limit` maps of each group by an order; of each image only the strongest one.

    `peak`: highest peaks, ties broken by the lower draw. `draw`: lowest draws, that is, a random choice of images.
    The result does not depend on the order in which maps are added.
    """

    def __init__(
        self, groups: int, limit: int, order: Literal["peak", "draw"], coactive: int = 0, device: torch.device | None = None
    ) -> None:
        self.limit, self.order = limit, order
        self._maps = FeatureMaps.empty(coactive, device)
        self._groups = groups
        self._pending: list[FeatureMaps] = []
        self._threshold = self._no_threshold()

    def candidates(self, groups: Tensor, peaks: Tensor, draws: Tensor) -> Bool[Tensor, " run"]:
        """Return which maps may be among the first of their group; the others cannot be."""
        return peaks >= self._threshold[groups] if self.order == "peak" else draws <= self._threshold[groups]

    def add(self, maps: FeatureMaps) -> None:
        """Add maps."""
        self._pending.append(maps)
        pending = sum(len(part.groups) for part in self._pending)
        entries = sum(len(part.tokens) for part in self._pending)
        if pending > max(PENDING_MAPS, len(self._maps.groups) // 4) or entries > PENDING_ENTRIES:
            self.merged()

    def merged(self) -> FeatureMaps:
        """Merge the pending maps and return the selection, by group and in order."""
        if self._pending:
            self._pending.insert(0, self._maps)
            self._maps = FeatureMaps.empty(self._maps.coactive.shape[1], self._maps.coactive.device)
            maps = FeatureMaps.joined(self._pending)
            self._maps = maps.take(self._selection(maps))
            self._raise_threshold()
        return self._maps

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the selection from `tensors`."""
        self._pending.clear()
        self._maps = FeatureMaps(**{name: tensor.to(self._threshold.device) for name, tensor in tensors.items()})
        self._raise_threshold()

    def _selection(self, maps: FeatureMaps) -> Int[Tensor, " chosen"]:
        """Return the places of the maps to keep, by group and in order."""
        chosen = self._first(maps, torch.arange(len(maps.groups), device=maps.groups.device))
        draws = torch.sort(maps.draws[chosen]).values
        if not bool((draws[1:] == draws[:-1]).any()):
            return chosen
        # An image came twice: a draw belongs to one feature and one image.
        return self._first(maps, strongest_of_each(maps.peaks, maps.draws, maps.groups))

    def _first(self, maps: FeatureMaps, among: Int[Tensor, " map"]) -> Int[Tensor, " chosen"]:
        """Return the places of the first maps of each group among some places, by group and in order."""
        # One sort of integers: the group in the upper bits, then the order, then the draw to break ties.
        groups, bits = maps.groups[among], max(1, (self._groups - 1).bit_length())
        peaks, draws = maps.peaks[among].view(torch.int32).long(), maps.draws[among]
        keys = (((1 << 31) - 1 - peaks) << (32 - bits)) | (draws >> (31 + bits)) if self.order == "peak" else draws >> bits
        order = torch.argsort((groups.long() << (63 - bits)) | keys, stable=True)
        ordered = groups[order]
        is_first = torch.ones_like(order, dtype=torch.bool)
        is_first[self.limit :] = ordered[self.limit :] != ordered[: -self.limit]
        return among[order[is_first]]

    def _raise_threshold(self) -> None:
        """Set the threshold of each group that has `limit` maps to the last of them."""
        groups, distance = self._maps.groups, self.limit - 1
        is_last = torch.zeros_like(groups, dtype=torch.bool)
        is_last[distance:] = groups[distance:] == groups[: max(0, len(groups) - distance)]
        self._threshold = self._no_threshold()
        self._threshold[groups[is_last]] = (self._maps.peaks if self.order == "peak" else self._maps.draws)[is_last]

    def _no_threshold(self) -> Tensor:
        return torch.full((self._groups,), -torch.inf if self.order == "peak" else LAST, device=self._maps.groups.device)


@final
class SilentPool:
    """Random images of each split, those of the lowest draws, and the features that fire in them at any timestep.

    The images are chosen on the CPU, one by one; the large table is where the dictionary is.
    """

    def __init__(self, size: int, images: int, seed: int, device: torch.device | None = None) -> None:
        self._seed, self._images = seed, images
        self.draws = torch.full((2 * images,), LAST)
        self.keys = torch.zeros(2 * images, dtype=torch.int64)
        self.shots = torch.full((2 * images,), -1, dtype=torch.int64)
        self.fires = torch.zeros(2 * images, size, dtype=torch.bool, device=device)

    def add(self, batch: FiringBatch, images: BatchImages) -> list[int]:
        """Add images of a batch whose draws are low enough and return their places in the batch."""
        draws = random_numbers(images.keys, torch.full_like(images.keys, -1), self._seed)
        added, places = [], batch.feature_shots.shots // images.shots.shape[1]
        for image, draw in enumerate(draws.tolist()):
            part = self._part(bool(images.held_out[image]))
            row = part.start + int(self.draws[part].argmax())
            if draw >= int(self.draws[row]) or bool((self.draws[part] == draw).any()):
                continue
            self.draws[row], self.keys[row] = draw, images.keys[image]
            self.shots[row] = images.shots[image, 0]
            self.fires[row] = False
            self.fires[row, batch.feature_shots.features[places == image]] = True
            added.append(image)
        return added

    def silent(self, held_out: bool, limit: int) -> Int[Tensor, "feature rank"]:
        """Choose for every feature up to `limit` shots of a split in which it is silent; the rest is -1."""
        part = self._part(held_out)
        filled = self.shots[part] >= 0
        keys, shots, fires = self.keys[part][filled], self.shots[part][filled], self.fires[part].cpu()[filled]
        size, limit = fires.shape[1], min(limit, len(shots))
        chosen = torch.full((size, limit), -1)
        for features in torch.arange(size).split(COMPARED_FEATURES) if limit else ():
            draws = random_numbers(keys.expand(len(features), -1), features[:, None].expand(-1, len(keys)), self._seed)
            draws[fires[:, features].T] = LAST
            lowest = draws.topk(limit, dim=1, largest=False, sorted=True)
            chosen[features] = torch.where(lowest.values < LAST, shots[lowest.indices], -1)
        return chosen

    def _part(self, held_out: bool) -> slice:
        return slice(self._images * held_out, self._images * (held_out + 1))

    def tensors(self) -> dict[str, Tensor]:
        """Return the pool by name."""
        return {name: getattr(self, name) for name in ("draws", "keys", "shots", "fires")}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the pool from `tensors`."""
        for name, values in tensors.items():
            getattr(self, name).copy_(values)
