"""Does an edit do what it says? The concept is to appear where it was put, nothing else is to change, and no image to break."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from difflex.errors import BadInput
from difflex.files import parsing, read_json, write_json
from difflex.records import HookContext, Rectangle
from difflex.steering import SteeringHook

__all__ = [
    "ImageStrip",
    "JudgeVerdict",
    "JudgedGenerator",
    "SteeringResults",
    "SteeringTask",
    "SteeringTrial",
    "StrengthCurve",
    "StrengthPoint",
    "judge",
    "side_by_side",
]

FORMAT = 2
AGAIN = "Delete it and run the command that makes it again."
BROKEN = 1.5
"""From this many times the loss of unedited images on, images are called broken."""
Images = Float[Tensor, "image channel row column"]


class SteeringTrial(NamedTuple):
    """An image in which a concept is to appear."""

    prompt: str
    seed: int
    region: Rectangle | None
    """Where the concept is put; None for the whole image."""


class JudgeVerdict(NamedTuple):
    """What is seen in an edited image."""

    shows: bool
    """The concept, in the trial's region."""
    right: Mapping[str, bool]
    """What else the prompt states, and whether it is so."""
    confidence: float
    """Of the judge, about the whole image."""


@final
@dataclass(frozen=True, kw_only=True)
class SteeringTask:
    """A concept, and the images in which it is to appear; their prompts name another one of its group."""

    concept: str
    group: str
    trials: tuple[SteeringTrial, ...]


@final
@dataclass(frozen=True, kw_only=True)
class StrengthPoint:
    """What came of one strength."""

    strength: float
    success: float
    """The share of images that show the concept where it was put."""
    specificity: float
    """Of all else that was right in the unedited images, the share that still is."""
    quality: float
    """The unedited model's loss on the finished images over that on unedited ones: 1 is as good, more is worse."""
    confidence: float
    """Of the judge, over that about unedited images."""


@final
@dataclass(frozen=True, kw_only=True)
class StrengthCurve:
    """A method on a task, over strengths."""

    method: str
    told: str
    """What was added: which feature, which direction."""
    concept: str
    group: str
    trials: int
    without: float
    """The share of unedited images that show the concept."""
    points: tuple[StrengthPoint, ...]

    @property
    def breaks(self) -> float | None:
        """The first strength at which images are broken; None if none of them does it."""
        return next((point.strength for point in self.points if point.quality >= BROKEN), None)

    def best(self, kept: float = 0.9) -> StrengthPoint | None:
        """The point of the highest success among those that keep `kept` of all else and do not break; None if there is none."""
        good = [point for point in self.points if point.specificity >= kept and point.quality < BROKEN]
        return max(good, key=lambda point: (point.success, -abs(point.strength)), default=None)

    def gain(self, kept: float = 0.9) -> float:
        """The success at the best point over that without the edit; 0 where no strength will do."""
        best = self.best(kept)
        return 0.0 if best is None else best.success - self.without


@final
@dataclass(frozen=True, kw_only=True)
class ImageStrip:
    """An image under a method at rising strengths, to be looked at: the first of a task, whatever came of it."""

    method: str
    concept: str
    group: str
    prompt: str
    """Of the unedited image."""
    strengths: tuple[float, ...]
    file: str
    """Beside the record, in the folder of its name: the unedited image, then one for each strength, side by side."""


@final
@dataclass(frozen=True, kw_only=True)
class SteeringResults:
    """Several methods on several tasks, as they are written and read again."""

    model: str
    site: str
    curves: tuple[StrengthCurve, ...]
    made_from: Mapping[str, str | int | float]
    """What the figures depend on."""
    strips: tuple[ImageStrip, ...] = ()

    def of(self, method: str) -> list[StrengthCurve]:
        """The curves of a method."""
        return [curve for curve in self.curves if curve.method == method]

    def save(self, path: Path) -> Path:
        """`path`, which now holds this as JSON."""
        return write_json(path, FORMAT, asdict(self))

    @classmethod
    def load(cls, path: Path) -> SteeringResults:
        """What was written to `path`."""
        said = read_json(path, FORMAT, AGAIN)
        with parsing(path, "what edits do", AGAIN):
            curves = [
                StrengthCurve(**{**each, "points": tuple(StrengthPoint(**point) for point in each["points"])})
                for each in said["curves"]
            ]
            strips = [ImageStrip(**{**each, "strengths": tuple(each["strengths"])}) for each in said["strips"]]
            return cls(**{**said, "curves": tuple(curves), "strips": tuple(strips)})


