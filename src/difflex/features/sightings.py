"""Of all shots that stream by, the few that are kept for each feature, with their maps; memory does not grow with the stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int, Int16
from torch import Tensor

from difflex.features.firing import ranges

__all__ = ["LEVELS", "FeatureMaps", "TopMaps"]

LEVELS = 65535
"""Values of a map are whole parts of its peak."""
SLICE = 1 << 18
"""Sightings whose maps are copied at once."""
PATIENCE = 1 << 18
"""How many sightings wait at least before they are sorted in."""
MARKS = 1 << 22
"""How many marks of maps wait at most."""


class FeatureMaps(NamedTuple):
    """A feature in a shot each, with its map."""

    groups: Int[Tensor, " sighting"]
    """Twice the feature, plus 1 if the shot is held out."""
    shots: Int[Tensor, " sighting"]
    peaks: Float[Tensor, " sighting"]
    draws: Int[Tensor, " sighting"]
    """Random numbers that depend on feature and image alone."""
    counts: Int[Tensor, " sighting"]
    """Marks of each map."""
    beside: Int[Tensor, "sighting other"]
    """Which features fire at the token of the peak; -1 where there are no more."""
    tokens: Int16[Tensor, " mark"]
    """Modulo 2^16."""
    levels: Int16[Tensor, " mark"]
    """Values as parts of the peak in 1/65535, modulo 2^16."""

    @classmethod
    def none(cls, beside: int) -> FeatureMaps:
        """No sighting."""
        few = torch.zeros(0, dtype=torch.int32)
        marks = torch.zeros(0, dtype=torch.int16)
        return cls(few, few, torch.zeros(0), few.long(), few, torch.zeros(0, beside, dtype=torch.int32), marks, marks)

    @classmethod
    def joined(cls, parts: list[FeatureMaps]) -> FeatureMaps:
        """All `parts` one after another; the list is emptied, so that memory holds few of them twice."""
        columns = [list(column) for column in zip(*parts, strict=True)]
        parts.clear()
        return cls(*(torch.cat(columns.pop(0)) for _ in range(len(columns))))

    def take(self, chosen: Int[Tensor, " chosen"]) -> FeatureMaps:
        """The `chosen` sightings, in this order."""
        starts, counts = (self.counts.cumsum(0) - self.counts)[chosen], self.counts[chosen]
        total = int(counts.sum())
        marks = [torch.empty(total, dtype=torch.int16) for _ in range(2)]
        done = 0
        for first, length in zip(starts.split(SLICE), counts.split(SLICE), strict=True):
            places = ranges(first.long(), length.long())
            for made, known in zip(marks, (self.tokens, self.levels), strict=True):
                torch.index_select(known, 0, places, out=made[done : done + len(places)])
            done += len(places)
        return FeatureMaps(
            groups=self.groups[chosen],
            shots=self.shots[chosen],
            peaks=self.peaks[chosen],
            draws=self.draws[chosen],
            counts=counts,
            beside=self.beside[chosen],
            tokens=marks[0],
            levels=marks[1],
        )


@final
class TopMaps:
    """Of each group the first `most` sightings by an order; of one image the strongest alone.

    `peak`: the highest peaks, among equals the lower draws. `draw`: the lowest draws, that is, a random choice of images.
    Either depends on what was seen, not on its order.
    """

    def __init__(self, groups: int, most: int, order: Literal["peak", "draw"], beside: int = 0) -> None:
        self.most, self.order = most, order
        self.sightings = FeatureMaps.none(beside)
        self._groups = groups
        self._waiting: list[FeatureMaps] = []
        self._bar = self._no_bar()
        self._may_repeat = False

    def wants(self, groups: Tensor, peaks: Tensor, draws: Tensor) -> Bool[Tensor, " sighting"]:
        """Which sightings may be among the first; others never are."""
        return peaks >= self._bar[groups] if self.order == "peak" else draws <= self._bar[groups]

    def add(self, sightings: FeatureMaps, may_repeat: bool) -> None:
        """Nothing; the sightings are taken into account, sooner or later. They `may_repeat` images that came before."""
        self._waiting.append(sightings)
        self._may_repeat |= may_repeat
        waiting = sum(len(each.groups) for each in self._waiting)
        marks = sum(len(each.tokens) for each in self._waiting)
        if waiting > max(PATIENCE, len(self.sightings.groups) // 4) or marks > MARKS:
            self.settle()

    def settle(self) -> FeatureMaps:
        """What is kept, by group and in order; nothing waits any more."""
        if self._waiting:
            self._waiting.insert(0, self.sightings)
            self.sightings = FeatureMaps.none(self.sightings.beside.shape[1])
            everything = FeatureMaps.joined(self._waiting)
            self.sightings = everything.take(self._first(everything))
            self._raise_bar()
        return self.sightings

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing; what was kept is kept again."""
        self._waiting.clear()
        self.sightings = FeatureMaps(**tensors)
        self._may_repeat = True
        self._raise_bar()

    def _first(self, given: FeatureMaps) -> Int[Tensor, " kept"]:
        """The places of what is kept, by group and in order."""
        order = self._cut(given, torch.arange(len(given.groups)))
        if self._may_repeat:
            kept = torch.sort(given.draws[order]).values
            if bool((kept[1:] == kept[:-1]).any()):
                return self._cut(given, _single(given))
        return order

    def _cut(self, given: FeatureMaps, among: Int[Tensor, " sighting"]) -> Int[Tensor, " kept"]:
        # One sort of whole numbers: the group, then what the order goes by, then what decides among equals.
        groups, bits = given.groups[among], max(1, (self._groups - 1).bit_length())
        peaks, draws = given.peaks[among].view(torch.int32).long(), given.draws[among]
        keys = (((1 << 31) - 1 - peaks) << (32 - bits)) | (draws >> (31 + bits)) if self.order == "peak" else draws >> bits
        order = torch.argsort((groups.long() << (63 - bits)) | keys, stable=True)
        ordered = groups[order]
        first = torch.ones(len(order), dtype=torch.bool)
        first[self.most :] = ordered[self.most :] != ordered[: -self.most]
        return among[order[first]]

    def _raise_bar(self) -> None:
        groups = self.sightings.groups
        before = self.most - 1
        last = torch.zeros(len(groups), dtype=torch.bool)
        last[before:] = groups[before:] == groups[: len(groups) - before]
        self._bar = self._no_bar()
        self._bar[groups[last]] = (self.sightings.peaks if self.order == "peak" else self.sightings.draws)[last]

    def _no_bar(self) -> Tensor:
        if self.order == "peak":
            return torch.full((self._groups,), -torch.inf)
        return torch.full((self._groups,), torch.iinfo(torch.int64).max)


def _single(given: FeatureMaps) -> Int[Tensor, " sighting"]:
    """The places of all sightings but those of an image that, in the same group, has a stronger one."""
    order = torch.argsort(given.peaks, descending=True, stable=True)
    order = order[torch.argsort(given.draws[order], stable=True)]
    order = order[torch.argsort(given.groups[order], stable=True)]
    groups, draws = given.groups[order], given.draws[order]
    again = torch.zeros(len(order), dtype=torch.bool)
    again[1:] = (groups[1:] == groups[:-1]) & (draws[1:] == draws[:-1])
    return order[~again]
