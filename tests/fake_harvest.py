"""A harvest without a model: random activations with a seed made from the shot."""

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, groupby, islice

import torch
from torch import Tensor

from difflex.records import Activations, Shot, Site

SITES = (Site("double.1"), Site("single.0", "update"), Site("double.1", stream="text"))


def fake_shots(runs: int | None, steps: int = 1, word: str = "star") -> Iterator[Shot]:
    """Yield the shots of `runs` prompts, endless if None."""
    for i in count() if runs is None else range(runs):
        prompt = f"{word} {i}"
        for step in range(steps):
            yield Shot(
                model="fake",
                prompt=prompt,
                seed=i % 3,
                pixels=(64, 64),
                steps=steps,
                guidance=0.0,
                timestep=1000.0 - 250.0 * step,
                split=Shot.split_of(prompt),
            )


def activation(shot: Shot, site: Site, tokens: int, width: int) -> Tensor:
    """Return the activations of `shot` at `site`: axes with different means and deviations."""
    key = hashlib.sha256(f"{shot.prompt}/{shot.seed}/{shot.timestep}/{site}".encode()).digest()
    noise = torch.randn(tokens, width, generator=torch.Generator().manual_seed(int.from_bytes(key[:7], "big")))
    axes = torch.arange(width)
    return noise * (1 + axes % 3) + 10.0 * (axes % 5 == 0)


@dataclass
class FakeHarvest:
    """A stand-in for the `harvest` of a pipeline that counts its shots."""

    tokens: int = 8
    width: int = 16
    delay: float = 0.0
    """Seconds per batch."""
    shot_count: int = 0
    """Shots harvested so far."""

    def __call__(self, shots: Iterable[Shot], sites: Sequence[Site], batch: int) -> Iterator[Activations]:
        runs = (list(alike) for _, alike in groupby(shots, key=lambda shot: replace(shot, timestep=None)))
        while together := list(islice(runs, batch)):
            time.sleep(self.delay)
            # Like a pipeline: all runs of a batch at one step, then at the next.
            for at_step in zip(*together, strict=True):
                self.shot_count += len(at_step)
                for site in sites:
                    tokens = self.tokens // 2 if site.stream == "text" else self.tokens
                    values = torch.stack([activation(shot, site, tokens, self.width) for shot in at_step])
                    grid = (2, tokens // 2) if site.stream == "image" else None
                    yield Activations(site=site, values=values, shots=at_step, grid=grid)
