"""Prompts from wherever they are: a list, a file, a folder of files, a data set on the hub."""

import csv
import json
import warnings
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

from difflex.errors import BadInput, BrokenFile, MissingExtra, UnknownName

__all__ = ["read_prompts"]

USUAL = ("prompt", "caption", "text")
"""Names of columns that are taken without being asked for."""


def read_prompts(source: str | Path | Iterable[str], column: str | None = None, revision: str | None = None) -> Iterator[str]:
    """The prompts in `source`, read as they are asked for; the first one at once, so that what is wrong is said at once.

    A file holds a prompt on each line (empty lines are left out), or a column: .csv, .jsonl or .parquet. A folder holds such
    files; OWNER/NAME or OWNER/NAME:COLUMN is a data set on the hub, streamed, pinned by `revision`. Anything else is a list.
    """
    prompts = _prompts(source, column, revision)
    first = next(prompts, None)
    if first is None:
        raise BadInput(f"There is no prompt in {source}. Give it at least one.")
    return chain([first], prompts)


def _prompts(source: str | Path | Iterable[str], column: str | None, revision: str | None) -> Iterator[str]:
    if not isinstance(source, (str, Path)):
        return iter(source)
    path = Path(source).expanduser()
    if path.is_file():
        readers = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
        return readers[path.suffix](path, column) if path.suffix in readers else _lines(path)
    name, _, asked = str(source).partition(":")
    if path.is_dir() or (name.count("/") == 1 and not name.startswith((".", "/", "~")) and not path.suffix):
        return _dataset(str(path) if path.is_dir() else name, column or asked or None, revision)
    raise BadInput(
        f"The file {source} does not exist. Name a file or folder of prompts, or a data set on the hub as OWNER/NAME:COLUMN."
    )


def _lines(path: Path) -> Iterator[str]:
    """Each line that holds something."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise BrokenFile(f"{path}, line {number}, is not UTF-8 text ({error.reason}). Save the file as UTF-8.") from error
            if text:
                yield text


def _csv(path: Path, column: str | None) -> Iterator[str]:
    # Cells may hold line breaks, which is why lines are handed on as they are.
    rows = csv.DictReader(_raw_lines(path))
    asked = _column(path, column, rows.fieldnames or ())
    return (row[asked] or "" for row in rows)


def _raw_lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            yield from file
        except UnicodeDecodeError as error:
            raise BrokenFile(
                f"{path} is not UTF-8 text ({error.reason} at byte {error.start}). Save the file as UTF-8."
            ) from error


def _jsonl(path: Path, column: str | None) -> Iterator[str]:
    asked = None
    for number, line in enumerate(_lines(path), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BrokenFile(f"{path}, entry {number}, is not JSON ({error}). Write one object on each line.") from error
        if isinstance(row, str):
            yield row
            continue
        asked = asked or _column(path, column, row)
        if asked not in row:
            raise BrokenFile(f"{path}, entry {number}, has no '{asked}'. Give each line the same entries.")
        yield str(row[asked])


def _parquet(path: Path, column: str | None) -> Iterator[str]:
    return _rows(_datasets().load_dataset("parquet", data_files=str(path), split="train", streaming=True), path, column)


def _dataset(name: str, column: str | None, revision: str | None) -> Iterator[str]:
    try:
        rows = _datasets().load_dataset(name, split="train", streaming=True, revision=revision)
    except (OSError, ValueError, RuntimeError) as error:
        what = str(error).strip().splitlines()[0]
        raise BadInput(
            f"The data set '{name}' cannot be read ({what}). Name a folder of files or OWNER/NAME on the hub."
        ) from error
    return _rows(rows, name, column)


def _rows(rows: Any, source: str | Path, column: str | None) -> Iterator[str]:
    """A column of a streamed data set."""
    first = next(iter(rows), None)
    if first is None:
        return iter(())
    asked = _column(source, column, rows.column_names or first)
    return (str(row[asked]) for row in rows)


def _column(source: str | Path, asked: str | None, known: Iterable[str]) -> str:
    """The column asked for, or the one that is meant where none is asked for."""
    names = list(known)
    if asked is not None and asked in names:
        return asked
    usual = [name for name in USUAL if name in names] if asked is None else []
    if usual or (asked is None and len(names) == 1):
        return usual[0] if usual else names[0]
    if asked is None:
        raise BadInput(f"Which column of {source} holds the prompts was not said. It has: {', '.join(names) or 'none'}.")
    raise UnknownName.among(f"In {source} the column", asked, names)


def _datasets() -> Any:
    if find_spec("datasets") is None:
        raise MissingExtra.of("datasets", "data", "reading Parquet files, folders and data sets on the hub")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import datasets
    datasets.disable_progress_bars()
    return datasets
