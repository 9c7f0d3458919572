"""How well images show what their captions ask for, as the judge sees it."""

from dataclasses import dataclass, replace
from itertools import permutations

from jaxtyping import Bool, Float
from torch import Tensor

from difflex.miniature.captions import RELATIONS, CaptionRequest, ObjectRequest, read
from difflex.miniature.judge import Judge, SceneReading, SeenObject
from difflex.miniature.world import COLUMNS, ROWS

ATTRIBUTES = ("colour", "shape", "background", "style", "position", "texture", "size", "count", "relation")


@dataclass(frozen=True, kw_only=True)
class CaptionScore:
    """What is right in one image."""

    caption: str
    right: dict[str, bool]
    """Attribute -> whether it is right for all objects; only attributes that the caption states."""
    reading: SceneReading


def score(
    captions: list[str],
    images: Float[Tensor, "image 3 height width"],
    judge: Judge,
    regions: Bool[Tensor, "image height width"] | None = None,
) -> list[CaptionScore]:
    """One score an image; with regions, only what lies in an image's region, by most of its pixels, counts as there."""
    readings = [reading for chunk in images.split(64) for reading in judge.read(chunk)]
    if regions is not None:
        readings = [_inside(reading, region) for reading, region in zip(readings, regions, strict=True)]
    return [
        CaptionScore(caption=caption, right=right_of(read(caption), reading), reading=reading)
        for caption, reading in zip(captions, readings, strict=True)
    ]


def _inside(reading: SceneReading, region: Bool[Tensor, "height width"]) -> SceneReading:
    there = tuple(thing for thing in reading.objects if (thing.mask & region).sum() > 0.5 * thing.mask.sum())
    return replace(reading, objects=there)


def table(scores: list[CaptionScore]) -> dict[str, float]:
    """Attribute -> the share of images in which it is right, among those whose caption states it."""
    rows = {attribute: [s.right[attribute] for s in scores if attribute in s.right] for attribute in ATTRIBUTES}
    return {attribute: sum(row) / len(row) for attribute, row in rows.items() if row}


def kind(caption: str) -> str:
    """`one object`, `two different` or `copies`."""
    objects = read(caption).objects
    return "copies" if any(thing.count > 1 for thing in objects) else ("two different" if len(objects) > 1 else "one object")


def right_of(request: CaptionRequest, reading: SceneReading) -> dict[str, bool]:
    """Attribute -> whether the image as read has it right; only attributes that the caption states."""
    wanted = [thing for thing in request.objects for _ in range(thing.count)]
    matched = _match(wanted, reading.objects)
    right: dict[str, bool] = {}
    for group in ("shape", "colour", "texture", "size"):
        asked = [(getattr(thing, group), seen) for thing, seen in zip(wanted, matched, strict=True) if getattr(thing, group)]
        if asked:
            right[group] = all(seen is not None and seen.concepts[group] == value for value, seen in asked)
    placed = [(thing, seen) for thing, seen in zip(wanted, matched, strict=True) if thing.row or thing.column]
    if placed:
        right["position"] = all(seen is not None and _in_place(thing, seen) for thing, seen in placed)
    if wanted:
        right["count"] = len(reading.objects) == len(wanted)
    if request.background:
        right["background"] = reading.background == request.background
    if request.style:
        right["style"] = reading.style == request.style
    if request.relation:
        right["relation"] = _related(request.relation, matched[0], matched[request.objects[0].count])
    return right


def _match(wanted: list[ObjectRequest], seen: tuple[SeenObject, ...]) -> list[SeenObject | None]:
    """The assignment of seen objects to wanted ones under which most is right."""
    candidates: list[SeenObject | None] = [*seen, *[None] * len(wanted)]
    best = max(
        permutations(range(len(candidates)), len(wanted)),
        key=lambda order: sum(_agreement(thing, candidates[i]) for thing, i in zip(wanted, order, strict=True)),
    )
    return [candidates[i] for i in best]


def _agreement(thing: ObjectRequest, seen: SeenObject | None) -> float:
    if seen is None:
        return -0.1
    asked = [getattr(thing, group) for group in ("shape", "colour", "texture", "size", "row", "column")]
    return sum(value is not None and value in seen.concepts.values() for value in asked)


def _in_place(thing: ObjectRequest, seen: SeenObject) -> bool:
    row = thing.row is None or thing.row == seen.concepts["row"]
    return row and (thing.column is None or thing.column == seen.concepts["column"])


def _related(relation: str, first: SeenObject | None, second: SeenObject | None) -> bool:
    if first is None or second is None:
        return False
    dx, dy = RELATIONS[relation]
    across = COLUMNS.index(first.concepts["column"]) - COLUMNS.index(second.concepts["column"])
    down = ROWS.index(first.concepts["row"]) - ROWS.index(second.concepts["row"])
    return across * dx > 0 if dx else down * dy > 0
