"""Where features fire in a batch of images, feature after feature: what sparse codes say, without a dense matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from difflex.records import Codes

__all__ = ["FeatureShots", "FiringBatch", "FiringPairs", "ImageBatch", "NegativeCodes", "fired", "ranges"]

CHUNK = 8192
"""Tokens encoded at once."""
Encode = Callable[[Float[Tensor, "token width"]], Codes]


class ImageBatch(NamedTuple):
    """The images of a batch, each seen at the same timesteps."""

    shots: Int[Tensor, "image timestep"]
    """The numbers of their shots."""
    keys: Int[Tensor, " image"]
    """Random numbers that depend on what the images are, and on nothing else."""
    held_out: Bool[Tensor, " image"]
    may_repeat: bool
    """Whether some of them may have come before."""


class NegativeCodes(NamedTuple):
    """Codes below 0, which do not count as firing."""

    features: Int[Tensor, " code"]
    values: Float[Tensor, " code"]


class FiringPairs(NamedTuple):
    """Pairs of token and feature in the order of features; for one feature those of a shot stand together, in order of tokens."""

    features: Int[Tensor, " pair"]
    shots: Int[Tensor, " pair"]
    """Counted through the images of the batch, for each through its timesteps."""
    tokens: Int[Tensor, " pair"]
    """Within the shot."""
    values: Float[Tensor, " pair"]


class FeatureShots(NamedTuple):
    """One feature in one shot each: neighbours among the pairs."""

    features: Int[Tensor, " spot"]
    shots: Int[Tensor, " spot"]
    """Counted through the images of the batch, for each through its timesteps."""
    starts: Int[Tensor, " spot"]
    """The first pair of each."""
    counts: Int[Tensor, " spot"]
    peaks: Float[Tensor, " spot"]


class FiringBatch(NamedTuple):
    """What the codes of a batch of images say."""

    fired: FiringPairs
    negative: NegativeCodes
    spots: FeatureShots
    codes: tuple[Codes, ...]
    """Of each timestep."""
    tokens: int
    """Of a shot."""


def fired(encode: Encode, seen: Sequence[Float[Tensor, "image token width"]]) -> FiringBatch:
    """Where the features that `encode` knows fire in images, seen at one or several timesteps."""
    tokens = seen[0].shape[1]
    codes = tuple(_encoded(encode, values.flatten(0, 1)) for values in seen)
    parts = [_pairs(each, step, len(seen), tokens) for step, each in enumerate(codes)]
    joined = FiringPairs(*(torch.cat(part) for part in zip(*parts, strict=True)))
    # 32 bits are sorted by digit, three times faster than 64.
    features, order = torch.sort(joined.features, stable=True)
    pairs = FiringPairs(features, joined.shots[order], joined.tokens[order], joined.values[order])
    return FiringBatch(pairs, _negative(codes), _spots(pairs), codes, tokens)


def ranges(starts: Int[Tensor, " range"], counts: Int[Tensor, " range"]) -> Int[Tensor, " place"]:
    """The places from each start on, as many as its count says, range after range."""
    ends = counts.cumsum(0)
    return torch.arange(int(ends[-1]) if len(ends) else 0) + torch.repeat_interleave(starts - (ends - counts), counts)


def _encoded(encode: Encode, values: Float[Tensor, "token width"]) -> Codes:
    parts = [encode(part) for part in values.split(CHUNK)]
    slots = max(part.values.shape[1] for part in parts)
    wide = [[functional.pad(each, (0, slots - each.shape[1])).cpu() for each in part] for part in parts]
    strengths, indices = (torch.cat(each) for each in zip(*wide, strict=True))
    return Codes(strengths.float(), indices)


def _pairs(codes: Codes, step: int, of: int, tokens: int) -> FiringPairs:
    """The codes of one timestep of several that are above 0, token by token."""
    rows, slots = codes.values.shape
    features, values = codes.indices.to(torch.int32).flatten(), codes.values.flatten()
    shots = torch.arange(step, rows // tokens * of, of, dtype=torch.int32).repeat_interleave(tokens * slots)
    places = torch.arange(tokens, dtype=torch.int32).repeat_interleave(slots).repeat(rows // tokens)
    positive = values > 0
    if bool(positive.all()):
        return FiringPairs(features, shots, places, values)
    there = positive.nonzero()[:, 0]
    return FiringPairs(features[there], shots[there], places[there], values[there])


def _negative(codes: Sequence[Codes]) -> NegativeCodes:
    below = [each.values < 0 for each in codes]
    features = torch.cat([each.indices[there] for each, there in zip(codes, below, strict=True)])
    return NegativeCodes(features.long(), torch.cat([each.values[there] for each, there in zip(codes, below, strict=True)]))


def _spots(pairs: FiringPairs) -> FeatureShots:
    begins = torch.ones(len(pairs.values), dtype=torch.bool)
    begins[1:] = (pairs.features[1:] != pairs.features[:-1]) | (pairs.shots[1:] != pairs.shots[:-1])
    starts = begins.nonzero()[:, 0]
    counts = torch.diff(starts, append=torch.tensor([len(begins)]))
    peaks = torch.segment_reduce(pairs.values, "max", lengths=counts) if len(starts) else pairs.values[:0]
    return FeatureShots(pairs.features[starts].long(), pairs.shots[starts].long(), starts, counts, peaks)
