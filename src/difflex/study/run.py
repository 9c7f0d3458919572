"""`run_study`: the commands of a study one after another; what is done is not done again, what has changed is."""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from difflex.errors import BadInput, BrokenFile, StaleWork, UnknownName
from difflex.files import file_sha256, folder_lock, write_json
from difflex.study.study import Command, Study

__all__ = ["CommandRecord", "StudyStep", "diary", "recipe_of", "run_study", "steps"]

DIARY = "run.json"
FORMAT = 1
Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]
State = Literal["done", "begun", "changed", "to do"]


@dataclass(frozen=True, kw_only=True)
class CommandRecord:
    """What the diary of a study says of a command."""

    verb: str
    flags: Mapping[str, Json]
    made: tuple[str, ...] = ()
    """Paths within the study."""
    seconds: float | None = None
    """What it took; None while it is not done."""
    done: str | None = None
    """When it was done, in UTC as ISO 8601 has it; None while it is not, and where an older difflex wrote the diary."""


@dataclass(frozen=True, kw_only=True)
class StudyStep:
    """A command of a study, and how far it is."""

    command: Command
    entry: CommandRecord
    state: State
    changes: Mapping[str, tuple[Json, Json]]
    """What was asked before and what is asked now, where the recipe has changed since."""


def run_study(study: Study, *, until: str | None = None, recipe: str | None = None, tell: Callable[[str], None] = print) -> None:
    """Nothing; all commands of `study` are done, or those up to the last of the verb `until`.

    A command that was done, and is asked again in the same words, is left out as long as nothing before it was done anew. What a
    changed recipe makes useless is removed and made again; what is merely no longer asked for is left where it is. The diary
    keeps `recipe`, the name that the study can be run again by.
    """
    wanted = steps(study)
    last = _last(wanted, until)
    study.prepare()
    with folder_lock(study.folder, shared=False):
        wanted, fresh = steps(study), False
        entries = [step.entry for step in wanted]
        for number, step in enumerate(wanted[: last + 1]):
            name = f"[{number + 1} of {len(wanted)}] {step.entry.verb}"
            if step.state == "done" and not fresh:
                tell(f"{name}: done already")
                continue
            fresh = True
            tell(f"{name}: {_why(step)}")
            entries[number] = replace(step.entry, seconds=None, done=None)
            # What comes later is struck out: were we killed now, it would have to be asked again.
            _write(study, entries[: number + 1], recipe)
            entries[number] = _done(study, step, tell)
            _write(study, entries[: number + 1], recipe)
        study.write()


def steps(study: Study) -> list[StudyStep]:
    """The commands of `study`, and how far each is."""
    before = diary(study.folder)
    asked = [CommandRecord(verb=verb_of(command), flags=_flags(command, study.folder)) for command in study.commands]
    found = [next((old for old in before if (old.verb, old.flags) == (new.verb, new.flags)), None) for new in asked]
    others = [old for old in before if old not in found]
    made = []
    for command, new, old in zip(study.commands, asked, found, strict=True):
        if old is not None:
            made.append(StudyStep(command=command, entry=old, state=_state(old, study.folder), changes={}))
            continue
        was = next((each for each in others if each.verb == new.verb), None)
        if was is not None:
            others.remove(was)
        changes = {} if was is None else _changes(was.flags, new.flags)
        made.append(StudyStep(command=command, entry=new, state="changed" if changes else "to do", changes=changes))
    return made


def diary(folder: Path) -> list[CommandRecord]:
    """What was run in `folder`; nothing where no recipe was."""
    path = folder / DIARY
    if not path.is_file():
        return []
    advice = "Delete it: what is done is then found again by looking."
    try:
        said = json.loads(path.read_bytes())
        found = said["format"]
        if found == FORMAT:
            return [_entry(entry) for entry in said["commands"]]
    except (ValueError, KeyError, TypeError) as error:
        raise BrokenFile(f"{path} is not the diary of a study ({error}): it is damaged. {advice}") from error
    raise BrokenFile(f"{path} is of format {found!r}; this difflex reads format {FORMAT}. Use the difflex that wrote it.")


