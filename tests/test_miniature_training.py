"""The training of the miniature: an exact encoder, the flow convention of the pipeline, resuming after a kill, devices."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline
from other_device import other_device
from torch import Tensor, nn

from difflex.errors import BrokenFile, NonFinite, StaleWork
from difflex.files import folder_lock
from difflex.miniature import flow, judge, learner, training
from difflex.miniature.__main__ import main as miniature_main
from difflex.miniature.architecture import FlowModel
from difflex.miniature.captions import WORDS
from difflex.miniature.drawing import draw
from difflex.miniature.exporting import TrainingRecord, write_card
from difflex.miniature.flow import (
    SIZES,
    CaptionIds,
    CaptionTokens,
    FlowBatch,
    FlowRecipe,
    FlowSize,
    GuidanceTeacher,
    OneStepTeacher,
    draw_latents,
    flow_loss,
)
from difflex.miniature.flux import MiniatureFluxConfig
from difflex.miniature.judge import Judge
from difflex.miniature.learner import FlowLearner, FlowOptimiser
from difflex.miniature.patches import PatchComponents, decoder_losses, write_encoder
from difflex.miniature.scoring import THRESHOLDS, examine, shortfalls
from difflex.miniature.training import CaptionChunks, ChunkPlan, FlowTraining, TrainingFolder, train_flow
from difflex.miniature.world import HELD_OUT_SEEDS, SHAPES, SceneMix
from difflex.tensors import read_tensors

# FLUX's query and key norms hold float32 weights, under autocast as in any mixed-precision training.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
TINY = MiniatureFluxConfig(double_blocks=1, single_blocks=1, heads=1, head_width=16, rotary_axes=(4, 6, 6), text_width=16)
SHORT = FlowRecipe(length=12, batch=4, guided_from=0.5, one_step_from=0.75)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tiny_size(monkeypatch):
    monkeypatch.setitem(SIZES, "tiny", FlowSize(config=TINY))


@pytest.fixture(scope="module")
def components():
    return PatchComponents.of(draw(torch.arange(128)).images * 2 - 1)


@pytest.fixture
def pipeline():
    return TINY.pipeline(0)


def filled_batch(scenes: int, components: PatchComponents, captions: list[str] | None = None) -> FlowBatch:
    drawn, generator = draw(torch.arange(scenes)), torch.Generator().manual_seed(0)
    ids = CaptionTokens(TINY.pipeline(0))(captions or drawn.captions)
    level, noise = torch.rand(scenes, generator=generator), torch.randn(scenes, 64, 64, generator=generator)
    return FlowBatch(*draw_latents(torch.arange(scenes), SceneMix(), components, TINY), *ids, level, noise)


def trained(folder: Path, recipe: FlowRecipe = SHORT, device: torch.device = CPU) -> dict[str, Tensor]:
    """Train the tiny size and return its state."""
    folder.mkdir(exist_ok=True)
    train_flow(TrainingFolder(folder), ["tiny"], recipe, device)
    return read_tensors(folder / "flow.safetensors", training.FORMAT, "").tensors


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(x, second[name]) for name, x in first.items())


def test_the_encoder_computes_the_components(pipeline, components):
    write_encoder(pipeline.vae, components)
    drawn = draw(torch.arange(8)).images * 2 - 1
    encoded = pipeline.vae.encode(drawn).latent_dist.mode()
    assert (encoded - components.encode(drawn)).abs().max() < 2e-3
    assert abs(encoded.std() - 1) < 0.1


def test_components_are_read_from_an_encoder(pipeline, components):
    write_encoder(pipeline.vae, components._replace(weights=-components.weights))
    read = PatchComponents.of_encoder(pipeline.vae)
    drawn = draw(torch.arange(4)).images * 2 - 1
    assert torch.equal(read.weights, -components.weights)
    assert torch.allclose(read.encode(drawn), -components.encode(drawn), atol=1e-5)


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


def test_long_captions_are_cut_as_the_tokenizers_cut_them(pipeline):
    caption = " ".join(WORDS[:40])
    for ids, tokenizer in zip(CaptionTokens(pipeline)([caption]), (pipeline.tokenizer, pipeline.tokenizer_2), strict=True):
        assert ids[0].tolist() == tokenizer(caption, truncation=True, max_length=tokenizer.model_max_length).input_ids


@torch.no_grad()
def test_training_uses_the_conventions_of_the_pipeline(pipeline):
    """One Euler step of the real pipeline is noise - velocity, with our ids, packing, texts and noise level."""
    captions = ["a red star", "two blue rings on grass"]
    noise = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    arguments = {"height": 64, "width": 64, "max_sequence_length": TINY.text_length, "guidance_scale": 0.0}
    latents = pipeline(captions, num_inference_steps=1, latents=noise, output_type="latent", **arguments).images
    velocity = TINY.model(pipeline).velocity(noise, torch.ones(2), *CaptionTokens(pipeline)(captions))
    assert torch.allclose(latents, noise - velocity, atol=1e-5)


def test_latents_are_packed_as_the_pipeline_packs_them(components):
    latents = components.encode(draw(torch.arange(2)).images * 2 - 1)
    packed = FluxPipeline._pack_latents(latents, 2, 16, 16, 16)
    assert torch.equal(draw_latents(torch.arange(2), SceneMix(), components, TINY).latents, packed)


def test_objects_are_the_shares_of_tokens_that_any_shape_covers(components):
    shares = torch.stack([draw(torch.arange(5)).on_tokens(shape, 8).flatten(1) for shape in SHAPES]).sum(0)
    assert torch.allclose(draw_latents(torch.arange(5), SceneMix(), components, TINY).objects, shares, atol=1e-6)


def test_the_flow_is_learned(components):
    model = FlowLearner("tiny", FlowRecipe(), filled_batch(8, components))
    model.prepare()
    history = []
    for _ in range(30):
        model.update(1.0)
        history.append(model.loss.item())
    assert sum(history[-5:]) / 5 < 0.9 * sum(history[:2]) / 2


def test_the_optimiser_computes_what_those_of_torch_compute():
    """Muon orthogonalises in bfloat16, and here in stacks."""
    model, other = (TINY.model(TINY.pipeline(0)) for _ in range(2))
    ours, generator = FlowOptimiser(model, FlowSize(config=TINY)), torch.Generator().manual_seed(0)
    matrix = lambda name, x: "transformer_blocks" in name and x.ndim == 2 and ".norm" not in name  # noqa: E731
    parts = [[x for name, x in other.named_parameters() if matrix(name, x) is side] for side in (True, False)]
    muon = torch.optim.Muon(parts[0], lr=5e-3, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(parts[1], lr=1.2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    start = [x.detach().clone() for x in model.parameters()]
    for _ in range(3):
        for x, y in zip(model.parameters(), other.parameters(), strict=True):
            x.grad = torch.randn(x.shape, generator=generator)
            y.grad = x.grad.clone()
        nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        ours.begin_update(1.0)
        ours.step()
        muon.step()
        adam.step()
    assert not any(x.grad.any() for x in model.parameters() if x.grad is not None)
    for (name, x), y, before in zip(model.named_parameters(), other.parameters(), start, strict=True):
        assert torch.allclose(x, y, atol=0.1 * (y - before).abs().max().item() if matrix(name, y) else 1e-6)


def test_the_learning_rate_warms_up_falls_and_begins_anew_with_guidance():
    recipe = FlowRecipe(length=10_000)
    factors = [recipe.rate_factor(recipe.progress(update, 0), update) for update in range(10_000)]
    assert factors[0] < 0.01 and factors[4000] == 1 and 0.02 <= factors[8999] < 0.021
    assert factors[5000:9000] == sorted(factors[5000:9000], reverse=True)
    assert factors[9000] == 0.12 and factors[-1] < 1e-4


def test_the_learning_rate_begins_anew_when_one_step_is_learned():
    recipe = FlowRecipe(length=10_000, guided_from=0.75, one_step_from=0.9)
    factors = [recipe.rate_factor(recipe.progress(update, 0), update) for update in range(10_000)]
    assert factors[7500] == 0.12 and factors[8999] < 1e-4 and factors[9000] == 0.25 and factors[-1] < 1e-4


def test_a_training_that_runs_over_its_minutes_does_not_begin_a_part_that_it_does_not_have():
    recipe = FlowRecipe(length=7, unit="minutes")
    progress = recipe.progress(10, 60 * 7.01)
    assert progress > 1 and not recipe.is_one_step(progress) and recipe.rate_factor(progress, 10) == 0


def test_the_last_part_of_the_training_has_more_pairs_and_noise():
    recipe = FlowRecipe(batch=512, mixes=((1, 0, 0), (0, 1, 0)), levels=((0, 0.1), (5, 0.1)), drop_caption=0.0)
    assert [recipe.trains_layout(x) for x in (0.62, 0.64)] == [False, True]
    state = FlowTraining(["tiny"], replace(recipe, batch=4), CPU)
    for layout, level in ((False, 0.5), (True, 0.993)):
        plan = ChunkPlan(3, 1, layout)
        _, ids = CaptionChunks(replace(recipe, batch=4), state.tokenize)[plan]
        assert torch.equal(ids.text, state.tokenize(draw(plan.seeds(state._recipe), plan.mix(recipe)).captions).text)
        state._load((*state.batch[:4],), layout)
        assert abs(state.batch.level.mean() - level) < 0.05


def test_scenes_do_not_depend_on_how_many_updates_are_drawn_together():
    state = FlowTraining(["tiny"], SHORT, CPU)
    plans = {together: [*state.chunks(together)] for together in (1, 8)}
    first, second = (torch.cat([plan.seeds(SHORT) for plan in each]) for each in plans.values())
    assert torch.equal(first, second) and len(first.unique()) == 12 * 4
    assert [plan.updates for plan in plans[8]] == [8, 4]


@pytest.mark.parametrize("seed", [-1, 300, 10**12])
def test_no_seed_of_a_training_draws_scenes_that_are_held_out(seed):
    seeds = ChunkPlan(5, 8, True).seeds(FlowRecipe(seed=seed))
    assert seeds.min() >= 0 and seeds.max() < HELD_OUT_SEEDS


def test_a_tenth_of_the_captions_is_empty():
    recipe = FlowRecipe(batch=2000)
    tokenize = CaptionTokens(TINY.pipeline(0))
    _, ids = CaptionChunks(recipe, tokenize)[ChunkPlan(0, 1, False)]
    assert 0.08 < (ids.text == tokenize([""]).text).all(1).float().mean() < 0.12


def test_the_teacher_returns_the_change_of_the_velocity_by_the_caption(pipeline, components):
    model, empty = TINY.model(pipeline), CaptionTokens(pipeline)([""])
    batch = filled_batch(2, components, ["", "a red star on grass"])
    effect = GuidanceTeacher(model, empty).effect(batch.noise, batch.level, batch.text, batch.text_2)
    with torch.no_grad():
        captioned = model.velocity(batch.noise, batch.level, batch.text, batch.text_2)
        plain = model.velocity(batch.noise, batch.level, *(ids.expand(2, -1) for ids in empty))
    assert torch.allclose(effect, captioned - plain, atol=1e-5)
    assert effect[0].abs().max() < 1e-5 < 1e-3 < effect[1].abs().max()


def test_guidance_moves_the_targets_along_the_effect(pipeline, components, monkeypatch):
    batch, recipe = filled_batch(4, components), FlowRecipe(guidance=3.0, doubt=(-2.0, -1.0))
    teacher, model = GuidanceTeacher(TINY.model(TINY.pipeline(0)), CaptionTokens(pipeline)([""])), TINY.model(pipeline)
    with torch.no_grad():
        plain = flow_loss(model, batch, recipe)
        monkeypatch.setattr(GuidanceTeacher, "effect", lambda self, x, *_: torch.full_like(x, 10.0))
        moved = flow_loss(model, batch, recipe, teacher)
    assert abs(moved - plain - 400) < 40  # targets moved by (3 - 1) * 10 everywhere


def test_one_step_is_taught_what_the_model_draws_in_several(pipeline, components):
    batch, recipe = filled_batch(4, components), FlowRecipe()
    model, former = TINY.model(pipeline), TINY.model(TINY.pipeline(1))
    teacher = OneStepTeacher(former)
    taught = teacher.batch(batch, recipe)
    assert taught.level.tolist() == [1, 1, 1, batch.level[3].item()] and torch.equal(taught.latents[3], batch.latents[3])
    drawn = former.draw(batch.noise, batch.text, batch.text_2, 4)
    assert torch.allclose(taught.latents[:3], drawn[:3], atol=1e-5)
    problem = model.problem(taught.latents, taught.noise, taught.level)
    target = teacher.target(problem, taught, recipe)
    assert torch.equal(problem.noisy[:3], batch.noise[:3])
    assert torch.allclose(target[:3], batch.noise[:3] - drawn[:3], atol=1e-5)
    with torch.no_grad():
        velocity = former.velocity(problem.noisy, problem.time, batch.text, batch.text_2)
    assert torch.allclose(target[3], velocity[3], atol=1e-5)


def test_a_model_draws_what_its_pipeline_draws(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    model, captions, noise = TINY.model(pipeline), ["a red star", ""], torch.randn(2, 64, 64)
    for steps in (1, 3):
        drawn = model.draw(noise, *CaptionTokens(pipeline)(captions), steps)
        options = {"height": 64, "width": 64, "max_sequence_length": 26, "guidance_scale": 0.0, "output_type": "latent"}
        expected = pipeline(captions, latents=noise.clone(), num_inference_steps=steps, return_dict=False, **options)[0]
        assert torch.allclose(drawn, expected, atol=1e-4)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The state of a whole training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "tiny", FlowSize(config=TINY))
        return trained(tmp_path_factory.mktemp("whole"))


def test_each_part_begins_from_the_average(whole):
    start = [x.detach() for x in TINY.model(TINY.pipeline(0)).parameters()]
    moved = {
        kind: sum((whole[f"tiny.{kind}.{i}"] - x).square().sum() for i, x in enumerate(start))
        for kind in ("base", "guided", "average")
    }
    assert 0 < moved["base"] < moved["guided"] != moved["average"]


SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from difflex.miniature import training
from difflex.miniature.flow import SIZES, FlowRecipe, FlowSize
from difflex.miniature.flux import MiniatureFluxConfig
training.CHECKPOINT_SECONDS = 0.0
tiny = MiniatureFluxConfig(double_blocks=1, single_blocks=1, heads=1, head_width=16, rotary_axes=(4, 6, 6), text_width=16)
SIZES["tiny"] = FlowSize(config=tiny)
recipe = FlowRecipe(length=12, batch=4, guided_from=0.5, one_step_from=0.75)
training.train_flow(training.TrainingFolder(Path(sys.argv[1])), ["tiny"], recipe, torch.device("cpu"))
"""


