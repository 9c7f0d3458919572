from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from functools import lru_cache
from typing import Any, cast

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

import difflex
from difflex.errors import BadInput, DifflexError, NonFinite, UnknownName
from difflex.pipeline import Pipeline, loading
from difflex.pipeline.calls import DenoiserCall
from difflex.pipeline.families import Family
from difflex.pipeline.profile import SiteRow
from difflex.pipeline.sites import apply_at_site
from difflex.records import HookContext, Site
from difflex.testing import TINY, tiny_folder

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
STEPS, PROMPTS = 2, ["a red star", "a blue circle"]


@pytest.fixture(scope="module", params=TINY)
def pipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    folder = tiny_folder(request.param, tmp_path_factory.mktemp("models") / request.param, defaults={"pixels": [[16, 24]]})
    yield difflex.load(folder)


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return difflex.load(tiny_folder("flux", tmp_path_factory.mktemp("models") / "flux"))


@lru_cache(1)
def rows_of(pipe: Pipeline) -> list[SiteRow]:
    """The table of sites, which a call of a copy of the model makes."""
    return pipe.sites()


def all_sites(pipe: Pipeline) -> list[Site]:
    return [
        Site(row.site.path, kind, row.site.stream, smooth)
        for row in rows_of(pipe)
        for kind in row.kinds
        for smooth in ((False, True) if row.site.stream == "image" else (False,))
    ]


def latents(pipe: Pipeline, guidance: float = 1.0) -> Tensor:
    """The last latents of a run of two prompts."""
    shots = list(pipe.shots(PROMPTS, steps=STEPS, keep_steps=[0], guidance=guidance))
    output = pipe.engine.run(shots, output_type="latent")
    assert isinstance(output, Tensor)
    return output


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_writing_back_what_was_read_at_every_site_changes_no_bit(pipe: Pipeline, guidance: float):
    plain = latents(pipe, guidance)
    with ExitStack() as stack:
        for site in all_sites(pipe):
            stack.enter_context(pipe.at(site, lambda x, context: x.clone()))
        assert torch.equal(latents(pipe, guidance), plain)


