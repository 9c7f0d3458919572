"""`FeatureCollector`: statistics and examples of one dictionary's features, updated batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Int
from torch import Tensor

from difflex.dictionaries import Dictionary
from difflex.errors import BadInput
from difflex.features.examples import FeatureMaps, SilentPool, TopMaps
from difflex.features.firing import BatchImages, FeatureShots, FeatureTotals, FiringBatch, firing_batch, random_numbers
from difflex.records import Activations

__all__ = ["CollectConfig", "FeatureCollector"]

MAX_TOKENS = 1 << 16


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
    """Statistics and examples of all features of a dictionary; memory depends on its size only, not on the images."""

    def __init__(self, dictionary: Dictionary, config: CollectConfig) -> None:
        self.dictionary, self.config = dictionary, config
        self.grid: tuple[int, int] | None = None
        groups = 2 * dictionary.size
        self.top = TopMaps(groups, config.top_examples, "peak")
        self.random = TopMaps(groups, config.random_examples, "draw", config.coactive)
        self.pool = SilentPool(dictionary.size, config.silent_pool, config.seed)
        self.totals: FeatureTotals | None = None
        self.tokens = 0
        """Number of tokens of a shot."""

    def add(self, activations: Sequence[Activations], images: BatchImages) -> list[int]:
        """Add a batch, with `activations` at each timestep, and return the images that may become examples."""
        if self.totals is None:
            self._start(activations[0])
        assert self.totals is not None
        for part in activations:
            if part.grid != self.grid or part.values.shape[1] != self.tokens:
                raise BadInput(
                    f"Images of several sizes: {self.tokens} tokens at {part.site} before, {part.values.shape[1]} now. "
                    "All images of a book must have the same size; collect from them separately."
                )
        batch = firing_batch(self.dictionary.encode, [part.values for part in activations])
        timesteps = [float(part.shots[0].timestep or 0.0) for part in activations]
        self.totals.add(batch, timesteps, len(images.keys))
        return sorted({*self.pool.add(batch, images), *self._add_examples(batch, images)})

    def _start(self, activations: Activations) -> None:
        self.grid, self.tokens = activations.grid, activations.values.shape[1]
        if self.tokens > MAX_TOKENS:
            raise BadInput(f"A book holds maps of at most {MAX_TOKENS} tokens; these have {self.tokens}. Use smaller images.")
        self.totals = FeatureTotals(self.dictionary.size, self.grid)

    def _add_examples(self, batch: FiringBatch, images: BatchImages) -> set[int]:
        """Add the maps that may become examples and return their images."""
        timesteps = images.shots.shape[1]
        runs = batch.feature_shots if timesteps == 1 else _strongest_timesteps(batch.feature_shots, timesteps)
        places = runs.shots // timesteps
        groups = 2 * runs.features + images.held_out[places]
        draws = random_numbers(images.keys[places], runs.features, self.config.seed)
        used: set[int] = set()
        for examples, coactive in ((self.top, 0), (self.random, self.config.coactive)):
            chosen = examples.candidates(groups, runs.peaks, draws).nonzero()[:, 0]
            if len(chosen):
                candidates = FeatureShots(*(column[chosen] for column in runs))
                shots = images.shots.flatten()[candidates.shots]
                maps = FeatureMaps.of(batch, candidates, groups[chosen], shots, draws[chosen], coactive)
                examples.add(maps, images.may_repeat)
                used.update(places[chosen].unique().tolist())
        return used

    def shots(self) -> Int[Tensor, " shot"]:
        """Return the numbers of all shots that examples use, sorted."""
        pool = self.pool.shots
        selected = [examples.merged().shots.long() for examples in (self.top, self.random)]
        return torch.cat([*selected, pool[pool >= 0]]).unique()

    def tensors(self) -> dict[str, Tensor]:
        """Return the state by name."""
        parts = {"top": self.top.merged()._asdict(), "random": self.random.merged()._asdict(), "pool": self.pool.tensors()}
        if self.totals is not None:
            parts["totals"] = self.totals.tensors()
            parts["shape"] = {"": torch.tensor([self.tokens, *(self.grid or ())])}
        return {f"{part}.{name}": value for part, tensors in parts.items() for name, value in tensors.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the state from `tensors`."""
        parts: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            part, _, name = key.partition(".")
            parts.setdefault(part, {})[name] = value
        self.top.restore(parts["top"])
        self.random.restore(parts["random"])
        self.pool.restore(parts["pool"])
        if "shape" in parts:
            self.tokens, *grid = parts["shape"][""].tolist()
            self.grid = (grid[0], grid[1]) if grid else None
            self.totals = FeatureTotals(self.dictionary.size, self.grid)
            self.totals.restore(parts["totals"])


def _strongest_timesteps(runs: FeatureShots, timesteps: int) -> FeatureShots:
    """Return for each feature and image the run of the highest peak, the first among equals."""
    images = runs.shots // timesteps
    order = torch.argsort(runs.peaks, descending=True, stable=True)
    order = order[torch.argsort(images[order], stable=True)]
    order = order[torch.argsort(runs.features[order], stable=True)]
    is_first = torch.ones(len(order), dtype=torch.bool)
    features, images = runs.features[order], images[order]
    is_first[1:] = (features[1:] != features[:-1]) | (images[1:] != images[:-1])
    return FeatureShots(*(column[order[is_first]] for column in runs))