class JudgedGenerator(NamedTuple):
    """What a task needs of the model and of a judge."""

    images: Callable[[Sequence[SteeringTrial], SteeringHook | None], Images]
    """The images of trials under an edit, or without one."""
    verdicts: Callable[[SteeringTask, Sequence[SteeringTrial], Images], Sequence[JudgeVerdict]]
    losses: Callable[[Images], Float[Tensor, " image"]]
    """The unedited model's loss on finished images, noised again."""


Method = Callable[[SteeringTrial, float], tuple[SteeringTrial, SteeringHook | None]]
"""What a method makes of a trial at a strength: the same trial under an edit, or another trial, where the prompt is the edit."""


def judge(
    task: SteeringTask, methods: Mapping[str, tuple[str, Method, Sequence[float]]], drawn: JudgedGenerator
) -> Iterator[StrengthCurve]:
    """A curve for each of `methods`: by name what it adds, how, and at which strengths."""
    if not task.trials:
        raise BadInput(f"There is no image in which '{task.concept}' could appear. Give at least one trial.")
    plain = drawn.images(task.trials, None)
    before, losses = drawn.verdicts(task, task.trials, plain), drawn.losses(plain)
    for name, (told, method, strengths) in methods.items():
        yield StrengthCurve(
            method=name,
            told=told,
            concept=task.concept,
            group=task.group,
            trials=len(task.trials),
            without=_mean([verdict.shows for verdict in before]),
            points=tuple(_point(task, method, strength, before, losses, drawn) for strength in strengths),
        )


def _point(
    task: SteeringTask,
    method: Method,
    strength: float,
    before: Sequence[JudgeVerdict],
    losses: Float[Tensor, " image"],
    drawn: JudgedGenerator,
) -> StrengthPoint:
    trials, changes = zip(*(method(trial, strength) for trial in task.trials), strict=True)
    edited = drawn.images(trials, side_by_side(trials, changes))
    # Judged by what was asked before: a prompt that was itself the edit states the concept, not what it took the place of.
    after = drawn.verdicts(task, task.trials, edited)
    kept = [new.right[what] for old, new in zip(before, after, strict=True) for what, right in old.right.items() if right]
    return StrengthPoint(
        strength=float(strength),
        success=_mean([verdict.shows for verdict in after]),
        specificity=_mean(kept) if kept else 1.0,
        quality=float(drawn.losses(edited).mean() / losses.mean()),
        confidence=_mean([each.confidence for each in after]) / max(1e-9, _mean([each.confidence for each in before])),
    )


def side_by_side(trials: Sequence[SteeringTrial], changes: Sequence[SteeringHook | None]) -> SteeringHook | None:
    """One edit for a batch in which each image has its own, all at one site."""
    given = {(trial.prompt, trial.seed): each for trial, each in zip(trials, changes, strict=True) if each is not None}
    sites = {each.site for each in given.values()}
    if not sites:
        return None
    if len(sites) > 1:
        raise BadInput(f"Images of one batch are edited at one site; these are at {', '.join(map(str, sorted(sites)))}.")

    def change(x: Float[Tensor, "batch token width"], moment: HookContext) -> Float[Tensor, "batch token width"] | None:
        assert moment.shots is not None
        written, any_new = [], False
        for row, shot in zip(x.split(1), moment.shots, strict=True):
            own = given.get((shot.prompt, shot.seed))
            new = None if own is None else own.change(row, moment)
            written.append(row if new is None else new)
            any_new |= new is not None
        return torch.cat(written) if any_new else None

    return SteeringHook(sites.pop(), change)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
