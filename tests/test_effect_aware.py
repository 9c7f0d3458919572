"""Edits whose strengths are optimised through the model: the gradients are those of the images, and what suffices is found."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import difflex
from difflex.effects.drawn_world import FIRST_CAPTION
from difflex.effects.effect_aware import (
    WHOLE_UNTIL,
    EffectConfig,
    EffectJudge,
    drawn_effect_judge,
    optimise_edits,
    similarity_effect_judge,
)
from difflex.effects.inputs import to_images
from difflex.effects.judging import SteeringTask, SteeringTrial
from difflex.effects.planned_steering import _contrast_name
from difflex.errors import BadInput
from difflex.miniature import draw, load_judge
from difflex.miniature.world import CONCEPTS, SceneMix
from difflex.records import Edit, HookContext, Shot, Site, check_contrast_name
from difflex.steering import EditFeatures, SteeringHook
from difflex.testing import tiny_folder

SITES = ("double.0", "single.0")
SETTINGS = Shot(model="m", pixels=(8, 8), steps=2, guidance=0.0)
TRIALS = tuple(SteeringTrial(f"image {number}", number, None) for number in range(4))
TASK = SteeringTask(concept="red", group="colour", trials=TRIALS)
UNIT = EditFeatures("a feature", lambda x: x, torch.ones(1, 1), {"peak": torch.ones(1)})


def edits(**changes: object) -> list[Edit]:
    return [Edit(operation="add", site=Site.parse(site), dictionary="d", features=(0,), **changes) for site in SITES]  # pyright: ignore[reportArgumentType]


def run(shots: Sequence[Shot], hooks: Sequence[SteeringHook]) -> Tensor:
    """Images of two numbers: what is added at the first site in the first step, and what is added anywhere else."""
    good, bad = torch.zeros(len(shots)), torch.zeros(len(shots))
    for step in range(2):
        for hook in hooks:
            x = torch.zeros(len(shots), 1, 1)
            edited = hook.change(x, HookContext(step, 1.0, None, tuple(shots), (1, 1), 2))
            added = (x if edited is None else edited)[:, 0, 0]
            good, bad = (good + added, bad) if (str(hook.site), step) == ("double.0", 0) else (good, bad + added)
    return torch.stack([good, bad], 1).view(-1, 2, 1, 1)


JUDGE = EffectJudge(
    lambda task, trials, images: (4 * images[:, 0, 0, 0] - 4).sigmoid().log(),
    lambda task, trials, before, after: (after - before)[:, 1, 0, 0].square(),
)


def unchanged(images: Tensor, level: float) -> Tensor:
    return torch.ones(len(images))


def test_strengths_become_what_suffices_at_the_site_and_step_that_have_the_effect():
    optimised = optimise_edits(
        TASK, edits(), lambda _: UNIT, SETTINGS, run, JUDGE, unchanged, EffectConfig(updates=150, batch=2, rate=0.1)
    )
    [edit] = [edit for edit in optimised.edits if abs(edit.strength) > 0.1]
    # The probability 0.9 is reached at 1 + log(9) / 4.
    assert (str(edit.site), edit.steps) == ("double.0", (0, 1)) and edit.strength == pytest.approx(1 + math.log(9) / 4, abs=0.1)
    assert optimised.shows[0] < 0.05 and optimised.shows[-1] > 0.85 and optimised.losses[-1] < optimised.losses[0]


def test_a_direction_turns_to_what_has_the_effect():
    two_wide = UNIT._replace(decoder=torch.tensor([[1.0, 0.1]]))

    def run_along(shots: Sequence[Shot], hooks: Sequence[SteeringHook]) -> Tensor:
        """Images of what is added to the second number and to the first one."""
        total = torch.zeros(len(shots), 2)
        for hook in hooks:
            edited = hook.change(torch.zeros(len(shots), 1, 2), HookContext(0, 1.0, None, tuple(shots), (1, 1), 2))
            total = total if edited is None else total + edited[:, 0]
        return total.flip(1)[..., None, None]

    config = EffectConfig(updates=200, batch=2, rate=0.1, directions=True)
    found = optimise_edits(TASK, edits()[:1], lambda _: two_wide, SETTINGS, run_along, JUDGE, unchanged, config)
    [(site, direction)] = found.directions.items()
    assert str(site) == "double.0" and float(direction[1].abs()) > 5 * float(direction[0].abs()) and found.shows[-1] > 0.85
    [edit] = [edit for edit in found.edits if abs(edit.strength) > 0.1]
    assert edit.strength * float(direction[1]) == pytest.approx(1 + math.log(9) / 4, abs=0.2)
    fixed = optimise_edits(
        TASK, edits()[:1], lambda _: two_wide, SETTINGS, run_along, JUDGE, unchanged, EffectConfig(updates=200, batch=2, rate=0.1)
    )
    assert not fixed.directions and fixed.shows[-1] < 0.5


def test_directions_of_any_concept_at_any_site_have_names_of_their_own():
    concepts = ("a red star", "звезда", "круг", "x" * 41, "x" * 42)
    names = [_contrast_name("effect", concept, Site.parse("double.1:smooth")) for concept in concepts]
    assert names[0] == "effect-a-red-star-double.1-smooth" and len({*names}) == 5
    for name in names:
        check_contrast_name(name)


def test_the_quality_of_images_is_kept_where_it_would_be_lost():
    losses = lambda images, level: 1 + images[:, 0, 0, 0].clamp(min=0)  # noqa: E731 (what has the effect costs quality)
    config = EffectConfig(updates=150, batch=2, whole=20.0)
    careful = optimise_edits(TASK, edits()[:1], lambda _: UNIT, SETTINGS, run, JUDGE, losses, config)
    assert sum(edit.strength for edit in careful.edits if edit.steps == (0, 1)) == pytest.approx(WHOLE_UNTIL - 1, abs=0.1)
    careless = optimise_edits(TASK, edits()[:1], lambda _: UNIT, SETTINGS, run, JUDGE, losses, replace(config, whole=0.0))
    assert careless.shows[-1] > 0.85 > careful.shows[-1]


def test_steps_that_are_not_edited_keep_no_strength():
    optimised = optimise_edits(
        TASK, edits(steps=(1, 2)), lambda _: UNIT, SETTINGS, run, JUDGE, unchanged, EffectConfig(updates=5)
    )
    assert all(edit.steps == (1, 2) for edit in optimised.edits)


@pytest.mark.parametrize("changed", [{"operation": "set"}, {"unit": "current-norm"}])
def test_edits_whose_change_depends_on_the_activation_are_refused(changed: dict[str, object]):
    wrong = [Edit(**{"operation": "add", "site": SITES[0], "dictionary": "d", "features": (0,), **changed})]  # pyright: ignore[reportArgumentType]
    with pytest.raises(BadInput, match="edits that add"):
        optimise_edits(TASK, wrong, lambda _: UNIT, SETTINGS, run, JUDGE, unchanged, EffectConfig())


@pytest.mark.parametrize("changes", [{"updates": 0}, {"batch": 0}, {"rate": 0.0}, {"keep": -1.0}, {"whole": -1.0}])
def test_impossible_settings_are_refused(changes: dict[str, object]):
    with pytest.raises(BadInput, match="optimise nothing"):
        EffectConfig(**changes)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_images_are_those_of_a_run_without_gradients_and_their_gradients_are_differences(family: str, tmp_path: Path):
    pipe = difflex.load(tiny_folder(family, tmp_path / family))
    site = pipe.sites()[0].site
    shots = [replace(next(iter(pipe.shots("a star", keep_steps=[0]))), timestep=None)]
    strength = torch.tensor(0.5, requires_grad=True)
    images = pipe.differentiable_images(shots, [(site, lambda x, context: x + strength)])
    images.mean().backward()
    assert strength.grad is not None

    def mean(value: float) -> float:
        with pipe.at(site, lambda x, context: x + value):
            return float(pipe.engine.pixels(shots).double().mean())

    assert mean(0.5) == pytest.approx(float(images.detach().double().mean()), abs=1e-6)
    assert float(strength.grad) == pytest.approx((mean(0.52) - mean(0.48)) / 0.04, rel=0.1, abs=1e-4)
    assert not pipe.engine.pixels(shots).requires_grad


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")  # of diffusers
@pytest.mark.parametrize("family", ["flux", "sdxl", "sd3"])
def test_losses_of_images_have_gradients_and_are_those_without_them(family: str, tmp_path: Path):
    pipe = difflex.load(tiny_folder(family, tmp_path / family))
    pixels = (torch.rand(2, 3, *next(iter(pipe.shots(""))).pixels) * 255).round() / 255
    for level in (0.3, 0.9):
        images = pixels.clone().requires_grad_()
        losses = pipe.differentiable_losses(images, level)
        assert torch.allclose(losses.detach(), pipe.losses(to_images(pixels), level)[:, 0], rtol=1e-3)
        losses.sum().backward()
        assert images.grad is not None
        step = 0.01 * images.grad / images.grad.abs().max()
        ahead, behind = (pipe.differentiable_losses(pixels + sign * step, level).sum().item() for sign in (1, -1))
        assert (ahead - behind) / 2 == pytest.approx(float((step * images.grad).sum()), rel=0.1)
    assert not pipe.engine.pixels(list(pipe.shots("a star", keep_steps=[0]))).requires_grad


@pytest.mark.parametrize("group", ["colour", "shape", "background", "style"])
def test_the_drawn_judge_prefers_images_with_the_concept_and_sees_changes_of_all_else(group: str):
    scenes = draw(torch.arange(FIRST_CAPTION, FIRST_CAPTION + 16), SceneMix(1, 0, 0))
    judge = drawn_effect_judge(load_judge())
    indices = getattr(scenes.specs, group)
    indices = indices if indices.ndim == 1 else indices[:, 0]
    concept = CONCEPTS[group][int(indices[0])]
    trials = [SteeringTrial("", number, None) for number in range(16)]
    task = SteeringTask(concept=concept, group=group, trials=tuple(trials))
    images = scenes.images.clone().requires_grad_()
    shows = judge.shows(task, trials, images)
    shows.sum().backward()
    assert images.grad is not None and bool((images.grad.flatten(1).norm(dim=1) > 0).all())
    is_shown = indices == indices[0]
    assert shows[is_shown].mean() > math.log(0.5) > shows[~is_shown].mean()
    same, other = (
        judge.changes(task, trials, scenes.images, scenes.images),
        judge.changes(task, trials, scenes.images, scenes.images.flip(0)),
    )
    assert bool((same.abs() < 1e-4).all()) and float(other.mean()) > 0.5


def test_the_judge_by_similarity_looks_at_the_region_and_at_the_rest():
    embed = lambda images: torch.nn.functional.normalize(images.mean((2, 3)) + 0.01, dim=1)  # noqa: E731
    judge = similarity_effect_judge(
        embed,
        lambda texts: torch.eye(3)[: len(texts)],
        10.0,
        lambda concept: ["green"],
        lambda trials, x: (x[..., :2], x[..., 2:]),
    )
    red, green = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    red[:, 0], green[:, 1] = 1.0, 1.0
    half = torch.cat([red[..., :2], green[..., 2:]], -1)
    assert (
        float(judge.shows(TASK, TRIALS[:1], half)) > math.log(0.9) > math.log(0.1) > float(judge.shows(TASK, TRIALS[:1], green))
    )
    assert float(judge.changes(TASK, TRIALS[:1], green, half)) == pytest.approx(0.0, abs=1e-5)
    assert float(judge.changes(TASK, TRIALS[:1], red, half)) > 1
