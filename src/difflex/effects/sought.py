"""Concepts as somebody tells them who studies a model whose world nobody drew, and eyes for such images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from difflex.effects.judging import JudgeVerdict, SteeringTask, SteeringTrial
from difflex.errors import BadInput
from difflex.records import Rectangle

__all__ = ["ConceptSpec", "ImageAnswer", "ImageQuestion", "SimilarityJudge", "by_answers"]

BLANK = "{}"
"""Where in a prompt a concept goes."""
Images = Float[Tensor, "image channel row column"]
Unedited = Callable[[Sequence[SteeringTrial]], Images]
"""The images of trials without an edit."""


@final
@dataclass(frozen=True, kw_only=True)
class ConceptSpec:
    """A concept that edits are to bring about, in words."""

    concept: str
    """As a prompt would say it: `a dog`."""
    group: str
    """What it is one of: `animal`."""
    instead: tuple[str, ...]
    """Others of its group, which the images would show without the edit."""
    prompts: tuple[str, ...]
    """In each a {} where the concept, or another one, goes."""
    region: Rectangle | None = None
    """Where the concept is put; None for the whole image."""
    feature: int | None = None
    """Which feature of the dictionary is to bring it about; None for the one that detects it best."""

    def __post_init__(self) -> None:
        if not self.concept or not self.instead or not self.prompts or not all(BLANK in each for each in self.prompts):
            raise BadInput(
                f"The concept '{self.concept}' cannot be sought: it needs words of its own, one other of its group or more in "
                f"'instead', and one prompt or more in 'prompts', each with a {BLANK} where the concept goes."
            )

    def task(self, trials: int) -> SteeringTask:
        """The images in which it is to appear: every prompt with every other concept, then again with other seeds."""
        told = tuple(SteeringTrial(self._prompt(i, self._other(i)), i, self.region) for i in range(trials))
        return SteeringTask(concept=self.concept, group=self.group, trials=told)

    def pairs(self, count: int) -> list[tuple[str, str]]:
        """Pairs of prompts that are alike but for the concept: it, and another one of its group; none twice."""
        count = min(count, len(self.prompts) * len(self.instead))
        return [(self._prompt(i, self.concept), self._prompt(i, self._other(i))) for i in range(count)]

    def reworded(self, trial: SteeringTrial) -> SteeringTrial:
        """The same prompt, but for the concept: what an edit must be as good as."""
        return trial._replace(prompt=self._prompt(trial.seed, self.concept))

    def rest(self, trial: SteeringTrial) -> str:
        """What else the image of a trial is of."""
        return self._prompt(trial.seed, "something")

    def _prompt(self, number: int, word: str) -> str:
        return self.prompts[number % len(self.prompts)].replace(BLANK, word)

    def _other(self, number: int) -> str:
        return self.instead[number // len(self.prompts) % len(self.instead)]


@final
class SimilarityJudge:
    """Eyes by what a model makes of images and of words in one space, as CLIP does."""

    def __init__(
        self,
        of_images: Callable[[Images], Float[Tensor, "image width"]],
        of_words: Callable[[Sequence[str]], Float[Tensor, "text width"]],
        sharpness: float,
        sought: Mapping[str, ConceptSpec],
        unedited: Unedited,
    ) -> None:
        """Directions of length 1; what their cosines are multiplied by to be shares; and what is sought, by concept."""
        self._of_images, self._of_words, self._sharpness = of_images, of_words, sharpness
        self._sought, self._unedited = sought, unedited

    def __call__(self, task: SteeringTask, trials: Sequence[SteeringTrial], images: Images) -> list[JudgeVerdict]:
        """What is seen: the concept, where it is likelier there than the others of its group; the rest, where what is outside
        is likest to the same of its own unedited image, and not to that of another trial."""
        words = self._of_words([task.concept, *self._sought[task.concept].instead])
        inside = self._of_images(_inside(images, trials[0].region))
        shares = torch.softmax(self._sharpness * inside @ words.T, dim=1)
        after, before = (self._of_images(_outside(each, trials[0].region)) for each in (images, self._unedited(trials)))
        likeness = after @ before.T
        own = likeness.diagonal() >= likeness.amax(1) - 1e-6
        return [
            JudgeVerdict(int(each.argmax()) == 0, {"the rest": bool(kept)}, float(each.max()))
            for each, kept in zip(shares, own, strict=True)
        ]


class ImageQuestion(NamedTuple):
    """What is asked of an image."""

    image: Float[Tensor, "channel row column"]
    part: Float[Tensor, "channel part_row part_column"] | None
    """Where the concept is put; None where that is all of it."""
    concept: str
    rest: str
    """What else it is of."""


class ImageAnswer(NamedTuple):
    """What is answered."""

    shows: bool
    """The concept, where it was put."""
    rest: bool


def by_answers(
    ask: Callable[[Sequence[ImageQuestion]], Sequence[ImageAnswer]], sought: Mapping[str, ConceptSpec]
) -> Callable[[SteeringTask, Sequence[SteeringTrial], Images], list[JudgeVerdict]]:
    """The verdicts of somebody who is asked about each image."""

    def verdicts(task: SteeringTask, trials: Sequence[SteeringTrial], images: Images) -> list[JudgeVerdict]:
        rest = sought[task.concept].rest
        asked = [
            ImageQuestion(image, _inside(image, trial.region) if trial.region else None, task.concept, rest(trial))
            for image, trial in zip(images, trials, strict=True)
        ]
        return [JudgeVerdict(each.shows, {"the rest": each.rest}, 1.0) for each in ask(asked)]

    return verdicts


def _bounds(region: Rectangle, images: Float[Tensor, "*some row column"]) -> tuple[slice, slice]:
    """Rows and columns, one of each at least."""

    def along(start: float, end: float, count: int) -> slice:
        first = min(round(start * count), count - 1)
        return slice(first, max(round(end * count), first + 1))

    return along(region.top, region.bottom, images.shape[-2]), along(region.left, region.right, images.shape[-1])


def _inside(images: Float[Tensor, "*some row column"], region: Rectangle | None) -> Float[Tensor, "*some part_row part_column"]:
    if region is None:
        return images
    rows, columns = _bounds(region, images)
    return images[..., rows, columns]


def _outside(images: Images, region: Rectangle | None) -> Images:
    """The images, grey where the concept is put; all of them, where that is everywhere."""
    if region is None:
        return images
    rows, columns = _bounds(region, images)
    greyed = images.clone()
    greyed[..., rows, columns] = 0.5
    return greyed
