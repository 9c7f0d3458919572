"""Forecasts of what the commands of a study take, and the plan of a study as a table. Only configs are read, nothing is fetched.

Time is counted in operations and divided by the rate of the machine for each kind of work. The counts and the rates of a CPU were
fitted to runs on mini-flux on two cores: within a factor of two there, a first guess elsewhere.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from difflex.choices import Precision
from difflex.commands.flags import StudyImagesCommand
from difflex.devices import find_device, free_memory, gather_rate, machine_rate
from difflex.errors import DifflexError
from difflex.explore.inputs import UNTRAINED
from difflex.pipeline import ModelProfile, profile_model
from difflex.records import Shot, Site
from difflex.store import Store, format_size
from difflex.study import Command, CommandStatus, Study, command_statuses
from difflex.tables import text_table

__all__ = [
    "CostEstimate",
    "DictionaryForecast",
    "Forecast",
    "Machine",
    "PlannedCommand",
    "StoreForecast",
    "Unknown",
    "plan",
    "plan_table",
    "this_machine",
]

START = 1.0
"""Seconds before the work of a command begins."""
PROCESS, CONTEXT = 800_000_000, 600_000_000
"""Bytes of memory that a process has with its libraries, and of GPU memory that it has for them."""
COLUMNS = ("", "state", "verb", "sites", "tokens", "disk", "GPU memory", "memory", "time", "flags")
GPU_COLUMN = COLUMNS.index("GPU memory")
MOST = 3
"""Sites that are named in a line of the table."""


EFFICIENCY = {"model": 0.34, "effect": 0.15, "training": 0.36, "encoding": 0.36, "growing": 0.47, "concepts": 0.5}
"""On a CPU, the share of the rate of a large matrix product that each kind of work reaches."""
MODEL, EFFECT, BUSY = 0.7, 0.4, 0.5
"""On a GPU, the share of the rate of a product that a model reaches in batches and one by one, and of the bandwidth that gathers
and updates of rows reach."""
WIDTH, SIZE, K, BATCH = 3072, 65_536, 64, 1024
"""The shape of the dictionaries and updates, those of FLUX.1, at which the rates of a GPU are measured."""
ROW_BYTES, PAIR_BYTES = 52, 8
"""Bytes that an update of a row moves for each coordinate: two weights, two moments and an average read and written in float32,
and a copy in 16 bits; and those of a feature that fires at a token, for four gathers in 16 bits."""
PASSES = 1.5
"""Passes of an ITDA growth, in terms of the size at the end."""


class DictionaryForecast(NamedTuple):
    """The shape of a dictionary."""

    size: int
    k: int
    width: int
    kind: Literal["sae", "itda", "neurons"] = "sae"


def encoding(shape: DictionaryForecast, tokens: float) -> float:
    """Return the operations of encoding: a dense product, k rows gathered, and what each token costs besides."""
    return tokens * (shape.width * shape.size + 60 * shape.k * shape.width + 1e6)


def growing(shape: DictionaryForecast, tokens: float) -> float:
    """Return the operations of a growth, three passes until the threshold is found: products, a Gram matrix, and k equations."""
    return tokens * (6.0 * shape.width * shape.size + 530.0 * shape.size * shape.k + 3100.0 * shape.k**3 + 9e6)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What commands run on."""

    rates: Mapping[str, float]
    """Operations per second by kind of work, as `difflex.commands.estimates` counts them; empty if they are unknown."""
    memory: int
    """Bytes of free memory."""
    gpu: int | None = None
    """Bytes of free GPU memory; None without a GPU."""

    @classmethod
    def with_cpu(cls, product: float, memory: int) -> "Machine":
        """Return a machine without a GPU that does `product` floating-point operations per second in a large matrix product."""
        return cls(rates=MappingProxyType({kind: product * share for kind, share in EFFICIENCY.items()}), memory=memory)

    @classmethod
    def with_gpu(cls, product: float, bandwidth: float, memory: int, gpu: int) -> "Machine":
        """Return a machine with a GPU, from its operations per second in a product and the bytes per second of gathered rows."""
        shape, moved = DictionaryForecast(SIZE, K, WIDTH), BUSY * bandwidth
        dense, fired = 2.0 * WIDTH * SIZE / product, SIZE * (1 - (1 - K / SIZE) ** BATCH)
        update = dense + (fired * WIDTH * ROW_BYTES / BATCH + K * WIDTH * PAIR_BYTES) / moved
        pursuit = dense + 16.0 * K * SIZE / moved  # scores and rows of pools, as benchmarks/gpu_parts/itda.py counts them
        rates = {
            "model": MODEL * product,
            "effect": EFFECT * product,
            "training": encoding(shape, 1) / update,
            "encoding": encoding(shape, 1) / (dense / MODEL + K * WIDTH * PAIR_BYTES / moved),
            "growing": growing(shape, 1) / (PASSES * pursuit),
            "concepts": moved / 2,  # element by element, in 16 bits
        }
        return cls(rates=MappingProxyType(rates), memory=memory, gpu=gpu)

    @property
    def description(self) -> str:
        """The device that memory and times are for."""
        memory = f"{format_size(self.memory)} of memory free" if self.memory else "its memory"
        if self.gpu is None:
            return f"For the CPU of this machine, with {memory}. difflex run RECIPE --dry-run --gpu 24GB plans for a GPU."
        return f"For {'the GPU of this machine' if self.rates else 'a GPU'} with {format_size(self.gpu)} free, and {memory}."

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """Where dictionaries and models are."""
        return "cpu" if self.gpu is None else "cuda"