def test_writing_at_any_site_changes_the_image(pipe: Pipeline):
    plain, sites = latents(pipe), all_sites(pipe)
    for site in sites[:: max(1, len(sites) // 12)]:
        # Nothing reads the text of the last single block.
        dead = site.path == "single.2" and site.stream == "text"
        with pipe.at(site, lambda x, context: x + 1):
            assert torch.equal(latents(pipe), plain) == dead, site


def test_the_table_of_sites_has_the_shapes_of_activations(pipe: Pipeline):
    rows, shapes = rows_of(pipe), {}
    assert len(rows) >= 3
    with ExitStack() as stack:
        for site in all_sites(pipe):
            stack.enter_context(pipe.at(site, lambda x, context, site=site: shapes.update({site: tuple(x.shape)})))
        latents(pipe)
    for row in rows:
        for kind in row.kinds:
            width = row.neurons if kind == "neurons" else row.width
            assert shapes[Site(row.site.path, kind, row.site.stream)] == (2, row.tokens, width)


def test_smooth_tokens_are_averaged_with_their_surroundings_and_a_change_of_them_is_added_to_the_tokens(flux: Pipeline):
    shots = list(flux.shots(PROMPTS, steps=1, pixels=(16, 24)))
    [plain, smooth] = flux.harvest(shots, ["double.1", "double.1:smooth"], progress=False)
    assert smooth.site == Site("double.1", smooth=True) == Site.parse("double.1:smooth") and plain.grid is not None
    rows, columns = plain.grid
    image = plain.values.view(len(shots), rows, columns, -1)
    for row in range(rows):
        for column in range(columns):
            around = image[:, max(0, row - 1) : row + 2, max(0, column - 1) : column + 2].flatten(1, 2).mean(1)
            token = smooth.values[:, row * columns + column]
            expected = image[:, row, column] / 4 + around / 2 + image.mean((1, 2)) / 4
            torch.testing.assert_close(token, expected, rtol=1e-5, atol=1e-5)
    change = torch.zeros_like(plain.values)
    change[:, 3] = 1.0
    with flux.at("double.1:smooth", lambda x, context: x + change):
        [changed] = flux.harvest(shots, ["double.1"], progress=False)
    torch.testing.assert_close(changed.values, plain.values + change, rtol=1e-5, atol=1e-5)
    with pytest.raises(BadInput, match="text tokens have no neighbours"):
        flux.site("double.1:text:smooth")


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_context_holds_step_timestep_half_and_shots(pipe: Pipeline, guidance: float):
    contexts: list[HookContext] = []
    site = rows_of(pipe)[0].site
    timesteps = pipe.engine.timesteps(next(pipe.shots([""], steps=STEPS, keep_steps=[0])))
    with pipe.at(site, lambda x, context: contexts.append(context)):
        latents(pipe, guidance)
    guided = pipe.engine.is_guided(guidance)
    calls = len(contexts) // 2 if guided else len(contexts)
    assert [context.step for context in contexts[:: 2 if guided else 1]] == list(range(calls))
    assert [context.timestep for context in contexts[:: 2 if guided else 1]] == list(timesteps)
    assert {context.half for context in contexts} == ({"conditional", "unconditional"} if guided else {None})
    assert all(context.shots is not None and [shot.prompt for shot in context.shots] == PROMPTS for context in contexts)


def test_the_conditional_half_equals_a_run_without_guidance(pipe: Pipeline):
    if not pipe.engine.is_guided(4.0):
        pytest.skip("guidance is folded into this model")
    site = [row.site for row in rows_of(pipe) if row.site.stream == "image"][-1]
    activations: dict[str | None, Tensor] = {}

    def keep(x: Tensor, context: HookContext) -> None:
        if context.step == 0:
            activations[context.half] = x.clone()

    with pipe.at(site, keep):
        latents(pipe, 4.0)
        latents(pipe)
    torch.testing.assert_close(activations["conditional"], activations[None], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(activations["unconditional"], activations[None], rtol=1e-4, atol=1e-5)


def test_a_function_can_be_limited_to_one_half(pipe: Pipeline):
    if not pipe.engine.is_guided(4.0):
        pytest.skip("guidance is folded into this model")
    halves: list[str | None] = []
    with pipe.at(rows_of(pipe)[0].site, lambda x, context: halves.append(context.half), half="conditional"):
        latents(pipe, 4.0)
    assert set(halves) == {"conditional"}


def test_the_grid_matches_the_number_of_tokens(pipe: Pipeline):
    grids: dict[Site, tuple[int, int] | None] = {}
    with ExitStack() as stack:
        for row in rows_of(pipe):
            stack.enter_context(pipe.at(row.site, lambda x, context, site=row.site: grids.update({site: context.grid})))
        latents(pipe)
    for row in rows_of(pipe):
        grid = grids[row.site]
        assert grid is None if row.site.stream == "text" else grid is not None and grid[0] * grid[1] == row.tokens
    assert grids[rows_of(pipe)[0].site] in ((4, 6), (8, 12))  # 16 x 24 pixels, 4 or 2 of them a token


def test_a_full_module_path_is_a_site(pipe: Pipeline):
    row, paths = rows_of(pipe)[0], [name for name, _ in pipe.engine.denoiser.named_modules()]
    assert pipe.site(row.path) == row.site
    inner = next(path for path in paths if path.endswith((".to_q", ".linear_in")))
    activations: list[Tensor] = []
    with pipe.at(inner, lambda x, context: activations.append(x.clone())):
        latents(pipe)
    assert activations[0].shape[0] == 2 and pipe.site(inner).path == inner


def test_the_error_for_an_unknown_site_shows_the_nearest(flux: Pipeline):
    with pytest.raises(UnknownName, match=r"nearest: single\.2"):
        flux.site("single.22")
    with pytest.raises(UnknownName, match=r"doubel\.\*.*double\.1"):
        list(flux.harvest([], "doubel.*"))


def test_a_kind_or_stream_that_a_block_lacks_is_an_error(tmp_path_factory: pytest.TempPathFactory):
    pipe = difflex.load(tiny_folder("sdxl", tmp_path_factory.mktemp("models") / "sdxl"))
    with pytest.raises(BadInput, match=r"down\.2\.1\.0:neurons"):
        pipe.site("down.2.1:neurons")
    with pytest.raises(BadInput, match="no text stream"):
        pipe.site("mid.0:text")


def test_wildcards_stand_for_one_index(flux: Pipeline):
    names = lambda pattern: [str(located.site) for located in flux.engine.sites.expand([pattern])]  # noqa: E731
    assert names("double.*:text") == ["double.0:text", "double.1:text"]
    assert names("*.1:update") == ["double.1:update", "single.1:update"]
    assert names("single.[02]") == ["single.0", "single.2"]


def test_two_dots_stand_for_the_blocks_in_between_in_the_order_of_the_model(
    flux: Pipeline, tmp_path_factory: pytest.TempPathFactory
):
    assert list(map(str, flux.expand("double.1..single.1:update"))) == ["double.1:update", "single.0:update", "single.1:update"]
    unet = difflex.load(tiny_folder("sdxl", tmp_path_factory.mktemp("models") / "sdxl"))
    assert list(map(str, unet.expand("down.2.1..up.0.1"))) == ["down.2.1", "mid.0", "up.0.0", "up.0.1"]
    for text, message in (("single.0..double.0", "no range"), ("double.0..single.9", "nearest"), ("..single.0", "is unknown")):
        with pytest.raises(DifflexError, match=message):
            flux.expand(text)


def test_hooks_are_removed_after_an_error(flux: Pipeline):
    def fail(x: Tensor, context: HookContext) -> None:
        raise RuntimeError("mine")

    plain = latents(flux)
    with pytest.raises(RuntimeError, match="mine"), flux.at("double.1", fail):
        latents(flux)
    assert torch.equal(latents(flux), plain)
    modules = list(flux.engine.denoiser.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    assert "cache_context" not in vars(flux.engine.denoiser)


def test_an_inner_block_sees_the_changes_of_an_outer_one(flux: Pipeline):
    activations: list[Tensor] = []
    with (
        flux.at("double.1", lambda x, context: torch.zeros_like(x)),
        flux.at("double.1", lambda x, context: activations.append(x.clone())),
    ):
        latents(flux)
    assert len(activations) == STEPS and not any(x.any() for x in activations)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1.5, "a float instead of a tensor"),
        (np.zeros((2, 6, 32)), "ndarray instead of a tensor"),
        ([1], "list instead of a tensor"),
        (torch.zeros(2), r"tensor of shape \(2,\) in place of"),
        (torch.zeros(2, 24, 32, dtype=torch.complex64), "no plain real values"),
        (torch.zeros(2, 24, 32, device="meta"), "on meta, which has no plain"),
    ],
)
def test_what_a_function_may_not_return_is_a_sentence_and_leaves_the_pipeline_usable(flux: Pipeline, value: object, message: str):
    plain = latents(flux)
    with pytest.raises((BadInput, TypeCheckError), match=message), flux.at("double.1", lambda x, context: value):  # pyright: ignore[reportArgumentType]
        latents(flux)
    assert torch.equal(latents(flux), plain) and flux.engine.tracker.run is None


def test_a_result_in_another_dtype_is_converted(flux: Pipeline):
    plain = latents(flux)
    with flux.at("double.1", lambda x, context: x.double()):
        assert torch.equal(latents(flux), plain)


def test_at_needs_a_function(flux: Pipeline):
    with pytest.raises((BadInput, TypeCheckError), match="a function is needed"):
        flux.at("double.1", 3)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("direct", [False, True])
def test_generating_inside_of_a_function_is_refused(flux: Pipeline, direct: bool):
    plain = latents(flux)

    def generate(x: Tensor, context: HookContext) -> None:
        cast(Any, flux.diffusers)(prompt="a moon", num_inference_steps=1) if direct else flux.generate("a moon", steps=1)

    with pytest.raises(BadInput, match=r"function at the site 'double\.1' runs the pipeline"), flux.at("double.1", generate):
        latents(flux)
    assert torch.equal(latents(flux), plain)


def test_threads_that_share_a_pipeline_wait_for_each_other(flux: Pipeline):
    def image(seed: int) -> bytes:
        return flux.generate("a red star", seed=seed, steps=2)[0].image.tobytes()

    alone = [image(seed) for seed in range(6)]
    with ThreadPoolExecutor(3) as pool:
        assert [*pool.map(image, range(6))] == alone


def test_a_thread_beside_a_block_of_at_gets_an_error_and_no_edit(flux: Pipeline):
    plain = latents(flux)
    with ThreadPoolExecutor(1) as pool, flux.at("double.1", lambda x, context: x + 1):
        for work in (lambda: latents(flux), lambda: cast(Any, flux.diffusers)(prompt="a moon")):
            with pytest.raises(BadInput, match="Another thread is using this pipeline"):
                pool.submit(work).result(60)
        assert not torch.equal(latents(flux), plain)
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(latents, flux).result(60), plain)


