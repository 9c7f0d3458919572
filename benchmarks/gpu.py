"""What one card does at the real sizes: reading full FLUX.1 (12 B parameters, random weights) and training a large dictionary.

Reading: tokens per second at `double.18`, 256 pixels, one step, bf16 and nf4, for each batch size; peak memory; the share of the
card's own matrix-product rate that is reached. Training: width 3072, size 65536, k 64, batch 4096, sparsify and
dictionary_learning beside it. `--write` puts the figures with date and card into docs/performance.md. Without a card everything
runs at a tiny size on the CPU, which shows that it works and measures nothing.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch
from peers.clients import start_learners
from torch.utils.flop_counter import FlopCounterMode

import difflex
from difflex.errors import OutOfMemory
from difflex.pipeline import Pipeline
from difflex.records import Shot

ROOT = Path(__file__).parent.parent
PYTHON = ROOT / ".venv-peers" / "bin" / "python"
PEERS = ("sparsify", "dictionary_learning")


class Sizes(NamedTuple):
    """What is measured."""

    model: str
    untrained: int | None
    site: str
    pixels: tuple[int, int]
    batches: tuple[int, ...]
    matrix: int
    """Side of the matrices whose product gives the ceiling."""
    width: int
    size: int
    k: int
    batch: int


CARD = Sizes(
    "black-forest-labs/FLUX.1-schnell", 0, "double.18", (256, 256), (1, 2, 4, 8, 16, 32, 64), 8192, 3072, 65_536, 64, 4096
)
TINY = Sizes("mini-flux", None, "double.2", (64, 64), (1,), 256, 64, 1024, 8, 128)


def seconds(work: Callable[[], object], device: torch.device, rounds: int = 3) -> float:
    """The median wall time of `work`, all of it finished, after one to warm up."""
    times = []
    for _ in range(rounds + 1):
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ceiling(sizes: Sizes, device: torch.device) -> float:
    """Operations per second of a plain bf16 product."""
    left, right = (torch.randn(sizes.matrix, sizes.matrix, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * sizes.matrix**3 / seconds(lambda: left @ right, device)


def shots_of(pipe: Pipeline, sizes: Sizes, count: int) -> list[Shot]:
    prompts = [f"image number {number}" for number in range(count)]
    return list(pipe.shots(prompts, steps=1, pixels=sizes.pixels, guidance=0.0))


def reading(sizes: Sizes, device: torch.device, precision: str, most: float) -> list[str]:
    """A row for each batch size, until the card is full."""
    pipe, rows = difflex.load(sizes.model, precision=precision, device=device, untrained=sizes.untrained), []
    for batch in sizes.batches:
        shots = shots_of(pipe, sizes, batch)

        def work(shots: list[Shot] = shots, batch: int = batch) -> int:
            found = pipe.harvest(shots, sizes.site, batch=batch, progress=False)
            return sum(seen.values.shape[:2].numel() for seen in found)

        try:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            with FlopCounterMode(display=False) as counted:
                tokens = work()
            took = seconds(work, device, rounds=1)
        except OutOfMemory:
            break
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else float("nan")
        share = counted.get_total_flops() / took / most
        rows.append(f"| {precision} | {batch} | {tokens / took:,.0f} | {peak:.1f} | {share:.0%} |")
        print(rows[-1], flush=True)
    return rows


def training(sizes: Sizes, device: torch.device, python: Path) -> list[str]:
    """A row for each learner."""
    shape = {"width": sizes.width, "size": sizes.size, "k": sizes.k, "batch": sizes.batch}
    rows = []
    for name in ["ours default", *(PEERS if python.exists() else ())]:
        with start_learners([name], python) as learners:
            more = {"adam": "default"} if name == "ours default" else {}
            learners[name].begin(world={}, **shape, updates=100, cycle=2, device=str(device), **more)
            learners[name].update(count=3)
            took = statistics.median(learners[name].update(count=10)["seconds"])
        rows.append(f"| {name} | {1000 * took:.1f} | {sizes.batch / took:,.0f} |")
        print(rows[-1], flush=True)
    return rows


def report(sizes: Sizes, card: str, most: float, read: list[str], trained: list[str]) -> str:
    """The figures as a section of a document."""
    lines = [
        f"\n## {card}, {datetime.now(UTC):%Y-%m-%d}\n",
        f"A bf16 product of {sizes.matrix} x {sizes.matrix} reaches {most / 1e12:.0f} TFLOP/s.\n",
        f"Reading {sizes.site} of {sizes.model}, {sizes.pixels[0]} pixels, 1 step:\n",
        "| precision | batch | tokens/s | peak GiB | of the ceiling |\n|---|---|---|---|---|",
        *read,
        f"\nTraining, width {sizes.width}, size {sizes.size}, k {sizes.k}, batch {sizes.batch}:\n",
        "| trainer | ms an update | tokens/s |\n|---|---|---|",
        *trained,
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """0; the figures have no bar of their own on another card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=Path, default=PYTHON)
    parser.add_argument("--write", action="store_true")
    wanted = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes, card = (CARD, torch.cuda.get_device_name()) if device.type == "cuda" else (TINY, "no card: tiny sizes on the CPU")
    most = ceiling(sizes, device)
    print(f"{card}; ceiling {most / 1e12:.1f} TFLOP/s in bf16")
    read = [row for precision in ("bf16", "nf4") for row in reading(sizes, device, precision, most)]
    trained = training(sizes, device, wanted.peer)
    if wanted.write and device.type == "cuda":
        with (ROOT / "docs" / "performance.md").open("a") as file:
            file.write(report(sizes, card, most, read, trained))
    print(f"gpu: {len(read)} readings and {len(trained)} trainers ran ({card})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