def this_machine(gpu: int | None = None) -> Machine:
    """Measure this machine; with `gpu` bytes, plan for a GPU of this size, whose speed is known only if one is here."""
    memory = free_memory("cpu")
    if find_device().type == "cpu":
        return Machine.with_cpu(machine_rate(), memory) if gpu is None else Machine(rates={}, memory=memory, gpu=gpu)
    return Machine.with_gpu(machine_rate(), gather_rate(), memory, free_memory("cuda") if gpu is None else gpu)


class StoreForecast(NamedTuple):
    """The shape of a store."""

    rows: int
    tokens: int
    """Tokens of a shot."""
    width: int
    shot: Shot
    """One of its shots."""


class MemoryFootprint(NamedTuple):
    """The memory that a command takes at most."""

    host: int
    """Bytes of memory."""
    gpu: int | None = None
    """Bytes of GPU memory; None without a GPU."""


@dataclass(frozen=True, kw_only=True)
class CostEstimate:
    """What a command is expected to take; None is unknown."""

    sites: tuple[str, ...] = ()
    tokens: int | None = None
    """Rows that it reads or writes, over all sites."""
    bytes: int | None = None
    """What its files will take on disk."""
    temporary: int = 0
    """What files that it deletes take on disk besides, while it runs."""
    memory: MemoryFootprint | None = None
    seconds: float | None = None
    unknown: str = ""
    """Why something is unknown."""


class Unknown(Exception):
    """A reason why a command cannot be estimated."""