def test_values_that_are_not_finite_give_no_image(flux: Pipeline):
    spoil = lambda x, context: x * float("nan") if context.step == 1 else None  # noqa: E731
    with pytest.raises(NonFinite, match=r"in fp32 are not finite from step 1 of 3 on .*no image of 'a red star' \(seed 4\)"):
        flux.generate("a red star", seed=4, steps=3, edits=[("double.1", spoil)])
    [outcome] = flux.images(flux.shots("a red star", steps=1), "double.1", {"none": lambda x, context: None})
    assert torch.equal(outcome.edited["none"], outcome.plain)


def test_writing_another_shape_is_an_error(flux: Pipeline):
    with (
        pytest.raises(BadInput, match=r"\(2, 3, 32\) in place of \(2, 64, 32\)"),
        flux.at("double.1", lambda x, context: x[:, :3]),
    ):
        latents(flux)


def test_an_edit_of_text_tokens_keeps_the_image_tokens_of_the_block(flux: Pipeline):
    def image(site: str) -> Tensor:
        activations: list[Tensor] = []
        with flux.at(site, lambda x, context: x + 1), flux.at("single.1", lambda x, context: activations.append(x.clone())):
            latents(flux)
        return activations[0]

    with flux.at("single.1", lambda x, context: None):
        plain = image("single.2")
    assert torch.equal(image("single.1:text"), plain)
    assert not torch.equal(image("single.1"), plain)


