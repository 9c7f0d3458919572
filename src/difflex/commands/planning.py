"""What a study would take, told before anything is done: nothing is loaded but configs, nothing written or fetched."""

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from difflex.errors import DifflexError
from difflex.store import said_size
from difflex.study import Study, StudyStep, steps
from difflex.study.forecast import CostEstimate, CostOutlook

__all__ = ["PlannedCommand", "machine_rate", "plan", "plan_table"]

MOMENT = 0.2
"""Seconds for which the machine is measured."""
SIDE = {"cpu": 512, "cuda": 4096}
"""Of the matrices."""
COLUMNS = ("", "state", "verb", "sites", "tokens", "disk", "time", "asked")


class PlannedCommand(NamedTuple):
    """A command, how far it is, and what it takes."""

    step: StudyStep
    estimate: CostEstimate
    """What it is expected to take; of what is done the files that are there, and the time that it took."""


def plan(study: Study, rate: float) -> list[PlannedCommand]:
    """The commands of `study` with what each takes on a machine of this `rate`."""
    outlook, planned = CostOutlook(rate=rate), []
    for step in steps(study):
        try:
            estimate = step.command.estimate(outlook)
        except DifflexError as error:  # what is wrong with a command is said when it is run
            estimate = CostEstimate(unknown=str(error))
        outlook = outlook.after(estimate)
        if step.state == "done":
            there = sum(_size(study.folder / path) for path in step.entry.made)
            estimate = replace(estimate, bytes=there, seconds=step.entry.seconds, unknown="")
        planned.append(PlannedCommand(step, estimate))
    return planned


def machine_rate() -> float:
    """Floating-point operations of a large matrix product in a second: on the card, or on all threads of the processor.

    The best of several, each on one thread: what others do on the machine meanwhile is not its rate.
    """
    place = "cuda" if torch.cuda.is_available() else "cpu"
    threads, side = torch.get_num_threads(), SIDE[place]
    x = torch.ones(side, side, device=place, dtype=torch.bfloat16 if place == "cuda" else torch.float32)
    best, end = float("inf"), time.perf_counter() + MOMENT
    try:
        torch.set_num_threads(1)
        while time.perf_counter() < end:
            began = time.perf_counter()
            torch.mm(x, x)
            if place == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    return 2 * side**3 / best * (1 if place == "cuda" else threads)


def plan_table(planned: Sequence[PlannedCommand]) -> str:
    """A line for each command, what cannot be told below them, and the whole."""
    lines = [COLUMNS, *(_line(number, each) for number, each in enumerate(planned, 1)), *_whole(planned)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
    unknown = [f"{number}: unknown: {each.estimate.unknown}" for number, each in enumerate(planned, 1) if each.estimate.unknown]
    return "\n".join([text, *unknown])


def _line(number: int, planned: PlannedCommand) -> tuple[str, ...]:
    step, estimate = planned
    asked = {name: value for name, value in step.entry.flags.items() if value not in (None, False, [], {})}
    sites = ",".join(estimate.sites[:MOST]) + (f" and {len(estimate.sites) - MOST} more" if len(estimate.sites) > MOST else "")
    tokens = "?" if estimate.tokens is None else f"{estimate.tokens:,}"
    size = "?" if estimate.bytes is None else said_size(estimate.bytes)
    about = "" if step.state == "done" else "about "
    took = "?" if estimate.seconds is None else about + said_time(estimate.seconds)
    return str(number), step.state, step.entry.verb, sites, tokens, size, took, " ".join(map(_asked, asked.items()))


MOST = 3
"""Sites that are named in a line."""


def _asked(flag: tuple[str, object]) -> str:
    name, value = flag
    return f"{name}={','.join(map(str, value)) if isinstance(value, list) else value}"


def _whole(planned: Sequence[PlannedCommand]) -> list[tuple[str, ...]]:
    """A line for what is left to do, and one for everything."""
    left = [each.estimate for each in planned if each.step.state != "done"]
    every = [each.estimate for each in planned]
    return [_sum("left to do", left), _sum("in all", every)] if len(left) < len(every) else [_sum("in all", every)]


def _sum(name: str, estimates: Sequence[CostEstimate]) -> tuple[str, ...]:
    sizes, times = [each.bytes for each in estimates], [each.seconds for each in estimates]
    size = said_size(sum(size or 0 for size in sizes)) + (" and ?" if None in sizes else "")
    took = said_time(sum(took or 0.0 for took in times)) + (" and ?" if None in times else "")
    return "", "", name, "", "", size, took, ""


def said_time(seconds: float) -> str:
    """A time in words, in two digits."""
    for unit, length in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.2g} {unit}" if seconds < 99 * length else f"{seconds / length:,.0f} {unit}"
    return f"{seconds:.2g} s" if seconds < 99 else f"{seconds:.0f} s"


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum((Path(folder) / name).stat().st_size for folder, _, names in os.walk(path) for name in names)
