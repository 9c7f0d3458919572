"""What a part of `benchmarks/gpu.py` returns, and how it measures."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch


class Bar(NamedTuple):
    """A bound that a figure must keep on a GPU."""

    name: str
    measured: float
    bound: float
    at_least: bool = False
    """Whether the figure must not be below the bound; otherwise it must not be above it."""

    @property
    def kept(self) -> bool:
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    def __str__(self) -> str:
        return f"{self.name}: {self.measured:.3g}, at {'least' if self.at_least else 'most'} {self.bound:.3g}"


@dataclass
class PartResult:
    """A table with its heading, and the bars that were measured."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[Any]] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    """Only what was measured on a GPU, at real sizes."""

    def add(self, *row: Any) -> None:
        """Add a row and print it."""
        self.rows.append(row)
        print("  ", *row, flush=True)

    def markdown(self) -> str:
        """Return the table as Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join([f"\n{self.title}\n", *("| " + " | ".join(map(str, line)) + " |" for line in lines)])

    def as_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "PartResult":
        entries = json.loads(text)
        return cls(**{**entries, "bars": [Bar(*bar) for bar in entries["bars"]]})


def seconds(work: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    """Return the median time of `work`, synchronised, after a warm-up round."""
    times = []
    for _ in range(rounds + 1):
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def wait(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device, work: Callable[[], object]) -> int:
    """Return the largest memory of the GPU during `work`; 0 on a CPU."""
    if device.type != "cuda":
        work()
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    work()
    wait(device)
    return torch.cuda.max_memory_allocated(device)
