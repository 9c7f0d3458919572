"""Values checked against the annotations of their fields: types, choices, finite numbers, texts that can be written."""

import re
from dataclasses import fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from difflex.errors import BadInput, UnknownName

__all__ = ["PLAIN", "check_fields", "check_value", "fits", "shown", "type_hints"]

BIG = {int: 2**63, float: 1e308}
"""Numbers are nearer to 0 than these."""
type_hints = cache(get_type_hints)
"""The annotations of a class, evaluated."""
PLAIN: dict[Any, str] = {
    int: "a whole number below 2^63",
    float: "a finite number",
    str: "text without NUL and halves of characters",
    bool: "true or false",
    NoneType: "None",
}
"""Types whose values are the same in JSON, and their names in messages."""


def check_fields(record: object) -> None:
    """Raise `BadInput` or `UnknownName` if a field of a dataclass has a value of another type than it is annotated with."""
    name, hints = type(record).__name__, type_hints(type(record))
    for field in fields(record):  # pyright: ignore[reportArgumentType]
        check_value(hints[field.name], getattr(record, field.name), f"{name}.{field.name}")


def check_value(kind: Any, value: object, name: str) -> None:
    """Raise an error that calls `value` by `name` if it is not of the type `kind`."""
    if not fits(kind, value):
        if get_origin(kind) is Literal and isinstance(value, str):
            raise UnknownName.among(name, value[:100], get_args(kind))
        raise BadInput(f"{name} is {shown(value)}, which is not {_describe(kind)}.")


def fits(kind: Any, value: Any) -> bool:
    """Return whether `value` is of the type `kind`; numbers must be finite, and texts have no NUL and no half of a character."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(fits(argument, value) for argument in arguments)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        return len(value) == len(kinds) and all(map(fits, kinds, value))
    if kind in (int, float):
        return isinstance(value, int if kind is int else (int, float)) and type(value) is not bool and abs(value) < BIG[kind]
    if kind is str:
        return isinstance(value, str) and not re.search("[\0\ud800-\udfff]", value)
    if issubclass(kind, tuple):  # a NamedTuple
        return isinstance(value, kind) and all(map(fits, type_hints(kind).values(), value))
    return isinstance(value, kind)


def _describe(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(map(_describe, arguments))
    if origin is Literal:
        return f"one of {', '.join(arguments)}"
    if origin is tuple:
        return f"a tuple, each item {_describe(arguments[0])}" + ("" if arguments[-1] is ... else f", {len(arguments)} in all")
    return PLAIN.get(kind) or f"a {kind.__name__}"


def shown(value: object) -> str:
    """Return `value` for a message, cut if it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print numbers of more than 4,300 digits
        return "a huge number"
    return text if len(text) <= 100 else f"{text[:100]}..."
