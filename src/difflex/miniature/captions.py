"""Captions: scenes described in words, and words parsed into requests."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import torch

from difflex.miniature.world import (
    BACKGROUNDS,
    COLOURS,
    COLUMNS,
    COUNTS,
    ROWS,
    SHAPES,
    SIZES,
    STYLES,
    TEXTURES,
    SceneSpecs,
    scenes,
    uniform,
)

FUNCTION_WORDS = ("a", "and", "at", "on", "the", "in", "of", "with", "picture", "style", "above", "below", "to", "drawing", "an")
PLURALS = tuple(shape + ("es" if shape == "cross" else "s") for shape in SHAPES)
WORDS = tuple(
    sorted({*SHAPES, *PLURALS, *COLOURS, *TEXTURES, *SIZES, *ROWS, *COLUMNS, *BACKGROUNDS, *STYLES, *COUNTS, *FUNCTION_WORDS})
)
"""All words of captions."""
CHUNK = 256
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Relation -> the direction, in columns and rows, from the second object to the first."""


@dataclass(frozen=True, kw_only=True)
class ObjectRequest:
    """One kind of object in a caption; None for attributes that it does not state."""

    shape: str
    count: int = 1
    colour: str | None = None
    texture: str | None = None
    size: str | None = None
    row: str | None = None
    column: str | None = None


@dataclass(frozen=True, kw_only=True)
class CaptionRequest:
    """The content of a caption."""

    objects: tuple[ObjectRequest, ...] = ()
    background: str | None = None
    style: str | None = None
    relation: str | None = None
    """Of the first object to the second."""
    unknown: tuple[str, ...] = ()
    """Words that are in no caption of the drawn world."""


def write_captions(specs: SceneSpecs) -> list[str]:
    """Write one caption per scene."""
    u = uniform(specs.seed, 40, stream=2).tolist()
    rows = [part.tolist() for part in (specs.count, specs.background, specs.style)]
    objects = [part.tolist() for part in (specs.shape, specs.colour, specs.texture, specs.size, specs.row, specs.column)]
    return [
        _caption(count, ground, style, [tuple(part[i][slot] for part in objects) for slot in range(count)], u[i])
        for i, (count, ground, style) in enumerate(zip(*rows, strict=True))
    ]


def endless_captions(start: int = 0) -> Iterator[str]:
    """Yield the captions of all scenes from the one of seed `start` on."""
    for first in count(start, CHUNK):
        yield from write_captions(scenes(torch.arange(first, first + CHUNK)))


def _caption(count: int, ground: int, style: int, objects: list[tuple[int, ...]], u: list[float]) -> str:
    copies = count > 1 and objects[0][:4] == objects[1][:4]
    if copies:
        text = _noun_phrase(objects[0], u[:8], COUNTS[count - 1]) + _shared_position(objects, u[8])
    elif count == 2:
        text = _pair(objects, u)
    else:
        text = _noun_phrase(objects[0], u[:8], "a") + (_position(objects[0], u[8]) if u[9] < 0.75 else "")
    if u[20] < 0.9:
        text = f"on {BACKGROUNDS[ground]} {text}" if u[21] < 0.12 else f"{text} on {BACKGROUNDS[ground]}"
    if u[22] < (0.4 if style == 0 else 0.92):
        text = _add_style(text, STYLES[style], u[23])
    return text


def _noun_phrase(item: tuple[int, ...], u: list[float], article: str) -> str:
    """Write article, adjectives and noun: `a small striped red star`, `two red stars`."""
    shape, colour, texture, size = item[:4]
    words = [SIZES[size]] if u[0] < 0.45 else []
    surface = [TEXTURES[texture]] if u[1] < (0.35 if texture == 0 else 0.8) else []
    tint = [COLOURS[colour]] if u[2] < 0.92 else []
    words += surface + tint if u[3] < 0.7 else tint + surface
    noun = SHAPES[shape] if article == "a" else PLURALS[shape]
    article = "an" if article == "a" and (words or [noun])[0][0] in "aeiou" else article
    return " ".join([article, *words, noun])


