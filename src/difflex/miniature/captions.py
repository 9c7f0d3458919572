"""Captions: a scene put into words, and words read back into what they ask for."""

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

GLUE = ("a", "and", "at", "on", "the", "in", "of", "with", "picture", "style", "above", "below", "to", "drawing", "an")
PLURALS = tuple(shape + ("es" if shape == "cross" else "s") for shape in SHAPES)
WORDS = tuple(sorted({*SHAPES, *PLURALS, *COLOURS, *TEXTURES, *SIZES, *ROWS, *COLUMNS, *BACKGROUNDS, *STYLES, *COUNTS, *GLUE}))
"""Every word that a caption can hold."""
CHUNK = 256
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Relation -> the step, in columns and rows, from the second object to the first."""


@dataclass(frozen=True, kw_only=True)
class ObjectRequest:
    """One kind of object that a caption asks for; None where the caption says nothing."""

    shape: str
    count: int = 1
    colour: str | None = None
    texture: str | None = None
    size: str | None = None
    row: str | None = None
    column: str | None = None


@dataclass(frozen=True, kw_only=True)
class CaptionRequest:
    """What a caption asks for."""

    objects: tuple[ObjectRequest, ...] = ()
    background: str | None = None
    style: str | None = None
    relation: str | None = None
    """How the first object stands to the second."""
    unknown: tuple[str, ...] = ()
    """Words that no caption of the drawn world holds."""


def write(specs: SceneSpecs) -> list[str]:
    """One caption a scene."""
    u = uniform(specs.seed, 40, stream=2).tolist()
    rows = [part.tolist() for part in (specs.count, specs.background, specs.style)]
    objects = [part.tolist() for part in (specs.shape, specs.colour, specs.texture, specs.size, specs.row, specs.column)]
    return [
        _caption(count, ground, style, [tuple(part[i][slot] for part in objects) for slot in range(count)], u[i])
        for i, (count, ground, style) in enumerate(zip(*rows, strict=True))
    ]


def endless(start: int = 0) -> Iterator[str]:
    """The captions of all scenes from the one of seed `start` on."""
    for first in count(start, CHUNK):
        yield from write(scenes(torch.arange(first, first + CHUNK)))


def _caption(count: int, ground: int, style: int, objects: list[tuple[int, ...]], u: list[float]) -> str:
    copies = count > 1 and objects[0][:4] == objects[1][:4]
    if copies:
        what = _things(objects[0], u[:8], COUNTS[count - 1]) + _shared_place(objects, u[8])
    elif count == 2:
        what = _pair(objects, u)
    else:
        what = _things(objects[0], u[:8], "a") + (_place(objects[0], u[8]) if u[9] < 0.75 else "")
    if u[20] < 0.9:
        what = f"on {BACKGROUNDS[ground]} {what}" if u[21] < 0.12 else f"{what} on {BACKGROUNDS[ground]}"
    if u[22] < (0.4 if style == 0 else 0.92):
        what = _styled(what, STYLES[style], u[23])
    return what


def _things(thing: tuple[int, ...], u: list[float], article: str) -> str:
    """Article, adjectives, noun: `a small striped red star`, `two red stars`."""
    shape, colour, texture, size = thing[:4]
    words = [SIZES[size]] if u[0] < 0.45 else []
    surface = [TEXTURES[texture]] if u[1] < (0.35 if texture == 0 else 0.8) else []
    tint = [COLOURS[colour]] if u[2] < 0.92 else []
    words += surface + tint if u[3] < 0.7 else tint + surface
    noun = SHAPES[shape] if article == "a" else PLURALS[shape]
    article = "an" if article == "a" and (words or [noun])[0][0] in "aeiou" else article
    return " ".join([article, *words, noun])


def _place(thing: tuple[int, ...], u: float) -> str:
    row, column = ROWS[thing[4]], COLUMNS[thing[5]]
    if (row, column) == ("middle", "center"):
        return " in the center"
    if u < 0.7:
        return f" at the {row} {column}"
    return f" at the {row}" if u < 0.85 and row != "middle" else f" at the {column}"


def _shared_place(things: list[tuple[int, ...]], u: float) -> str:
    """The row or column that all copies have in common, if any, most of the time."""
    rows, columns = {t[4] for t in things}, {t[5] for t in things}
    if len(rows) == 1 and u < 0.7:
        return f" at the {ROWS[rows.pop()]}"
    return f" at the {COLUMNS[columns.pop()]}" if len(columns) == 1 and u < 0.7 else ""


def _pair(things: list[tuple[int, ...]], u: list[float]) -> str:
    first, second = (things[1], things[0]) if u[24] < 0.5 else (things[0], things[1])
    one, two = _things(first, u[:8], "a"), _things(second, u[10:18], "a")
    relations = [
        name for name, (dx, dy) in RELATIONS.items() if _sign(first[5] - second[5]) == dx and _sign(first[4] - second[4]) == dy
    ] or [
        name
        for name, (dx, dy) in RELATIONS.items()
        if (dx and dx == _sign(first[5] - second[5])) or (dy and dy == _sign(first[4] - second[4]))
    ]
    if u[25] < 0.45:
        return f"{one} {relations[int(u[26] * len(relations))]} {two}"
    if u[25] < 0.75:
        return f"{one}{_place(first, u[27])} and {two}{_place(second, u[28])}"
    return f"{one} and {two}"


def _styled(what: str, style: str, u: float) -> str:
    if u < 0.5:
        return f"{what} {style}"
    if u < 0.75:
        return f"{style} picture of {what}"  # the word of the captions that mini-flux was trained on
    return f"{what} in {style} style" if u < 0.9 else f"{style} drawing of {what}"


def _sign(x: int) -> int:
    return (x > 0) - (x < 0)


def read(caption: str) -> CaptionRequest:
    """What a caption asks for: the inverse of `write`, and good enough for what people type."""
    text = re.sub(r"[^a-z ]", " ", caption.lower())
    text = text.replace("in the center", "middle center")
    text = re.sub(r"\b(?:to the )?(left|right) of(?: the)?\b", r"\1-of", text).replace("watercolour", "watercolor")
    words = text.split()
    nouns = [i for i, word in enumerate(words) if word in SHAPES or word in PLURALS]
    starts = [max((i for i in range(noun) if words[i] in ("a", "an", *COUNTS)), default=0) for noun in nouns]
    objects = []
    for start, noun, end in zip(starts, nouns, [*starts[1:], len(words)][: len(starts)], strict=True):
        objects.append(_wanted(words[start : noun + 1], words[noun + 1 : end]))
    relation = next((word.replace("-", " ") for word in words if word.replace("-", " ") in RELATIONS), None)
    return CaptionRequest(
        objects=tuple(objects),
        background=_first(words, BACKGROUNDS),
        style=_first(words, STYLES),
        relation=relation if len(objects) > 1 else None,
        unknown=tuple(word for word in words if word not in WORDS and word.replace("-", " ") not in RELATIONS),
    )


def _wanted(phrase: list[str], after: list[str]) -> ObjectRequest:
    noun = phrase[-1]
    return ObjectRequest(
        shape=noun if noun in SHAPES else SHAPES[PLURALS.index(noun)],
        count=next((COUNTS.index(word) + 1 for word in phrase if word in COUNTS), 1),
        colour=_first(phrase, COLOURS),
        texture=_first(phrase, TEXTURES),
        size=_first(phrase, SIZES),
        row=_first(after, ROWS),
        column=_first(after, COLUMNS),
    )


def _first(words: list[str], among: tuple[str, ...]) -> str | None:
    return next((word for word in words if word in among), None)
