"""`run_study`: run the commands of a study one after another, except those that are done and have not changed."""

import math
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from difflex.errors import BadInput, StaleWork, UnknownName
from difflex.files import Json, disk_errors, file_sha256, folder_lock, parsing, read_json, write_json
from difflex.study.study import Command, Study

LOG_FILE = "run.json"
FORMAT = 2
ADVICE = "Delete it: the commands then check themselves what is done."
State = Literal["done", "begun", "changed", "to do"]


@dataclass(frozen=True, kw_only=True)
class CommandRecord:
    """A command in the log of a study."""

    verb: str
    flags: Mapping[str, Json]
    outputs: tuple[str, ...] = ()
    """Paths within the study."""
    seconds: float | None = None
    """The time it took; None while it is not finished."""
    finished: str | None = None
    """The date and time in UTC (ISO 8601); None while it is not finished."""

    @property
    def settings(self) -> list[str]:
        """`NAME=VALUE` of every flag that is set."""
        values = {name: value for name, value in self.flags.items() if value not in (None, False, [], {})}
        return [f"{name}={','.join(map(str, value)) if isinstance(value, list) else value}" for name, value in values.items()]


@dataclass(frozen=True, kw_only=True)
class CommandStatus:
    """A command of a study and its state."""

    command: Command
    record: CommandRecord
    state: State
    changes: Mapping[str, tuple[Json, Json]]
    """By flag: the old and the new value, if the recipe has changed."""


def run_study(
    study: Study,
    *,
    until: str | None = None,
    recipe: str | None = None,
    options: Mapping[str, object] = MappingProxyType({}),
    report: Callable[[str], None] = print,
) -> None:
    """Run all commands of `study`, or those up to the last one with the verb `until`.

    A command that is done and has not changed is skipped as long as none before it ran. Files that a changed recipe makes
    useless are deleted and made again; what is worth more than time is moved to `old-1` in the study; files that the recipe no
    longer asks for are kept. `recipe` and its `options` are the name and flags of the `difflex run` that runs the study again,
    for the log.
    """
    call = {"recipe": recipe, "options": {name: _json(value, study.folder) for name, value in options.items()}}
    former = _read_call(study.folder)
    command_statuses(study, until)  # refuses what cannot run, before the folder is made
    study.prepare()
    with folder_lock(study.folder):
        statuses, rerun = command_statuses(study, until), False
        made = {(study.folder / path).resolve() for record in read_log(study.folder) for path in record.outputs}
        records = [status.record for status in statuses]
        for number, status in enumerate(statuses):
            name = f"[{number + 1} of {len(study.commands)}] {status.record.verb}"
            if status.state == "done" and not rerun:
                report(f"{name}: done already")
                continue
            is_first, rerun = not rerun, True
            report(f"{name}: {_reason(status)}")
            records[number] = replace(status.record, seconds=None, finished=None)
            # Later commands leave the log: after a kill they have to run again.
            _write_log(study, records[: number + 1], call)
            try:
                records[number] = _run(study, status, made, report)
            except BaseException:
                if is_first and not _is_begun(study.folder):  # nothing was begun with these options
                    _write_log(study, records[: number + 1], former)
                raise
            _write_log(study, records[: number + 1], call)
        study.write()


def command_statuses(study: Study, until: str | None = None) -> list[CommandStatus]:
    """Return the commands of `study`, or those up to the last one with the verb `until`, with their states."""
    log = [replace(old, flags=_with_defaults(old, study)) for old in read_log(study.folder)]
    records = [CommandRecord(verb=verb_of(command), flags=_flags(command, study.folder)) for command in study.commands]
    logged = [next((old for old in log if (old.verb, old.flags) == (new.verb, new.flags)), None) for new in records]
    others = [old for old in log if old not in logged]
    statuses = []
    for command, new, old in zip(study.commands, records, logged, strict=True):
        if old is not None:
            statuses.append(CommandStatus(command=command, record=old, state=_state(old, study.folder), changes={}))
            continue
        former = next((record for record in others if record.verb == new.verb), None)
        if former is not None:
            others.remove(former)
        changes = {} if former is None else _changes(former.flags, new.flags)
        state: State = "changed" if changes else "to do"
        statuses.append(CommandStatus(command=command, record=new, state=state, changes=changes))
    return statuses[: _last_number([status.record.verb for status in statuses], until) + 1]


def read_log(folder: Path) -> list[CommandRecord]:
    """Return the commands that a recipe ran in `folder`; none without a log."""
    path = folder / LOG_FILE
    if not os.path.isfile(path):
        return []
    entries = read_json(path, FORMAT, ADVICE)
    with parsing(path, "the log of a study", ADVICE):
        return [_parse_record(entry) for entry in entries["commands"]]


def recipe_record(folder: Path) -> CommandRecord | None:
    """Return the `difflex run` of the recipe that ran in `folder`; None without a log, or if it was called from Python."""
    call = _read_call(folder)
    name, options = call.get("recipe"), call.get("options", {})
    if not isinstance(name, str) or not isinstance(options, dict):
        return None
    return CommandRecord(verb="run", flags={"recipe": name, **options})


def _read_call(folder: Path) -> dict[str, Json]:
    """Return the recipe that ran in `folder` and its options, as they are in the log."""
    path = folder / LOG_FILE
    entries = read_json(path, FORMAT, ADVICE) if os.path.isfile(path) else {}
    return {name: entries[name] for name in ("recipe", "options") if name in entries}


