"""The content of a folder, without times: what must stay, and what a command must lead to."""

import hashlib
import json
import os
import re
import shutil
import sqlite3
import tempfile
from collections import Counter
from itertools import zip_longest
from pathlib import Path
from typing import Any

TIMES = {"seconds", "finished", "at", "checksum", "tokens_per_second", "waiting", "difflex"}
"""Entries and columns that differ between equal runs: times, and what depends on them."""
NUMBERS = {"id", "number", "explanation", "example", "booked"}
"""Columns that number rows."""
CLOCK = re.compile(rb"finished [^<]{0,60}|[\d.]+ (second|minute|hour)s?|\d{4}-\d\d-\d\d|\d\d:\d\d(:\d\d)?")
SIDECARS = ("-wal", "-shm")
LEFTOVERS = (".tmp", ".part", "-journal")
PAID = ("explanations", "judgements", "scores", "usage", "answers", "calls")
"""Tables whose rows cost money."""
SPENT = ("usage", "calls")
"""Tables of what was spent, which a kill in the midst of a call may change."""

Content = dict[str, str]


def content(folder: Path) -> Content:
    """Return a hash of the content of each file in `folder`, by path."""
    return {path: content_hash(folder / path) for path in files(folder)}


def files(folder: Path) -> list[str]:
    """Return the paths of all files and links in `folder`, without the temporary ones of SQLite."""
    found = []
    for root, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        found += [os.path.relpath(os.path.join(root, name), folder) for name in [*names, *links]]
    return sorted(path for path in found if not path.endswith(SIDECARS) and "__pycache__" not in path)


def content_hash(path: Path, exact: bool = False) -> str:
    """Return a hash of the file at `path` that is the same for every run; `exact` minds the order of entries."""
    if path.is_symlink():
        return f"link to {os.readlink(path)}"
    if not path.is_file():
        return "missing" if not path.exists() else "no file"
    data = path.read_bytes()
    try:
        if path.suffix == ".json":
            data = _untimed(data, exact)
        elif path.suffix == ".jsonl":
            data = b"\n".join(_untimed(line, exact) for line in data.splitlines())
        elif path.suffix == ".sqlite":
            found = {name: rows.items() for name, rows in table_rows(path).items() if name not in SPENT}
            data = repr([(name, [*rows] if exact else sorted(rows)) for name, rows in found.items()]).encode()
        elif path.suffix in (".html", ".csv"):
            data = CLOCK.sub(b"", data)
    except (ValueError, RecursionError, sqlite3.Error, OverflowError):
        pass
    return hashlib.sha256(data).hexdigest()


def raw_hash(path: Path) -> str:
    """Return the hash of the bytes of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no file"


def _untimed(data: bytes, exact: bool = False) -> bytes:
    return json.dumps(_without_times(json.loads(data)), sort_keys=not exact).encode()


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_times(inner) for name, inner in value.items() if name not in TIMES}
    return [_without_times(inner) for inner in value] if isinstance(value, list) else value


def table_rows(path: Path) -> dict[str, Counter[str]]:
    """Return how often each row is in each table of a database; changes that are still in its log count."""
    with tempfile.TemporaryDirectory() as folder:
        for ending in ("", "-wal"):
            if path.with_name(path.name + ending).is_file():
                shutil.copy(path.with_name(path.name + ending), Path(folder, "copy" + ending))
        connection = sqlite3.connect(Path(folder, "copy"))
        connection.text_factory = bytes  # damaged text is no UTF-8
        try:
            names = [name.decode() for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            return {name: _rows(connection, name) for name in sorted(names)}
        finally:
            connection.close()


def _rows(connection: sqlite3.Connection, table: str) -> Counter[str]:
    cursor = connection.execute(f'SELECT * FROM "{table}"')
    kept = [number for number, column in enumerate(cursor.description) if column[0] not in TIMES | NUMBERS]
    return Counter(repr([row[number] for number in kept]) for row in cursor if b"failed" not in row)


def paid_rows(folder: Path) -> dict[str, Counter[str]]:
    """Return the rows that cost money in all databases of `folder` that can be read, by path and table."""
    rows: dict[str, Counter[str]] = {}
    for path in files(folder):
        if path.endswith(".sqlite") and (folder / path).is_file():
            try:
                tables = table_rows(folder / path)
            except (sqlite3.Error, UnicodeError):
                continue
            rows |= {f"{path} {name}": found for name, found in tables.items() if name in PAID}
    return rows


def first_difference(one: Path, other: Path) -> str:
    """Describe where two text files differ; empty for other files."""
    if not (one.is_file() and other.is_file() and one.suffix in (".json", ".jsonl", ".csv", ".html")):
        return ""
    texts = [_words(path) for path in (one, other)]
    pairs = zip_longest(*texts)
    return next((f"{a!r} instead of {b!r}" for a, b in pairs if a != b), "")[:300]


def _words(path: Path) -> list[str]:
    text = path.read_text(errors="replace")
    if path.suffix in (".json", ".jsonl"):
        lines = [text] if path.suffix == ".json" else text.splitlines()
        try:
            return [line for part in lines for line in json.dumps(_without_times(json.loads(part)), indent=0).splitlines()]
        except ValueError:
            return text.splitlines()
    return CLOCK.sub(b"", text.encode()).decode(errors="replace").split()


def leftovers(folder: Path) -> list[str]:
    """Return the temporary files in `folder`."""
    return [path for path in files(folder) if path.endswith(LEFTOVERS)]
