"""`difflex verify`: compare every file of a study that a later command trusts with its checksum; nothing is changed."""

import json
import os
import re
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple, final

from tyro.conf import Positional, arg

from difflex.errors import BrokenFile, DifflexError, UnknownName
from difflex.files import disk_errors, file_sha256, read_json
from difflex.progress import ProgressBar
from difflex.study import Command, Study

__all__ = ["VerifyCommand"]

PARTS = {
    "study.json": ("study.json", "Move it away and run difflex harvest into the folder again: everything else is kept."),
    "run.json": ("run.json", "Move it away and run the recipe again: it continues with what exists."),
    "anatomy.json": ("anatomy", "Run difflex anatomy again."),
    "dictionaries/*/*/config.json": ("dictionaries", "Move its folder away and run difflex train or difflex itda again."),
    "dictionaries/*/*/hub.json": ("dictionaries", "Run difflex pull again."),
    "dictionaries/*/*/code_statistics.safetensors": ("dictionaries", "Delete it, and import the dictionary again."),
    "dictionaries/*/*/[!c]*.safetensors": ("dictionaries", "Move its folder away and run difflex train or difflex itda again."),
    "dictionaries/*/*/training/*.safetensors": ("training states", "Move it away: its dictionary is not affected."),
    "dictionaries/*/*/training/log.jsonl": ("training logs", "Move it away: its dictionary is not affected."),
    "dictionaries/*/*/training/state.json": ("training states", "Move its folder away: a finished dictionary is not affected."),
    "evaluation/*/*.json": ("evaluation", "Move it away and run difflex evaluate again."),
    "transfer/*/*/*.json": ("transfer", "Move it away and run difflex transfer again."),
    "concepts/*/*.json": ("concepts", "Move it away and run difflex concepts again."),
    "measures/*/*.json": ("measures", "Move it away and run difflex measure again."),
    "block-roles.json": ("block roles", "Move it away and run difflex block-roles again."),
    "books/*/*.sqlite": ("books", ""),
    "books/*/*.safetensors": ("books", "Move it away and run difflex collect again."),
    "images/*.webp": ("images", ""),
    "explanations/answers.sqlite": ("answers", "Run difflex explain again: it keeps every answer that can be read."),
    "explanations/**/*.json": ("explanations", "Run difflex explain again: answers are kept, and it writes the file from them."),
    "steering/scales/*/*.safetensors": ("scales", "Move it away: it is measured again where it is needed."),
    "steering/contrasts/*.safetensors": ("contrasts", "Run difflex contrast again."),
    "steering/judged/*/*.json": ("steer-eval", "Move it away and run difflex steer-eval again."),
    "steering/removal/*/*.json": ("removal", "Move it away and run difflex removal again."),
    "steering/cae/*.json": ("cae", "Move it away and run difflex cae again."),
    "steering/findings/*.json": ("findings", "Move it away and run difflex findings again."),
}
"""For files by their place in a study: the line of the summary that counts them, and how a damaged one is repaired."""
KEPT_ASIDE = r"\.(damaged|older)-\d+\.sqlite$"
"""Names of books that difflex collect replaced: they are kept, and no command reads them."""


class CheckedFile(NamedTuple):
    """A file, and what raises an error if it is damaged."""

    part: str
    """The line of the summary that counts it."""
    path: Path
    check: Callable[[], object]


@final
@dataclass(frozen=True, kw_only=True)
class VerifyCommand(Command):
    """Compare all files of a study with their checksums, and name the command that repairs a damaged one. Changes nothing."""

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """The folder of the study."""

    def __call__(self) -> None:
        top = Study.open(self.study).folder if self.study.is_file() else self.study  # of a packed study, where it is unpacked
        studies = [top, *sorted(path.parent for path in top.glob("*/study.json"))]
        if not any((top / name).exists() for name in ("study.json", "activations", "dictionaries")):
            raise UnknownName(f"{self.study} is not a study: it has no study.json. difflex harvest begins one.")
        files = [file for folder in studies for file in _files(Study(folder=folder, model=""), top)]
        counts: dict[str, tuple[int, int]] = {file.part: (0, 0) for file in files}
        with (
            ProgressBar(total=sum(map(_size, files)), unit="B", unit_scale=True, desc="verify") as bar,
            ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        ):
            for file, error in zip(files, pool.map(_error, files), strict=True):
                checked, damaged = counts[file.part]
                counts[file.part] = checked + 1, damaged + (error is not None)
                bar.update(_size(file))
                if error is not None:
                    bar.write(error)
        for part, (checked, damaged) in counts.items():
            noun = f"{checked:,} file{'s' * (checked != 1)}"
            print(f"{part}: {noun}, {f'{damaged:,} DAMAGED' if damaged else 'all intact'}")
        if damaged := sum(damaged for _, damaged in counts.values()):
            raise BrokenFile(
                f"{damaged:,} of {len(files):,} files in {self.study} are damaged or cannot be read. Nothing was changed."
            )


