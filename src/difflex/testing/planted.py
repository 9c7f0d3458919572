"""Planted dictionaries: activations that are sparse mixtures of known directions, to hold what is learned to the truth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from difflex.records import ActivationBatch

__all__ = ["PlantedDictionary", "PlantedRecovery"]


class PlantedRecovery(NamedTuple):
    """How well planted directions were found, as the best cosine of each."""

    mean: float
    rarest: float
    """Mean over the rarest quarter."""


@dataclass(frozen=True, kw_only=True)
class PlantedDictionary:
    """A world of `truths` directions, of which `active` fire at a token on average."""

    width: int = 256
    truths: int = 1024
    active: float = 12.0
    exponent: float = 0.5
    """The i-th truth fires with a frequency proportional to `i ** -exponent`."""
    stretched: int = 16
    """Axes that are made `stretch` times as wide, as large models have them."""
    stretch: float = 8.0
    noise: float = 0.05
    """Variance of the noise over the variance of the mixture, before stretching."""
    seed: int = 0

    @cached_property
    def frequencies(self) -> Float[Tensor, " truth"]:
        """The share of tokens at which each truth fires, falling."""
        ranks = torch.arange(1, self.truths + 1, dtype=torch.float64) ** -self.exponent
        return (ranks * self.active / ranks.sum()).float().clamp_max(1)

    @cached_property
    def directions(self) -> Float[Tensor, "truth width"]:
        """The truths in model space, at length one."""
        return F.normalize(self._mixed * self._axes, dim=1)

    def batches(self, batch: int, start: int = 0) -> Iterator[ActivationBatch]:
        """Endless batches of `batch` rows from number `start` on; each depends on its number and the seed alone."""
        for number in count(start):
            generator = self._generator(number + 1)
            fires = torch.rand(batch, self.truths, generator=generator) < self.frequencies
            amounts = fires * (0.5 + torch.rand(batch, self.truths, generator=generator))
            noise = torch.randn(batch, self.width, generator=generator) * self._noise_scale
            first = number * batch
            yield ActivationBatch(
                (amounts @ self._mixed + noise) * self._axes, torch.arange(first, first + batch), torch.zeros(batch).long()
            )

    def recovery(self, decoder: Float[Tensor, "size width"]) -> PlantedRecovery:
        """How well the rows of `decoder`, in model space, hold the truths; compared unstretched, where no axis outweighs."""
        rows = F.normalize(decoder / self._axes, dim=1)
        best = torch.cat([(part @ rows.T).amax(1) for part in self._mixed.split(1024)])
        return PlantedRecovery(float(best.mean()), float(best[-(self.truths // 4) :].mean()))

    @cached_property
    def _mixed(self) -> Float[Tensor, "truth width"]:
        return F.normalize(torch.randn(self.truths, self.width, generator=self._generator(0)), dim=1)

    @cached_property
    def _axes(self) -> Float[Tensor, " width"]:
        axes = torch.ones(self.width)
        axes[: self.stretched] = self.stretch
        return axes

    @cached_property
    def _noise_scale(self) -> float:
        """Standard deviation of the noise on every axis."""
        square = 1 + 1 / 12  # mean square of an amount that is uniform between 0.5 and 1.5
        return (self.noise * float(self.frequencies.sum()) * square / self.width) ** 0.5

    def _generator(self, number: int) -> torch.Generator:
        """Randomness that no small seed elsewhere shares: else a learner could begin with the truth."""
        return torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + number)