def _entry(said: Mapping[str, Any]) -> CommandRecord:
    """What the diary says of a command; a ValueError where its date is none."""
    entry = CommandRecord(**{**said, "made": tuple(said["made"])})
    if entry.done is not None:
        datetime.fromisoformat(entry.done)
    return entry


def recipe_of(folder: Path) -> str | None:
    """The name of the recipe that was run in `folder`; None where none was, or its function was called from Python."""
    found = diary(folder) and json.loads((folder / DIARY).read_bytes()).get("recipe")
    return found if isinstance(found, str) else None


def verb_of(command: Command) -> str:
    """The verb that `command` is written with."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", type(command).__name__.removesuffix("Command")).lower()


def _done(study: Study, step: StudyStep, tell: Callable[[str], None]) -> CommandRecord:
    began = time.monotonic()
    while True:
        try:
            made = step.command() or ()
            break
        except StaleWork as error:
            place = error.place
            if place is None or not place.exists() or study.folder.resolve() not in place.resolve().parents:
                raise
            tell(f"{place} is removed and made anew: {error}")
            _remove(place)
    paths = tuple(os.path.relpath(path, study.folder) for path in made)
    done = datetime.now(UTC).isoformat(timespec="seconds")
    return replace(step.entry, made=paths, seconds=round(time.monotonic() - began, 1), done=done)


def _state(entry: CommandRecord, folder: Path) -> State:
    there = all((folder / path).exists() for path in entry.made)
    return "begun" if entry.seconds is None else "done" if there else "to do"


def _why(step: StudyStep) -> str:
    if step.state == "changed":
        return ", ".join(f"{name} {was!r} -> {now!r}" for name, (was, now) in step.changes.items())
    return {"begun": "goes on", "done": "asked again, as something before it was made anew"}.get(step.state, "begins")


def _last(wanted: Sequence[StudyStep], until: str | None) -> int:
    verbs = [step.entry.verb for step in wanted]
    if not verbs:
        raise BadInput("The study has no commands. Its recipe must name some.")
    if until is None:
        return len(verbs) - 1
    if until not in verbs:
        raise UnknownName.among("The station", until, dict.fromkeys(verbs), "The recipe has no other.")
    return max(number for number, verb in enumerate(verbs) if verb == until)


def _flags(command: Command, folder: Path) -> dict[str, Json]:
    """The fields of `command` as JSON, with the content of files; the study's own folder is a dot, as it may be moved."""
    values = {field.name: getattr(command, field.name) for field in fields(command)}  # pyright: ignore[reportArgumentType]
    told = {name: _json(value, folder) for name, value in values.items()}
    files = {name: Path(value) for name, value in values.items() if isinstance(value, (str, Path)) and Path(value).is_file()}
    return told | {f"{name}, SHA-256": file_sha256(path) for name, path in files.items()}


def _json(value: object, folder: Path) -> Json:
    if isinstance(value, Path) and value.is_relative_to(folder):
        inside = value.relative_to(folder).as_posix()
        return inside if inside == "." else f"./{inside}"
    if isinstance(value, range):
        return f"{value.start}:{value.stop}"
    if isinstance(value, (tuple, list)):
        return [_json(each, folder) for each in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _changes(was: Mapping[str, Json], now: Mapping[str, Json]) -> dict[str, tuple[Json, Json]]:
    names = dict.fromkeys([*was, *now])
    return {name: (was.get(name), now.get(name)) for name in names if was.get(name) != now.get(name)}


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink()


def _write(study: Study, entries: Sequence[CommandRecord], recipe: str | None) -> None:
    path = study.folder / DIARY
    write_json(path, FORMAT, {"recipe": recipe, "commands": [asdict(entry) for entry in entries]})
