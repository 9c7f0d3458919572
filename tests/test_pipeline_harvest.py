from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import difflex
from difflex.errors import BadInput, NonFinite, OutOfMemory
from difflex.pipeline import Pipeline, loading
from difflex.pipeline.families import Family
from difflex.pipeline.harvesting import FiniteCheck, one_behind
from difflex.records import Activations, HookContext, Site
from difflex.testing import TINY, tiny_folder

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
PROMPTS = ["a red star", "a blue circle", "two green hearts"]


@pytest.fixture(scope="module", params=TINY)
def pipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return difflex.load(
        tiny_folder(request.param, tmp_path_factory.mktemp("models") / request.param, defaults={"pixels": [[16, 24]]})
    )


@pytest.fixture
def flux(tmp_path: Path) -> Pipeline:
    return difflex.load(tiny_folder("flux", tmp_path / "flux"))


def middle(pipe: Pipeline) -> Site:
    image_sites = [row.site for row in pipe.sites() if row.site.stream == "image"]
    return image_sites[len(image_sites) // 2]


def by_shot(harvested: list[Activations]) -> dict[tuple[str, int, float | None], Tensor]:
    return {
        (shot.prompt, shot.seed, shot.timestep): values
        for activations in harvested
        for shot, values in zip(activations.shots, activations.values, strict=True)
    }


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_harvest_yields_the_activations_that_a_hook_reads(pipe: Pipeline, guidance: float):
    site, read = middle(pipe), {}
    shots = list(pipe.shots(PROMPTS[:2], steps=2, guidance=guidance))

    def keep(x: Tensor, context: HookContext) -> None:
        if context.half != "unconditional":
            read.setdefault(context.timestep, x.clone())

    runs = list(pipe.shots(PROMPTS[:2], steps=2, keep_steps=[0], guidance=guidance))
    with pipe.at(site, keep):
        pipe.engine.run(runs, output_type="latent")
    for activations in pipe.harvest(shots, site, batch=2, progress=False):
        timesteps = {shot.timestep for shot in activations.shots}
        assert torch.equal(activations.values, read[timesteps.pop()]) and not timesteps
        assert [shot.prompt for shot in activations.shots] == PROMPTS[:2]


def test_the_batch_size_does_not_change_activations(pipe: Pipeline):
    shots = list(pipe.shots(PROMPTS, seeds=range(2), steps=2, keep_steps=[1]))
    single = by_shot(list(pipe.harvest(shots, middle(pipe), batch=1, progress=False)))
    batched = by_shot(list(pipe.harvest(shots, middle(pipe), batch=32, progress=False)))
    assert len(single) == 6 and single.keys() == batched.keys()
    for shot in single:
        torch.testing.assert_close(single[shot], batched[shot], rtol=1e-4, atol=1e-4)


def test_at_noise_level_one_the_image_does_not_matter(pipe: Pipeline):
    images = [Image.new("RGB", (24, 16), colour) for colour in ("red", "blue")]
    white, black = (
        next(pipe.harvest_images([image], noise=1.0, sites=middle(pipe), prompts=["a star"], progress=False)).values
        for image in images
    )
    clean = next(pipe.harvest_images(images[:1], noise=0.3, sites=middle(pipe), prompts=["a star"], progress=False)).values
    flow = pipe.engine.family.flow
    # The last level of a variance-preserving schedule still holds a trace of the image.
    assert torch.equal(white, black) if flow else torch.allclose(white, black, atol=0.2 * float(white.std()))
    assert not torch.allclose(clean, white, atol=0.2 * float(white.std()))


def test_noise_level_one_equals_the_first_step_of_a_flow_model(pipe: Pipeline):
    if not pipe.engine.family.flow or pipe.engine.family.name == "flux2-klein":
        pytest.skip("the first level is not pure noise, or depends on the number of steps")
    site = middle(pipe)
    shots = list(pipe.shots(["a star"], seeds=[7], steps=2, keep_steps=[0], guidance=0.0))
    generated = next(pipe.harvest(shots, site, progress=False))
    noised = next(
        pipe.harvest_images([Image.new("RGB", (24, 16))], noise=1.0, sites=site, prompts=["a star"], seed=7, progress=False)
    )
    assert generated.shots[0].timestep == noised.shots[0].timestep == 1000
    torch.testing.assert_close(noised.values, generated.values)
    assert noised.grid == generated.grid


def test_the_pass_stops_after_the_last_site(flux: Pipeline):
    called: list[str] = []
    for name in ("transformer_blocks.1", "single_transformer_blocks.0"):
        flux.engine.denoiser.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: called.append(name))
    shots = list(flux.shots(PROMPTS, steps=3, keep_steps=[0]))
    list(flux.harvest(shots, ["double.0", "double.1:text"], progress=False))
    assert called == ["transformer_blocks.1"]
    called.clear()
    list(flux.harvest(flux.shots(PROMPTS, steps=3, keep_steps=[1]), "double.1", progress=False))
    assert called == ["transformer_blocks.1", "single_transformer_blocks.0", "transformer_blocks.1"]