@dataclass
class Forecast:
    """Estimates of commands one after another: what earlier ones will have written is known to later ones."""

    machine: Machine
    stores: dict[tuple[Path, Site], StoreForecast] = field(default_factory=dict)
    """By study and site."""
    held: dict[Path, tuple[Precision | None, bool]] = field(default_factory=dict)
    """By study, the precision of its model, and whether it is offloaded."""
    dictionaries: dict[tuple[Path, Site], tuple[DictionaryForecast, ...]] = field(default_factory=dict)

    def seconds(self, **work: float) -> float | None:
        """Return the time that operations take, by kind of work; None if the machine is not at hand."""
        rates = self.machine.rates
        return START + sum(operations / rates[kind] for kind, operations in work.items()) if rates else None

    def memory(self, device: float = 0, host: float = 0) -> MemoryFootprint:
        """Return the memory of a command with `device` bytes where the tensors are, and `host` bytes besides."""
        if self.machine.gpu is None:
            return MemoryFootprint(round(PROCESS + device + host))
        return MemoryFootprint(round(PROCESS + host), round(CONTEXT + device))

    def store(self, folder: Path, site: Site) -> StoreForecast:
        """Return the shape of a store that exists or will exist."""
        if (folder, site) not in self.stores:
            try:
                store = Store.open(Study.open(folder).stores()[site])
            except (DifflexError, KeyError):
                raise Unknown(f"{site} is not in {folder} yet, and its width is not known") from None
            rows = store.count() + store.count("held-out")
            self.stores[folder, site] = StoreForecast(rows, store.tokens, store.width, store.shot(0))
        return self.stores[folder, site]

    def learned(
        self, folder: Path, names: Iterable[str] = (), largest: bool = False
    ) -> dict[Site, tuple[DictionaryForecast, ...]]:
        """Return the dictionaries that a study will have, at the sites of `names` (dictionaries or sites; all without names).

        Labels are not predicted: of a site, as many dictionaries are returned as are named by label. With `largest`, only the
        largest of each kind at each site.
        """
        pairs = [(Site.parse(name.partition("/")[0]), "/" in name) for name in names]
        counts = {site: sum(labelled for other, labelled in pairs if other == site) for site, _ in pairs}
        known = {site: several for (study, site), several in self.dictionaries.items() if study == folder}
        learned = {site: several[: counts.get(site) or None] for site, several in known.items() if not pairs or site in counts}
        if not learned:
            raise Unknown("which dictionaries there will be is not known")
        if largest:
            return {
                site: tuple({each.kind: each for each in sorted(several)}.values())
                for site, several in known.items()
                if site in learned
            }
        return learned

    def add(self, folder: Path, site: Site, shapes: Sequence[DictionaryForecast]) -> None:
        """Remember dictionaries that a study will have."""
        self.dictionaries[folder, site] = (*self.dictionaries.get((folder, site), ()), *shapes)

    def profile(self, shot: Shot, *sites: Site) -> ModelProfile:
        """Return the costs of the model of `shot` in runs like it."""
        revision = None if (shot.revision or "").startswith(UNTRAINED) else shot.revision
        return profile_or_unknown(shot.model, map(str, sites), revision, shot.steps, shot.pixels, shot.guidance, shot.text_length)

    def studied(self, folder: Path, command: StudyImagesCommand, *sites: Site) -> ModelProfile:
        """Return the costs of the model of a study, in runs like those of its harvest but for the flags of `command`."""
        shot = next((store.shot for (study, _), store in self.stores.items() if study == folder), None)
        model = shot or Study.open(folder)
        run = shot or Study.open(folder).settings
        given = [
            getattr(run, name) if (value := getattr(command, name)) is None else value for name in ("steps", "pixels", "guidance")
        ]
        revision = None if (model.revision or "").startswith(UNTRAINED) else model.revision
        return profile_or_unknown(model.model, map(str, sites), revision, *given, run.text_length)


def profile_or_unknown(name: str, sites: Iterable[str], revision: str | None, *settings: Any) -> ModelProfile:
    try:
        return profile_model(name, tuple(sites), revision, *settings)
    except DifflexError as error:
        missing = "could not be read from" in str(error)
        raise Unknown(f"the model {name} is not on this machine" if missing else str(error).split(". ")[0]) from None


def harvesting(model: ModelProfile, runs: float, prompts: float, steps: int) -> float:
    """Return the operations of runs that end at the site in the last of `steps`, and encoding their prompts."""
    return runs * ((steps - 1) * model.step + model.partial_step) + prompts * model.prompt


class PlannedCommand(NamedTuple):
    """A command of a study, its state, and what it takes."""

    status: CommandStatus
    estimate: CostEstimate
    """The expectation; for a finished command its real files and time."""


Estimator = Callable[[Forecast, Command], CostEstimate]


def plan(study: Study, machine: Machine, estimate: Estimator, until: str | None = None) -> list[PlannedCommand]:
    """Return the commands of `study`, up to `until`, with what each takes, by `estimate`, on a `machine`."""
    forecast, planned = Forecast(machine), []
    for status in command_statuses(study, until):
        cost = estimate(forecast, status.command)
        if status.state == "done":
            size = sum(_size(study.folder / path) for path in status.record.outputs)
            cost = replace(cost, bytes=size, temporary=0, seconds=status.record.seconds, unknown="")
        planned.append(PlannedCommand(status, cost))
    return planned