def _size(file: CheckedFile) -> int:
    try:
        return file.path.stat().st_size
    except OSError:
        return 0


def _error(file: CheckedFile) -> str | None:
    """Return the sentence about a damaged file; None for an intact one."""
    try:
        with disk_errors(file.path, "read"):
            file.check()
    except FileNotFoundError:
        return f"{file.path} is missing."
    except DifflexError as error:
        return " ".join(str(error).split())
    return None


def _files(study: Study, root: Path) -> Iterator[CheckedFile]:
    """Yield all files of `study`; parts of one inside the study `root` carry its name."""
    prefix = "" if study.folder == root else f"{study.folder.relative_to(root)}/"
    for place in sorted(path for path in study.activations.glob("*") if not path.name.startswith(".")):
        yield from _store_files(prefix + place.name.replace("+", ":"), place)
    for pattern, (part, repair) in PARTS.items():
        for path in sorted(path for path in study.folder.glob(pattern) if not re.search(KEPT_ASIDE, path.name)):
            yield CheckedFile(prefix + part, path, partial(_check, study, path, repair))


def _store_files(part: str, folder: Path) -> Iterator[CheckedFile]:
    from difflex.store import Store

    try:
        checksums = Store.checksums(folder)
    except DifflexError:
        yield CheckedFile(part, folder, partial(Store.checksums, folder))
        return
    part = part if any(path.name == "statistics.safetensors" for path in checksums) else f"{part}, not finished"
    yield CheckedFile(part, folder / "manifest.json", partial(Store.checksums, folder))
    for path, sha256 in checksums.items():
        yield CheckedFile(part, path, partial(_compare, path, sha256))


def _compare(path: Path, sha256: str) -> None:
    if not path.is_file() or file_sha256(path) != sha256:
        problem = "does not match its checksum: it is damaged" if path.is_file() else "is missing"
        raise BrokenFile(f"{path} {problem}. Run the same harvest again: it makes what is damaged again, and nothing else.")


def _check(study: Study, path: Path, repair: str) -> None:
    """Raise an error if the file at `path` is damaged."""
    from difflex.dictionary_config import fingerprint
    from difflex.features import ImageAlbum
    from difflex.tensors import check_tensors

    if path.parent == study.images:
        if sentence := ImageAlbum(study.images).damage(path.name):
            raise BrokenFile(sentence)
    elif path.suffix == ".sqlite":
        _check_answers(path, repair) if path.name == "answers.sqlite" else _check_book(study, path)
    elif path.suffix == ".jsonl":
        _check_lines(path, repair)
    elif path.suffix == ".safetensors":
        check_tensors(path, repair)
    else:
        _check_json(path, repair)
        if path.name == "config.json":
            fingerprint(path.parent)  # compares it with the tensors


def _check_json(path: Path, repair: str) -> None:
    try:
        entries = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        entries = None
    entries = entries if isinstance(entries, dict) else {}
    number = entries.get("format")
    read_json(path, number if type(number) is int else 0, repair)
    if "checksum" not in entries:
        raise BrokenFile(f"{path} has no checksum: it is damaged, or was written by hand. {repair}")


def _check_lines(path: Path, repair: str) -> None:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BrokenFile(f"{path}, line {number}, is not JSON ({error}): it is damaged. {repair}") from error


def _check_book(study: Study, path: Path) -> None:
    from difflex.features import Book, ImageAlbum

    with Book.open(path) as book:
        book.verify()
        for image in book.images():
            if not (study.images / image.file).is_file() and (sentence := ImageAlbum(study.images).damage(image.file)):
                raise BrokenFile(sentence)


def _check_answers(path: Path, repair: str) -> None:
    from difflex.sqlite import sqlite_errors

    # Without a log to replay, the file is read as it is: nothing is made beside it, and its disk may be read-only.
    mode = "mode=ro" if path.with_name(f"{path.name}-wal").exists() else "immutable=1"
    with sqlite_errors(path, repair), closing(sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", uri=True)) as connection:
        [problem, *_] = [text for (text,) in connection.execute("PRAGMA integrity_check")]
    if problem != "ok":
        raise BrokenFile(f"{path} is damaged ({problem}). {repair}")
