"""`difflex status`: how far a study is."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, final

from tyro.conf import Positional, arg

from difflex.store import Store
from difflex.study import Command, CommandRecord, Study, read_log

__all__ = ["StatusCommand"]

COLUMNS = ("", "state", "when (UTC)", "seconds", "verb", "asked")


@final
@dataclass(frozen=True, kw_only=True)
class StatusCommand(Command):
    """Say what a study holds: its activations and dictionaries, and how far its recipe is."""

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """The folder of the study."""

    def __call__(self) -> None:
        study = Study.open(self.study)
        print(f"{study.folder} studies {study.model}")
        for site, folder in study.stores().items():
            store = Store.open(folder)
            rows = store.count() + store.count("held-out")
            print(f"  {site}: {rows:,} tokens of width {store.width}{'' if store.complete else ', not finished'}")
        for place in study.dictionaries():
            print(f"  {place}")
        if entries := read_log(study.folder):
            print(_table([(entry, "begun" if entry.seconds is None else "done") for entry in entries]))


def _table(rows: Sequence[tuple[CommandRecord, str]]) -> str:
    lines = [COLUMNS, *(_line(number, entry, state) for number, (entry, state) in enumerate(rows, 1))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _line(number: int, entry: CommandRecord, state: str) -> tuple[str, ...]:
    asked = " ".join(f"{name}={_short(value)}" for name, value in entry.flags.items() if value not in (None, False, [], {}))
    when = entry.finished[:16].replace("T", " ") if entry.finished else ""
    return str(number), state, when, "" if entry.seconds is None else f"{entry.seconds:.0f}", entry.verb, asked


def _short(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