def plan_table(planned: Sequence[PlannedCommand], machine: Machine) -> str:
    """Return a table with a line for each command, the sums, and what is unknown or does not fit the machine."""
    remaining = [each.estimate for each in planned if each.status.state != "done"]
    sums = [_sum("remaining", remaining)] if len(remaining) < len(planned) else []
    sums.append(_sum("total", [each.estimate for each in planned]))
    lines = [COLUMNS, *(_line(number, each) for number, each in enumerate(planned, 1)), *sums]
    if machine.gpu is None:
        lines = [(*line[:GPU_COLUMN], *line[GPU_COLUMN + 1 :]) for line in lines]
    unknown = [f"{number}: unknown: {each.estimate.unknown}" for number, each in enumerate(planned, 1) if each.estimate.unknown]
    return "\n".join(
        [text_table(lines), *unknown, *_too_large(planned, machine), most_on_disk(planned).text, machine.description]
    )


def _too_large(planned: Sequence[PlannedCommand], machine: Machine) -> list[str]:
    """Return a line for each command that does not fit into the free memory."""
    lines = []
    for number, (status, cost) in enumerate(planned, 1):
        if cost.memory is None or status.state == "done":
            continue
        needs = (("GPU memory", cost.memory.gpu, machine.gpu), ("memory", cost.memory.host, machine.memory))
        lines += [
            f"{number}: {status.record.verb} needs {format_size(need)} of {name}, and {format_size(free)} are free."
            for name, need, free in needs
            if need is not None and free is not None and need > free
        ]
    return lines


class DiskPeak(NamedTuple):
    """The most that the files of a study take at once."""

    bytes: int
    """0 where no command's are known."""
    command: int
    """The number of the command that takes it."""
    temporary: int
    """Of files that it deletes."""

    @property
    def text(self) -> str:
        """A line about it."""
        if not self.bytes:
            return "Most on disk at once: unknown."
        most = f"Most on disk at once: {format_size(self.bytes)}, during command {self.command}"
        return most + (f", of which {format_size(self.temporary)} are deleted at its end." if self.temporary else ".")


def most_on_disk(planned: Sequence[PlannedCommand]) -> DiskPeak:
    """Return the most that the files of these commands take at once; what is unknown counts as nothing."""
    kept, peak = 0, DiskPeak(0, len(planned), 0)
    for number, (_, cost) in enumerate(planned, 1):
        kept += cost.bytes or 0
        peak = max(peak, DiskPeak(kept + cost.temporary, number, cost.temporary))
    return peak


def _line(number: int, planned: PlannedCommand) -> tuple[str, ...]:
    status, estimate = planned
    flags = {name: value for name, value in status.record.flags.items() if value not in (None, False, [], {})}
    words = [f"{name}={','.join(map(str, value)) if isinstance(value, list) else value}" for name, value in flags.items()]
    sites = ",".join(estimate.sites[:MOST]) + (f" and {len(estimate.sites) - MOST} more" if len(estimate.sites) > MOST else "")
    tokens = "?" if estimate.tokens is None else f"{estimate.tokens:,}"
    size = "?" if estimate.bytes is None else format_size(estimate.bytes)
    about = "" if status.state == "done" else "about "
    took = "?" if estimate.seconds is None else about + duration(estimate.seconds)
    memory = _memory_cells([estimate])
    return str(number), status.state, status.record.verb, sites, tokens, size, *memory, took, " ".join(words)


def _sum(name: str, estimates: Sequence[CostEstimate]) -> tuple[str, ...]:
    """Return the line of sums; of memory, the most of any command."""
    sizes, times = [each.bytes for each in estimates], [each.seconds for each in estimates]
    known = (format_size(sum(size or 0 for size in sizes)), duration(sum(took or 0.0 for took in times)))
    size, took = (
        "?" if values and not any(values) else text + (" and ?" if None in values else "")
        for text, values in zip(known, (sizes, times), strict=True)
    )
    return "", "", name, "", "", size, *_memory_cells(estimates), took, ""


def _memory_cells(estimates: Sequence[CostEstimate]) -> tuple[str, str]:
    """Return the most GPU memory and the most memory of any of these."""
    known = [each.memory for each in estimates if each.memory is not None]
    gpu, host = [memory.gpu for memory in known if memory.gpu is not None], [memory.host for memory in known]
    return format_size(max(gpu)) if gpu else "?", format_size(max(host)) if host else "?"


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
