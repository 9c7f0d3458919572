"""Predictions and images under edits, and the losses of given images."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

import difflex
from difflex.errors import BadInput, UnknownName
from difflex.pipeline import Pipeline
from difflex.records import EditOutcomes, HookContext, Shot, Site
from difflex.testing import tiny_folder

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
PROMPTS = ["a red star", "a blue circle"]


# One half or two, in separate calls or one batch; guidance as an input; repeated timesteps; predicted variances.
@pytest.fixture(scope="module", params=["flux", "flux-dev", "sd3", pytest.param("sdxl", marks=pytest.mark.slow), "sd1", "pixart"])
def pipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tiny_folder(request.param, tmp_path_factory.mktemp("models") / request.param, defaults={"pixels": [[16, 24]]})
    return difflex.load(folder)


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return difflex.load(tiny_folder("flux", tmp_path_factory.mktemp("models") / "flux"))


def middle(pipe: Pipeline) -> Site:
    image_sites = [row.site for row in pipe.sites() if row.site.stream == "image"]
    return image_sites[len(image_sites) // 2]


def same(x: Tensor, context: HookContext) -> Tensor:
    return x.clone()


def halved(x: Tensor, context: HookContext) -> Tensor:
    return x / 2


def put_back(x: Tensor, context: HookContext) -> Tensor:
    """A bad reconstruction plus its error, in float64, where the sum is exact."""
    reconstruction = (x.double() * 0.3 + 1).float().double()
    return (reconstruction + (x.double() - reconstruction)).to(x.dtype)


EDITS = {"same": same, "put back": put_back, "halved": halved}


def by_shot(outcomes: list[EditOutcomes], edit: str | None = None) -> dict[Shot, Tensor]:
    return {
        shot: tensor
        for outcome in outcomes
        for shot, tensor in zip(outcome.shots, outcome.plain if edit is None else outcome.edited[edit], strict=True)
    }


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_an_edit_that_keeps_the_activations_keeps_every_bit_of_the_prediction(pipe: Pipeline, guidance: float):
    shots = list(pipe.shots(PROMPTS, steps=2, guidance=guidance))
    outcomes = list(pipe.predictions(shots, middle(pipe), EDITS))
    assert {shot for outcome in outcomes for shot in outcome.shots} == set(shots)
    for outcome in outcomes:
        assert torch.equal(outcome.edited["same"], outcome.plain)
        assert torch.equal(outcome.edited["put back"], outcome.plain)
        assert not torch.allclose(outcome.edited["halved"], outcome.plain)


def test_the_plain_prediction_equals_that_of_a_run_without_edits(pipe: Pipeline):
    shots = list(pipe.shots(PROMPTS, steps=2, guidance=4.0))
    plain = by_shot(list(pipe.predictions(shots, middle(pipe), EDITS)))
    outputs: list[Tensor] = []
    handle = pipe.engine.denoiser.register_forward_hook(lambda module, args, output: outputs.append(output[0].clone()))
    pipe.engine.run([replace(shot, timestep=None) for shot in shots[::2]], output_type="latent")
    handle.remove()
    for shot, tensor in plain.items():
        candidates = (step[-len(PROMPTS) :, : len(tensor)] for step in outputs)  # the conditional half is the last
        assert any(torch.equal(step[PROMPTS.index(shot.prompt)], tensor) for step in candidates)


def test_the_edited_prediction_of_the_first_step_equals_that_of_an_edited_run(pipe: Pipeline):
    (shot,) = pipe.shots(PROMPTS[:1], steps=2, keep_steps=[0], guidance=1.0)
    (outcome,) = pipe.predictions([shot], middle(pipe), {"halved": halved})
    with pipe.at(middle(pipe), halved):
        (edited,) = pipe.predictions([shot], middle(pipe), {})
    assert torch.equal(outcome.edited["halved"], edited.plain)


def test_images_under_an_edit_equal_those_generated_within_at(pipe: Pipeline):
    shots = list(pipe.shots(PROMPTS, steps=2, guidance=1.0))  # two of each run: one image
    (outcome,) = pipe.images(shots, middle(pipe), EDITS)
    assert outcome.plain.shape == (2, 3, 16, 24) and 0 <= outcome.plain.min() < outcome.plain.max() <= 1
    assert torch.equal(outcome.edited["same"], outcome.plain) and torch.equal(outcome.edited["put back"], outcome.plain)
    with pipe.at(middle(pipe), halved):
        (edited,) = pipe.images(shots, middle(pipe), {})
    assert torch.equal(outcome.edited["halved"], edited.plain) and not torch.equal(edited.plain, outcome.plain)
    assert [shot.timestep for shot in outcome.shots] == [None, None]


def test_only_the_conditional_half_is_edited_and_compared(tmp_path: Path):
    pipe = difflex.load(tiny_folder("sdxl", tmp_path / "sdxl", defaults={"pixels": [[16, 24]]}))
    halves = []

    def record(x: Tensor, context: HookContext) -> Tensor:
        halves.append(context.half)
        return x

    shots = list(pipe.shots(PROMPTS, steps=1, guidance=4.0))
    (outcome,) = pipe.predictions(shots, middle(pipe), {"record": record})
    assert halves == ["conditional"] and len(outcome.plain) == len(PROMPTS)


def test_a_run_ends_at_its_last_kept_step(flux: Pipeline):
    steps: list[int] = []
    shots = list(flux.shots(PROMPTS, steps=4, keep_steps=[1]))
    with flux.at("double.0", lambda x, context: steps.append(context.step)):
        list(flux.predictions(shots, "double.1", {"halved": halved}))
    assert steps == [0, 1, 1]  # the last for the edit


def test_a_failing_edit_leaves_no_hook_behind(flux: Pipeline):
    shots = list(flux.shots(PROMPTS, steps=1))

    def failing(x: Tensor, context: HookContext) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(flux.predictions(shots, "double.1", {"failing": failing}))
    assert not flux.engine.denoiser._forward_hooks and not flux.engine.denoiser._forward_pre_hooks
    assert all(
        torch.equal(outcome.plain, outcome.edited["same"]) for outcome in flux.predictions(shots, "double.1", {"same": same})
    )


def test_unusable_sites_timesteps_and_batches_are_errors(flux: Pipeline):
    shots = list(flux.shots(PROMPTS, steps=2))
    with pytest.raises(UnknownName, match=r"double\.9"):
        flux.predictions(shots, "double.9", {})
    with pytest.raises(BadInput, match="timestep 123"):
        list(flux.predictions([replace(shots[0], timestep=123.0)], "double.1", {}))
    with pytest.raises(BadInput, match="batch of 0"):
        flux.images(shots, "double.1", {}, batch=0)


def test_predictions_and_images_of_mini_flux_under_edits():
    pipe = difflex.load("mini-flux")
    shots = list(pipe.shots(["a red star on grass"], steps=2, pixels=pipe.engine.defaults.pixels[0]))
    for outcome in [*pipe.predictions(shots, "double.1", EDITS), *pipe.images(shots, "double.1", EDITS)]:
        assert torch.equal(outcome.edited["put back"], outcome.plain)
        assert not torch.equal(outcome.edited["halved"], outcome.plain)


def test_the_loss_of_an_image_is_the_error_of_the_prediction(flux: Pipeline):
    """By hand: at pure noise the input is the noise alone, and the target is noise - image."""
    colours = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    losses = flux.losses(colours, [0.3, 1.0], prompts="a star", seed=4)
    assert losses.shape == (2, 2) and torch.isfinite(losses).all()
    single = flux.losses(colours[1:], 1.0, prompts="a star", seed=5)
    torch.testing.assert_close(single[0, 0], losses[1, 1])
    vae = flux.diffusers.components["vae"]
    pixels = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    with torch.no_grad():
        latents = (vae.encode(pixels).latent_dist.mode() - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
    noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(4))
    shot = next(flux.shots("a star", seeds=[4], steps=1, pixels=(32, 32), guidance=1.0))
    [outcome] = flux.predictions([shot], middle(flux), {})
    target = rearrange(noise[None] - latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
    assert shot.timestep == 1000.0  # the run begins with the same noise
    torch.testing.assert_close((outcome.plain.float() - target).square().mean(), losses[0, 1])


def test_every_family_computes_losses_of_images(pipe: Pipeline):
    images = [Image.new("RGB", (24, 16), colour) for colour in ("red", "blue")]
    losses = pipe.losses(images, [0.2, 0.7])
    assert losses.shape == (2, 2) and (losses > 0).all() and torch.isfinite(losses).all()
    with pytest.raises(BadInput, match="between 0"):
        pipe.losses(images, 1.5)
