"""The drawn world of mini-flux: captions in which a concept should appear, pairs of captions, and the judge of its images."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import count as numbers_from
from itertools import islice
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from difflex.effects.inputs import ModelFunctions, to_images, to_tensor
from difflex.effects.judging import Images, JudgedGenerator, JudgeVerdict, SteeringTask, SteeringTrial
from difflex.miniature import correct_attributes, load_judge
from difflex.miniature.captions import CaptionRequest, parse_caption, write_captions
from difflex.miniature.judge import Judge, SceneReading
from difflex.miniature.world import (
    BACKGROUNDS,
    COLUMNS,
    CONCEPTS,
    HELD_OUT_SEEDS,
    OBJECT_GROUPS,
    PIXELS,
    ROWS,
    STYLES,
    SceneMix,
    scenes,
)
from difflex.records import Rectangle
from difflex.steering import SteeringHook
from difflex.steering.strengths import LOSS_LEVELS

FIRST_TASK, FIRST_PAIR, FIRST_CAPTION = (HELD_OUT_SEEDS + millions * 10**6 for millions in (2, 3, 6))
"""Seeds of the first scenes for tasks, for pairs, and for captions by concept."""
CHUNK = 256
"""Scenes that are drawn at once, to search their captions."""
WHOLE = ("background", "style")
"""Groups whose concepts belong to the whole image."""
ONE_OBJECT, TWO_OBJECTS = SceneMix(1, 0, 0), SceneMix(0, 1, 0)
OFFSET, REACH = 0.29, 0.26
"""The distance of outer cells from the middle of the image, and half the size of an object, as shares of the image."""
CAPTION_GROUPS = ("shape", "colour", "texture", "size", "background", "style")
"""Groups of which the caption of a single object can name a concept."""

CaptionKind = Literal["alike", "other scenery", "two objects", "unsaid", "against", "an object", "no object"]
"""`alike`: like the pairs of a contrast. `other scenery`: backgrounds and styles that no pair has. `two objects`: the concept
should appear on the first of two. `unsaid`: the caption names no concept of the group. `against`: it names another three times.
`an object`: as `alike`. `no object`: the same captions with background and style alone; the edit is where the object would be."""
PAIR_SCENERY, OTHER_SCENERY = (BACKGROUNDS[:4], STYLES[:2]), (BACKGROUNDS[4:], STYLES[2:])
REPEATS = 3
"""How often a caption `against` a concept names another one."""


class ConceptCaption(NamedTuple):
    """A caption of a single object, and the concept of a group that it names."""

    concept: str
    caption: str


def group_of(concept: str) -> str:
    """Return the group of a concept of the drawn world; empty for any other concept."""
    return next((group for group, names in CONCEPTS.items() if concept in names), "")


def caption_task(concept: str, trials: int) -> SteeringTask:
    """Return trials whose captions name another concept of the group and, for concepts of objects, where the object is."""
    return SteeringTask.of(concept, group_of(concept), islice(_captions_without(concept, ONE_OBJECT), trials))


def _captions_without(concept: str, mix: SceneMix) -> Iterator[tuple[str, Rectangle | None]]:
    """Yield captions, without end, whose first object has another concept of the group, and the region of that object."""
    group = group_of(concept)
    for caption in _endless_captions(FIRST_TASK, mix):
        request = parse_caption(caption)
        name, region = _named(request, group), _object_region(request) if group not in WHOLE else None
        if name is not None and name != concept and (region is not None or group in WHOLE):
            yield caption, region


def _endless_captions(first_seed: int, mix: SceneMix) -> Iterator[str]:
    for seed in numbers_from(first_seed, CHUNK):
        yield from write_captions(scenes(torch.arange(seed, seed + CHUNK), mix))


def captions_by_concept(group: str, count: int) -> list[list[ConceptCaption]]:
    """Return for each concept of a group `count` captions of single objects that name it, all different."""
    captions: dict[str, dict[str, ConceptCaption]] = {concept: {} for concept in CONCEPTS[group]}
    for caption in _endless_captions(FIRST_CAPTION, ONE_OBJECT):
        concept = _named(parse_caption(caption), group)
        if concept is not None and len(captions[concept]) < count:
            captions[concept].setdefault(caption, ConceptCaption(concept, caption))
        elif all(len(texts) == count for texts in captions.values()):
            break
    return [list(texts.values()) for texts in captions.values()]


def caption_pairs(
    concept: str, count: int, accepts: Callable[[CaptionRequest], bool] = lambda request: True
) -> list[tuple[str, str]]:
    """Return pairs of captions that differ only in the concept: it, and another one of its group.

    For concepts of objects they say where the object is. `accepts` filters them by what the first caption of a pair asks for.
    """
    group = group_of(concept)
    index, pairs = CONCEPTS[group].index(concept), list[tuple[str, str]]()
    for first in numbers_from(FIRST_PAIR, CHUNK):
        specs = scenes(torch.arange(first, first + CHUNK), ONE_OBJECT)
        with_concept = replace(specs, **{group: torch.full_like(getattr(specs, group), index)})
        for positive, negative in zip(write_captions(with_concept), write_captions(specs), strict=True):
            request = parse_caption(positive)
            is_named = _named(request, group) == concept and _named(parse_caption(negative), group) is not None
            if is_named and positive != negative and (group in WHOLE or _object_region(request) is not None) and accepts(request):
                pairs.append((positive, negative))
        if len(pairs) >= count:
            return pairs[:count]
    raise AssertionError("the seeds of scenes do not end")


@cache
def scenery_pairs(concept: str, count: int) -> list[tuple[str, str]]:
    """Return pairs of captions with one half of the backgrounds and styles, so that the other half is new to a contrast."""
    return caption_pairs(concept, count, lambda request: _has_scenery(request, group_of(concept), PAIR_SCENERY))


@cache
def kind_task(concept: str, kind: CaptionKind, trials: int) -> SteeringTask:
    """Return a task of captions of a kind; their seeds follow one another."""
    group, is_new = group_of(concept), kind == "other scenery"
    captions = _captions_without(concept, TWO_OBJECTS if kind == "two objects" else ONE_OBJECT)
    scenery = OTHER_SCENERY if is_new else PAIR_SCENERY
    matches = (
        (_reword(caption, group, kind), region)
        for caption, region in captions
        if _has_scenery(parse_caption(caption), group, scenery, is_new)
    )
    return SteeringTask.of(concept, group, islice(matches, trials))


def _has_scenery(request: CaptionRequest, group: str, scenery: tuple[tuple[str, ...], ...], stated: bool = False) -> bool:
    """Return whether background and style, except those of `group`, are of `scenery`; or, unless `stated`, not named."""
    pairs = (("background", request.background, scenery[0]), ("style", request.style, scenery[1]))
    return all((value is None and not stated) or value in allowed for name, value, allowed in pairs if name != group)


def _reword(caption: str, group: str, kind: CaptionKind) -> str:
    if kind == "no object":
        request = parse_caption(caption)
        return " ".join([*(["on", request.background] if request.background else []), request.style or ""]).strip()
    if kind == "unsaid":
        return _without_group(caption, group)
    if kind == "against":
        return " ".join(word if group_of(word) != group else " ".join([word] * REPEATS) for word in caption.split())
    return caption


def _without_group(caption: str, group: str) -> str:
    """Return the caption without its concepts of a group."""
    names = "|".join(CONCEPTS[group])
    if group == "background":
        caption = re.sub(rf"\bon (?:{names})\b", "", caption)
    elif group == "style":
        caption = re.sub(rf"\b(?:in (?:{names}) style|(?:{names}) (?:picture|drawing) of|(?:{names}))\b", "", caption)
    elif group in OBJECT_GROUPS:
        caption = re.sub(rf"\b(?:{names})\b", "", caption)
        caption = re.sub(r"\ban? +(?=(\w))", lambda match: "an " if match[1] in "aeiou" else "a ", caption)
    return " ".join(caption.split())


def with_concept(trial: SteeringTrial, concept: str) -> SteeringTrial:
    """Return the trial with a caption that names the concept: the baseline that edits are compared with."""
    group = group_of(concept)
    words = [concept if group_of(word) == group else word for word in trial.prompt.split()]
    for i, word in enumerate(words[:-1]):
        if word in ("a", "an"):
            words[i] = "an" if words[i + 1][0] in "aeiou" else "a"
    return trial._replace(prompt=" ".join(words))


def caption_region(caption: str, group: str) -> Rectangle | None:
    """Return where a caption puts its first object; None for groups of the whole image, or where the caption does not say."""
    request = parse_caption(caption)
    return _object_region(request) if request.objects and group not in WHOLE else None


def _named(request: CaptionRequest, group: str) -> str | None:
    return getattr(request if group in WHOLE else request.objects[0], group)


def _object_region(request: CaptionRequest) -> Rectangle | None:
    """Return the region of the first object of a caption that names both row and column."""
    first = request.objects[0]
    if first.row is None or first.column is None:
        return None
    x, y = 0.5 + OFFSET * (COLUMNS.index(first.column) - 1), 0.5 + OFFSET * (ROWS.index(first.row) - 1)
    clip = lambda edge: min(1.0, max(0.0, edge))  # noqa: E731
    return Rectangle(clip(x - REACH), clip(y - REACH), clip(x + REACH), clip(y + REACH))


class DrawnJudge:
    """The judge of the drawn world, applied to trials."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge

    def __call__(self, task: SteeringTask, trials: Sequence[SteeringTrial], images: Images) -> list[JudgeVerdict]:
        """Return the verdicts on the images of trials."""
        return [self._verdict(task, trial, scene) for trial, scene in zip(trials, self._read(images), strict=True)]

    def of_captions(self, group: str, captions: Sequence[ConceptCaption], images: Images) -> list[JudgeVerdict]:
        """Return the verdicts on images: whether each shows the concept of the group that its caption names, and all else."""
        return [
            self._verdict(SteeringTask(concept=concept, group=group, trials=()), SteeringTrial(caption, 0, None), scene)
            for (concept, caption), scene in zip(captions, self._read(images), strict=True)
        ]

    def _read(self, images: Images) -> list[SceneReading]:
        return [scene for chunk in images.split(64) for scene in self._judge.read(chunk)]

    def _verdict(self, task: SteeringTask, trial: SteeringTrial, scene: SceneReading) -> JudgeVerdict:
        right = {
            name: is_right
            for name, is_right in correct_attributes(parse_caption(trial.prompt), scene).items()
            if name != task.group
        }
        if task.group in WHOLE:
            concepts = [getattr(scene, task.group)]
        else:
            region = _region_pixels(trial.region)
            inside = [item for item in scene.objects if (item.mask & region).sum() > 0.5 * item.mask.sum()]
            concepts = [item.concepts[task.group] for item in inside]
        return JudgeVerdict(task.concept in concepts, right, scene.confidence)


def _region_pixels(region: Rectangle | None) -> Bool[Tensor, "row column"]:
    if region is None:
        return torch.ones(PIXELS, PIXELS, dtype=torch.bool)
    at = (torch.arange(PIXELS) + 0.5) / PIXELS
    return torch.outer((at >= region.top) & (at < region.bottom), (at >= region.left) & (at < region.right))


def drawn_generator(model: ModelFunctions, steps: int | None = None) -> JudgedGenerator:
    """Return the model, in runs of `steps` (None: its own number), with the judge of the drawn world."""

    def images(trials: Sequence[SteeringTrial], hooks: Sequence[SteeringHook]) -> Images:
        prompts, seeds = [trial.prompt for trial in trials], [trial.seed for trial in trials]
        assert seeds == list(range(seeds[0], seeds[0] + len(seeds))), "the seeds of a task's trials follow one another"
        return to_tensor(model.generate(prompts, seeds[0], steps, hooks))

    return JudgedGenerator(images, DrawnJudge(load_judge()), lambda pixels: model.losses(to_images(pixels), LOSS_LEVELS).mean(1))
