"""Prompts from wherever they are: a list, a file, a folder of files, a data set on the hub."""

import csv
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

from difflex.errors import BadInput, BrokenFile, DifflexError, MissingExtra, UnknownName

__all__ = ["read_prompts"]

USUAL = ("prompt", "caption", "text")
"""Names of columns that are taken without being asked for."""
HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*")
"""What a name on the hub looks like."""


def read_prompts(source: str | Path | Iterable[str], column: str | None = None, revision: str | None = None) -> Iterator[str]:
    """The prompts in `source`, read as they are asked for; the first one at once, so that what is wrong is said at once.

    A file holds a prompt on each line, or a column: .csv, .json (a list), .jsonl or .parquet. A folder holds such files;
    OWNER/NAME or OWNER/NAME:COLUMN is a data set on the hub, streamed, pinned by `revision`. What is empty in them is left out.
    Anything else is a list.
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
        if path.suffix.lower() not in READERS and column is not None:
            raise BadInput(
                f"The file {path} has no column '{column}': it is read as text. Columns are in {', '.join(READERS)} files."
            )
        read = READERS.get(path.suffix.lower(), _text)
        return filter(None, read(path, column))
    name, _, asked = str(source).partition(":")
    if path.is_dir() or (HUB.fullmatch(name) and path.suffix.lower() not in FILES):
        return filter(None, _dataset(str(path) if path.is_dir() else name, column or asked or None, revision))
    raise BadInput(
        f"The file {source} does not exist. Name a file or folder of prompts, or a data set on the hub as OWNER/NAME:COLUMN."
    )


def _text(path: Path, column: str | None) -> Iterator[str]:
    return _lines(path)


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
    try:
        # Cells may hold line breaks, which is why lines are handed on as they are.
        rows = csv.DictReader(_raw_lines(path))
        asked = _column(path, column, rows.fieldnames or ())
        for row in rows:
            yield row[asked] or ""
    except csv.Error as error:
        raise BrokenFile(f"{path} is not a table in CSV ({error}). Look for a quote that is opened and never closed.") from error


def _raw_lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            yield from file
        except UnicodeDecodeError as error:
            raise BrokenFile(
                f"{path} is not UTF-8 text ({error.reason} at byte {error.start}). Save the file as UTF-8."
            ) from error


def _jsonl(path: Path, column: str | None) -> Iterator[str]:
    return _entries(path, column, (_parsed(path, f"entry {number}", line) for number, line in enumerate(_lines(path), 1)))


def _json(path: Path, column: str | None) -> Iterator[str]:
    entries = _parsed(path, "the file", "\n".join(_lines(path)) or "[]")
    if not isinstance(entries, list):
        raise BrokenFile(f"{path} holds no list. Write a list of prompts or of objects, or one object a line in a .jsonl file.")
    return _entries(path, column, entries)


def _parsed(path: Path, where: str, text: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise BrokenFile(f"{path}, {where}, is not JSON ({error}). Write one object on each line of a .jsonl file.") from error


def _entries(path: Path, column: str | None, entries: Iterable[object]) -> Iterator[str]:
    """A prompt of each entry, which is an object or the prompt itself."""
    asked = None
    for number, row in enumerate(entries, 1):
        where = f"{path}, entry {number}"
        if isinstance(row, Mapping):
            asked = asked or _column(path, column, row)
            if asked not in row:
                raise BrokenFile(f"{where}, has no '{asked}'. Give each the same entries.")
            row = row[asked]
        yield _prompt(row, where)


def _prompt(value: object, where: str) -> str:
    """The text of an entry; nothing where it is null."""
    if value is None or isinstance(value, str):
        return value or ""
    raise BrokenFile(f"{where}, holds {value!r} where a prompt should be. Write text, or name another column.")


def _parquet(path: Path, column: str | None) -> Iterator[str]:
    if path.read_bytes()[:4] != b"PAR1":
        raise BrokenFile(f"{path} is not a Parquet file: it does not begin like one. Copy or download it again.")
    load = partial(_datasets().load_dataset, "parquet", data_files=str(path))
    return _rows(load, path, column)


def _dataset(name: str, column: str | None, revision: str | None) -> Iterator[str]:
    return _rows(partial(_datasets().load_dataset, name, revision=revision), name, column)


def _rows(load: Callable[..., Any], source: str | Path, column: str | None) -> Iterator[str]:
    """A column of a streamed data set."""
    try:
        rows = load(split="train", streaming=True)
        first = next(iter(rows), None)
        asked = None if first is None else _column(source, column, rows.column_names or first)
        for number, row in enumerate(rows if asked else (), 1):
            yield _prompt(row[asked], f"{source}, row {number}")
    # All that datasets raises of its own has one ancestor, beside what the readers of the formats raise.
    except (OSError, ValueError, RuntimeError, _datasets().exceptions.DatasetsError) as error:
        if isinstance(error, DifflexError):
            raise
        what = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(
            f"The data set '{source}' cannot be read ({what}). Name a folder of files in UTF-8, or OWNER/NAME on the hub."
        ) from error


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


READERS = {".csv": _csv, ".json": _json, ".jsonl": _jsonl, ".parquet": _parquet}
"""Of files with columns."""
FILES = (".txt", *READERS)
"""Endings that no data set on the hub has."""
