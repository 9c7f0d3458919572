"""The benchmark's items of the drawn world: their captions, the masks of their objects, and the judge of edited images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count as numbers_from
from itertools import islice
from typing import NamedTuple, TypeVar, final

import torch

from difflex.effects.edit_bench.items import DRAWN, EDIT_TYPES, EditItem, EditMasks, EditType, EditWorld, Images, Mask
from difflex.errors import BadInput
from difflex.miniature import correct_attributes, load_judge
from difflex.miniature.captions import CaptionRequest, ObjectRequest, parse_caption
from difflex.miniature.judge import Judge, SceneReading
from difflex.miniature.world import (
    BACKGROUNDS,
    COLOURS,
    COLUMNS,
    HELD_OUT_SEEDS,
    PIXELS,
    ROWS,
    SHAPES,
    STYLES,
    TEXTURES,
    SceneMix,
    SceneSpecs,
    scenes,
    uniform,
)

FIRST_ITEM = HELD_OUT_SEEDS + 8 * 10**6
"""The seed of the first scene of an item."""
STREAM = 8
"""Of the random numbers by which items change."""
CHUNK = 256
ONE_OBJECT, TWO_OBJECTS = SceneMix(1, 0, 0), SceneMix(0, 1, 0)
GROUPS = ("shape", "colour", "texture", "row", "column")
"""Of objects, which captions of items state, besides background and style of the image."""
ASKED: Mapping[EditType, tuple[str, ...]] = {
    "object": ("shape", "colour"),
    "add": ("shape", "colour", "count"),
    "delete": ("count",),
    "content": ("shape",),
    "pose": ("position",),
    "colour": ("colour",),
    "material": ("texture",),
    "background": ("background",),
    "style": ("style",),
}
"""The statements of the target caption that an edit is to make true; all others are to stay true."""
T = TypeVar("T")
MOST = 10**5
"""Items of a type."""


class DrawnPair(NamedTuple):
    """The content of the two captions of an item."""

    source: CaptionRequest
    target: CaptionRequest


def drawn_items(types: Sequence[EditType], per_type: int) -> list[EditItem]:
    """Return so many items of each of `types`; those of a type are always the same, whatever their number."""
    if not 0 < per_type <= MOST:
        raise BadInput(f"{per_type:,} items of a type are not possible. Ask for 1 to {MOST:,}.")
    return [
        EditItem(
            id=f"{kind}-{number}",
            type=kind,
            source=write_caption(pair.source),
            target=write_caption(pair.target),
            seed=number * len(EDIT_TYPES) + EDIT_TYPES.index(kind),
        )
        for kind in types
        for number, pair in enumerate(islice(_pairs(kind), per_type))
    ]


def _pairs(kind: EditType) -> Iterator[DrawnPair]:
    """Yield the pairs of an edit type, without end."""
    mix = TWO_OBJECTS if kind in ("add", "delete") else ONE_OBJECT
    for first in numbers_from(FIRST_ITEM + EDIT_TYPES.index(kind) * 10**6, CHUNK):
        specs = scenes(torch.arange(first, first + CHUNK), mix)
        draws = uniform(specs.seed, 3, STREAM).tolist()
        for number, u in enumerate(draws):
            whole = _request(specs, number)
            if kind in ("add", "delete"):
                one = replace(whole, objects=whole.objects[:1])
                yield DrawnPair(one, whole) if kind == "add" else DrawnPair(whole, one)
            else:
                yield DrawnPair(whole, _changed(whole, kind, u))


def _request(specs: SceneSpecs, number: int) -> CaptionRequest:
    names = {"shape": SHAPES, "colour": COLOURS, "texture": TEXTURES, "row": ROWS, "column": COLUMNS}
    objects = [
        ObjectRequest(**{group: names[group][int(getattr(specs, group)[number, slot])] for group in GROUPS})
        for slot in range(int(specs.count[number]))
    ]
    background, style = BACKGROUNDS[int(specs.background[number])], STYLES[int(specs.style[number])]
    return CaptionRequest(objects=tuple(objects), background=background, style=style)


def _changed(request: CaptionRequest, kind: EditType, u: Sequence[float]) -> CaptionRequest:
    """Return a request for another object, content, pose, colour, material, background or style, by three random numbers."""
    item = request.objects[0]
    shape, colour, texture = (
        _another(names, value, number)
        for names, value, number in zip((SHAPES, COLOURS, TEXTURES), (item.shape, item.colour, item.texture), u, strict=True)
    )
    places = [(row, column) for row in ROWS for column in COLUMNS]
    row, column = _another(places, (item.row, item.column), u[0])
    changes: dict[EditType, Callable[[], CaptionRequest]] = {
        "object": lambda: _with_object(request, replace(item, shape=shape, colour=colour)),
        "content": lambda: _with_object(request, replace(item, shape=shape)),
        "pose": lambda: _with_object(request, replace(item, row=row, column=column)),
        "colour": lambda: _with_object(request, replace(item, colour=colour)),
        "material": lambda: _with_object(request, replace(item, texture=texture)),
        "background": lambda: replace(request, background=_another(BACKGROUNDS, request.background, u[0])),
        "style": lambda: replace(request, style=_another(STYLES, request.style, u[0])),
    }
    return changes[kind]()


def _with_object(request: CaptionRequest, item: ObjectRequest) -> CaptionRequest:
    return replace(request, objects=(item,))


def _another(values: Sequence[T], value: T | None, u: float) -> T:
    """Return one of the other values."""
    others = [other for other in values if other != value]
    return others[min(int(u * len(others)), len(others) - 1)]


def write_caption(request: CaptionRequest) -> str:
    """Return the caption that states all of a request; `parse_caption` is its inverse."""
    objects = " and ".join(_object_phrase(item) for item in request.objects)
    return " ".join([objects, f"on {request.background}", request.style or ""]).strip()


def _object_phrase(item: ObjectRequest) -> str:
    words = [word for word in (item.texture, item.colour, item.shape) if word]
    article = "an" if words[0][0] in "aeiou" else "a"
    place = "in the center" if (item.row, item.column) == ("middle", "center") else f"at the {item.row} {item.column}"
    return " ".join([article, *words, place])


def drawn_world(types: Sequence[EditType], per_type: int) -> EditWorld:
    """Return so many items of each of `types` in the drawn world, whose judge finds the masks and scores the images."""
    judge = DrawnEditJudge(load_judge())
    return EditWorld(DRAWN, tuple(drawn_items(types, per_type)), judge.masks, judge.scores)


@final
@dataclass(frozen=True)
class DrawnEditJudge:
    """The judge of the drawn world, for items of the editing benchmark."""

    judge: Judge

    def masks(self, items: Sequence[EditItem], sources: Images, references: Images) -> list[EditMasks]:
        """Return the pixels of what each item is about, as the judge finds it in the generated images."""
        readings = zip(items, self._read(sources), self._read(references), strict=True)
        return [EditMasks(_mask(item, item.source, before), _mask(item, item.target, after)) for item, before, after in readings]

    def scores(self, items: Sequence[EditItem], sources: Images, edited: Images) -> list[dict[str, float]]:
        """Return `success`, 1 where all that is asked for holds, and `kept`, the share of all else right that still is."""
        readings = zip(items, self._read(sources), self._read(edited), strict=True)
        return [_scores(item, before, after) for item, before, after in readings]

    def _read(self, images: Images) -> list[SceneReading]:
        return [scene for chunk in images.split(64) for scene in self.judge.read(chunk)]


def _scores(item: EditItem, before: SceneReading, after: SceneReading) -> dict[str, float]:
    asked, target = ASKED[item.type], parse_caption(item.target)
    holds = correct_attributes(target, after)
    # What both captions state: for an added or deleted object, all about the other one.
    common = parse_caption(item.source) if item.type == "add" else target
    untouched = ("count",) if item.type in ("add", "delete") else asked
    right = [name for name, is_right in correct_attributes(common, before).items() if is_right and name not in untouched]
    still = correct_attributes(common, after)
    kept = sum(still[name] for name in right) / len(right) if right else 1.0
    return {"success": float(all(holds[name] for name in asked)), "kept": kept}


def _mask(item: EditItem, caption: str, reading: SceneReading) -> Mask:
    """Return the pixels in an image of what an item is about."""
    everything = torch.ones(PIXELS, PIXELS, dtype=torch.bool)
    if item.type == "style":
        return everything
    if item.type == "background":
        objects = everything.new_zeros(everything.shape)
        for detected in reading.objects:
            objects |= detected.mask
        return ~objects
    request = parse_caption(caption).objects[-1]  # for an added or deleted object the second one
    agreement = [
        sum(value == getattr(request, group) for group, value in detected.concepts.items() if group in GROUPS)
        for detected in reading.objects
    ]
    if not agreement:
        return _cell(request)
    return reading.objects[agreement.index(max(agreement))].mask


def _cell(request: ObjectRequest) -> Mask:
    """Return the third of the rows and columns in which a caption puts an object, where the judge finds none."""
    mask = torch.zeros(PIXELS, PIXELS, dtype=torch.bool)
    row, column = ROWS.index(request.row or "middle"), COLUMNS.index(request.column or "center")
    edges = [round(i * PIXELS / 3) for i in range(4)]
    mask[edges[row] : edges[row + 1], edges[column] : edges[column + 1]] = True
    return mask