def test_a_killed_training_ends_with_the_same_bits(tmp_path, whole):
    killed = tmp_path / "killed"
    killed.mkdir()
    kill_after_a_checkpoint([sys.executable, "-c", SCRIPT, str(killed)], killed / "flow.safetensors")
    assert 0 < read_tensors(killed / "flow.safetensors", training.FORMAT, "").header["updates"] < 12
    assert_equal(trained(killed), whole)


def kill_after_a_checkpoint(command: list[str], file: Path) -> None:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while not file.exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("last", [8, 11])
def test_a_training_that_stops_in_a_later_part_ends_with_the_same_bits(tmp_path, monkeypatch, whole, last):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    losses = FlowTraining.losses

    def interrupted(state: FlowTraining) -> dict[str, float]:
        if state.updates == last:
            raise KeyboardInterrupt
        return losses(state)

    monkeypatch.setattr(FlowTraining, "losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "stopped")
    monkeypatch.setattr(FlowTraining, "losses", losses)
    assert_equal(trained(tmp_path / "stopped"), whole)


def test_a_training_by_minutes_goes_on_with_the_time_already_spent(tmp_path, monkeypatch):
    """By a clock that moves one second whenever it is read."""
    clock = count()
    monkeypatch.setattr(training.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    losses, recipe = FlowTraining.losses, replace(SHORT, length=2, unit="minutes")

    def interrupted(state: FlowTraining) -> dict[str, float]:
        if state.updates == 3:
            raise KeyboardInterrupt
        return losses(state)

    monkeypatch.setattr(FlowTraining, "losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, recipe)
    before = read_tensors(tmp_path / "flow.safetensors", training.FORMAT, "").header
    monkeypatch.setattr(FlowTraining, "losses", losses)
    for _ in range(1000):  # the time between the two does not count
        next(clock)
    trained(tmp_path, recipe)
    after = read_tensors(tmp_path / "flow.safetensors", training.FORMAT, "").header
    assert before["updates"] == 2 and 0 < before["seconds"] < 60
    assert before["updates"] < after["plain_updates"] < after["updates"] < 40
    assert 110 <= after["seconds"] < 150


def test_an_update_that_cannot_be_captured_is_computed_in_another_way(components, monkeypatch, capsys):
    """The fallbacks of a GPU, with a stand-in for its graphs."""
    model = FlowLearner("tiny", SHORT, filled_batch(2, components))
    before = {name: x.clone() for name, x in model.state().items()}
    monkeypatch.setattr(model, "_device", torch.device("cuda"))
    monkeypatch.setattr(learner.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(nn.Module, "compile", lambda block, dynamic: (_ for _ in ()).throw(RuntimeError("no compiler")))
    monkeypatch.setattr(learner, "capture", lambda update: update)
    assert model.prepare() == "captured" and model.prepare() is None
    monkeypatch.setattr(learner, "capture", lambda update: lambda: model.loss.fill_(9.0))
    model._update = None
    assert model.prepare() == "eager"
    assert "cannot be compiled: no compiler" in (printed := capsys.readouterr().out) and "loss is 9.0000" in printed
    assert_equal(model.state(), before)
    assert model.optimiser.updates == 0


def test_training_on_another_device_has_the_same_results(tmp_path, monkeypatch):
    """All but the backward pass and mixed precision, which the pretended device lacks: gradients are made up."""

    def loss_with_gradients(model: FlowModel, *rest: object) -> Tensor:
        with torch.no_grad():
            loss = flow_loss(model, *rest)  # pyright: ignore[reportArgumentType]
        for parameter in model.parameters():
            parameter.grad = parameter.detach() * loss
        return loss

    monkeypatch.setattr(learner, "flow_loss", loss_with_gradients)
    monkeypatch.setattr(Tensor, "backward", lambda loss: None)
    monkeypatch.setattr(flow, "_mixed_precision", lambda device: nullcontext())
    recipe = replace(SHORT, length=4, batch=2)
    expected = trained(tmp_path / "cpu", recipe)
    with other_device() as device:
        results = trained(tmp_path / "other", recipe, device)
    assert results.keys() == expected.keys()
    assert all(torch.allclose(x, expected[name], atol=1e-5) for name, x in results.items())


def test_an_update_reads_no_value_and_stays_on_its_device():
    """So that a CUDA graph can hold it: tensors on `meta` have no values, and mix with no others."""
    batch = FlowBatch.empty(2, TINY, (32, TINY.text_length), torch.device("meta"))
    model = FlowLearner("tiny", SHORT, batch)
    for is_guided in (False, True):
        if is_guided:
            model.begin_guidance(CaptionIds(batch.text[:1], batch.text_2[:1]))
        model.prepare()
        model.update(1.0)
    assert {x.device.type for x in model.state().values()} == {"meta"}


@pytest.mark.gpu
def test_a_gpu_trains_with_captured_updates_and_goes_on(tmp_path, capsys):
    run, recipe = TrainingFolder(tmp_path), replace(SHORT, length=48, batch=16)
    train_flow(run, ["tiny", "mini-flux-small"], recipe, torch.device("cuda"), workers=2)
    assert "eager" not in capsys.readouterr().out
    assert read_tensors(run.flow, training.FORMAT, "").header["updates"] == 48


def test_entries_of_the_log_after_the_state_are_not_repeated(tmp_path):
    run, state = TrainingFolder(tmp_path), FlowTraining(["tiny"], SHORT, CPU)
    state.updates = state.plain_updates = 12
    state.save(run.flow)
    run.log.write_text('{"update": 12, "loss": 1}\n{"update": 50, "loss": 2}\n{"update": 100, "lo')
    trained(tmp_path)
    assert run.log.read_text() == '{"update": 12, "loss": 1}\n'


@pytest.mark.parametrize("keep", [0, 100, -100])
def test_a_damaged_state_is_a_sentence_and_is_kept(tmp_path, keep):
    run = TrainingFolder(tmp_path)
    FlowTraining(["tiny"], SHORT, CPU).save(run.flow)
    damaged = run.flow.read_bytes()[:keep]
    run.flow.write_bytes(damaged)
    with pytest.raises(BrokenFile, match=r"flow\.safetensors .*Move it away to train"):
        trained(tmp_path)
    assert run.flow.read_bytes() == damaged


def test_two_trainings_in_one_folder_are_refused(tmp_path, monkeypatch, capsys):
    with folder_lock(tmp_path), pytest.raises(SystemExit, match="2"):
        command(monkeypatch, "train", tmp_path, "--device", "cpu")
    assert "Another process is writing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sizes", "recipe"), [(["tiny"], replace(SHORT, batch=8)), (["tiny"], replace(SHORT, length=24)), (["tiny", "tiny"], SHORT)]
)
def test_other_settings_do_not_continue_a_run(tmp_path, sizes, recipe):
    run = TrainingFolder(tmp_path)
    FlowTraining(["tiny"], SHORT, CPU).save(run.flow)
    with pytest.raises(StaleWork, match="other settings"):
        train_flow(run, sizes, recipe, CPU)


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    state = FlowTraining(["tiny"], SHORT, CPU)
    state.learners[0].loss.fill_(torch.nan)
    with pytest.raises(NonFinite, match="not finite after 0 updates"):
        state.save(tmp_path / "flow.safetensors")
    assert not [*tmp_path.iterdir()]


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    """Run `python -m difflex.miniature` with these words."""
    monkeypatch.setattr(sys, "argv", ["miniature", *map(str, words)])
    miniature_main()


def test_the_commands_train_export_and_describe_a_model(tmp_path, monkeypatch, capsys):
    run, models = tmp_path / "run", tmp_path / "models"
    flags = ["--sizes", "tiny", "--updates", 20, "--batch", 2, "--device", "cpu", "--threads", 1]
    command(monkeypatch, "train", run, *flags)
    command(monkeypatch, "export", run, models)
    assert {path.name for path in models.iterdir()} == {"tiny", "tiny-base"}
    assert not [path for path in models.rglob("*.json") if str(tmp_path) in path.read_text(encoding="utf-8")]
    settings = json.loads((models / "tiny-base" / "difflex.json").read_text())
    assert (settings["name"], settings["steps"], settings["guidance"]) == ("tiny-base", 20, 1.75)
    embeddings = []
    for name, updates in (("tiny", 2), ("tiny-base", 0)):
        assert TrainingRecord.load(models / name).guided_updates == updates
        pipeline = FluxPipeline.from_pretrained(models / name, dtype=torch.float32)
        embeddings.append(pipeline.text_encoder.get_input_embeddings().weight)
        write_card(models / name, {"4 steps": {"all": {"count": 0.5}, "unseen combinations": {"shape and colour": 0.5}}})
    assert not torch.equal(*embeddings)
    folded, base = ((models / name / "README.md").read_text() for name in ("tiny", "tiny-base"))
    assert "40 scenes drawn" in folded and "18 updates of 2 scenes" in " ".join(folded.split()) and "in 2 more updates" in folded
    assert "36 scenes drawn" in base and "unlike in `tiny`, which was trained further from these weights" in base
    assert "- 4 steps: count 50.0% is under 85%.\n" in folded
    command(monkeypatch, "examine", models / "tiny-base", "--captions", 6, "--steps", 1, "--guidance", 1.75)
    assert "true drawings" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["train", "run", "--updates", "0"], "'0' is not a whole number from 1 on"),
        (["train", "run", "--minutes", "nan"], "'nan' is not a number from 0.01 on"),
        (["train", "run", "--updates", "9", "--minutes", "1"], "not allowed with"),
        (["train", "run", "--sizes", "huge"], "invalid choice: 'huge'"),
        (["train", "run", "--device", "toaster"], "The device 'toaster' does not exist"),
        (["examine", "no-model"], "no-model is neither a pipeline folder nor an embedded model"),
        (["export", "no-run", "models"], "is missing"),
        (["card", "no-model"], "training.json is missing"),
    ],
)
def test_wrong_words_of_a_command_are_explained(tmp_path, monkeypatch, capsys, words, complaint):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch, *words)
    assert complaint in capsys.readouterr().err and not [*tmp_path.iterdir()]


