"""The training of the miniature: an exact encoder, the flow convention of the pipeline, resuming after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from difflex.errors import BrokenFile, StaleWork
from difflex.files import folder_lock
from difflex.miniature.__main__ import main as miniature_main
from difflex.miniature.architecture import MiniatureConfig, decoder_losses, untrained_pipeline, write_encoder
from difflex.miniature.captions import WORDS
from difflex.miniature.drawing import draw
from difflex.miniature.exporting import export, generate_images
from difflex.miniature.flow import (
    CaptionTokens,
    FlowModel,
    FlowRecipe,
    GuidanceTeacher,
    flow_losses,
    make_batch,
    noise_levels,
    rate_factor,
    train_update,
    training_batch,
)
from difflex.miniature.judge import Judge
from difflex.miniature.scoring import THRESHOLDS, examine, shortfalls
from difflex.miniature.training import FlowState, HeldOutLoss, TrainingFolder, fit_components, pack, train_flow
from difflex.tensors import write_tensors

# FLUX's query and key norms hold float32 weights, under autocast as in any mixed-precision training.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
TINY = MiniatureConfig(double_blocks=1, single_blocks=1, heads=1, head_width=16, rotary_axes=(4, 6, 6), text_width=16)
SHORT = FlowRecipe(updates=12, batch=4, guided_from=0.25)


@pytest.fixture(scope="module")
def components(tmp_path_factory):
    return fit_components(TrainingFolder(tmp_path_factory.mktemp("run")))


@pytest.fixture
def pipeline():
    return untrained_pipeline(TINY, seed=0)


def test_the_encoder_computes_the_components(pipeline, components):
    write_encoder(pipeline.vae, components)
    drawn = draw(torch.arange(8)).images * 2 - 1
    encoded = pipeline.vae.encode(drawn).latent_dist.mode()
    assert (encoded - components.encode(drawn)).abs().max() < 2e-3
    assert abs(encoded.std() - 1) < 0.1


def test_the_decoder_learns(pipeline, components):
    batches = iter([draw(torch.arange(2)).images * 2 - 1] * 20)
    errors = list(decoder_losses(pipeline.vae, components, batches, 20))
    assert errors[-1] < 0.5 * errors[0]


def test_every_known_word_is_one_token_for_both_encoders(pipeline):
    assert all(len(pipeline.tokenizer.tokenize(word)) == 1 for word in WORDS)
    assert all(len(pipeline.tokenizer_2.tokenize(word)) == 1 for word in WORDS)


def test_unknown_words_are_spelled(pipeline):
    assert len(pipeline.tokenizer.tokenize("zebra")) == 5
    assert pipeline.tokenizer_2.unk_token_id not in pipeline.tokenizer_2("zebra").input_ids


@torch.no_grad()
def test_training_uses_the_conventions_of_the_pipeline(pipeline):
    """One Euler step of the real pipeline is noise - velocity, with our ids, packing, texts and noise level."""
    captions = ["a red star", "two blue rings on grass"]
    noise = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    arguments = {"height": 64, "width": 64, "max_sequence_length": TINY.text_length, "guidance_scale": 0.0}
    latents = pipeline(captions, num_inference_steps=1, latents=noise, output_type="latent", **arguments).images
    velocity = FlowModel(pipeline).velocity(noise, torch.ones(2), *CaptionTokens(pipeline)(captions))
    assert torch.allclose(latents, noise - velocity, atol=1e-5)


def test_latents_are_packed_as_the_pipeline_packs_them(pipeline, components):
    scenes = draw(torch.arange(2))
    latents = components.encode(scenes.images * 2 - 1)
    packed = FluxPipeline._pack_latents(latents, 2, 16, 16, 16)
    assert torch.equal(make_batch(scenes, components, CaptionTokens(pipeline), scenes.captions).latents, packed)


def test_concept_targets_are_token_shares(pipeline, components):
    scenes = draw(torch.arange(5))
    batch = make_batch(scenes, components, CaptionTokens(pipeline), scenes.captions)
    assert torch.allclose(batch.concepts[:, :, 0], scenes.on_tokens("circle", 8).flatten(1))
    objects = torch.stack([(scenes.slots >= 0).float().mean((1, 2))] * 3, dim=1)
    groups = torch.stack([part.sum(2).mean(1) for part in batch.concepts.split([8, 10, 5], dim=2)], dim=1)
    assert torch.allclose(groups, objects, atol=1e-5)


def test_the_flow_is_learned(pipeline, components):
    recipe, scenes = FlowRecipe(), draw(torch.arange(8))
    state = FlowState(FlowModel(pipeline), recipe)
    batch = make_batch(scenes, components, CaptionTokens(pipeline), scenes.captions)
    history = [train_update(state.model, state.average, state.optimisers, batch, recipe, 300).flow for _ in range(30)]
    assert torch.stack(history[-5:]).mean() < 0.9 * torch.stack(history[:2]).mean()


def test_the_learning_rate_warms_up_and_ends_at_zero():
    recipe = FlowRecipe(updates=1000, decay_from=0.5)
    factors = [rate_factor(recipe, update) for update in range(1000)]
    assert factors[0] < 0.01 and factors[400] == 1 and factors[-1] < 1e-4
    assert factors[500:] == sorted(factors[500:], reverse=True)


def test_the_last_part_of_the_training_has_more_pairs_and_noise(components, pipeline):
    recipe = FlowRecipe(updates=100, batch=256, layout_from=0.5, layout_mix=(0.0, 1.0, 0.0), layout_level_mean=5.0)
    captions = {update: training_batch(update, recipe, components, CaptionTokens(pipeline)).concepts for update in (49, 50)}
    objects = {update: (shares[:, :, :10].sum(2).mean(1)).std() for update, shares in captions.items()}
    assert objects[50] < objects[49]  # the area of pairs varies less than that of singles, pairs and copies together
    levels = {update: noise_levels(256, recipe, torch.Generator().manual_seed(0), update) for update in (49, 50)}
    assert levels[49].median() < 0.85 < 0.98 < levels[50].median()


def test_the_teacher_returns_the_change_of_the_velocity_by_the_caption(pipeline, components):
    model, texts = FlowModel(pipeline), CaptionTokens(pipeline)
    guide = GuidanceTeacher(model, list(model.parameters()), texts)
    batch = make_batch(draw(torch.arange(2)), components, texts, ["", "a red star on grass"])
    noisy, level = torch.randn(batch.latents.shape), torch.full((2,), 0.9)
    effect = guide(noisy, level, batch.clip, batch.t5)
    empty = (ids.expand(2, -1) for ids in texts([""]))
    with torch.no_grad():
        expected = model.velocity(noisy, level, batch.clip, batch.t5) - model.velocity(noisy, level, *empty)
    assert torch.allclose(effect, expected, atol=1e-5)
    assert effect[0].abs().max() < 1e-5 < 1e-3 < effect[1].abs().max()


def test_guidance_moves_the_targets_along_the_effect(pipeline, components):
    batch = make_batch(draw(torch.arange(4)), components, CaptionTokens(pipeline), [""] * 4)
    model, recipe = FlowModel(pipeline), FlowRecipe(guidance=3.0, doubt=(-2.0, -1.0))
    loss = lambda guide: flow_losses(model, batch, recipe, torch.Generator().manual_seed(0), 0, guide).flow  # noqa: E731
    with torch.no_grad():
        plain, zero, moved = loss(None), loss(lambda x, *_: torch.zeros_like(x)), loss(lambda x, *_: torch.full_like(x, 10.0))
    assert torch.equal(plain, zero)
    assert abs(moved - plain - 400) < 40  # targets moved by (3 - 1) * 10 everywhere


def test_the_loss_with_a_wrong_word_is_measured_for_every_group(pipeline, components):
    held_out = HeldOutLoss(components, CaptionTokens(pipeline), scenes=64)
    model = FlowModel(pipeline)
    assert set(held_out.rises(model)) == {"background", "style", "colour", "size", "texture", "shape", "row", "column"}
    assert held_out.loss(model) == held_out.loss(model)


SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from difflex.miniature import training
from difflex.miniature.architecture import MiniatureConfig, untrained_pipeline
from difflex.miniature.flow import FlowRecipe
training.CHECKPOINT_SECONDS = 0.0
tiny = MiniatureConfig(double_blocks=1, single_blocks=1, heads=1, head_width=16, rotary_axes=(4, 6, 6), text_width=16)
recipe = FlowRecipe(updates=12, batch=4, guided_from=0.25)
training.train_flow(training.TrainingFolder(Path(sys.argv[1])), untrained_pipeline(tiny, 0), recipe, float("inf"))
"""


