"""Shots at which a feature is silent: chosen at random, of one pool for all features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from jaxtyping import Int
from torch import Tensor

from difflex.features.drawing import drawn
from difflex.features.firing import FiringBatch, ImageBatch

__all__ = ["SilentPool"]

NOBODY = torch.iinfo(torch.int64).max
CHUNK = 4096
"""Features for which shots are chosen at once."""


@final
class SilentPool:
    """For each split the images of the lowest draws, and which features fire in them at any timestep."""

    def __init__(self, size: int, places: int, seed: int) -> None:
        self._seed, self._places = seed, places
        self.draws = torch.full((2 * places,), NOBODY)
        self.keys = torch.zeros(2 * places, dtype=torch.int64)
        self.shots = torch.full((2 * places,), -1, dtype=torch.int64)
        self.fires = torch.zeros(2 * places, size, dtype=torch.bool)

    def add(self, batch: FiringBatch, arrivals: ImageBatch) -> list[int]:
        """The images of the batch that are in the pool now."""
        draws = drawn(arrivals.keys, torch.full_like(arrivals.keys, -1), self._seed)
        came, images = [], batch.spots.shots // arrivals.shots.shape[1]
        for image, draw in enumerate(draws.tolist()):
            half = slice(*(self._places * (int(arrivals.held_out[image]) + side) for side in (0, 1)))
            place = half.start + int(self.draws[half].argmax())
            if draw >= int(self.draws[place]) or bool((self.draws[half] == draw).any()):
                continue
            self.draws[place], self.keys[place] = draw, arrivals.keys[image]
            self.shots[place] = arrivals.shots[image, 0]
            self.fires[place] = False
            self.fires[place, batch.spots.features[images == image]] = True
            came.append(image)
        return came

    def silent(self, held_out: bool, most: int) -> Int[Tensor, "feature rank"]:
        """For every feature up to `most` shots of a split at which it is silent, its own choice; -1 where there are none."""
        half = slice(self._places * held_out, self._places * (held_out + 1))
        there = self.shots[half] >= 0
        keys, shots, fires = self.keys[half][there], self.shots[half][there], self.fires[half][there]
        size, most = fires.shape[1], min(most, len(shots))
        chosen = torch.full((size, most), -1)
        for features in torch.arange(size).split(CHUNK) if most else ():
            draws = drawn(keys.expand(len(features), -1), features[:, None].expand(-1, len(keys)), self._seed)
            draws[fires[:, features].T] = NOBODY
            best = draws.topk(most, dim=1, largest=False, sorted=True)
            chosen[features] = torch.where(best.values < NOBODY, shots[best.indices], -1)
        return chosen

    def tensors(self) -> dict[str, Tensor]:
        """The pool, by name."""
        return {"draws": self.draws, "keys": self.keys, "shots": self.shots, "fires": self.fires}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing; the pool is the one that `tensors` gave."""
        for name, known in tensors.items():
            getattr(self, name).copy_(known)
