"""A live sweep on mini-flux: its time over that of the slower of harvest and training, each on one core.

Harvest and training run on a thread of their own, on one core each, so two cores must be idle. Rounds alternate.
"""

import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

import difflex
from difflex.dictionaries import DictionaryOrigin
from difflex.miniature.captions import endless_captions
from difflex.records import Site
from difflex.store.live import LiveSites, SiteBatch
from difflex.training import FitConfig, default
from difflex.training.fitting import FitTask
from difflex.training.groups import fit_tasks

torch.set_num_threads(1)
SITES = (Site("double.1"), Site("single.0"))
TOKENS, BATCH, WINDOW, ROUNDS = 24_576, 1024, 2048, 3
OVERHEAD = 1.15
TRAININGS = [default(width=192, size=size, k=16) for size in (2048, 4096)]


def live(ahead: bool) -> LiveSites:
    """Return the activations of the model while it runs."""
    pipe = difflex.load("mini-flux", device="cpu")
    shots = pipe.shots(endless_captions(10**6))
    return LiveSites(shots, SITES, partial(pipe.harvest, progress=False), window=WINDOW, batch=16, ahead=ahead)


def harvest() -> tuple[float, list[SiteBatch]]:
    """Return the time of the harvest alone, and its batches."""
    with live(ahead=False) as activations:
        activations.fill_memory()
        began = time.perf_counter()
        batches = list(activations.batches(BATCH, stop=TOKENS // BATCH))
        return time.perf_counter() - began, batches


def train(batches: Iterator[SiteBatch]) -> float:
    """Return the time of a training on these batches."""
    config, began = FitConfig(tokens=TOKENS, checkpoints="compact", progress=False), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tasks = {
            Path(folder) / site.folder / training.label: FitTask(DictionaryOrigin(site=site), training)
            for site, training in itertools.product(SITES, TRAININGS)
        }
        stream = fit_tasks(tasks, lambda start: batches, config=config, device=torch.device("cpu"), replay=True)
        assert sum(1 for _ in stream) == len(tasks)
    return time.perf_counter() - began


def main() -> int:
    """Return 0 if the bar is met, else 1."""
    ratios = []
    for _ in range(ROUNDS):
        harvested, batches = harvest()
        trained = train(iter(batches))
        with live(ahead=True) as activations:
            activations.fill_memory()
            together = train(activations.batches(BATCH, stop=TOKENS // BATCH))
        ratios.append(together / max(harvested, trained))
        print(f"  harvest {harvested:.1f} s, training {trained:.1f} s, both at once {together:.1f} s")
    ratio = statistics.median(ratios)
    print(f"live: {ratio:.2f}x the slower of harvest and training (bar {OVERHEAD}x): {'met' if ratio <= OVERHEAD else 'MISSED'}")
    return ratio > OVERHEAD


if __name__ == "__main__":
    sys.exit(main())