def test_a_killed_training_ends_with_the_same_bits(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    kill_after_a_checkpoint([sys.executable, "-c", SCRIPT, str(killed)], killed / "flow.safetensors")
    for folder in (whole, killed):
        train_flow(TrainingFolder(folder), untrained_pipeline(TINY, 0), SHORT, float("inf"))
    for name in ("flow.safetensors", "components.safetensors"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()


def kill_after_a_checkpoint(command: list[str], file: Path) -> None:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while not file.exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_entries_of_the_log_after_the_state_are_not_repeated(tmp_path, pipeline):
    run = TrainingFolder(tmp_path)
    state = FlowState(FlowModel(pipeline), SHORT)
    state.update = 12
    state.save(run.flow)
    run.log.write_text('{"update": 12, "flow": 1}\n{"update": 50, "flow": 2}\n{"update": 100, "fl')
    train_flow(run, pipeline, SHORT, float("inf"))
    assert run.log.read_text() == '{"update": 12, "flow": 1}\n'


@pytest.mark.parametrize("keep", [0, 100, -100])
def test_a_damaged_state_is_a_sentence_and_is_kept(tmp_path, pipeline, keep):
    run = TrainingFolder(tmp_path)
    FlowState(FlowModel(pipeline), SHORT).save(run.flow)
    damaged = run.flow.read_bytes()[:keep]
    run.flow.write_bytes(damaged)
    with pytest.raises(BrokenFile, match=r"flow\.safetensors .*Move it away to train this stage"):
        train_flow(run, pipeline, SHORT, float("inf"))
    assert run.flow.read_bytes() == damaged


def test_two_trainings_in_one_folder_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["miniature", "train", str(tmp_path)])
    with folder_lock(tmp_path), pytest.raises(SystemExit, match="2"):
        miniature_main()
    assert "Another process is writing" in capsys.readouterr().err


def test_another_recipe_does_not_continue_a_run(tmp_path, pipeline):
    run = TrainingFolder(tmp_path)
    FlowState(FlowModel(pipeline), SHORT).save(run.flow)
    with pytest.raises(StaleWork, match="batch"):
        train_flow(run, pipeline, FlowRecipe(updates=12, batch=8), float("inf"))


def test_changes_of_the_recipe_are_logged(tmp_path, pipeline):
    run = TrainingFolder(tmp_path)
    FlowState(FlowModel(pipeline), SHORT).save(run.flow)
    train_flow(run, pipeline, replace(SHORT, updates=1, level_mean=0.5), float("inf"))
    entries = [json.loads(line) for line in run.log.read_text().splitlines()]
    assert {"update": 0, "changed": "level_mean", "before": FlowRecipe().level_mean, "now": 0.5} in entries


def test_a_packed_run_is_small_and_continues(tmp_path, pipeline, components):
    run, packed = TrainingFolder(tmp_path), TrainingFolder(tmp_path / "packed")
    state = FlowState(FlowModel(pipeline), SHORT)
    batch = make_batch(draw(torch.arange(4)), components, CaptionTokens(pipeline), [""] * 4)
    train_update(state.model, state.average, state.optimisers, batch, SHORT, 0)
    state.update = 1
    state.save(run.flow)
    pack(run, packed)
    assert packed.flow.stat().st_size < 0.4 * run.flow.stat().st_size
    restored = FlowState(FlowModel(untrained_pipeline(TINY, 1)), SHORT)
    restored.restore(packed.flow)
    assert restored.update == 1
    for x, y in zip(state.model.parameters(), restored.model.parameters(), strict=True):
        assert torch.allclose(x, y, rtol=1e-2, atol=1e-3)
    train_update(restored.model, restored.average, restored.optimisers, batch, SHORT, 1)


def test_a_run_keeps_its_components(tmp_path):
    run = TrainingFolder(tmp_path)
    first = fit_components(run)
    changed = first._replace(weights=-first.weights)
    write_tensors(run.components, 1, changed._asdict())
    assert torch.equal(fit_components(run).weights, changed.weights)


def test_an_exported_model_is_a_diffusers_pipeline_folder(tmp_path, pipeline):
    run = TrainingFolder(tmp_path / "work")
    run.folder.mkdir()
    FlowState(FlowModel(pipeline), SHORT).save(run.flow)
    pipeline.vae.save_pretrained(run.autoencoder)
    exported = export(run, tmp_path / "model", TINY)
    assert not [path for path in (tmp_path / "model").rglob("*.json") if str(tmp_path) in path.read_text(encoding="utf-8")]
    again = FluxPipeline.from_pretrained(tmp_path / "model", dtype=torch.float32)
    first, second = (generate_images(p, ["a red star on grass"], steps=2) for p in (exported, again))
    assert torch.equal(first, second)
    assert first.shape == (1, 3, 64, 64)


def test_the_examination_has_all_rows_and_fails_noise():
    """With an untrained judge and noise most thresholds are missed; the rows are complete."""
    judge = Judge().eval()
    rows = examine(lambda captions: torch.rand(len(captions), 3, 64, 64), judge, captions=12)
    assert set(rows) == {"one object", "two different", "copies", "all", "unseen combinations"}
    assert len(shortfalls(rows)) >= len(THRESHOLDS) // 2


def test_the_command_prints_no_warning_of_missing_packages():
    process = subprocess.run([sys.executable, "-m", "difflex.miniature", "--help"], capture_output=True, text=True, check=True)
    assert process.stdout.startswith("usage: python -m difflex.miniature") and not process.stderr
