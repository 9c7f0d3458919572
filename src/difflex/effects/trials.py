"""What the drawn world asks of an edit: images in which a concept is to appear, pairs of captions, and a judge's eyes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import count as counted
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from difflex.effects import JudgeVerdict, SteeringTask, SteeringTrial
from difflex.miniature.captions import CaptionRequest, read, write
from difflex.miniature.judge import Judge, SceneReading
from difflex.miniature.scoring import right_of
from difflex.miniature.world import COLUMNS, CONCEPTS, HELD_OUT_SEEDS, PIXELS, ROWS, SceneMix, scenes
from difflex.records import Rectangle

__all__ = [
    "NAMED",
    "DrawnJudge",
    "NamedCaption",
    "as_images",
    "as_tensor",
    "drawn_naming",
    "drawn_pairs",
    "drawn_task",
    "group_of",
    "placed",
    "reworded",
]

FIRST, FIRST_PAIR, FIRST_NAMING = (HELD_OUT_SEEDS + millions * 10**6 for millions in (2, 3, 6))
CHUNK = 1024
LOOKED_AT = 20
"""Scenes looked at for each that is wanted."""
WHOLE = ("background", "style")
ONE = SceneMix(1, 0, 0)
AWAY, REACH = 0.29, 0.26
"""How far outer cells lie from the middle of the image, and how far an object reaches, as shares of the image."""


NAMED = ("shape", "colour", "texture", "size", "background", "style")
"""Groups of which a caption of a single object can name a concept."""


class NamedCaption(NamedTuple):
    """A caption of a single object, and the concept of a group that it names."""

    concept: str
    caption: str


def group_of(concept: str) -> str:
    """The group that a concept of the drawn world belongs to; empty if there is none."""
    return next((group for group, names in CONCEPTS.items() if concept in names), "")


def drawn_task(concept: str, trials: int, mix: SceneMix = ONE) -> SteeringTask:
    """Captions that name another concept of the group and, for what belongs to an object, say where it is.

    They are of single objects; in another mix the first one counts.
    """
    group = group_of(concept)
    found, chunks = list[SteeringTrial](), counted(FIRST, LOOKED_AT * trials)
    while len(found) < trials:
        first = next(chunks)
        for caption in write(scenes(torch.arange(first, first + LOOKED_AT * trials), mix)):
            request = read(caption)
            named, region = _named(request, group), _place(request) if group not in WHOLE else None
            if named is not None and named != concept and (region is not None or group in WHOLE):
                found.append(SteeringTrial(caption, len(found), region))
    return SteeringTask(concept=concept, group=group, trials=tuple(found[:trials]))


def drawn_naming(group: str, count: int) -> list[list[NamedCaption]]:
    """Captions of single objects: for each concept of the group, one of `NAMED`, `count` that name it. No caption comes twice."""
    found: dict[str, dict[str, NamedCaption]] = {concept: {} for concept in CONCEPTS[group]}
    for first in counted(FIRST_NAMING, CHUNK):
        for caption in write(scenes(torch.arange(first, first + CHUNK), SceneMix(1, 0, 0))):
            concept = _named(read(caption), group)
            if concept is not None:
                found[concept].setdefault(caption, NamedCaption(concept, caption))
        if all(len(each) >= count for each in found.values()):
            break
    return [list(each.values())[:count] for each in found.values()]


def drawn_pairs(
    concept: str, count: int, among: Callable[[CaptionRequest], bool] = lambda request: True
) -> list[tuple[str, str]]:
    """Pairs of captions that are alike but for a concept: it, and another one of its group.

    For what belongs to an object they say where it is. `among` says of what a wanted caption asks for whether it will do.
    """
    group = group_of(concept)
    index, found = CONCEPTS[group].index(concept), list[tuple[str, str]]()
    for first in counted(FIRST_PAIR, CHUNK):
        specs = scenes(torch.arange(first, first + CHUNK), ONE)
        with_it = replace(specs, **{group: torch.full_like(getattr(specs, group), index)})
        for wanted, unwanted in zip(write(with_it), write(specs), strict=True):
            request = read(wanted)
            named = _named(request, group) == concept and _named(read(unwanted), group) is not None
            if named and wanted != unwanted and (group in WHOLE or _place(request) is not None) and among(request):
                found.append((wanted, unwanted))
        if len(found) >= count:
            return found[:count]
    raise AssertionError("the seeds of scenes do not end")


def reworded(trial: SteeringTrial, concept: str) -> SteeringTrial:
    """The same caption, but for the concept: what an edit must be as good as."""
    group = group_of(concept)
    words = [concept if group_of(word) == group else word for word in trial.prompt.split()]
    for i, word in enumerate(words[:-1]):
        if word in ("a", "an"):
            words[i] = "an" if words[i + 1][0] in "aeiou" else "a"
    return trial._replace(prompt=" ".join(words))


def placed(caption: str, group: str) -> Rectangle | None:
    """Where a caption puts what the concepts of a group belong to: its first object, or None for the whole image."""
    request = read(caption)
    return _place(request) if request.objects and group not in WHOLE else None


def as_tensor(images: Iterable[Image.Image]) -> Float[Tensor, "image channel row column"]:
    """Images with pixels between 0 and 1."""
    each = [
        torch.frombuffer(bytearray(one.convert("RGB").tobytes()), dtype=torch.uint8).view(one.height, one.width, 3)
        for one in images
    ]
    return torch.stack(each).movedim(3, 1).float() / 255


def as_images(pixels: Float[Tensor, "image channel row column"]) -> Iterator[Image.Image]:
    """The images that these are the pixels of."""
    for one in (pixels * 255).round().to(torch.uint8).movedim(1, 3):
        yield Image.frombytes("RGB", (one.shape[1], one.shape[0]), one.contiguous().numpy().tobytes())


def _named(request: CaptionRequest, group: str) -> str | None:
    return getattr(request if group in WHOLE else request.objects[0], group)


def _place(request: CaptionRequest) -> Rectangle | None:
    """Where a caption puts its object, if it says both row and column."""
    thing = request.objects[0]
    if thing.row is None or thing.column is None:
        return None
    across, down = 0.5 + AWAY * (COLUMNS.index(thing.column) - 1), 0.5 + AWAY * (ROWS.index(thing.row) - 1)
    edge = lambda at: min(1.0, max(0.0, at))  # noqa: E731
    return Rectangle(edge(across - REACH), edge(down - REACH), edge(across + REACH), edge(down + REACH))


class DrawnJudge:
    """The judge of the drawn world, asked about edits."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge

    def __call__(
        self, task: SteeringTask, trials: Sequence[SteeringTrial], images: Float[Tensor, "image channel row column"]
    ) -> list[JudgeVerdict]:
        """What it sees of each image."""
        readings = self._readings(images)
        return [self._verdict(task, trial, reading) for trial, reading in zip(trials, readings, strict=True)]

    def of_named(
        self, group: str, named: Sequence[NamedCaption], images: Float[Tensor, "image channel row column"]
    ) -> list[JudgeVerdict]:
        """What it sees of each image: whether it shows the concept of the group that its caption names, and what else."""
        readings = self._readings(images)
        tasks = [
            SteeringTask(concept=each.concept, group=group, trials=(SteeringTrial(each.caption, 0, None),)) for each in named
        ]
        return [self._verdict(task, task.trials[0], reading) for task, reading in zip(tasks, readings, strict=True)]

    def _readings(self, images: Float[Tensor, "image channel row column"]) -> list[SceneReading]:
        return [reading for chunk in images.split(64) for reading in self._judge.read(chunk)]

    def _verdict(self, task: SteeringTask, trial: SteeringTrial, reading: SceneReading) -> JudgeVerdict:
        right = {what: ok for what, ok in right_of(read(trial.prompt), reading).items() if what != task.group}
        if task.group in WHOLE:
            return JudgeVerdict(getattr(reading, task.group) == task.concept, right, reading.confidence)
        region = _pixels(trial.region)
        there = [thing for thing in reading.objects if (thing.mask & region).sum() > 0.5 * thing.mask.sum()]
        return JudgeVerdict(any(thing.concepts[task.group] == task.concept for thing in there), right, reading.confidence)


def _pixels(region: Rectangle | None) -> Bool[Tensor, "row column"]:
    if region is None:
        return torch.ones(PIXELS, PIXELS, dtype=torch.bool)
    at = (torch.arange(PIXELS) + 0.5) / PIXELS
    return torch.outer((at >= region.top) & (at < region.bottom), (at >= region.left) & (at < region.right))
