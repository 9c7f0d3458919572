"""The words that a command is given by, from what the diary of a study says of it."""

from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from typing import Any, get_args, get_type_hints

from tyro.conf import Positional
from tyro.constructors import PrimitiveConstructorSpec

from difflex.commands import verb_class
from difflex.files import Json
from difflex.study import CommandRecord

__all__ = ["words"]

FIRST = get_args(Positional[int])[1:]
"""What marks a field that is given without its name."""


def words(entry: CommandRecord, study: str = "STUDY") -> list[str]:
    """The verb of `entry` and its flags, as a shell is told them; what is as by default is left out, the folder is `study`."""
    command: type[Any] = verb_class(entry.verb)
    hints = get_type_hints(command, include_extras=True)
    known = {field.name: field for field in fields(command) if field.name in entry.flags}
    placed, named = [], []
    for name, field in known.items():
        value, hint = entry.flags[name], hints[name]
        if any(mark in FIRST for mark in _marks(hint)):
            placed += _spelt(value, hint, study)
        elif not _is_default(value, field):
            flag = f"--{name.replace('_', '-')}"
            named += [flag] if value is True else [flag, *_spelt(value, hint, study)]
    return [entry.verb, *placed, *named]


def _marks(hint: object) -> Iterator[object]:
    """All that annotations say of a field, however deep they stand."""
    yield from getattr(hint, "__metadata__", ())
    for inner in (getattr(hint, "__origin__", None), *get_args(hint)):
        if inner is not None and inner is not hint and not isinstance(inner, str):
            yield from _marks(inner)


def _spelt(value: Json, hint: object, study: str) -> list[str]:
    """A value as the words that its flag reads: by the rule of its type, where that has one."""
    rule = next((mark for mark in _marks(hint) if isinstance(mark, PrimitiveConstructorSpec)), None)
    if rule is not None and not isinstance(value, str):
        return rule.str_from_instance(tuple(value) if isinstance(value, list) else value)
    several = value if isinstance(value, list) else [value]
    return [_word(each, study) for each in several]


def _word(value: Json, study: str) -> str:
    text = f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
    return study if text == "." else f"{study}/{text[2:]}" if text.startswith("./") else text


def _is_default(value: Json, field: "Field[Any]") -> bool:
    if field.default is MISSING:
        return False
    usual = field.default
    if isinstance(usual, range):
        return value == f"{usual.start}:{usual.stop}"
    return value == (list(usual) if isinstance(usual, tuple) else usual)
