"""How well images show what their captions say, by the judge; and the examination of a model on fresh captions."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import permutations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from difflex.miniature.captions import RELATIONS, CaptionRequest, ObjectRequest, parse_caption
from difflex.miniature.drawing import Scenes, draw
from difflex.miniature.judge import DetectedObject, Judge, SceneReading
from difflex.miniature.world import COLUMNS, HELD_OUT_SEEDS, ROWS, SceneMix

ATTRIBUTES = ("colour", "shape", "background", "style", "position", "texture", "size", "count", "relation")
Generate = Callable[[list[str]], Float[Tensor, "caption 3 height width"]]
"""Captions -> images in [0, 1]."""
Examination = dict[str, dict[str, float]]
"""Row name -> attribute -> share of images in which it is correct."""
THRESHOLDS = {
    "colour": 0.90,
    "shape": 0.85,
    "background": 0.97,
    "style": 0.90,
    "position": 0.90,
    "texture": 0.75,
    "count": 0.85,
    "relation": 0.50,
}
"""The share that each attribute must reach over all captions."""
COMPOSITION_THRESHOLD = 0.75
"""The share that shape and colour together must reach on combinations that training never shows."""
KINDS = {"one object": SceneMix(1, 0, 0), "two different": SceneMix(0, 1, 0), "copies": SceneMix(0, 0, 1)}
FIRST_SEED = HELD_OUT_SEEDS + 1_000_000


@dataclass(frozen=True, kw_only=True)
class CaptionScore:
    """The correct attributes of one image."""

    caption: str
    correct: dict[str, bool]
    """Attribute -> whether it is correct for all objects; only attributes that the caption states."""
    reading: SceneReading


def score(
    captions: list[str],
    images: Float[Tensor, "image 3 height width"],
    judge: Judge,
    regions: Bool[Tensor, "image height width"] | None = None,
) -> list[CaptionScore]:
    """Score each image against its caption; with `regions`, objects with most of their pixels outside are ignored."""
    readings = [reading for chunk in images.split(64) for reading in judge.read(chunk)]
    if regions is not None:
        readings = [_restrict(reading, region) for reading, region in zip(readings, regions, strict=True)]
    return [
        CaptionScore(caption=caption, correct=correct_attributes(parse_caption(caption), reading), reading=reading)
        for caption, reading in zip(captions, readings, strict=True)
    ]


def _restrict(reading: SceneReading, region: Bool[Tensor, "height width"]) -> SceneReading:
    objects = tuple(item for item in reading.objects if (item.mask & region).sum() > 0.5 * item.mask.sum())
    return replace(reading, objects=objects)


def shares_correct(scores: list[CaptionScore]) -> dict[str, float]:
    """Return for each attribute the share of images in which it is correct, among those whose caption states it."""
    rows = {attribute: [s.correct[attribute] for s in scores if attribute in s.correct] for attribute in ATTRIBUTES}
    return {attribute: sum(row) / len(row) for attribute, row in rows.items() if row}


def correct_attributes(request: CaptionRequest, reading: SceneReading) -> dict[str, bool]:
    """Return for each attribute that the caption states whether the image has it."""
    requests = [item for item in request.objects for _ in range(item.count)]
    objects = _match(requests, reading.objects)
    pairs = list(zip(requests, objects, strict=True))
    correct: dict[str, bool] = {}
    for group in ("shape", "colour", "texture", "size"):
        stated = [(getattr(item, group), detected) for item, detected in pairs if getattr(item, group)]
        if stated:
            correct[group] = all(detected is not None and detected.concepts[group] == value for value, detected in stated)
    positioned = [(item, detected) for item, detected in pairs if item.row or item.column]
    if positioned:
        correct["position"] = all(detected is not None and _has_position(item, detected) for item, detected in positioned)
    if requests:
        correct["count"] = len(reading.objects) == len(requests)
    if request.background:
        correct["background"] = reading.background == request.background
    if request.style:
        correct["style"] = reading.style == request.style
    if request.relation:
        correct["relation"] = _has_relation(request.relation, objects[0], objects[request.objects[0].count])
    return correct


def _match(requests: list[ObjectRequest], objects: tuple[DetectedObject, ...]) -> list[DetectedObject | None]:
    """Assign detected objects to requested ones so that most is correct."""
    candidates: list[DetectedObject | None] = [*objects, *[None] * len(requests)]
    best = max(
        permutations(range(len(candidates)), len(requests)),
        key=lambda order: sum(_agreement(item, candidates[i]) for item, i in zip(requests, order, strict=True)),
    )
    return [candidates[i] for i in best]


def _agreement(request: ObjectRequest, detected: DetectedObject | None) -> float:
    if detected is None:
        return -0.1
    values = [getattr(request, group) for group in ("shape", "colour", "texture", "size", "row", "column")]
    return sum(value is not None and value in detected.concepts.values() for value in values)


def _has_position(request: ObjectRequest, detected: DetectedObject) -> bool:
    row = request.row is None or request.row == detected.concepts["row"]
    return row and (request.column is None or request.column == detected.concepts["column"])


def _has_relation(relation: str, first: DetectedObject | None, second: DetectedObject | None) -> bool:
    if first is None or second is None:
        return False
    dx, dy = RELATIONS[relation]
    across = COLUMNS.index(first.concepts["column"]) - COLUMNS.index(second.concepts["column"])
    down = ROWS.index(first.concepts["row"]) - ROWS.index(second.concepts["row"])
    return across * dx > 0 if dx else down * dy > 0


def examine(generate: Generate, judge: Judge, captions: int = 500) -> Examination:
    """Score generated images: a row for each kind of caption (a third each), one for all, one for unseen combinations."""
    rows: Examination = {}
    scores: list[CaptionScore] = []
    for number, (name, mix) in enumerate(KINDS.items()):
        count = captions // 3 + (number < captions % 3)
        part = _score_generated(generate, judge, draw(torch.arange(count) + FIRST_SEED + number * 100_000, mix))
        rows[name] = shares_correct(part)
        scores += part
    rows["all"] = shares_correct(scores)
    unseen = _score_generated(generate, judge, draw(torch.arange(captions // 2) + FIRST_SEED + 500_000, held_out=True))
    rows["unseen combinations"] = shares_correct(unseen) | {"shape and colour": _share_of_both(unseen)}
    return rows


def examine_drawings(judge: Judge, captions: int = 500) -> dict[str, float]:
    """Score true drawings: the upper limit for every model."""
    scenes = draw(torch.arange(captions) + FIRST_SEED + 900_000)
    return shares_correct(score(scenes.captions, scenes.images, judge))


def shortfalls(rows: Examination) -> list[str]:
    """Describe the thresholds that the examination misses."""
    lines = [
        f"{name} {rows['all'].get(name, 0):.1%} is under {threshold:.0%}"
        for name, threshold in THRESHOLDS.items()
        if rows["all"].get(name, 0) < threshold
    ]
    composition = rows["unseen combinations"]["shape and colour"]
    if composition < COMPOSITION_THRESHOLD:
        lines.append(f"shape and colour of unseen combinations {composition:.1%} is under {COMPOSITION_THRESHOLD:.0%}")
    return lines


def as_markdown(rows: Examination) -> str:
    """Format the examination as a table of percentages."""
    columns = [*ATTRIBUTES, "shape and colour"]
    head = f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}\n"
    cells = lambda row: " | ".join(f"{row[c]:.1%}" if c in row else "" for c in columns)  # noqa: E731
    return head + "\n".join(f"| {name} | {cells(row)} |" for name, row in rows.items())


def _score_generated(generate: Generate, judge: Judge, scenes: Scenes) -> list[CaptionScore]:
    return score(scenes.captions, generate(scenes.captions), judge)


def _share_of_both(scores: list[CaptionScore]) -> float:
    """Return the share of images with shape and colour both correct, among those whose caption states both."""
    stated = [s.correct for s in scores if {"shape", "colour"} <= s.correct.keys()]
    return sum(correct["shape"] and correct["colour"] for correct in stated) / len(stated)