def test_a_card_tells_what_a_record_adds(tmp_path, pipeline):
    model = tmp_path / "other"
    pipeline.save_pretrained(model)
    record = {"made_by": "A script", "machine": "a GPU", "seconds": 415.0, "updates": 10, "guided_updates": 2}
    record |= {"sizes": ["other", "small"], "muon_rate": 5e-3, "adam_rate": 1e-3, "notes": ["It differs."]}
    TrainingRecord(**record, recipe=vars(FlowRecipe())).save(model)
    write_card(model, {"4 steps": {"all": {}, "unseen combinations": {"shape and colour": 0.9}}})
    card = (model / "README.md").read_text()
    assert "- A script: 6.9 minutes on a GPU, together with `small` on the same scenes.\n" in card and "\n- It differs.\n" in card


def test_the_embedded_autoencoder_is_used_unless_the_run_has_its_own(tmp_path, pipeline):
    run = TrainingFolder(tmp_path)
    assert isinstance(run.load_autoencoder(TINY), AutoencoderKL)
    pipeline.vae.save_pretrained(run.autoencoder)
    assert torch.equal(run.load_autoencoder(TINY).decoder.conv_in.weight, pipeline.vae.decoder.conv_in.weight)


def test_a_training_from_scratch_makes_its_own_judge_and_autoencoder(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "JUDGE_UPDATES", 3)
    monkeypatch.setattr(MiniatureFluxConfig, "decoder_updates", 3)
    for module in (training, judge):
        monkeypatch.setattr(module, "draw", lambda seeds: draw(seeds[:16]))
    recipe = replace(SHORT, length=2)
    training.train(tmp_path / "own", ["tiny"], recipe, CPU, from_scratch=True)
    assert {path.name for path in (tmp_path / "own").iterdir()} >= {"judge.safetensors", "vae", "flow.safetensors", "log.jsonl"}
    training.train(tmp_path / "other", ["tiny"], recipe, CPU)
    with pytest.raises(StaleWork, match="autoencoder of the package"):
        training.train(tmp_path / "other", ["tiny"], recipe, CPU, from_scratch=True)


def test_the_examination_has_all_rows_and_fails_noise():
    """With an untrained judge and noise most thresholds are missed; the rows are complete."""
    rows = examine(lambda captions: torch.rand(len(captions), 3, 64, 64), Judge().eval(), captions=12)
    assert set(rows) == {"one object", "two different", "copies", "all", "unseen combinations"}
    assert len(shortfalls(rows)) >= len(THRESHOLDS) // 2


def test_the_command_prints_no_warning_of_missing_packages():
    process = subprocess.run([sys.executable, "-m", "difflex.miniature", "--help"], capture_output=True, text=True, check=True)
    assert process.stdout.startswith("usage: python -m difflex.miniature") and not process.stderr