def test_steps_and_halves_are_known_in_a_call_of_the_diffusers_pipeline_itself(pipe: Pipeline):
    """difflex knows nothing of such a call but what the denoiser gets."""
    guidance = 4.0
    shots = list(pipe.shots(PROMPTS, steps=STEPS, keep_steps=[0], guidance=guidance))
    ours, raw = [], []
    site = rows_of(pipe)[0].site
    with pipe.at(site, lambda x, context: ours.append((context.step, context.timestep, context.half, x.clone()))):
        pipe.engine.run(shots, output_type="latent")
    prompts = pipe.engine.encoder([shot.prompt for shot in shots], pipe.engine.is_guided(guidance))
    with pipe.at(site, lambda x, context: raw.append((context.step, context.timestep, context.half, x.clone()))):
        pipe.diffusers(**prompts, **pipe.engine._settings(shots, pipe.engine.is_guided(guidance)), output_type="latent")  # pyright: ignore
    assert len(ours) == len(raw) > 0
    for (step, timestep, half, x), (*same, y) in zip(ours, raw, strict=True):
        # FluxPipeline names every call conditional, without guidance too.
        assert same in ([step, timestep, half], [step, timestep, half or "conditional"]) and torch.equal(x, y)


def test_without_a_cache_context_the_prompt_embedding_determines_the_half(flux: Pipeline):
    halves: list[str | None] = []
    with flux.at("double.0", lambda x, context: halves.append(context.half)):
        # Older versions of diffusers name no call.
        vars(flux.engine.denoiser)["cache_context"] = lambda name: nullcontext()
        latents(flux, guidance=4.0)
    assert halves == ["conditional", "unconditional"] * STEPS


def test_steps_with_equal_timesteps_in_bf16_are_distinguished(tmp_path_factory: pytest.TempPathFactory):
    pipe = difflex.load(tiny_folder("flux-dev", tmp_path_factory.mktemp("models") / "flux"), precision="bf16")
    shot, steps = next(pipe.shots(["a star"], steps=400, keep_steps=[0], pixels=(16, 24))), []
    rounded = torch.tensor(pipe.engine.timesteps(shot)[:60]).bfloat16()
    assert len(rounded.unique()) < 50

    def watch(x: Tensor, context: HookContext) -> None:
        steps.append(context.step)
        if len(steps) == 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), pipe.at("double.0", watch):
        pipe.engine.run([shot], output_type="latent")
    assert steps == list(range(60))


