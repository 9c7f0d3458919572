"""The miniature SDXL: the sites of arXiv 2410.22366 exist, training has the conventions of the pipeline, and it is exported."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from torch import nn

from difflex import load
from difflex.errors import BadInput
from difflex.miniature import training
from difflex.miniature.__main__ import main as miniature_main
from difflex.miniature.drawing import draw
from difflex.miniature.exporting import generate_images, write_card
from difflex.miniature.flow import SIZES, CaptionTokens, FlowBatch, FlowRecipe, FlowSize, draw_latents, flow_loss
from difflex.miniature.learner import FlowLearner
from difflex.miniature.patches import PatchComponents, patch_vae, write_encoder
from difflex.miniature.sdxl import OBJECT_WEIGHT, PLACE_WEIGHT, MiniatureSdxlConfig
from difflex.miniature.training import TrainingFolder, train_flow
from difflex.miniature.world import SceneMix
from difflex.tensors import read_tensors

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")  # of diffusers
TINY = MiniatureSdxlConfig(widths=(8, 8, 16), text_width=16)
SHORT = FlowRecipe(length=6, batch=2, guided_from=0.5, one_step_from=0.7)
CPU = torch.device("cpu")


def untrained(config: MiniatureSdxlConfig = TINY) -> StableDiffusionXLPipeline:
    pipeline = config.pipeline(0)
    assert isinstance(pipeline, StableDiffusionXLPipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(autouse=True)
def tiny_size(monkeypatch):
    monkeypatch.setitem(SIZES, "tiny", FlowSize(config=TINY))


@pytest.fixture(scope="module")
def components():
    return PatchComponents.of(draw(torch.arange(64)).images * 2 - 1, TINY.patch, TINY.latents)


@pytest.fixture
def run(tmp_path: Path, components: PatchComponents) -> TrainingFolder:
    folder = TrainingFolder(tmp_path / "run")
    vae = patch_vae(TINY.patch, TINY.latents)
    write_encoder(vae, components)
    vae.save_pretrained(folder.autoencoder)
    return folder


def test_the_encoder_of_small_patches_computes_their_components(components):
    vae, drawn = patch_vae(TINY.patch, TINY.latents), draw(torch.arange(8)).images * 2 - 1
    write_encoder(vae, components)
    encoded = vae.encode(drawn, return_dict=False)[0].mode()
    assert encoded.shape == (8, 8, 32, 32)
    assert (encoded - components.encode(drawn)).abs().max() < 2e-3
    read = PatchComponents.of_encoder(vae)
    assert torch.equal(read.weights, components.weights) and torch.allclose(
        read.encode(drawn), components.encode(drawn), atol=1e-5
    )


@torch.no_grad()
def test_one_step_of_the_pipeline_begins_at_noise_alone_and_ends_at_what_training_predicts():
    pipeline, captions = untrained(), ["a red star", "two blue rings on grass"]
    model, noise = TINY.model(pipeline).eval(), torch.randn(2, 8, 32, 32, generator=torch.Generator().manual_seed(0))
    steps = {"num_inference_steps": 1, "guidance_scale": 0.0, "output_type": "latent", "return_dict": False}
    generated = torch.as_tensor(pipeline(captions, latents=noise.clone(), **steps)[0])
    latents = torch.randn(2, 1024, 8)
    noisy, target, time = model.problem(latents, noise.flatten(2).movedim(1, 2), torch.ones(2))
    velocity = model.velocity(noisy, time, *CaptionTokens(pipeline)(captions))
    assert torch.allclose(generated.flatten(2).movedim(1, 2), -velocity, atol=1e-2)  # in float32, at a noise of 4,096
    assert torch.allclose(target, -latents, atol=2e-3) and time.tolist() == [999, 999]


def test_a_model_draws_what_its_pipeline_draws():
    pipeline, captions = untrained(), ["a red star", "two blue rings on grass"]
    noise = torch.randn(2, 8, 32, 32, generator=torch.Generator().manual_seed(0))
    for steps in (1, 3, 4):
        drawn = TINY.model(pipeline).eval().draw(noise.flatten(2).movedim(1, 2), *CaptionTokens(pipeline)(captions), steps)
        options = {"num_inference_steps": steps, "guidance_scale": 0.0, "output_type": "latent", "return_dict": False}
        expected = torch.as_tensor(pipeline(captions, latents=noise.clone(), **options)[0])
        assert torch.allclose(drawn, expected.flatten(2).movedim(1, 2), atol=1e-2)


def test_noise_is_mixed_as_the_scheduler_of_the_pipeline_mixes_it():
    pipeline = untrained()
    model, latents, noise = TINY.model(pipeline), torch.randn(3, 1024, 8), torch.randn(3, 1024, 8)
    noisy, target, time = model.problem(latents, noise, torch.tensor([0.1, 0.5, 0.9]))
    pipeline.scheduler.set_timesteps(1000)
    added = pipeline.scheduler.add_noise(latents, noise, time.float())
    sigma = pipeline.scheduler.sigmas.flip(0)[1:][time][:, None, None]  # by rising timestep, without the last zero
    assert torch.allclose(noisy, added / (sigma**2 + 1).sqrt(), atol=1e-4)
    level = sigma / (1 + sigma)  # signal and noise of the same ratio in a rectified flow
    assert torch.allclose(level.flatten(), torch.tensor([0.1, 0.5, 0.9]), atol=0.02)
    assert torch.allclose(noisy - (sigma**2 + 1).sqrt() * latents, sigma * target, atol=1e-3)


def test_every_matrix_of_the_blocks_and_every_kernel_is_trained_by_muon_and_all_that_is_read_is_trained(components):
    pipeline = TINY.pipeline(0)
    model = TINY.model(pipeline)
    names = {name for name, x in model.named_parameters() if model.is_matrix(name, x)}
    assert "unet.down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_k.weight" in names
    assert "unet.up_blocks.1.resnets.0.conv1.weight" in names
    assert not [name for name in names if "emb" in name or "norm" in name or name.startswith(("clip", "unet.conv"))]
    ids = CaptionTokens(pipeline)(["a red star", "two blue rings on grass"])
    batch = FlowBatch(*draw_latents(torch.arange(2), SceneMix(), components, TINY), *ids, torch.rand(2), torch.randn(2, 1024, 8))
    flow_loss(model, batch, SHORT).backward()
    assert [name for name, x in model.named_parameters() if (x.grad is None) == x.requires_grad] == []


def test_a_model_in_training_starts_from_the_same_weights_whatever_was_drawn_before():
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(TINY.model(TINY.pipeline(0)))
    assert all(torch.equal(x, y) for x, y in zip(*(model.parameters() for model in models), strict=True))


def test_the_heads_learn_places_and_objects_within_a_few_updates():
    pipeline = TINY.pipeline(0)
    model, ids = TINY.model(pipeline), CaptionTokens(pipeline)(["a red star"] * 4)
    optimiser, generator = torch.optim.Adam(model.parameters(), lr=1e-2), torch.Generator().manual_seed(0)

    def loss() -> float:
        model.velocity(torch.randn(4, 1024, 8, generator=generator), torch.full((4,), 999), *ids)
        extra = torch.as_tensor(model.extra_loss(torch.zeros(4, 1024)))
        optimiser.zero_grad()
        extra.backward()
        optimiser.step()
        return extra.item()

    losses = [loss() for _ in range(40)]
    assert losses[0] > 0.9 * (PLACE_WEIGHT * math.log(8) + OBJECT_WEIGHT * math.log(2)) and losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
def test_a_training_that_stops_ends_with_the_same_bits(run, monkeypatch, tmp_path):
    train_flow(run, ["tiny"], SHORT, CPU)
    other = TrainingFolder(tmp_path / "other")
    shutil.copytree(run.autoencoder, other.autoencoder)
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    update = FlowLearner.update

    def interrupted(learner: FlowLearner, factor: float) -> None:
        if learner.optimiser.updates == 4:
            raise KeyboardInterrupt
        update(learner, factor)

    monkeypatch.setattr(FlowLearner, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_flow(other, ["tiny"], SHORT, CPU)
    monkeypatch.setattr(FlowLearner, "update", update)
    train_flow(other, ["tiny"], SHORT, CPU)
    first, second = (read_tensors(folder.flow, training.FORMAT, "").tensors for folder in (run, other))
    assert first.keys() == second.keys() and all(torch.equal(x, second[name]) for name, x in first.items())


def test_an_autoencoder_that_the_package_lacks_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(MiniatureSdxlConfig, "decoder_updates", 2)
    monkeypatch.setattr(training, "draw", lambda seeds: draw(seeds[:16]))
    monkeypatch.setattr(MiniatureSdxlConfig, "autoencoder", "mini-nothing")
    training.train(tmp_path, ["tiny"], FlowRecipe(length=1, batch=2), CPU)
    assert (tmp_path / "vae" / "config.json").is_file() and not (tmp_path / "judge.safetensors").exists()


def test_miniatures_of_different_latents_are_not_trained_together(run):
    with pytest.raises(BadInput, match="tiny, mini-flux take different latents"):
        train_flow(run, ["tiny", "mini-flux"], SHORT, CPU)


def test_an_exported_model_is_a_pipeline_that_difflex_loads(run, tmp_path, monkeypatch, capsys):
    train_flow(run, ["tiny"], SHORT, CPU)
    monkeypatch.setattr(sys, "argv", ["miniature", "export", str(run.folder), str(tmp_path / "models")])
    miniature_main()
    model = tmp_path / "models" / "tiny"
    settings = json.loads((model / "difflex.json").read_text())
    assert (settings["family"], settings["steps"], settings["guidance"]) == ("sdxl", 4, 0.0)
    pipeline = StableDiffusionXLPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    images = generate_images(pipeline, ["a red star"], steps=2)
    guided = generate_images(pipeline, ["a red star"], steps=2, guidance=2.0)
    assert images.shape == (1, 3, 64, 64) and not torch.equal(images, guided)
    loaded = load(model)
    sites = {row.site.path for row in loaded.sites()}
    assert {"down.2.1", "mid.0", "up.0.0", "up.0.1"} <= sites
    write_card(model, {"4 steps": {"all": {}, "unseen combinations": {"shape and colour": 0.9}}})
    card = (model / "README.md").read_text()
    assert "- One step: in 1 last updates 75% of a batch" in card
    assert "`StableDiffusionXLPipeline`" in card and "[8, 8, 16] channels" in card and "velocity prediction, in bfloat16" in card


def test_the_grid_at_the_four_sites_is_eight_by_eight():
    pipeline, grids = untrained(MiniatureSdxlConfig()), set[tuple[int, ...]]()
    unet = pipeline.unet
    blocks = (*unet.down_blocks[2].attentions, *unet.mid_block.attentions, *unet.up_blocks[0].attentions)
    for block in blocks:
        assert isinstance(block, nn.Module)
        block.register_forward_hook(lambda module, args, output: grids.add(tuple(output[0].shape[2:])))
    pipeline("a red star", num_inference_steps=1, guidance_scale=0.0)
    assert len(blocks) == 6 and grids == {(8, 8)}
