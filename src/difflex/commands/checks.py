"""The check of a recipe's commands: their values are held to what the command line accepts."""

from dataclasses import fields
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from tyro.constructors import PrimitiveConstructorSpec

from difflex.errors import BadInput
from difflex.study import Command

__all__ = ["check_values"]


def check_values(command: Command) -> None:
    """Raise an error if `command`, which a recipe made, holds a value that the command line would refuse."""
    hints = get_type_hints(type(command), include_extras=True)
    for field in fields(command):  # pyright: ignore[reportArgumentType]
        value, hint = getattr(command, field.name), hints[field.name]
        problem = "" if _fits(value, hint) else f"it is a {type(value).__name__}, not {_plain(hint)}"
        rule = next((mark for mark in get_args(hint) if isinstance(mark, PrimitiveConstructorSpec)), None)
        if rule is not None and not problem and value not in (None, ()):
            try:
                rule.instance_from_str(rule.str_from_instance(value))
            except ValueError as error:
                problem = str(error)
        if problem:
            raise BadInput(f"{type(command).__name__}({field.name}={value!r:.80}) is not possible: {problem.rstrip('.')}.")


def _fits(value: object, hint: Any) -> bool:
    """Whether `value` is of the type of a field: a plain class, a choice, an alternative of types, or a tuple."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _fits(value, inner[0])
    if origin is Literal:
        return value in inner
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is tuple:
        many = len(inner) == 2 and inner[1] is ...
        kinds = inner[:1] * len(value) if many and isinstance(value, tuple) else inner
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if not isinstance(hint, type) or hint is object:  # a type of the recipe's own
        return True
    return isinstance(value, (int, float) if hint is float else hint) and (hint is bool or not isinstance(value, bool))


def _plain(hint: Any) -> str:
    """Return a type as it is written, without what is noted about it."""
    inner = get_args(hint)
    if get_origin(hint) is Annotated:
        return _plain(inner[0])
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_plain, inner))
    if get_origin(hint) is tuple:
        return "a tuple of " + ", ".join(_plain(each) for each in inner if each is not ...)
    return "None" if hint is NoneType else hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
