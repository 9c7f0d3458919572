"""`JsonRecord`: a base of dataclasses that are stored as JSON files, and the reading of JSON by the annotations of fields."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

from difflex.errors import BadInput, BrokenFile, DifflexError, NonFinite, UnknownName
from difflex.files import read_json, write_json
from difflex.records import Site
from difflex.values import PLAIN, check_value, fits, shown, type_hints

__all__ = ["JsonRecord", "from_json"]

Record = TypeVar("Record", bound="JsonRecord")


class JsonRecord:
    """A base of dataclasses that are stored as JSON files."""

    FORMAT: ClassVar[int]
    COMMAND: ClassVar[str]
    """The command that writes the file."""
    INDENT: ClassVar[int | None] = 1

    def save(self, path: Path | str) -> Path:
        """Write the record to `path` and return the path."""
        try:
            return write_json(Path(path), self.FORMAT, _to_json(self), self.INDENT)
        except ValueError as error:
            raise NonFinite(f"The results of difflex {self.COMMAND} hold NaN or infinity; {path} is not written.") from error

    def as_text(self) -> str:
        """Return a text that `load` reads from a file; without a checksum, so that it may be changed by hand."""
        return json.dumps({"format": self.FORMAT, **_to_json(self)}, indent=self.INDENT, allow_nan=False) + "\n"

    @classmethod
    def load(cls: type[Record], path: Path | str) -> Record:
        """Return the record in `path`."""
        path = Path(path)
        if not path.is_file():
            raise BadInput(f"There is no file {path}. difflex {cls.COMMAND} makes it.")
        advice = f"Move it away and run difflex {cls.COMMAND} again."
        entries = read_json(path, cls.FORMAT, advice)
        try:
            return from_json(cls, entries, "the file")
        except (DifflexError, RecursionError) as error:
            raise BrokenFile(f"{path} cannot be read as results of difflex {cls.COMMAND}: {error} {advice}") from error


def _to_json(value: object) -> Any:
    """Return `value` as JSON: dataclasses become objects, tuples become lists, sites become text."""
    if isinstance(value, Site):
        return str(value)
    if is_dataclass(value):
        return {field.name: _to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    return [_to_json(item) for item in value] if isinstance(value, tuple | list) else value


def from_json(kind: Any, entry: Any, name: str) -> Any:
    """Return the value of the type `kind` that `_to_json` made `entry` of; raise `BadInput` or `UnknownName` if there is none."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):  # X | None, or X | Record | str | None
        fitting = [argument for argument in arguments if argument in (str, NoneType) and fits(argument, entry)]
        fitting += [argument for argument in arguments if is_dataclass(argument) and isinstance(entry, dict)]
        return from_json((fitting or arguments)[0], entry, name)
    if kind in PLAIN or origin is Literal:
        check_value(kind, entry, name)
        return entry
    is_object = origin is dict or is_dataclass(kind)
    expected, text = (str, "a site") if kind is Site else (dict, "an object") if is_object else (list, "a list")
    if type(entry) not in (expected,):
        raise BadInput(f"{name} is {shown(entry)}, which is not {text}.")
    if kind is Site:
        return Site.parse(entry)
    if origin is dict:
        keys = {key: _parse_key(arguments[0], key, name) for key in entry}
        return {keys[key]: from_json(arguments[1], item, f"{name}, {key}") for key, item in entry.items()}
    hints = type_hints(kind) if origin is not tuple else {}
    if is_object:
        names = [field.name for field in fields(kind)]
        if unknown := [key for key in entry if key not in names]:
            raise UnknownName.among(f"In {name} the entry", shown(unknown[0]).strip("'"), names)
        values = {key: from_json(hints[key], item, f"'{key}'") for key, item in entry.items()}
        try:
            return kind(**values)  # pyright: ignore[reportCallIssue]
        except TypeError as error:
            raise BadInput(f"{name} is incomplete: {error}.") from error
    kinds = tuple(hints.values()) or arguments
    kinds = kinds[:1] * len(entry) if kinds[-1] is ... else kinds
    if len(kinds) != len(entry):
        raise BadInput(f"{name} has {len(entry)} items, not {len(kinds)}.")
    items = [from_json(*pair, f"{name}, item {number}") for number, pair in enumerate(zip(kinds, entry, strict=True))]
    return tuple(items) if origin is tuple else kind(*items)  # pyright: ignore[reportCallIssue] (a NamedTuple)


def _parse_key(kind: Any, key: str, name: str) -> Any:
    try:
        return Site.parse(key) if kind is Site else kind(key)
    except ValueError as error:
        raise BadInput(f"{name} has the key '{key}', which is not {PLAIN.get(kind, 'a site')}.") from error
