"""The plan of a study: its commands with their states and forecasts, as a table."""

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from difflex.commands.forecast import CostEstimate, Forecast
from difflex.store import said_size
from difflex.study import Study, StudyStep, steps

__all__ = ["PlannedCommand", "duration", "machine_rate", "plan", "plan_table"]

COLUMNS = ("", "state", "verb", "sites", "tokens", "disk", "time", "flags")
MOST = 3
"""Sites that are named in a line of the table."""


class PlannedCommand(NamedTuple):
    """A command of a study, its state, and what it takes."""

    step: StudyStep
    estimate: CostEstimate
    """The expectation; for a finished command its real files and time."""


def plan(study: Study, rate: float) -> list[PlannedCommand]:
    """Return the commands of `study` with what each takes on a machine of this `rate`."""
    forecast, planned = Forecast(rate), []
    for step in steps(study):
        estimate = forecast.estimate(step.command)
        if step.state == "done":
            size = sum(_size(study.folder / path) for path in step.entry.made)
            estimate = replace(estimate, bytes=size, seconds=step.entry.seconds, unknown="")
        planned.append(PlannedCommand(step, estimate))
    return planned


def machine_rate() -> float:
    """Measure the floating-point operations per second of a large matrix product, on the GPU or on all threads of the CPU.

    The best of several, each on one thread: what other processes do meanwhile is not part of the rate.
    """
    device, side = ("cuda", 4096) if torch.cuda.is_available() else ("cpu", 512)
    threads = torch.get_num_threads()
    x = torch.ones(side, side, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    best, end = float("inf"), time.perf_counter() + 0.2
    try:
        torch.set_num_threads(1)
        while time.perf_counter() < end:
            began = time.perf_counter()
            torch.mm(x, x)
            if device == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    return 2 * side**3 / best * (1 if device == "cuda" else threads)


def plan_table(planned: Sequence[PlannedCommand]) -> str:
    """Return a table with a line for each command, the sums, and what is unknown."""
    remaining = [each.estimate for each in planned if each.step.state != "done"]
    sums = [_sum("remaining", remaining)] if len(remaining) < len(planned) else []
    sums.append(_sum("total", [each.estimate for each in planned]))
    lines = [COLUMNS, *(_line(number, each) for number, each in enumerate(planned, 1)), *sums]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
    unknown = [f"{number}: unknown: {each.estimate.unknown}" for number, each in enumerate(planned, 1) if each.estimate.unknown]
    return "\n".join([text, *unknown])


def _line(number: int, planned: PlannedCommand) -> tuple[str, ...]:
    step, estimate = planned
    flags = {name: value for name, value in step.entry.flags.items() if value not in (None, False, [], {})}
    words = [f"{name}={','.join(map(str, value)) if isinstance(value, list) else value}" for name, value in flags.items()]
    sites = ",".join(estimate.sites[:MOST]) + (f" and {len(estimate.sites) - MOST} more" if len(estimate.sites) > MOST else "")
    tokens = "?" if estimate.tokens is None else f"{estimate.tokens:,}"
    size = "?" if estimate.bytes is None else said_size(estimate.bytes)
    about = "" if step.state == "done" else "about "
    took = "?" if estimate.seconds is None else about + duration(estimate.seconds)
    return str(number), step.state, step.entry.verb, sites, tokens, size, took, " ".join(words)


def _sum(name: str, estimates: Sequence[CostEstimate]) -> tuple[str, ...]:
    sizes, times = [each.bytes for each in estimates], [each.seconds for each in estimates]
    size = said_size(sum(size or 0 for size in sizes)) + (" and ?" if None in sizes else "")
    took = duration(sum(took or 0.0 for took in times)) + (" and ?" if None in times else "")
    return "", "", name, "", "", size, took, ""


def duration(seconds: float) -> str:
    """Return a time in words, with two digits."""
    for unit, length in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.2g} {unit}" if seconds < 99 * length else f"{seconds / length:,.0f} {unit}"
    return f"{seconds:.2g} s" if seconds < 99 else f"{seconds:.0f} s"


def _size(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum((Path(folder) / name).stat().st_size for folder, _, names in os.walk(path) for name in names)