def _position(item: tuple[int, ...], u: float) -> str:
    row, column = ROWS[item[4]], COLUMNS[item[5]]
    if (row, column) == ("middle", "center"):
        return " in the center"
    if u < 0.7:
        return f" at the {row} {column}"
    return f" at the {row}" if u < 0.85 and row != "middle" else f" at the {column}"


def _shared_position(items: list[tuple[int, ...]], u: float) -> str:
    """Write the row or column that all copies have in common, if any, most of the time."""
    rows, columns = {item[4] for item in items}, {item[5] for item in items}
    if len(rows) == 1 and u < 0.7:
        return f" at the {ROWS[rows.pop()]}"
    return f" at the {COLUMNS[columns.pop()]}" if len(columns) == 1 and u < 0.7 else ""


def _pair(items: list[tuple[int, ...]], u: list[float]) -> str:
    first, second = (items[1], items[0]) if u[24] < 0.5 else (items[0], items[1])
    phrases = _noun_phrase(first, u[:8], "a"), _noun_phrase(second, u[10:18], "a")
    relations = [
        name for name, (dx, dy) in RELATIONS.items() if _sign(first[5] - second[5]) == dx and _sign(first[4] - second[4]) == dy
    ] or [
        name
        for name, (dx, dy) in RELATIONS.items()
        if (dx and dx == _sign(first[5] - second[5])) or (dy and dy == _sign(first[4] - second[4]))
    ]
    if u[25] < 0.45:
        return f" {relations[int(u[26] * len(relations))]} ".join(phrases)
    if u[25] < 0.75:
        phrases = phrases[0] + _position(first, u[27]), phrases[1] + _position(second, u[28])
    return " and ".join(phrases)


def _add_style(text: str, style: str, u: float) -> str:
    if u < 0.5:
        return f"{text} {style}"
    if u < 0.75:
        return f"{style} picture of {text}"  # "picture" is the word in the captions of mini-flux
    return f"{text} in {style} style" if u < 0.9 else f"{style} drawing of {text}"


def _sign(x: int) -> int:
    return (x > 0) - (x < 0)


def parse_caption(caption: str) -> CaptionRequest:
    """Parse a caption of `write_captions`, or similar words of a user."""
    text = re.sub(r"[^a-z ]", " ", caption.lower())
    text = text.replace("in the center", "middle center")
    text = re.sub(r"\b(?:to the )?(left|right) of(?: the)?\b", r"\1-of", text).replace("watercolour", "watercolor")
    words = text.split()
    nouns = [i for i, word in enumerate(words) if word in SHAPES or word in PLURALS]
    starts = [max((i for i in range(noun) if words[i] in ("a", "an", *COUNTS)), default=0) for noun in nouns]
    objects = []
    for start, noun, end in zip(starts, nouns, [*starts[1:], len(words)][: len(starts)], strict=True):
        objects.append(_object_request(words[start : noun + 1], words[noun + 1 : end]))
    relation = next((word.replace("-", " ") for word in words if word.replace("-", " ") in RELATIONS), None)
    return CaptionRequest(
        objects=tuple(objects),
        background=_first_of(words, BACKGROUNDS),
        style=_first_of(words, STYLES),
        relation=relation if len(objects) > 1 else None,
        unknown=tuple(word for word in words if word not in WORDS and word.replace("-", " ") not in RELATIONS),
    )


def _object_request(phrase: list[str], after: list[str]) -> ObjectRequest:
    noun = phrase[-1]
    return ObjectRequest(
        shape=noun if noun in SHAPES else SHAPES[PLURALS.index(noun)],
        count=next((COUNTS.index(word) + 1 for word in phrase if word in COUNTS), 1),
        colour=_first_of(phrase, COLOURS),
        texture=_first_of(phrase, TEXTURES),
        size=_first_of(phrase, SIZES),
        row=_first_of(after, ROWS),
        column=_first_of(after, COLUMNS),
    )


def _first_of(words: list[str], names: tuple[str, ...]) -> str | None:
    return next((word for word in words if word in names), None)
