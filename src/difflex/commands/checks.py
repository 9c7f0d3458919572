"""The check of a recipe's commands: their values are held to what the command line accepts."""

from dataclasses import fields
from typing import get_args, get_type_hints

from tyro.constructors import PrimitiveConstructorSpec

from difflex.errors import BadInput
from difflex.study import Command
from difflex.values import check_value, shown, type_hints

__all__ = ["check_values"]


def check_values(command: Command) -> None:
    """Raise an error if `command`, which a recipe made, holds a value that the command line would refuse."""
    kind = type(command)
    if not kind.__module__.startswith("difflex."):  # a class of the recipe's own
        return
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(command):  # pyright: ignore[reportArgumentType]
        value, name = getattr(command, field.name), f"{kind.__name__}.{field.name}"
        check_value(type_hints(kind)[field.name], value, name)
        rule = next((mark for mark in get_args(hints[field.name]) if isinstance(mark, PrimitiveConstructorSpec)), None)
        if rule is not None and value not in (None, ()):
            try:
                rule.instance_from_str(rule.str_from_instance(value))
            except ValueError as error:
                raise BadInput(f"{name} is {shown(value)}: {error}") from error
