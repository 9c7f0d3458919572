"""Edits that are aware of their effect: strengths of each site and step, and directions, found by gradients of a judge."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from difflex.effects.drawn_world import group_of
from difflex.effects.judging import Images, SteeringMethod, SteeringTask, SteeringTrial, batch_hooks
from difflex.errors import BadInput, NonFinite
from difflex.miniature.judge import DENSE, WHOLE, Judge
from difflex.miniature.world import CONCEPTS
from difflex.records import Edit, HookContext, Shot, Site
from difflex.steering import EditFeatures, SteeringHook
from difflex.steering.strengths import LOSS_LEVELS
from difflex.values import check_fields

ENOUGH = 0.9
"""The probability of a concept from which on more is not asked for."""
SMALLEST = 0.02
"""Strengths below this are left out."""
WHOLE_UNTIL = 1.2
"""The model's loss on edited images over that on unedited ones, up to which images count as whole."""
Run = Callable[[Sequence[Shot], Sequence[SteeringHook]], Images]
"""The images of shots with hooks, with gradients with respect to what these add."""
Losses = Callable[[Images, float], Float[Tensor, " image"]]
"""The unedited model's losses on images at a level of noise, with gradients with respect to these."""


class EffectJudge(NamedTuple):
    """A judge whose answers have gradients with respect to the images."""

    shows: Callable[[SteeringTask, Sequence[SteeringTrial], Images], Float[Tensor, " image"]]
    """The log-probability that the region of each trial shows the concept."""
    changes: Callable[[SteeringTask, Sequence[SteeringTrial], Images, Images], Float[Tensor, " image"]]
    """How far all else differs between unedited and edited images; 0 for the same image."""


@final
@dataclass(frozen=True, kw_only=True)
class EffectConfig:
    """How strengths are optimised."""

    updates: int = 40
    rate: float = 0.3
    """The first learning rate of Adam, about how much a strength changes in an update; it falls to zero along a cosine."""
    batch: int = 8
    """Images of an update."""
    keep: float = 1.0
    """The weight of changes of all else, next to that of the concept."""
    whole: float = 4.0
    """The weight of the loss of quality."""
    strength_cost: float = 0.02
    """The weight of the mean strength."""
    directions: bool = False
    """Also optimise the direction of each edit, from that of its features on."""

    def __post_init__(self) -> None:
        check_fields(self)
        weights = (self.keep, self.whole, self.strength_cost)
        if self.updates < 1 or self.batch < 1 or self.rate <= 0 or min(weights) < 0:
            raise BadInput(
                f"{self.updates} updates of {self.batch} images at a rate of {self.rate:g} with the weights "
                f"{', '.join(f'{weight:g}' for weight in weights)} optimise nothing. Give numbers above 0; weights may be 0."
            )


class OptimisedEdits(NamedTuple):
    """Edits with optimised strengths, and the course of the optimisation."""

    edits: tuple[Edit, ...]
    """One for each site and step whose strength counts."""
    losses: tuple[float, ...]
    shows: tuple[float, ...]
    """The mean probability of the concept, at each update."""
    directions: dict[Site, Float[Tensor, " width"]]
    """What a strength of 1 adds at each site, where directions are optimised."""


