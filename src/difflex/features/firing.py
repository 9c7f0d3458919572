"""Where features fire in a batch of images, computed from sparse codes, and sums over all batches for each feature."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from difflex.records import Codes, Shot

ENCODED_TOKENS = 8192
"""Tokens encoded at once."""
Encode = Callable[[Float[Tensor, "token width"]], Codes]

# The constants of SplitMix64 (Steele et al. 2014), as signed numbers.
ADDED, FIRST, SECOND = (constant - (1 << 64) for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
POSITIVE = torch.iinfo(torch.int64).max

BINS, FIRST_BIN = 128, -64
"""Histogram of values from 2^-16 to 2^16, four bins per doubling; values beyond go into the outermost bins."""
PARTS = 4
"""Rows and columns of the parts of an image that `position` is about."""


def image_key(shot: Shot) -> int:
    """Return a number that identifies the image of a shot, the same at all timesteps and noise levels."""
    entries = replace(shot, timestep=None, noise=None).as_json()
    entries["picture"] = entries.pop("image")  # the name under which it is hashed: renaming it would change random choices
    return int.from_bytes(hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).digest()[:8], "big") & POSITIVE


def random_numbers(keys: Int[Tensor, "*pair"], features: Int[Tensor, "*pair"], seed: int) -> Int[Tensor, "*pair"]:
    """Return a non-negative random number for each pair of image key and feature; it depends on these and the seed alone."""
    offset = (seed * ADDED + (1 << 63)) % (1 << 64) - (1 << 63)  # a product of 64 bits that wraps
    return _mixed(_mixed(keys + offset) + features * ADDED) & POSITIVE


def _mixed(numbers: Tensor) -> Tensor:
    """Hash 64-bit `numbers`; products wrap."""
    numbers = (numbers ^ _shifted(numbers, 30)) * FIRST
    numbers = (numbers ^ _shifted(numbers, 27)) * SECOND
    return numbers ^ _shifted(numbers, 31)


def _shifted(numbers: Tensor, by: int) -> Tensor:
    """Shift `numbers` right, filling with zeros."""
    return (numbers >> by) & ((1 << (64 - by)) - 1)


class BatchImages(NamedTuple):
    """The images of a batch, all at the same timesteps."""

    shots: Int[Tensor, "image timestep"]
    """Numbers of the shots."""
    keys: Int[Tensor, " image"]
    """`image_key` of each."""
    held_out: Bool[Tensor, " image"]


class FiringPairs(NamedTuple):
    """Pairs of a token and a feature that fires there, sorted by feature, shot and token."""

    features: Int[Tensor, " pair"]
    shots: Int[Tensor, " pair"]
    """Place in the batch: image by image, and for each image timestep by timestep."""
    tokens: Int[Tensor, " pair"]
    """Position within the shot."""
    values: Float[Tensor, " pair"]


class FeatureShots(NamedTuple):
    """Pairs of a feature and a shot in which it fires: consecutive runs of `FiringPairs`."""

    features: Int[Tensor, " run"]
    shots: Int[Tensor, " run"]
    """Place in the batch, as in `FiringPairs`."""
    starts: Int[Tensor, " run"]
    """First firing pair."""
    counts: Int[Tensor, " run"]
    """Number of firing pairs."""
    peaks: Float[Tensor, " run"]


class FiringBatch(NamedTuple):
    """Where features fire in a batch of images."""

    pairs: FiringPairs
    feature_shots: FeatureShots
    codes: tuple[Codes, ...]
    """Codes at each timestep."""
    tokens: int
    """Number of tokens of a shot."""


def firing_batch(encode: Encode, activations: Sequence[Float[Tensor, "image token width"]]) -> FiringBatch:
    """Encode the activations of images at one or several timesteps and return where features fire."""
    tokens = activations[0].shape[1]
    codes = tuple(_encoded(encode, values.flatten(0, 1)) for values in activations)
    parts = [_pairs(part, place, len(codes), tokens) for place, part in enumerate(codes)]
    joined = FiringPairs(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
    # Torch sorts int32 three times faster than int64.
    features, order = torch.sort(joined.features, stable=True)
    pairs = FiringPairs(features, joined.shots[order], joined.tokens[order], joined.values[order])
    return FiringBatch(pairs, _feature_shots(pairs), codes, tokens)


def ranges(starts: Int[Tensor, " range"], counts: Int[Tensor, " range"]) -> Int[Tensor, " place"]:
    """Return the places of all ranges, one range after another."""
    ends = counts.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    offsets = torch.repeat_interleave(starts - (ends - counts), counts, output_size=total)
    return torch.arange(total, device=ends.device) + offsets


def strongest_first(values: Float[Tensor, " row"], *keys: Int[Tensor, " row"]) -> Int[Tensor, " row"]:
    """Return the places of rows sorted by `keys`, the last one first, and within equal keys by falling value."""
    order = torch.argsort(values, descending=True, stable=True)
    for key in keys:
        order = order[torch.argsort(key[order], stable=True)]
    return order


def strongest_of_each(values: Float[Tensor, " row"], *keys: Int[Tensor, " row"]) -> Int[Tensor, " group"]:
    """Return the place of the row of the highest value, the first among equals, for each combination of keys."""
    order = strongest_first(values, *keys)
    return order[_begins(*(key[order] for key in keys))]


def _begins(*keys: Int[Tensor, " row"]) -> Bool[Tensor, " row"]:
    """Return which rows differ from the row before in one of the keys."""
    begins = torch.zeros_like(keys[0], dtype=torch.bool)
    begins[:1] = True
    for key in keys:
        begins[1:] |= key[1:] != key[:-1]
    return begins


def _encoded(encode: Encode, values: Float[Tensor, "token width"]) -> Codes:
    parts = [encode(part) for part in values.split(ENCODED_TOKENS)]
    slots = max(part.values.shape[1] for part in parts)
    padded = [[functional.pad(column, (0, slots - column.shape[1])) for column in part] for part in parts]
    values, indices = (torch.cat(columns) for columns in zip(*padded, strict=True))
    return Codes(values.float(), indices)


def _pairs(codes: Codes, place: int, timesteps: int, tokens: int) -> FiringPairs:
    """Return the positive codes at timestep number `place` of `timesteps`, token by token."""
    (rows, slots), device = codes.values.shape, codes.values.device
    features, values = codes.indices.to(torch.int32).flatten(), codes.values.flatten()
    shots = torch.arange(place, rows // tokens * timesteps, timesteps, dtype=torch.int32, device=device)
    shots = shots.repeat_interleave(tokens * slots)
    positions = torch.arange(tokens, dtype=torch.int32, device=device).repeat_interleave(slots).repeat(rows // tokens)
    positive = values > 0
    if bool(positive.all()):
        return FiringPairs(features, shots, positions, values)
    chosen = positive.nonzero()[:, 0]
    return FiringPairs(features[chosen], shots[chosen], positions[chosen], values[chosen])


def _feature_shots(pairs: FiringPairs) -> FeatureShots:
    starts = _begins(pairs.features, pairs.shots).nonzero()[:, 0]
    counts = torch.diff(starts, append=starts.new_full((1,), len(pairs.values)))
    peaks = torch.segment_reduce(pairs.values, "max", lengths=counts) if len(starts) else pairs.values[:0]
    return FeatureShots(pairs.features[starts].long(), pairs.shots[starts].long(), starts, counts, peaks)


@final
class FeatureTotals:
    """Sums over all tokens for each of `size` features: how often it fires, how strongly, when and where."""

    def __init__(self, size: int, device: torch.device | None = None) -> None:
        self.size = size
        zeros = partial(torch.zeros, device=device)
        self.firings, self.shots, self.negatives = (zeros(size, dtype=torch.int64) for _ in range(3))
        self.sums, self.border_sums = (zeros(size, dtype=torch.float64) for _ in range(2))
        self.peaks, self.lowest = zeros(size), zeros(size)
        self.histogram = zeros(size, BINS, dtype=torch.int32)
        self.part_sums = zeros(size, PARTS * PARTS, dtype=torch.float64)
        self.timestep_firings: dict[float, Int[Tensor, " size"]] = {}
        self.timestep_tokens: dict[float, int] = {}

    def add(self, batch: FiringBatch, timesteps: Sequence[float], images: int, grid: tuple[int, int] | None) -> None:
        """Add a batch of `images` at these timesteps, whose tokens form a `grid`."""
        (features, _, tokens, values), runs = batch.pairs, batch.feature_shots
        self.firings += torch.bincount(features, minlength=self.size)
        self.shots += torch.bincount(runs.features, minlength=self.size)
        if len(runs.starts):
            self.sums.index_add_(0, runs.features, torch.segment_reduce(values, "sum", lengths=runs.counts).double())
        self.peaks.scatter_reduce_(0, runs.features, runs.peaks, "amax")
        self.histogram.view(-1).index_add_(0, features * BINS + _bins(values), torch.ones_like(features))
        if grid is not None:
            part, border = (column.to(values.device) for column in _layout(*grid))
            self.part_sums.view(-1).index_add_(0, features * PARTS**2 + part[tokens], values.double())
            self.border_sums.index_add_(0, features, (values * border[tokens]).double())
        self._add_timesteps(batch, timesteps, images)
        for codes in batch.codes:
            is_negative = codes.values < 0
            negative = codes.indices[is_negative].long()
            self.negatives += torch.bincount(negative, minlength=self.size)
            self.lowest.scatter_reduce_(0, negative, codes.values[is_negative], "amin")

    def _add_timesteps(self, batch: FiringBatch, timesteps: Sequence[float], images: int) -> None:
        places = batch.pairs.shots % len(timesteps) if len(timesteps) > 1 else None
        for place, timestep in enumerate(timesteps):
            features = batch.pairs.features if places is None else batch.pairs.features[places == place]
            firings = self.timestep_firings.setdefault(timestep, torch.zeros_like(self.firings))
            firings += torch.bincount(features, minlength=self.size)
            self.timestep_tokens[timestep] = self.timestep_tokens.get(timestep, 0) + images * batch.tokens

    @property
    def tokens(self) -> int:
        """Number of tokens in all batches."""
        return sum(self.timestep_tokens.values())

    def position(self, grid: tuple[int, int]) -> Float[Tensor, " size"]:
        """Return `FeatureStats.position` of all features."""
        part, _ = _layout(*grid)
        even = torch.bincount(part, minlength=PARTS**2) / len(part)
        shares = self.part_sums / self.part_sums.sum(1, keepdim=True).clamp_min(1e-300)
        return (shares - even).clamp_min(0).sum(1)

    def border(self, grid: tuple[int, int]) -> Float[Tensor, " size"]:
        """Return `FeatureStats.border` of all features."""
        return self.border_sums / self.sums.clamp_min(1e-300) / _layout(*grid)[1].mean()

    def tensors(self) -> dict[str, Tensor]:
        """Return all sums by name."""
        names = ("firings", "shots", "negatives", "sums", "border_sums", "peaks", "lowest", "histogram", "part_sums")
        timesteps, firings = list(self.timestep_tokens), list(self.timestep_firings.values())
        return {
            **{name: getattr(self, name) for name in names},
            "timesteps": torch.tensor(timesteps, dtype=torch.float64),
            "timestep tokens": torch.tensor([self.timestep_tokens[timestep] for timestep in timesteps], dtype=torch.int64),
            "timestep firings": torch.stack(firings) if firings else torch.zeros(0, self.size),
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the sums from `tensors`."""
        sums = dict(tensors)
        timesteps = sums.pop("timesteps").tolist()
        self.timestep_tokens = dict(zip(timesteps, sums.pop("timestep tokens").tolist(), strict=True))
        firings = sums.pop("timestep firings")
        columns = (column.to(self.firings.device, copy=True) for column in firings)
        self.timestep_firings = dict(zip(timesteps, columns, strict=True))
        for name, values in sums.items():
            getattr(self, name).copy_(values)


def _bins(values: Float[Tensor, " pair"]) -> Int[Tensor, " pair"]:
    """Return the histogram bin of each value, from its exponent and the first two bits of its mantissa."""
    quarters = (values.view(torch.int32) >> 21) - 4 * 127
    return (quarters - FIRST_BIN).clamp_(0, BINS - 1)


@cache
def _layout(rows: int, columns: int) -> tuple[Int[Tensor, " token"], Float[Tensor, " token"]]:
    """Return the part of the image that each token is in, and 1 for tokens at the border."""
    row, column = torch.arange(rows)[:, None].expand(rows, columns), torch.arange(columns).expand(rows, columns)
    part = row * PARTS // rows * PARTS + column * PARTS // columns
    border = (row == 0) | (column == 0) | (row == rows - 1) | (column == columns - 1)
    return part.flatten().int(), border.flatten().float()
