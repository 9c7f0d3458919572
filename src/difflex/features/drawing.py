"""Random numbers that depend on what they are for, not on when they are drawn: the same choice in any order, killed or not."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace

import torch
from jaxtyping import Int
from torch import Tensor

from difflex.records import Shot

__all__ = ["drawn", "key_of"]

# The constants of SplitMix64 (Steele et al. 2014), as signed numbers.
ADDED, FIRST, SECOND = (each - (1 << 64) for each in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
POSITIVE = torch.iinfo(torch.int64).max


def key_of(shot: Shot) -> int:
    """A number for the image that a shot belongs to: the same at all its timesteps and levels of noise."""
    told = json.dumps(asdict(replace(shot, timestep=None, noise=None)), sort_keys=True)
    return int.from_bytes(hashlib.sha256(told.encode()).digest()[:8], "big") & POSITIVE


def drawn(keys: Int[Tensor, "*pair"], others: Int[Tensor, "*pair"], seed: int) -> Int[Tensor, "*pair"]:
    """A random number, 0 or above, for each pair of a key and another number."""
    sown = torch.tensor(seed, dtype=torch.int64) * ADDED
    return _mixed(_mixed(keys + sown) + others * ADDED) & POSITIVE


def _mixed(numbers: Tensor) -> Tensor:
    """Numbers whose every bit depends on every bit of `numbers`; products wrap."""
    numbers = (numbers ^ _shifted(numbers, 30)) * FIRST
    numbers = (numbers ^ _shifted(numbers, 27)) * SECOND
    return numbers ^ _shifted(numbers, 31)


def _shifted(numbers: Tensor, by: int) -> Tensor:
    """`numbers` shifted right, zeros coming in."""
    return (numbers >> by) & ((1 << (64 - by)) - 1)
