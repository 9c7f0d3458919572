"""Judging edits: whether the concept appears in its region, whether all else stays, and whether images break."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from difflex.errors import BadInput
from difflex.records import Edit, HookContext, Rectangle, Site
from difflex.steering import EditFeatures, SteeringHook, steering_hooks
from difflex.steering.strengths import BROKEN

Images = Float[Tensor, "image channel row column"]


class SteeringTrial(NamedTuple):
    """An image in which a concept should appear."""

    prompt: str
    seed: int
    region: Rectangle | None
    """Where the concept should appear; None for the whole image."""


class JudgeVerdict(NamedTuple):
    """The verdict of a judge on an image."""

    shows: bool
    """Whether the concept is in the trial's region."""
    right: Mapping[str, bool]
    """Whether each other statement of the prompt is true."""
    confidence: float
    """Of the judge, about the whole image."""


@final
@dataclass(frozen=True, kw_only=True)
class SteeringTask:
    """A concept, and trials whose prompts name another concept of its group."""

    concept: str
    group: str
    trials: tuple[SteeringTrial, ...]

    @classmethod
    def of(cls, concept: str, group: str, images: Iterable[tuple[str, Rectangle | None]]) -> SteeringTask:
        """Return the task with a trial for each prompt and region; their seeds follow one another."""
        trials = tuple(SteeringTrial(prompt, seed, region) for seed, (prompt, region) in enumerate(images))
        return cls(concept=concept, group=group, trials=trials)


@final
@dataclass(frozen=True, kw_only=True)
class StrengthPoint:
    """The effect of a method at one strength."""

    strength: float
    success: float
    """The share of images that show the concept in its region."""
    specificity: float
    """Of all else that was right in the unedited images, the share that still is."""
    quality: float
    """The unedited model's loss on the edited images over that on unedited ones: 1 is as good, more is worse."""
    confidence: float
    """Of the judge, over that about unedited images."""


@final
@dataclass(frozen=True, kw_only=True)
class StrengthCurve:
    """The effect of a method on a task, over strengths."""

    method: str
    description: str
    """The feature or the direction that is added."""
    concept: str
    group: str
    trials: int
    without: float
    """The share of unedited images that show the concept."""
    points: tuple[StrengthPoint, ...]

    @property
    def breaks(self) -> float | None:
        """The first strength at which images are broken; None if there is none."""
        return next((point.strength for point in self.points if point.quality >= BROKEN), None)

    def best(self, retention: float = 0.9) -> StrengthPoint | None:
        """Return the point of the highest success among those that keep the share `retention` of all else and break no image."""
        good = [point for point in self.points if point.specificity >= retention and point.quality < BROKEN]
        return max(good, key=lambda point: (point.success, -abs(point.strength)), default=None)

    def gain(self, retention: float = 0.9) -> float:
        """Return the success at the best point minus that without the edit; 0 without a best point."""
        best = self.best(retention)
        return 0.0 if best is None else best.success - self.without


class JudgedGenerator(NamedTuple):
    """A model and a judge of its images."""

    images: Callable[[Sequence[SteeringTrial], Sequence[SteeringHook]], Images]
    """The images of trials with hooks; unedited without any."""
    verdicts: Callable[[SteeringTask, Sequence[SteeringTrial], Images], Sequence[JudgeVerdict]]
    losses: Callable[[Images], Float[Tensor, " image"]]
    """The unedited model's loss on images, after noise was added to them."""