@pytest.mark.parametrize("site", ["double.1", "single.1:text", "double.1:update", "double.1:neurons"])
def test_a_change_in_place_counts_only_if_the_tensor_is_returned(flux: Pipeline, site: str):
    def change(x: Tensor, context: HookContext) -> Tensor:
        x += 5
        return x

    def change_without_return(x: Tensor, context: HookContext) -> None:
        x += 5

    plain = latents(flux)
    with flux.at(site, lambda x, context: x + 5):
        edited = latents(flux)
    with flux.at(site, change):
        assert torch.equal(latents(flux), edited)
    with flux.at(site, change_without_return):
        assert torch.equal(latents(flux), plain)
    assert not torch.equal(edited, plain)


def test_activations_may_be_kept_after_the_call(flux: Pipeline):
    originals, copies = [], []
    with (
        flux.at("double.1", lambda x, context: originals.append(x)),
        flux.at("double.1", lambda x, context: copies.append(x.clone())),
    ):
        latents(flux)
    assert all(torch.equal(first, second) for first, second in zip(originals, copies, strict=True))


def test_an_unknown_half_is_an_error(flux: Pipeline):
    # The tests check types too, whose error comes first.
    with pytest.raises((UnknownName, TypeCheckError), match="cond"):
        flux.at("double.1", lambda x, context: None, half="cond")  # pyright: ignore[reportArgumentType]


def test_the_table_takes_the_path_of_any_module(flux: Pipeline):
    [row] = flux.sites("transformer.x_embedder")
    assert (row.path, row.width, row.tokens, row.kinds) == ("transformer.x_embedder", 32, 64, ("residual",))
    with pytest.raises(BadInput, match=r"time_text_embed' returns no tokens"):
        flux.sites("transformer.time_text_embed")


def test_reading_a_tuple_of_unknown_streams_is_an_error(flux: Pipeline):
    with (
        pytest.raises(BadInput, match=r"blocks\.0\.attn returns 2 values.*image stream.*Use a module inside"),
        flux.at("transformer.transformer_blocks.0.attn", lambda x, context: None),
    ):
        latents(flux)


def test_neurons_of_a_module_path_are_an_error(flux: Pipeline):
    with pytest.raises(BadInput, match=r"blocks\.0\.ff:neurons' does not exist.*activation function itself"):
        flux.site("transformer.transformer_blocks.0.ff:neurons")


@pytest.mark.parametrize(("site", "span"), [("single.0", slice(3, 9)), ("single.0:text", slice(0, 3))])
def test_a_single_block_may_return_its_streams_as_one_tensor(flux: Pipeline, site: str, span: slice):
    """diffusers up to 0.34 returned one tensor."""
    call = DenoiserCall(step=0, timestep=1000.0, halves=(None,), shots=None, text_tokens=3, grid=(2, 3))
    joint, activations = torch.randn(1, 9, 32), []
    output = apply_at_site(flux.engine.sites.locate(site), call, (), {}, joint, lambda x, context: activations.append(x) or x + 1)
    assert torch.equal(activations[0], joint[:, span])
    expected = joint.clone()
    expected[:, span] += 1
    assert isinstance(output, Tensor) and torch.equal(output, expected)


@pytest.fixture(scope="module", params=["flux", "sd1"])
def unknown(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """A pipeline of a class that has no row in the table of families."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "family_of", lambda pipeline, denoiser: Family(name="other", denoiser=denoiser))
        return difflex.load(tiny_folder(request.param, tmp_path_factory.mktemp("models") / request.param))


def test_the_table_of_an_unknown_family_lists_repeated_modules_with_tokens(unknown: Pipeline):
    rows = unknown.sites()
    assert len(rows) > 5
    shapes: dict[str, tuple[int, ...]] = {}
    with ExitStack() as stack:
        for row in rows:
            stack.enter_context(unknown.at(row.site, lambda x, context, path=row.path: shapes.update({path: tuple(x.shape[1:])})))
        unknown.generate("a star", steps=1)
    assert shapes == {row.path: (row.tokens, row.width) for row in rows}