def _is_begun(folder: Path) -> bool:
    """Return whether a command has written a file since the last entry in the log."""
    logged = (folder / LOG_FILE).stat().st_mtime_ns
    files = (path for path in folder.rglob("*") if path.name != LOG_FILE and path.is_file())
    return any(path.stat().st_mtime_ns >= logged for path in files)


def _parse_record(entry: Mapping[str, Any]) -> CommandRecord:
    record = CommandRecord(**{**entry, "outputs": tuple(entry["outputs"])})
    seconds = 0.0 if record.seconds is None else record.seconds
    if not isinstance(record.verb, str) or not isinstance(record.flags, dict) or not isinstance(entry["outputs"], list):
        raise TypeError("a verb, flags or outputs of another kind")
    if not all(isinstance(path, str) for path in record.outputs) or isinstance(seconds, str) or not 0 <= seconds < math.inf:
        raise ValueError("outputs that are no names, or a time that is no number")
    if record.finished is not None:
        datetime.fromisoformat(record.finished)  # a ValueError if it is no date
    return record


def verb_of(command: Command) -> str:
    """Return the verb of `command` on the command line."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", type(command).__name__.removesuffix("Command")).lower()


def _run(study: Study, status: CommandStatus, made: Collection[Path], report: Callable[[str], None]) -> CommandRecord:
    """Run a command and return its record; stale files of the study that stop it give way first."""
    start = time.monotonic()
    while True:
        try:
            outputs = status.command() or ()
            break
        except StaleWork as error:
            path = error.path
            if path is None or not path.exists() or study.folder.resolve() not in path.resolve().parents:
                raise
            with disk_errors(path):
                report(f"{path} is {_give_way(study.folder, path, made)} and made again: {error}")
    paths = tuple(os.path.relpath(path, study.folder) for path in outputs)
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    return replace(status.record, outputs=paths, seconds=round(time.monotonic() - start, 1), finished=finished)


def _give_way(folder: Path, path: Path, made: Collection[Path]) -> str:
    """Delete stale work, or move it away if that costs more than time to make again; return what was done.

    Books and the answers of VLMs are moved, and dictionaries that the recipe did not make: `made` are the outputs in its log.
    """
    inside = [path, *path.rglob("*")] if path.is_dir() else [path]
    if not any(each.suffix == ".sqlite" or (each.name == "config.json" and each.parent.resolve() not in made) for each in inside):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        return "deleted"
    place = path.resolve().relative_to(folder.resolve())
    target = next(old for number in count(1) if not (old := folder / f"old-{number}" / place).exists())
    target.parent.mkdir(parents=True, exist_ok=True)
    path.rename(target)
    return f"moved to {target}"


def _state(record: CommandRecord, folder: Path) -> State:
    if record.seconds is None:
        return "begun"
    return "done" if all(os.path.exists(folder / path) for path in record.outputs) else "to do"


def _reason(status: CommandStatus) -> str:
    """Say why a command runs."""
    if status.state == "changed":
        return ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in status.changes.items())
    return {"begun": "continues", "done": "runs again, since a command before it ran"}.get(status.state, "begins")


def _last_number(verbs: Sequence[str], until: str | None) -> int:
    if not verbs:
        raise BadInput("The study has no commands. Its recipe must name some.")
    if until is None:
        return len(verbs) - 1
    if until not in verbs:
        raise UnknownName.among("The verb", until, dict.fromkeys(verbs), "The recipe has no other.")
    return max(number for number, verb in enumerate(verbs) if verb == until)


def _flags(command: Command, folder: Path) -> dict[str, Json]:
    """Return the fields of `command` as JSON, with checksums of files; paths in the study are relative, since it may be moved."""
    values = {field.name: getattr(command, field.name) for field in fields(command)}  # pyright: ignore[reportArgumentType]
    flags = {name: _json(value, folder) for name, value in values.items()}
    files = {name: Path(value) for name, value in values.items() if isinstance(value, (str, Path)) and os.path.isfile(value)}
    for name, path in files.items():
        with disk_errors(path, "read"):
            flags[f"{name}, SHA-256"] = file_sha256(path)
    return flags


def _with_defaults(record: CommandRecord, study: Study) -> Mapping[str, Json]:
    """Return the flags of a record, with the defaults of those that the command did not have when it ran."""
    command = next((command for command in study.commands if verb_of(command) == record.verb), None)
    if command is None:
        return record.flags
    defaults = {field.name: field.default for field in fields(command) if field.default is not MISSING}  # pyright: ignore[reportArgumentType]
    return {**{name: _json(value, study.folder) for name, value in defaults.items()}, **record.flags}


def _json(value: object, folder: Path) -> Json:
    if isinstance(value, Path) and value.is_relative_to(folder):
        relative = value.relative_to(folder).as_posix()
        return relative if relative == "." else f"./{relative}"
    if isinstance(value, range):
        return f"{value.start}:{value.stop}" + (f":{value.step}" if value.step > 1 else "")
    if isinstance(value, (tuple, list)):
        return [_json(item, folder) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _changes(old: Mapping[str, Json], new: Mapping[str, Json]) -> dict[str, tuple[Json, Json]]:
    names = dict.fromkeys([*old, *new])
    return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def _write_log(study: Study, records: Sequence[CommandRecord], call: Mapping[str, Json]) -> None:
    write_json(study.folder / LOG_FILE, FORMAT, {**call, "commands": [asdict(record) for record in records]})