def optimise_edits(
    task: SteeringTask,
    edits: Sequence[Edit],
    features: Callable[[Edit], EditFeatures],
    settings: Shot,
    run: Run,
    judge: EffectJudge,
    losses: Losses,
    config: EffectConfig,
) -> OptimisedEdits:
    """Return `edits` with a strength for each step that makes the concept of `task` appear at its trials and keeps all else.

    With directions, the edits are at a site each, and what is returned stands for edits along the directions that were found.

    What is minimised is -log p + keep * c + whole * q + strength_cost * |s|: p is the judge's probability of the concept, up to
    ENOUGH; c is how far all else changes; q the logarithm by which the model's loss exceeds WHOLE_UNTIL times that on unedited
    images, at one of LOSS_LEVELS after another; |s| the mean strength. `settings` is a shot of the run without prompt and seed.
    Edits must add.
    """
    if any(edit.operation != "add" or edit.unit == "current-norm" for edit in edits) or not edits:
        raise BadInput("Strengths are optimised of edits that add, in units other than current-norm. Give one or more of them.")
    batches = [task.trials[start : start + config.batch] for start in range(0, len(task.trials), config.batch)]
    prepared = [_TrialBatch.of(trials, edits, features, settings) for trials in batches]
    found = _EditParameters.of([_direction(edit, features) for edit in edits], settings.steps, config.directions)
    adam = found.optimiser(config.rate)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, config.updates)
    course, shown = list[float](), list[float]()
    unedited = cache(lambda batch: run(prepared[batch].shots, ()).detach())
    usual = cache(lambda batch, level: losses(unedited(batch), level).detach().mean())
    for update in range(config.updates):
        number, level = update % len(prepared), LOSS_LEVELS[update // len(prepared) % len(LOSS_LEVELS)]
        batch = prepared[number]
        images = run(batch.shots, batch.hooks(found.strengths, found.directions()))
        shows = judge.shows(task, batch.trials, images)
        changes = judge.changes(task, batch.trials, unedited(number), images)
        damage = (losses(images, level).mean() / (WHOLE_UNTIL * usual(number, level))).log().clamp(min=0)
        loss = -shows.clamp(max=math.log(ENOUGH)).mean() + config.keep * changes.mean() + config.whole * damage
        loss = loss + config.strength_cost * found.strengths.abs().mean()
        if not bool(torch.isfinite(loss)):
            raise NonFinite(f"The loss of update {update} for '{task.concept}' is NaN or infinite. Lower the learning rate.")
        adam.zero_grad()
        loss.backward()
        adam.step()
        falling.step()
        course.append(loss.item())
        shown.append(shows.detach().exp().mean().item())
    edited = tuple(_lasting(edits, found.strengths.tolist()))
    directions = {edit.site: direction.detach() for edit, direction in zip(edits, found.directions(), strict=True)}
    return OptimisedEdits(edited, tuple(course), tuple(shown), directions if config.directions else {})


class _EditParameters(NamedTuple):
    """What is optimised."""

    strengths: Float[Tensor, "edit step"]
    starts: list[Float[Tensor, " width"]]
    turns: list[Float[Tensor, " width"]]
    """By how much of its own length each direction is moved."""

    @classmethod
    def of(cls, starts: list[Tensor], steps: int, turns: bool) -> _EditParameters:
        strengths = torch.zeros(len(starts), steps, requires_grad=True)
        return cls(strengths, starts, [torch.zeros_like(start, requires_grad=turns) for start in starts])

    def directions(self) -> list[Float[Tensor, " width"]]:
        """Return what a strength of 1 adds, for each edit."""
        return [start + start.norm() * turn for start, turn in zip(self.starts, self.turns, strict=True)]

    def optimiser(self, rate: float) -> torch.optim.Adam:
        """Return Adam, which turns a direction about as fast as it changes a strength."""
        groups = [{"params": [self.strengths], "lr": rate}]
        groups += [{"params": [turn], "lr": rate / len(turn) ** 0.5} for turn in self.turns if turn.requires_grad]
        # Short memories: strengths that are more than enough must not keep growing.
        return torch.optim.Adam(groups, betas=(0.5, 0.9))


def _lasting(edits: Sequence[Edit], strengths: Sequence[Sequence[float]]) -> Iterator[Edit]:
    """Yield an edit for each site and step whose strength counts."""
    for edit, row in zip(edits, strengths, strict=True):
        for step, strength in enumerate(row):
            if abs(strength) >= SMALLEST and (edit.steps is None or edit.steps[0] <= step < edit.steps[1]):
                yield replace(edit, strength=round(strength, 4), steps=(step, step + 1))


def _direction(edit: Edit, features: Callable[[Edit], EditFeatures]) -> Float[Tensor, " width"]:
    """Return what an edit adds at a strength of 1."""
    found = features(edit)
    return (found.units[edit.unit].to(found.decoder) @ found.decoder).detach().cpu()


@final
@dataclass(frozen=True)
class _TrialBatch:
    """Trials, their shots, and hooks that add the weight of each edit at each token to its first number, by site."""

    trials: Sequence[SteeringTrial]
    shots: tuple[Shot, ...]
    units: dict[Site, dict[int, SteeringHook]]
    """By the number of the edit."""

    @classmethod
    def of(
        cls, trials: Sequence[SteeringTrial], edits: Sequence[Edit], features: Callable[[Edit], EditFeatures], settings: Shot
    ) -> _TrialBatch:
        units = dict[Site, dict[int, SteeringHook]]()
        for number, edit in enumerate(edits):
            one = torch.eye(1, len(_direction(edit, features)))
            weights = features(edit)._replace(decoder=one, units={edit.unit: torch.ones(1)})
            method = SteeringMethod.of_edits("", [replace(edit, strength=1.0)], lambda _, found=weights: found, (1.0,))
            for hook in batch_hooks(trials, [method.apply(trial, 1.0)[1] for trial in trials]):
                units.setdefault(hook.site, {})[number] = hook
        shots = tuple(replace(settings, prompt=trial.prompt, seed=trial.seed, timestep=None) for trial in trials)
        return cls(trials, shots, units)

    def hooks(self, strengths: Float[Tensor, "edit step"], directions: Sequence[Float[Tensor, " width"]]) -> list[SteeringHook]:
        """Return hooks that make the edits at `strengths` along `directions`."""

        def change(units: Mapping[int, SteeringHook], x: Tensor, context: HookContext) -> Tensor | None:
            still, total = torch.zeros_like(x), None
            for number, unit in units.items():
                weights = unit.change(still, context)
                if weights is not None:
                    part = weights[..., :1] * (strengths[number, context.step] * directions[number]).to(x)
                    total = part if total is None else total + part
            return None if total is None else x + total

        return [SteeringHook(site, partial(change, units)) for site, units in self.units.items()]


def drawn_effect_judge(judge: Judge) -> EffectJudge:
    """Return the judge of the drawn world with gradients.

    Pixels count by the probability that they could show the concept: object pixels of the region, or background pixels. Changes
    are divergences of the judge's predictions from those for the unedited image.
    """

    def shows(task: SteeringTask, trials: Sequence[SteeringTrial], images: Images) -> Tensor:
        group = group_of(task.concept)
        index = CONCEPTS[group].index(task.concept)
        answers = judge(images)
        likely = answers[group].log_softmax(1)[:, index]
        if group in WHOLE:
            return likely
        objects = answers["object"].sigmoid().detach()
        weights = _inside(trials, images) * (1 - objects if group == "background" else objects) + 1e-6
        return (weights * likely).sum((1, 2)) / weights.sum((1, 2))

    def changes(task: SteeringTask, trials: Sequence[SteeringTrial], before: Images, after: Images) -> Tensor:
        group, (old, new) = task.group, (judge(images) for images in (before, after))
        objects, outside = old["object"].sigmoid(), 1 - _inside(trials, before)
        # A shape changes with its outline.
        total = _mean(F.binary_cross_entropy_with_logits(new["object"], objects, reduction="none")
                      - F.binary_cross_entropy_with_logits(old["object"], objects, reduction="none"),
                      outside if group == "shape" else torch.ones_like(outside))  # fmt: skip
        for name in DENSE:
            weights = 1 - objects if name == "background" else objects
            weights = weights * outside if name == group else weights
            total = total + _mean(_divergence(old[name], new[name]), weights)
        for name in WHOLE:
            total = total + (0.0 if name == group else _divergence(old[name], new[name]))
        return total

    return EffectJudge(shows, changes)


def similarity_effect_judge(
    embed_images: Callable[[Images], Float[Tensor, "image width"]],
    embed_texts: Callable[[Sequence[str]], Float[Tensor, "text width"]],
    logit_scale: float,
    instead: Callable[[str], Sequence[str]],
    parts: Callable[[Sequence[SteeringTrial], Images], tuple[Images, Images | None]],
) -> EffectJudge:
    """Return the judge by embeddings of norm 1, as CLIP makes them; `instead` are the other concepts of the group.

    `parts` returns the region of images, and the images without it (None where it is the whole image).
    """

    def shows(task: SteeringTask, trials: Sequence[SteeringTrial], images: Images) -> Tensor:
        texts = embed_texts([task.concept, *instead(task.concept)])
        return (logit_scale * embed_images(parts(trials, images)[0]) @ texts.T).log_softmax(1)[:, 0]

    def changes(task: SteeringTask, trials: Sequence[SteeringTrial], before: Images, after: Images) -> Tensor:
        rest = [parts(trials, images)[1] for images in (before, after)]
        if rest[0] is None or rest[1] is None:
            return after.new_zeros(len(after))
        return logit_scale * (1 - (embed_images(rest[0]) * embed_images(rest[1])).sum(1))

    return EffectJudge(shows, changes)


def _inside(trials: Sequence[SteeringTrial], images: Images) -> Float[Tensor, "image row column"]:
    """Return 1 for pixels in the region of each trial, 0 for others."""
    rows, columns = images.shape[-2:]
    y, x = ((torch.arange(count) + 0.5) / count for count in (rows, columns))
    masks = [
        torch.ones(rows, columns)
        if trial.region is None
        else torch.outer(
            ((y >= trial.region.top) & (y < trial.region.bottom)).float(),
            ((x >= trial.region.left) & (x < trial.region.right)).float(),
        )
        for trial in trials
    ]
    return torch.stack(masks).to(images)


def _divergence(old: Tensor, new: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of predictions over the axis of concepts."""
    before, after = old.log_softmax(1), new.log_softmax(1)
    return (before.exp() * (before - after)).sum(1)


def _mean(values: Float[Tensor, "image row column"], weights: Float[Tensor, "image row column"]) -> Float[Tensor, " image"]:
    return (values * weights).sum((1, 2)) / weights.sum((1, 2)).clamp(min=1.0)