def test_many_sites_share_one_pass_and_are_yielded_in_order(flux: Pipeline):
    shots = list(flux.shots(PROMPTS, steps=2))
    harvested = list(flux.harvest(shots, ["double.*", "single.1:text", "double.0:neurons"], batch=2, progress=False))
    names = ["double.0", "double.1", "single.1:text", "double.0:neurons"]
    assert [str(activations.site) for activations in harvested] == names * 2 * 2  # two steps, two batches
    assert [len(activations.shots) for activations in harvested] == [2] * 8 + [1] * 8
    assert [activations.grid for activations in harvested[:3]] == [(8, 8), (8, 8), None]
    assert harvested[0].values.shape == (2, 64, 32)


def test_a_timestep_that_the_scheduler_repeats_is_kept_once(tmp_path: Path):
    pipe = difflex.load(tiny_folder("sd1", tmp_path / "sd1"))
    timesteps = pipe.engine.timesteps(next(pipe.shots([""], steps=4)))
    assert len(timesteps) == 5 and len(set(timesteps)) == 4
    shots = list(pipe.shots(["a star"], steps=4))
    harvested = list(pipe.harvest(shots, "mid.0", progress=False))
    assert [activations.shots[0] for activations in harvested] == shots and len(shots) == 4


def test_a_string_is_a_single_prompt_name_or_image(flux: Pipeline, tmp_path: Path):
    assert {shot.prompt for shot in flux.shots("a star")} == {"a star"}
    Image.new("RGB", (32, 32)).save(tmp_path / "black.png")
    path, images = str(tmp_path / "black.png"), [Image.new("RGB", (32, 32))] * 2
    [named] = flux.harvest_images(path, 0.5, "double.1", names="night", progress=False)
    [pair] = flux.harvest_images(images, 0.5, "double.1", prompts="a star", progress=False)
    assert [shot.image for shot in named.shots] == ["night"]
    assert [shot.prompt for shot in pair.shots] == ["a star"] * 2


@pytest.mark.parametrize("batch", [0, -1])
def test_a_batch_of_no_images_is_an_error(flux: Pipeline, batch: int):
    calls = (
        lambda: flux.generate("a star", batch=batch),
        lambda: flux.harvest(flux.shots("a star"), "double.1", batch),
        lambda: flux.harvest_images([Image.new("RGB", (32, 32))], 0.5, "double.1", batch=batch),
    )
    for call in calls:
        with pytest.raises(BadInput, match=f"batch of {batch} images"):
            call()


def test_harvesting_the_shot_of_an_image_is_an_error_that_says_how_to_do_it(flux: Pipeline):
    [activations] = flux.harvest_images(Image.new("RGB", (32, 32)), 0.5, "double.1", names="night", seed=3, progress=False)
    with pytest.raises(BadInput, match=r"'night' does not hold the image.*harvest_images, with noise=0\.5, seed=3"):
        list(flux.harvest(activations.shots, "double.1", progress=False))


