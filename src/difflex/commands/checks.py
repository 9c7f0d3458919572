"""Checks of recipes: their code, their options, and their commands, whose values are held to what the command line accepts."""

import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

from tyro.constructors import PrimitiveConstructorSpec

from difflex.errors import BadInput, DifflexError
from difflex.study import Command, Study
from difflex.values import check_value, shown, type_hints

__all__ = ["check_options", "check_values", "checked_study", "mistakes"]


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


@contextmanager
def mistakes(name: str) -> Iterator[None]:
    """Turn whatever the code of a recipe raises into an error that names its file and line."""
    try:
        yield
    except DifflexError:
        raise
    except (Exception, SystemExit) as error:
        file = name.rpartition(":")[0] or name
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        place = f"{file}, line {line}" if line else f"The recipe {name}"
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        raise BadInput(f"{place}, failed with {reason.strip(': ')}. Mend it there, then give the same command again.") from error


def checked_study(name: str, study: object) -> Study:
    """Return what the recipe `name` returned, if it is a study of commands that the command line would accept."""
    if not isinstance(study, Study):
        raise BadInput(f"The recipe {name} returned {study!r:.100}; return a difflex.Study.")
    if not isinstance(study.folder, Path) or not isinstance(study.model, str) or not isinstance(study.commands, (tuple, list)):
        raise BadInput(
            f"The recipe {name} returned {study!r:.200}; its folder is a Path, its model a name, its commands a tuple."
        )
    for command in study.commands:
        if not isinstance(command, Command) or not is_dataclass(command):
            raise BadInput(f"The recipe {name} names {command!r:.200} as a command; name instances, as TrainCommand(...).")
        check_values(command)
    return study


def check_options(name: str, function: Callable[..., Study], options: Mapping[str, object], known: Sequence[str]) -> None:
    """Raise an error for an option that a recipe does not take."""
    parameters = inspect.signature(function).parameters if options else {}
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for option in options:
        if option not in parameters:
            accepted = ", ".join(f"--{each}" for each in known if each in parameters) or "no options"
            raise BadInput(
                f"The recipe {name} takes {accepted}, but --{option} was given. Add an argument `{option}` to its function."
            )