class SteeringMethod(NamedTuple):
    """A way to make a concept appear."""

    description: str
    apply: Callable[[SteeringTrial, float], tuple[SteeringTrial, Sequence[SteeringHook]]]
    """A trial at a strength: the same trial with hooks, or a trial with another prompt."""
    strengths: Sequence[float]

    @classmethod
    def adding(cls, edit: Edit, features: EditFeatures, strengths: Sequence[float]) -> SteeringMethod:
        """Return the method that makes `edit` with `features` in the region of a trial."""
        return cls.of_edits(features.description, [replace(edit, strength=1.0)], lambda _: features, strengths)

    @classmethod
    def of_edits(
        cls, description: str, edits: Sequence[Edit], features: Callable[[Edit], EditFeatures], factors: Sequence[float]
    ) -> SteeringMethod:
        """Return the method that makes `edits` in the region of a trial, their strengths multiplied by each of `factors`."""

        def apply(trial: SteeringTrial, factor: float) -> tuple[SteeringTrial, Sequence[SteeringHook]]:
            placed = {
                # Text tokens have no place in the image.
                replace(edit, strength=factor * edit.strength, region=None if edit.site.stream == "text" else trial.region): edit
                for edit in edits
            }
            return trial, steering_hooks(placed, lambda edit: features(placed[edit]))

        return cls(description, apply, factors)


@final
class JudgedTask:
    """A task whose unedited images are judged: what edits are compared with."""

    def __init__(self, task: SteeringTask, generator: JudgedGenerator) -> None:
        """Generate and judge the unedited images."""
        if not task.trials:
            raise BadInput(f"There is no trial for '{task.concept}'. Give at least one.")
        self.task, self._generator = task, generator
        unedited = generator.images(task.trials, ())
        self._before, self._losses = generator.verdicts(task, task.trials, unedited), generator.losses(unedited)
        self.without = _mean([verdict.shows for verdict in self._before])

    def point(self, method: SteeringMethod, strength: float) -> StrengthPoint:
        """Return the effect of a method at a strength."""
        trials, hooks = zip(*(method.apply(trial, strength) for trial in self.task.trials), strict=True)
        edited = self._generator.images(trials, batch_hooks(trials, hooks))
        # Judged by the original prompts: a prompt that was edited states the concept, not what it replaced.
        after = self._generator.verdicts(self.task, self.task.trials, edited)
        pairs = list(zip(self._before, after, strict=True))
        still_right = [new.right[name] for old, new in pairs for name, right in old.right.items() if right]
        return StrengthPoint(
            strength=float(strength),
            success=_mean([verdict.shows for verdict in after]),
            specificity=_mean(still_right) if still_right else 1.0,
            quality=float(self._generator.losses(edited).mean() / self._losses.mean()),
            confidence=_mean([new.confidence for new in after]) / max(1e-9, _mean([old.confidence for old in self._before])),
        )

    def curve(self, name: str, method: SteeringMethod) -> StrengthCurve:
        """Return the effect of the method called `name` at its strengths."""
        return StrengthCurve(
            method=name,
            description=method.description,
            concept=self.task.concept,
            group=self.task.group,
            trials=len(self.task.trials),
            without=self.without,
            points=tuple(self.point(method, strength) for strength in method.strengths),
        )


def judge_methods(
    task: SteeringTask, methods: Mapping[str, SteeringMethod], generator: JudgedGenerator
) -> Iterator[StrengthCurve]:
    """Yield a curve for each of `methods`, which are given by name."""
    judged = JudgedTask(task, generator)
    yield from (judged.curve(name, method) for name, method in methods.items())


def batch_hooks(trials: Sequence[SteeringTrial], hooks: Sequence[Sequence[SteeringHook]]) -> list[SteeringHook]:
    """Return the hooks of a batch whose images have hooks of their own, one for each site."""
    by_site = dict[Site, dict[tuple[str, int], SteeringHook]]()
    for trial, own in zip(trials, hooks, strict=True):
        for hook in own:
            by_site.setdefault(hook.site, {})[trial.prompt, trial.seed] = hook

    def change(
        by_image: Mapping[tuple[str, int], SteeringHook], x: Float[Tensor, "batch token width"], context: HookContext
    ) -> Float[Tensor, "batch token width"] | None:
        assert context.shots is not None
        rows, is_changed = [], False
        for row, shot in zip(x.split(1), context.shots, strict=True):
            hook = by_image.get((shot.prompt, shot.seed))
            edited = None if hook is None else hook.change(row, context)
            rows.append(row if edited is None else edited)
            is_changed |= edited is not None
        return torch.cat(rows) if is_changed else None

    return [SteeringHook(site, partial(change, by_image)) for site, by_image in by_site.items()]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