def test_an_unknown_family_can_be_harvested_without_guidance_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loading, "family_of", lambda pipeline, denoiser: Family(name="other", denoiser=denoiser))
    pipe = difflex.load(tiny_folder("sd1", tmp_path / "sd1"))
    site = "unet.mid_block.attentions.0"
    activations = next(pipe.harvest(pipe.shots(PROMPTS, steps=1), site, progress=False))
    assert len(activations.values) == len(activations.shots) == 3
    with pytest.raises(BadInput, match=r"6 rows for 3 shots.*StableDiffusionPipeline has no row.*guidance=0"):
        list(pipe.harvest(pipe.shots(PROMPTS, steps=1, guidance=4.0), site, progress=False))
    with pytest.raises(BadInput, match="no row in the table of families"):
        next(pipe.harvest_images([Image.new("RGB", (32, 32))], 0.5, site, progress=False))


def test_a_shot_without_a_timestep_stands_for_its_whole_run(flux: Pipeline):
    shot = flux.generate("a red star", seed=3, steps=3)[0].shot
    harvested = list(flux.harvest([shot], "double.1", progress=False))
    assert [activations.shots[0].timestep for activations in harvested] == list(flux.engine.timesteps(shot))


def test_a_timestep_that_is_not_in_the_run_is_an_error(flux: Pipeline):
    from dataclasses import replace

    shot = next(flux.shots(PROMPTS, steps=2))
    with pytest.raises(BadInput, match=r"2 steps has no timestep 123.*1000, 500"):
        list(flux.harvest([replace(shot, timestep=123.0)], "double.1", progress=False))


def test_prompts_are_read_lazily(flux: Pipeline):
    read: list[int] = []

    def endless():
        while True:
            read.append(len(read))
            yield f"a star {len(read)}"

    harvested = flux.harvest(flux.shots(endless(), steps=1), "double.1", batch=2, progress=False)
    for _ in range(3):
        next(harvested)
    assert len(read) <= 2 * 8 + 1  # eight batches are encoded ahead where that is cheap


def test_each_prompt_is_encoded_once_over_all_its_seeds(flux: Pipeline):
    list(flux.harvest(flux.shots(PROMPTS, seeds=range(5), steps=2), "double.1", batch=4, progress=False))
    assert flux.engine.encoder.encoded == 3 + 1  # and the empty prompt, to learn the timesteps


def test_the_error_for_values_that_are_not_finite_names_site_shot_and_block(flux: Pipeline):
    flux.engine.denoiser.get_parameter("transformer_blocks.0.ff.net.2.bias").data[3] = float("inf")
    with pytest.raises(
        NonFinite, match=r"'single\.1'.*single_transformer_blocks\.1.*'a red star', seed 0.*first arise in .*blocks\.0"
    ):
        list(flux.harvest(flux.shots(PROMPTS, steps=1), "single.1", progress=False))


def test_a_batch_that_does_not_fit_is_halved_for_good(flux: Pipeline, monkeypatch: pytest.MonkeyPatch):
    batches = _with_room_for(flux, 3, monkeypatch)
    shots = list(flux.shots([f"a star {i}" for i in range(10)], steps=1))
    with pytest.warns(UserWarning, match="does not fit") as warned:
        harvested = list(flux.harvest(shots, "double.1", batch=8, progress=False))
    assert [str(warning.message)[:12] for warning in warned] == ["A batch of 8", "A batch of 4"]
    assert batches == [8, 4, 2, 2, 2, 2, 2]
    assert [shot for activations in harvested for shot in activations.shots] == shots
    list(flux.harvest(shots[:4], "double.1", batch=8, progress=False))
    assert batches[7:] == [2, 2]


def test_the_error_for_a_single_shot_that_does_not_fit_names_options(flux: Pipeline, monkeypatch: pytest.MonkeyPatch):
    shots = list(flux.shots(PROMPTS[:1], steps=1))
    _with_room_for(flux, 0, monkeypatch)
    with pytest.raises(OutOfMemory, match=r"nf4.*offload"):
        list(flux.harvest(shots, "double.1", progress=False))


