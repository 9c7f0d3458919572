"""A live sweep: one pass of FLUX.1 (random weights) trains SAEs at four sites, against harvest alone and training alone."""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import difflex
from difflex.dictionaries import DictionaryOrigin
from difflex.records import Site
from difflex.store.live import LiveSites, SiteBatch
from difflex.training import FitConfig, TrainingConfig, default
from difflex.training.data import BatchFeed, TrainingRanks
from difflex.training.fitting import FitRun, FitTask
from gpu_parts import Bar, PartResult, peak_bytes, wait

FLUX = {
    "model": "black-forest-labs/FLUX.1-schnell",
    "untrained": 0,
    "sites": ("double.18", "double.9", "single.9", "single.18"),
    "pixels": (256, 256),
    "images": 32,
    "batch": 4096,
    "updates": 24,
    "middle": ((32_768, 64), (16_384, 64), (16_384, 32)),
    "elsewhere": ((16_384, 64),),
}
TINY = {
    "model": "mini-flux",
    "untrained": None,
    "sites": ("double.1", "single.0"),
    "pixels": (64, 64),
    "images": 4,
    "batch": 64,
    "updates": 8,
    "middle": ((256, 8), (128, 8)),
    "elsewhere": ((128, 8),),
}
OVERHEAD = 1.15


def sweep(device: torch.device) -> PartResult:
    """Return rows for the harvest alone, the training alone, and both at once."""
    scale = FLUX if device.type == "cuda" else TINY
    precision = "bf16" if device.type == "cuda" else "fp32"
    pipe = difflex.load(scale["model"], precision=precision, device=device, untrained=scale["untrained"])
    sites, batch, updates = [pipe.site(name) for name in scale["sites"]], scale["batch"], scale["updates"]
    prompts = [f"image number {number}" for number in range(4 * batch * updates // 64)]
    tokens = batch * updates

    def live(ahead: bool) -> LiveSites:
        shots = pipe.shots(prompts, steps=1, pixels=scale["pixels"], guidance=0.0)
        harvest = partial(pipe.harvest, progress=False)
        return LiveSites(shots, sites, harvest, window=4 * batch, batch=scale["images"], ahead=ahead)

    with live(ahead=False) as activations:
        activations.fill_memory()
        wait(device)
        began = time.perf_counter()
        batches = list(activations.batches(batch, stop=updates))
        harvested = time.perf_counter() - began
        width = max(activations.widths.values())
    method = "standardise" if device.type == "cuda" else "none"  # the tiny run has too few tokens for statistics
    trainings = {
        site: [replace(default(width=width, size=size, k=k), normalisation=method) for size, k in scale[place]]
        for site, place in zip(sites, ("middle", *["elsewhere"] * (len(sites) - 1)), strict=True)
    }
    train(trainings, batches, iter(batches[:8]), batch * 8, device)  # compiles the kernels
    trained = train(trainings, batches, iter(batches), tokens, device)
    together: list[float] = []

    def both() -> None:
        with live(ahead=True) as activations:
            stream = activations.batches(batch, stop=updates)
            together.append(train(trainings, batches, stream, tokens, device))

    peak = peak_bytes(device, both) / 2**30
    count, cost = sum(map(len, trainings.values())), together[0] / max(harvested, trained)
    result = PartResult(
        f"A live sweep of {count} SAEs at {len(sites)} sites of {scale['model']}, {tokens} tokens, batch {batch}:",
        ("harvest alone, tokens/s", "training alone", "both at once", "time over that of the slower", "peak GiB"),
    )
    speeds = [f"{tokens / seconds:,.0f}" for seconds in (harvested, trained, together[0])]
    result.add(*speeds, f"{cost:.2f}x", f"{peak:.1f}")
    if device.type == "cuda":
        result.bars.append(Bar("live sweep over the slower of harvest and training", cost, OVERHEAD))
    return result


def train(
    trainings: dict[Site, list[TrainingConfig]],
    first: list[SiteBatch],
    stream: Iterator[SiteBatch],
    tokens: int,
    device: torch.device,
) -> float:
    """Return the seconds of a training on `stream`; `first` gives the statistics, which are not timed."""
    config, ranks = FitConfig(tokens=tokens, epoch=tokens, progress=False), TrainingRanks()
    sources = iter((iter(first), stream))
    with tempfile.TemporaryDirectory() as folder:
        tasks = {
            Path(folder) / site.folder / training.label: FitTask(DictionaryOrigin(site=site), training)
            for site, several in trainings.items()
            for training in several
        }
        run = FitRun(tasks, BatchFeed(lambda start: next(sources), ranks, device, sharded=False), config, ranks, device)
        wait(device)
        began = time.perf_counter()
        run.train()
        wait(device)
        return time.perf_counter() - began


PARTS = {"live-sweep": sweep}
