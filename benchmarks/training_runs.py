"""Whole runs on mini-flux: the cost of a sweep over that of one dictionary, harvest included, and the time waiting for data.

The site is the residual stream of the middle double block. The sweep is timed by the CPU time of the process, on one thread, in
alternating rounds.
"""

import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

import difflex
from difflex.cli import main as command
from difflex.dictionaries import DictionaryOrigin
from difflex.miniature.captions import endless_captions
from difflex.records import Site
from difflex.store import LiveActivations, Store
from difflex.training import FitConfig, TrainingConfig, default, fit
from difflex.training.data import Batches

torch.set_num_threads(1)
SITE = Site("double.1")
SWEEP, WAITING = 2.5, 0.05
TOKENS, BATCH, ROUNDS = 65_536, 1024, 3
SIX = [default(width=192, size=size, k=k) for size in (2048, 1024) for k in (32, 16, 8)]
"""The most expensive first: the six are compared with it."""


def seconds(trainings: list[TrainingConfig], batches: Batches) -> float:
    """Return the CPU time of a training, including that of `batches`."""
    config = FitConfig(tokens=TOKENS, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        fit(
            {Path(folder) / training.label: training for training in trainings},
            batches,
            origin=DictionaryOrigin(site=SITE),
            config=config,
        )
        return time.process_time() - began


def sweep() -> float:
    """Return the time of six dictionaries in one pass over that of one, both from a running pipeline."""
    pipe = difflex.load("mini-flux", device="cpu")
    harvest = partial(pipe.harvest, progress=False)

    def batches(start: int):
        shots = pipe.shots(endless_captions(10**6))
        return LiveActivations(shots, SITE, lambda *arguments: harvest(*arguments), window=16_384, batch=16).batches(
            BATCH, start=start
        )

    times = {count: [] for count in (1, 6)}
    for number in range(ROUNDS):
        for count in list(times)[:: 1 if number % 2 else -1]:
            times[count].append(seconds(SIX[:count], batches))
    print(f"  one dictionary {statistics.median(times[1]):.1f} s, six {statistics.median(times[6]):.1f} s, harvest included")
    return statistics.median(six / one for one, six in zip(times[1], times[6], strict=True))


def waiting(folder: Path) -> float:
    """Return the share of time that training from a store waits for data, from its log."""
    words = ["harvest", "mini-flux", "--prompts", "captions", "--site", str(SITE), "--out", str(folder / "study")]
    assert command([*words, "--tokens", str(TOKENS)]) == 0
    store = Store.open(folder / "study" / "activations" / SITE.folder)
    config = FitConfig(tokens=8 * TOKENS, progress=False)

    def batches(start: int):
        return store.batches(BATCH, start=start, epochs=None)

    fit({folder / "one": SIX[0]}, batches, origin=DictionaryOrigin(site=SITE), config=config)
    lines = [json.loads(line) for line in (folder / "one" / "training" / "log.jsonl").read_text().splitlines()]
    last = [line for line in lines if "waiting" in line][-1]
    print(f"  from a store: {last['tokens_per_second']} tokens/s, {last['waiting']:.1%} of the time spent waiting for data")
    return last["waiting"]


def main() -> int:
    """Return 0 if both bars are met, else 1."""
    ratio = sweep()
    with tempfile.TemporaryDirectory() as folder:
        share = waiting(Path(folder))
    met = ratio < SWEEP and share < WAITING
    print(
        f"training_runs: six dictionaries {ratio:.2f}x one (bar {SWEEP}x), waiting {share:.1%} (bar {WAITING:.0%}): "
        f"{'met' if met else 'MISSED'}"
    )
    return not met


if __name__ == "__main__":
    sys.exit(main())