def _with_room_for(pipe: Pipeline, room: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Simulate a GPU with memory for `room` shots; return the list to which the sizes of its batches are added."""
    sizes: list[int] = []
    block = pipe.engine.denoiser.get_submodule("transformer_blocks.0")

    def limit(_module: object, _args: object, kwargs: dict[str, Tensor]) -> None:
        sizes.append(len(kwargs["hidden_states"]))
        if sizes[-1] > room:
            raise torch.OutOfMemoryError("CUDA out of memory")

    block.register_forward_pre_hook(limit, with_kwargs=True)
    return sizes


def test_an_interrupted_run_does_not_affect_the_next_one(pipe: Pipeline):
    site, shots = middle(pipe), list(pipe.shots(PROMPTS[:1], steps=3, keep_steps=[0]))

    def interrupt(x: Tensor, context: HookContext) -> None:
        if context.step == 1:
            raise KeyboardInterrupt

    steps: list[int] = []
    with pytest.raises(KeyboardInterrupt), pipe.at(site, interrupt):
        pipe.engine.run(shots, output_type="latent")
    with pipe.at(site, lambda x, context: steps.append(context.step)):
        pipe.engine.run(shots, output_type="latent")
    halves = 2 if pipe.engine.is_guided(shots[0].guidance) else 1
    assert steps[::halves] == list(range(len(pipe.engine.timesteps(shots[0]))))


def test_the_shots_of_images_hold_name_noise_level_and_seed(flux: Pipeline, tmp_path: Path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    images = [tmp_path / "red.png", Image.new("RGB", (32, 32), "blue")]
    first, second = flux.harvest_images(images, noise=(0.9, 0.2), sites="double.1", seed=5, progress=False)
    assert [(s.noise, s.timestep) for s in (first.shots[0], second.shots[0])] == [(0.9, 900.0), (0.2, 200.0)]
    assert [shot.seed for shot in first.shots] == [5, 6] and first.shots[0].image == str(tmp_path / "red.png")
    assert first.shots[1].image is not None and first.shots[1].image.startswith("sha256:")


def test_unusable_images_are_errors(flux: Pipeline, tmp_path: Path):
    with pytest.raises(BadInput, match="30 x 32"):
        next(flux.harvest_images([Image.new("RGB", (32, 30))], noise=0.5, sites="double.1", progress=False))
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(BadInput, match=r"broken\.png"):
        next(flux.harvest_images([tmp_path / "broken.png"], noise=0.5, sites="double.1", progress=False))
    with pytest.raises(BadInput, match="between 0"):
        next(flux.harvest_images([], noise=1.5, sites="double.1", progress=False))
    with pytest.raises(BadInput, match="more images than prompts"):
        next(flux.harvest_images([Image.new("RGB", (32, 32))], noise=0.5, sites="double.1", prompts=[], progress=False))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_harvest_with_images_yields_the_same_activations_and_the_image_of_each_run(pipe: Pipeline, guidance: float):
    site, shots = middle(pipe), list(pipe.shots(PROMPTS, steps=2, guidance=guidance))
    plain = by_shot([*pipe.harvest(shots, site, batch=2, progress=False)])
    batches = [*pipe.harvest_with_images(shots, site, batch=2)]
    activations_by_shot = by_shot([activations for batch in batches for activations in batch.activations])
    assert activations_by_shot.keys() == plain.keys() and all(torch.equal(activations_by_shot[key], plain[key]) for key in plain)
    assert [len(batch.images) for batch in batches] == [2, 1]
    [alone] = pipe.generate(PROMPTS[2], steps=2, guidance=guidance)
    assert batches[1].images[0].tobytes() == alone.image.tobytes()


@pytest.mark.parametrize("may_wait", [True, False])
def test_the_next_batch_is_computed_before_one_that_may_wait_is_used(may_wait: bool):
    events: list[str] = []

    def batches() -> Iterator[int]:
        for number in range(3):
            events.append(f"compute {number}")
            yield number

    for number in one_behind(batches(), lambda _: may_wait):
        events.append(f"use {number}")
    waiting = ["compute 0", "compute 1", "use 0", "compute 2", "use 1", "use 2"]
    assert events == (waiting if may_wait else [f"{act} {number}" for number in range(3) for act in ("compute", "use")])


@pytest.mark.parametrize(("value", "passed"), [(1.0, True), (float("nan"), False), (float("inf"), False)])
def test_a_check_of_several_sites_finds_a_value_that_is_not_finite(value: float, passed: bool):
    assert FiniteCheck([torch.ones(2, 3, 4), torch.full((2, 1, 4), value)]).passed() is passed
