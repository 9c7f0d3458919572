"""Forecasts of what the commands of a study take, and the plan of a study as a table. Only configs are read, nothing is fetched.

Time is counted in floating-point operations and divided by the measured rate of this machine. The efficiencies and the terms that
no matrix product explains were fitted to runs on mini-flux on two cores: within a factor of two there, a first guess elsewhere.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from difflex.commands.inputs import UNTRAINED
from difflex.errors import DifflexError
from difflex.pipeline import ModelProfile, profile_model
from difflex.records import Shot, Site
from difflex.store import Store, format_size
from difflex.study import Command, CommandStatus, Study, command_statuses
from difflex.tables import text_table

__all__ = [
    "CostEstimate",
    "DictionaryForecast",
    "Forecast",
    "PlannedCommand",
    "StoreForecast",
    "Unknown",
    "duration",
    "plan",
    "plan_table",
]

EFFICIENCY = {"model": 0.34, "effect": 0.15, "training": 0.36, "encoding": 0.36, "growing": 0.47, "concepts": 0.5}
"""The share of the rate of a large matrix product that each kind of work reaches."""
START = 1.0
"""Seconds before the work of a command begins."""
COLUMNS = ("", "state", "verb", "sites", "tokens", "disk", "time", "flags")
MOST = 3
"""Sites that are named in a line of the table."""


class StoreForecast(NamedTuple):
    """The shape of a store."""

    rows: int
    tokens: int
    """Tokens of a shot."""
    width: int
    shot: Shot
    """One of its shots."""


class DictionaryForecast(NamedTuple):
    """The shape of a dictionary."""

    size: int
    k: int
    width: int


@dataclass(frozen=True, kw_only=True)
class CostEstimate:
    """What a command is expected to take; None is unknown."""

    sites: tuple[str, ...] = ()
    tokens: int | None = None
    """Rows that it reads or writes, over all sites."""
    bytes: int | None = None
    """What its files will take on disk."""
    seconds: float | None = None
    unknown: str = ""
    """Why something is unknown."""


class Unknown(Exception):
    """A reason why a command cannot be estimated."""


@dataclass
class Forecast:
    """Estimates of commands one after another: what earlier ones will have written is known to later ones."""

    rate: float
    """Floating-point operations per second of a large matrix product."""
    stores: dict[tuple[Path, Site], StoreForecast] = field(default_factory=dict)
    """By study and site."""
    dictionaries: dict[tuple[Path, Site], tuple[DictionaryForecast, ...]] = field(default_factory=dict)

    def seconds(self, **work: float) -> float:
        """Return the time that operations take, by kind of work."""
        return START + sum(operations / (self.rate * EFFICIENCY[kind]) for kind, operations in work.items())

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

    def learned(self, folder: Path, names: Iterable[str] = ()) -> dict[Site, tuple[DictionaryForecast, ...]]:
        """Return the dictionaries that a study will have, at the sites of `names` (dictionaries or sites; all without names).

        Labels are not predicted: of a site, as many dictionaries are returned as are named by label.
        """
        pairs = [(Site.parse(name.partition("/")[0]), "/" in name) for name in names]
        counts = {site: sum(labelled for other, labelled in pairs if other == site) for site, _ in pairs}
        known = {site: several for (study, site), several in self.dictionaries.items() if study == folder}
        learned = {site: several[: counts.get(site) or None] for site, several in known.items() if not pairs or site in counts}
        if not learned:
            raise Unknown("which dictionaries there will be is not known")
        return learned

    def add(self, folder: Path, site: Site, shapes: Sequence[DictionaryForecast]) -> None:
        """Remember dictionaries that a study will have."""
        self.dictionaries[folder, site] = (*self.dictionaries.get((folder, site), ()), *shapes)

    def profile(self, shot: Shot, *sites: Site) -> ModelProfile:
        """Return the costs of the model of `shot` in runs like it."""
        revision = None if (shot.revision or "").startswith(UNTRAINED) else shot.revision
        return profile_or_unknown(shot.model, map(str, sites), revision, shot.steps, shot.pixels, shot.guidance)

    def studied(self, folder: Path, *sites: Site) -> ModelProfile:
        """Return the costs of the model of a study, in runs of its own steps, pixels and guidance."""
        shot = next((store.shot for (study, _), store in self.stores.items() if study == folder), None)
        model = shot or Study.open(folder)
        return profile_or_unknown(
            model.model, map(str, sites), None if (model.revision or "").startswith(UNTRAINED) else model.revision
        )


def profile_or_unknown(name: str, sites: Iterable[str], revision: str | None, *settings: Any) -> ModelProfile:
    try:
        return profile_model(name, tuple(sites), revision, *settings)
    except DifflexError as error:
        missing = "could not be read from" in str(error)
        raise Unknown(f"the model {name} is not on this machine" if missing else str(error).split(". ")[0]) from None


class PlannedCommand(NamedTuple):
    """A command of a study, its state, and what it takes."""

    status: CommandStatus
    estimate: CostEstimate
    """The expectation; for a finished command its real files and time."""


Estimator = Callable[[Forecast, Command], CostEstimate]


def plan(study: Study, rate: float, estimate: Estimator, until: str | None = None) -> list[PlannedCommand]:
    """Return the commands of `study`, up to `until`, with what each takes, by `estimate`, on a machine of this `rate`."""
    forecast, planned = Forecast(rate), []
    for status in command_statuses(study, until):
        cost = estimate(forecast, status.command)
        if status.state == "done":
            size = sum(_size(study.folder / path) for path in status.record.outputs)
            cost = replace(cost, bytes=size, seconds=status.record.seconds, unknown="")
        planned.append(PlannedCommand(status, cost))
    return planned


def plan_table(planned: Sequence[PlannedCommand]) -> str:
    """Return a table with a line for each command, the sums, and what is unknown."""
    remaining = [each.estimate for each in planned if each.status.state != "done"]
    sums = [_sum("remaining", remaining)] if len(remaining) < len(planned) else []
    sums.append(_sum("total", [each.estimate for each in planned]))
    lines = [COLUMNS, *(_line(number, each) for number, each in enumerate(planned, 1)), *sums]
    unknown = [f"{number}: unknown: {each.estimate.unknown}" for number, each in enumerate(planned, 1) if each.estimate.unknown]
    return "\n".join([text_table(lines), *unknown])


def _line(number: int, planned: PlannedCommand) -> tuple[str, ...]:
    status, estimate = planned
    flags = {name: value for name, value in status.record.flags.items() if value not in (None, False, [], {})}
    words = [f"{name}={','.join(map(str, value)) if isinstance(value, list) else value}" for name, value in flags.items()]
    sites = ",".join(estimate.sites[:MOST]) + (f" and {len(estimate.sites) - MOST} more" if len(estimate.sites) > MOST else "")
    tokens = "?" if estimate.tokens is None else f"{estimate.tokens:,}"
    size = "?" if estimate.bytes is None else format_size(estimate.bytes)
    about = "" if status.state == "done" else "about "
    took = "?" if estimate.seconds is None else about + duration(estimate.seconds)
    return str(number), status.state, status.record.verb, sites, tokens, size, took, " ".join(words)


def _sum(name: str, estimates: Sequence[CostEstimate]) -> tuple[str, ...]:
    sizes, times = [each.bytes for each in estimates], [each.seconds for each in estimates]
    size = format_size(sum(size or 0 for size in sizes)) + (" and ?" if None in sizes else "")
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
