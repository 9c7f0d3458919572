"""Types of flags that several verbs share."""

import re
from typing import Annotated

from tyro.constructors import PrimitiveConstructorSpec

__all__ = ["Numbers", "Pixels", "Range"]


def _range(words: list[str]) -> range:
    found = re.fullmatch(r"(\d+):(\d+)", words[0])
    if not found or int(found[1]) >= int(found[2]):
        raise ValueError(
            f"'{words[0]}' is not a range. Write START:END with START below END, END itself left out: 0:4 is 0 1 2 3."
        )
    return range(int(found[1]), int(found[2]))


def _pixels(words: list[str]) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", words[0])
    if not found:
        raise ValueError(f"'{words[0]}' is not a size. Write HEIGHTxWIDTH or one number for a square: 64x96 or 64.")
    return int(found[1]), int(found[2] or found[1])


def _numbers(words: list[str]) -> tuple[int, ...]:
    parts = [part for word in words for part in word.split(",") if part]
    if not all(re.fullmatch(r"[1-9]\d*", part) for part in parts):
        raise ValueError(f"'{' '.join(words)}' is not a list of numbers. Write them with commas or spaces: 16,32,64.")
    return tuple(map(int, parts))


Range = Annotated[
    range,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="START:END",
        instance_from_str=_range,
        is_instance=lambda value: isinstance(value, range),
        str_from_instance=lambda value: [f"{value.start}:{value.stop}"],
    ),
]
"""Whole numbers from START up to but not END, as in Python."""

Pixels = Annotated[
    tuple[int, int],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="HEIGHTxWIDTH",
        instance_from_str=_pixels,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [f"{value[0]}x{value[1]}"],
    ),
]
"""Height and width of an image."""

Numbers = Annotated[
    tuple[int, ...],
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="N,...",
        instance_from_str=_numbers,
        is_instance=lambda value: isinstance(value, tuple) and all(isinstance(number, int) for number in value),
        str_from_instance=lambda value: [",".join(map(str, value))],
    ),
]
"""Whole numbers above 0, with commas or spaces between them."""
