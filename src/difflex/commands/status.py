"""`difflex status`: the content of a study and the state of its commands."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, final

from tyro.conf import Positional, arg

from difflex.study import Command, CommandRecord, Study, read_log

__all__ = ["StatusCommand"]

COLUMNS = ("", "state", "finished (UTC)", "seconds", "verb", "flags")


@final
@dataclass(frozen=True, kw_only=True)
class StatusCommand(Command):
    """Show the activations and dictionaries of a study, and which commands of its recipe are done."""

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """The folder of the study."""

    def __call__(self) -> None:
        from difflex.store import Store

        study = Study.open(self.study)
        print(f"{study.folder}: a study of {study.model}")
        for site, folder in study.stores().items():
            store = Store.open(folder)
            rows = store.count() + store.count("held-out")
            print(f"  {site}: {rows:,} tokens of width {store.width}{'' if store.complete else ', not finished'}")
        for ref in study.dictionaries():
            print(f"  {ref}")
        if records := read_log(study.folder):
            lines = [COLUMNS, *(_line(number, record) for number, record in enumerate(records, 1))]
            widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
            print("\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines))


def _line(number: int, record: CommandRecord) -> tuple[str, ...]:
    flags = {name: value for name, value in record.flags.items() if value not in (None, False, [], {})}
    words = [f"{name}={','.join(map(str, value)) if isinstance(value, list) else value}" for name, value in flags.items()]
    finished = record.finished[:16].replace("T", " ") if record.finished else ""
    seconds = "" if record.seconds is None else f"{record.seconds:.0f}"
    return str(number), "begun" if record.seconds is None else "done", finished, seconds, record.verb, " ".join(words)
