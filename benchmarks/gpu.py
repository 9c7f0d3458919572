"""Speed of one GPU at real sizes: harvesting FLUX.1 (12 B parameters, random weights) and training a large SAE.

Harvest: tokens per second at `double.18`, 256 pixels, one step, in bf16 and nf4, by batch size; peak memory; the share of the
GPU's measured matrix-product rate. Training: width 3072, size 65536, k 64, batch 4096, compared with sparsify and
dictionary_learning. `--write` appends the figures with date and GPU to docs/performance.md. Without a GPU everything runs at a
tiny size on the CPU, which tests the script and measures nothing.
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
    """The sizes of a run."""

    model: str
    untrained: int | None
    site: str
    pixels: tuple[int, int]
    batches: tuple[int, ...]
    matrix: int
    """Side of the square matrices whose product gives the ceiling."""
    width: int
    size: int
    k: int
    batch: int


GPU = Sizes(
    "black-forest-labs/FLUX.1-schnell", 0, "double.18", (256, 256), (1, 2, 4, 8, 16, 32, 64), 8192, 3072, 65_536, 64, 4096
)
TINY = Sizes("mini-flux", None, "double.2", (64, 64), (1,), 256, 64, 1024, 8, 128)


def seconds(work: Callable[[], object], device: torch.device, rounds: int = 3) -> float:
    """Return the median wall time of `work`, synchronised, after a warm-up round."""
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
    """Return the operations per second of a plain bf16 product."""
    left, right = (torch.randn(sizes.matrix, sizes.matrix, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * sizes.matrix**3 / seconds(lambda: left @ right, device)


def shots_of(pipe: Pipeline, sizes: Sizes, count: int) -> list[Shot]:
    prompts = [f"image number {number}" for number in range(count)]
    return list(pipe.shots(prompts, steps=1, pixels=sizes.pixels, guidance=0.0))


def harvesting(sizes: Sizes, device: torch.device, precision: str, most: float) -> list[str]:
    """Return a row for each batch size, until the GPU is full."""
    pipe, rows = difflex.load(sizes.model, precision=precision, device=device, untrained=sizes.untrained), []
    for batch in sizes.batches:
        shots = shots_of(pipe, sizes, batch)

        def work(shots: list[Shot] = shots, batch: int = batch) -> int:
            harvest = pipe.harvest(shots, sizes.site, batch=batch, progress=False)
            return sum(activations.values.shape[:2].numel() for activations in harvest)

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
    """Return a row for each trainer."""
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


def report(sizes: Sizes, gpu: str, most: float, harvested: list[str], trained: list[str]) -> str:
    """Return the figures as a Markdown section."""
    lines = [
        f"\n## {gpu}, {datetime.now(UTC):%Y-%m-%d}\n",
        f"A bf16 product of {sizes.matrix} x {sizes.matrix} reaches {most / 1e12:.0f} TFLOP/s.\n",
        f"Harvest at {sizes.site} of {sizes.model}, {sizes.pixels[0]} pixels, 1 step:\n",
        "| precision | batch | tokens/s | peak GiB | of the ceiling |\n|---|---|---|---|---|",
        *harvested,
        f"\nTraining, width {sizes.width}, size {sizes.size}, k {sizes.k}, batch {sizes.batch}:\n",
        "| trainer | ms an update | tokens/s |\n|---|---|---|",
        *trained,
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the benchmark; there are no bars, because GPUs differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=Path, default=PYTHON)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes, gpu = (GPU, torch.cuda.get_device_name()) if device.type == "cuda" else (TINY, "no GPU: tiny sizes on the CPU")
    most = ceiling(sizes, device)
    print(f"{gpu}; ceiling {most / 1e12:.1f} TFLOP/s in bf16")
    harvested = [row for precision in ("bf16", "nf4") for row in harvesting(sizes, device, precision, most)]
    trained = training(sizes, device, arguments.peer)
    if arguments.write and device.type == "cuda":
        with (ROOT / "docs" / "performance.md").open("a") as file:
            file.write(report(sizes, gpu, most, harvested, trained))
    print(f"gpu: {len(harvested)} harvests and {len(trained)} trainers ran ({gpu})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
