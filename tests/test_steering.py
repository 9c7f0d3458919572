"""Edits: they change what they name and nothing else, and the same edit makes the same image again."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import difflex
from difflex.dictionaries import SAE, Dictionary, DictionaryOrigin, Normalisation, SAEWeights
from difflex.errors import BadInput, BrokenFile, DifflexError, NonFinite, StaleWork, UnknownName
from difflex.files import Json
from difflex.pipeline import Pipeline
from difflex.records import ActivationBatch, Edit, HookContext, Rectangle, RegionMap, Shot, Site, TransplantSource
from difflex.steering import (
    EditRecord,
    SteeringHook,
    check_origin,
    dictionary_features,
    rectangle,
    steering_hooks,
)
from difflex.steering.contrast import Contrast, contrast_features, decompose, find_contrast
from difflex.steering.features import FeatureScales, measure_scales
from difflex.steering.hooks import TransplantMaps, read_region, region_tokens
from difflex.steering.strengths import intact_strengths
from difflex.tensors import read_tensors, write_tensors
from difflex.testing import TINY, tiny_folder

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
SIZE, K, GRID = 40, 4, (4, 6)
TOKENS = GRID[0] * GRID[1]
SILENT = SIZE - 1
"""A feature that never fires."""
OPERATIONS = ("add", "set", "scale", "ablate", "replace", "transplant")


def dictionary_at(site: Site, width: int, model: str | None = "m") -> Dictionary:
    generator = torch.Generator().manual_seed(1)
    decoder = F.normalize(torch.randn(SIZE, width, generator=generator), dim=1)
    mute = torch.where(torch.arange(SIZE) == SILENT, -1e6, 0.0)
    weights = SAEWeights(encoder=decoder, decoder=decoder, bias=torch.zeros(width), encoder_bias=mute, thresholds=None)
    origin = DictionaryOrigin(site=site, model=model, revision=None)
    return SAE(kind="topk", k=K, origin=origin, normalisation=Normalisation.identity(width), weights=weights, relu=True)


SITE = Site("double.1")
DICTIONARY = dictionary_at(SITE, 16)
X = torch.randn(2, TOKENS, 16, generator=torch.Generator().manual_seed(3))
SCALES = measure_scales(
    DICTIONARY, [ActivationBatch(X.flatten(0, 1), torch.zeros(2 * TOKENS).long(), torch.zeros(2 * TOKENS).long())]
)
ACTIVE = int(SCALES.peaks.argmax())


def context(step: int = 0, half: str | None = None, steps: int = 4) -> HookContext:
    shot = Shot(model="m", pixels=(16, 24), steps=steps, guidance=0.0)
    return HookContext(step, 1000.0, half, (shot,), GRID)  # pyright: ignore[reportArgumentType]


def edit(operation: str = "add", **changes: object) -> Edit:
    return Edit(**{"operation": operation, "site": SITE, "dictionary": "d", "features": (ACTIVE,), **changes})  # pyright: ignore


def steering(
    *edits: Edit, dictionary: Dictionary = DICTIONARY, scales: FeatureScales | None = SCALES, maps: TransplantMaps | None = None
) -> SteeringHook:
    hooks = steering_hooks(edits, lambda item: dictionary_features(dictionary, item.features, scales), lambda _: maps)  # pyright: ignore
    assert len(hooks) == 1
    return hooks[0]


def edited(x: Tensor, *edits: Edit, at: HookContext | None = None) -> Tensor:
    out = steering(*edits).change(x, at or context())
    return x if out is None else out


def code(x: Tensor, feature: int = ACTIVE) -> Tensor:
    return dictionary_features(DICTIONARY, [feature], None).codes(x.flatten(0, 1))[:, 0].view(x.shape[:2])


def test_a_strength_of_one_peak_adds_the_largest_code_of_the_sample():
    expected = X + code(X).max() * DICTIONARY.decoder[ACTIVE]
    torch.testing.assert_close(edited(X, edit()), expected)


def test_adding_by_norm_moves_each_token_by_the_mean_length():
    moved = edited(X, edit(strength=0.5, unit="norm")) - X
    torch.testing.assert_close(moved.norm(dim=-1), torch.full((2, TOKENS), 0.5 * SCALES.norm))


@pytest.mark.parametrize("region", [None, Rectangle(0.5, 0, 1, 1), "fires"])
def test_adding_by_the_current_norm_moves_each_token_by_the_mean_length_of_its_own_image(region: Rectangle | str | None):
    x = X * torch.tensor([1.0, 3.0])[:, None, None]
    moved = (edited(x, edit(strength=0.5, unit="current-norm", region=region)) - x).norm(dim=-1)
    inside = moved > 0
    expected = 0.5 * x.norm(dim=-1).mean(1, keepdim=True).expand(2, TOKENS)
    torch.testing.assert_close(moved[inside], expected[inside])
    alone = edited(x[1:], edit(strength=0.5, unit="current-norm", region=region))
    torch.testing.assert_close(alone[0], edited(x, edit(strength=0.5, unit="current-norm", region=region))[1])
    assert inside.any(1).all() and bool(inside.all()) == (region is None)


def test_ablating_subtracts_the_feature_and_leaves_other_tokens_unchanged():
    fires = code(X) > 0
    out = edited(X, edit("ablate"))
    assert fires.any() and not fires.all()
    torch.testing.assert_close(out, X - code(X)[..., None] * DICTIONARY.decoder[ACTIVE])
    assert torch.equal(out[~fires], X[~fires])


def test_setting_a_code_adds_its_difference_to_the_current_code():
    out = edited(X, edit("set", strength=1.5, unit="code"))
    torch.testing.assert_close(out, X + (1.5 - code(X))[..., None] * DICTIONARY.decoder[ACTIVE])


def test_scaling_by_one_adding_zero_and_ablating_a_silent_feature_change_nothing():
    for nothing in (edit("scale"), edit("add", strength=0.0), edit("scale", region="fires", strength=1.0)):
        assert steering(nothing).change(X, context()) is None
    assert steering(edit("ablate", features=(SILENT,), unit="code"), scales=None).change(X, context()) is None


def test_replacing_leaves_only_the_feature():
    out = edited(X, edit("replace", strength=2.0))
    torch.testing.assert_close(out, (2 * SCALES.peaks[ACTIVE] * DICTIONARY.decoder[ACTIVE]).expand_as(X))


def test_edits_keep_the_reconstruction_error():
    unexplained = X - DICTIONARY.decode(DICTIONARY.encode(X.flatten(0, 1))).view_as(X)
    out = edited(X, edit("scale", strength=3.0))
    codes = DICTIONARY.encode(X.flatten(0, 1))
    tripled = codes._replace(values=torch.where(codes.indices == ACTIVE, 3 * codes.values, codes.values))
    torch.testing.assert_close(out - DICTIONARY.decode(tripled).view_as(X), unexplained)


@pytest.mark.parametrize("operation", ["add", "set", "scale", "ablate", "replace"])
def test_two_disjoint_regions_add_up_to_their_union_exactly(operation: str):
    left, right = Rectangle(0, 0, 0.5, 1), Rectangle(0.5, 0, 1, 1)
    one_after_the_other = edited(
        edited(X, edit(operation, strength=2.0, region=left)), edit(operation, strength=2.0, region=right)
    )
    assert torch.equal(one_after_the_other, edited(X, edit(operation, strength=2.0)))
    if operation != "replace":
        together = edited(X, edit(operation, strength=2.0, region=left), edit(operation, strength=2.0, region=right))
        assert torch.equal(together, one_after_the_other)


def test_an_edit_of_a_region_changes_only_its_tokens():
    out = edited(X, edit(region=Rectangle(0, 0, 0.5, 0.5)))
    changed = (out != X).any(-1)[0].view(GRID)
    assert changed[:2, :3].all() and changed.sum() == 6


def test_the_region_fires_is_where_the_code_is_above_zero():
    changed = (edited(X, edit(region="fires")) != X).any(-1)
    assert torch.equal(changed, code(X) > 0)


def test_an_image_as_a_region_covers_its_light_part(tmp_path: Path):
    mask = Image.new("L", (60, 40))
    mask.paste(255, (10, 0, 20, 10))
    mask.save(tmp_path / "mask.png")
    region = read_region(str(tmp_path / "mask.png"))
    assert region is not None and region_tokens(region, GRID).nonzero()[:, 0].tolist() == [1]


def test_a_region_map_multiplies_the_change_at_each_token():
    weights = [[0.0] * GRID[1] for _ in range(GRID[0])]
    weights[0][1], weights[1][2] = 1.0, 0.2
    full, mapped = edited(X, edit(strength=2.0)), edited(X, edit(strength=2.0, region=RegionMap.of(weights)))
    by_token = torch.tensor(weights).flatten()
    assert torch.equal(mapped[:, by_token == 0], X[:, by_token == 0])
    assert torch.equal(mapped[:, by_token == 1], full[:, by_token == 1])
    expected = X + by_token[:, None] * (full - X)
    torch.testing.assert_close(mapped, expected, atol=1e-5, rtol=1e-5)
    removed, ablated = (edited(X, edit("ablate", region=region)) for region in (RegionMap.of(weights), None))
    torch.testing.assert_close(removed, X + by_token[:, None] * (ablated - X), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("operation", ["add", "set", "ablate", "replace"])
def test_a_region_map_of_ones_is_the_rectangle_of_the_same_tokens(operation: str):
    half = [[float(column >= GRID[1] // 2) for column in range(GRID[1])] for _ in range(GRID[0])]
    assert torch.equal(
        edited(X, edit(operation, region=RegionMap.of(half))), edited(X, edit(operation, region=Rectangle(0.5, 0, 1, 1)))
    )


def test_a_region_map_is_averaged_onto_a_coarser_grid():
    columns = 2 * GRID[1]
    fine = [[float(column == 0) for column in range(columns)] for _ in range(2 * GRID[0])]
    change = (edited(X, edit(region=RegionMap.of(fine))) - X) / (edited(X, edit()) - X)
    assert change.view(len(X), *GRID, -1)[:, :, 0].nanmean() == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("rows", "columns", "weights", "problem"),
    [
        (2, 2, "AAAAAA==", "has no byte above 0"),
        (2, 2, "/w==", "has 1 bytes"),
        (2, 2, "%", "not base64"),
        (0, 2, "/w==", "0 x 2 is not possible"),
        (10**9, 10**9, "/w==", "is not possible"),
    ],
)
def test_a_region_map_that_is_none_is_refused(rows: int, columns: int, weights: str, problem: str):
    with pytest.raises(BadInput, match=problem):
        RegionMap(rows=rows, columns=columns, weights=weights)


def test_a_region_smaller_than_a_token_is_the_token_it_lies_in():
    assert region_tokens(rectangle([9, 9, 10, 10], pixels=(16, 24)), GRID).nonzero()[:, 0].tolist() == [2 * 6 + 2]


@pytest.mark.parametrize("numbers", [(0.5, 0, 0.5, 1), (0, 0, 1), (0, -0.1, 1, 1), (0, 0, 30, 16), (0, 0, math.nan, 1)])
def test_a_region_outside_the_image_is_refused(numbers: tuple[float, ...]):
    with pytest.raises(BadInput):
        rectangle(numbers, pixels=(16, 24))


def test_only_the_chosen_steps_are_edited_and_steps_beyond_the_run_are_refused():
    some = edit(steps=(1, 3))
    assert [not torch.equal(edited(X, some, at=context(step)), X) for step in range(4)] == [False, True, True, False]
    with pytest.raises(BadInput, match="the run has 2"):
        edited(X, some, at=context(steps=2))


def test_under_guidance_the_unconditional_half_is_unedited_edited_or_edited_with_the_opposite_sign():
    plus = edited(X, edit()) - X
    for half, sign in (("conditional", 0), ("both", 1), ("opposed", -1)):
        unconditional = edited(X, edit(half=half), at=context(half="unconditional"))
        torch.testing.assert_close(unconditional - X, sign * plus)
        torch.testing.assert_close(edited(X, edit(half=half), at=context(half="conditional")) - X, plus)


def test_a_transplant_copies_codes_from_the_region_of_the_source_to_that_of_the_edit():
    other = torch.randn(1, TOKENS, 16, generator=torch.Generator().manual_seed(8))
    source = TransplantSource(prompt="p", region=Rectangle(0, 0, 0.5, 1))
    moved = edit("transplant", source=source, region=Rectangle(0.5, 0, 1, 1), unit="code")
    maps = TransplantMaps(moved, dictionary_features(DICTIONARY, moved.features, SCALES))
    maps(other, context())
    out = steering(moved, maps=maps).change(X, context())
    assert out is not None
    expected = code(X).clone().view(2, *GRID)
    expected[:, :, 3:] = code(other).view(GRID)[:, :3]
    delta = (expected.view(2, TOKENS) - code(X))[..., None] * DICTIONARY.decoder[ACTIVE]
    torch.testing.assert_close(out, X + delta)
    with pytest.raises(BadInput, match="same steps and pixels"):
        steering(moved, maps=maps).change(X, context(step=2))


def test_an_unknown_feature_is_refused_and_a_dead_one_gives_a_warning():
    with pytest.raises(UnknownName, match="0 to 39"):
        steering(edit(features=(SIZE,)))
    with pytest.warns(UserWarning, match="dead"):
        steering(edit(features=(SILENT,)))


SOURCE = TransplantSource(prompt="p")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"operation": "zzz"}, "Edit.operation 'zzz' is unknown; known: add, set, scale"),
        ({"operation": None}, "not one of add"),
        ({"what": "zzz"}, None),
        ({"unit": "peaks"}, "nearest: peak"),
        ({"half": "all"}, "known: conditional"),
        ({"site": 7}, "7 is not a site"),
        ({"strength": math.nan}, "not a finite number"),
        ({"strength": -math.inf}, "not a finite number"),
        ({"strength": 10**400}, "not a finite number"),
        ({"strength": "1"}, "not a finite number"),
        ({"strength": True}, "not a finite number"),
        ({"features": ()}, "names no feature"),
        ({"features": [1]}, "not a tuple"),
        ({"features": (1, 1)}, "named twice"),
        ({"features": (-1,)}, "no feature -1"),
        ({"features": (1.5,)}, "whole number"),
        ({"features": (10**30,)}, "whole number"),
        ({"contrast": "red"}, "one of the two"),
        ({"dictionary": None, "features": (), "contrast": "../red"}, "cannot be the name"),
        ({"dictionary": None, "features": (), "contrast": "x" * 101}, "cannot be the name"),
        ({"dictionary": "a\0b"}, "without NUL"),
        ({"steps": (2, 2)}, "START below END"),
        ({"steps": (3, 1)}, "START below END"),
        ({"steps": (-1, 2)}, "START below END"),
        ({"steps": (1,)}, "2 in all"),
        ({"steps": range(3)}, "not a tuple"),
        ({"region": Rectangle(0, 0, 1.5, 1)}, "outside the image"),
        ({"region": Rectangle(0.5, 0, 0.5, 1)}, "empty"),
        ({"region": Rectangle(math.nan, 0, 1, 1)}, "not a Rectangle"),
        ({"region": (0, 0, 1, 1)}, "not a Rectangle"),
        ({"operation": "set", "unit": "norm"}, "a length"),
        ({"operation": "set", "unit": "current-norm"}, "a length"),
        ({"operation": "replace", "half": "opposed"}, "no opposite"),
        ({"operation": "transplant"}, "needs a source"),
        ({"source": SOURCE}, "Leave the source out"),
        ({"operation": "replace", "region": "fires"}, "cannot be 'fires'"),
        ({"operation": "transplant", "source": SOURCE, "region": "fires"}, "cannot be 'fires'"),
        ({"operation": "transplant", "source": SOURCE, "at": ("double.0",)}, "maps of its own site"),
        ({"at": ("double.0", "double.0")}, "names a site twice"),
        ({"at": ("double.0:zzz",)}, "not a site"),
        ({"at": "double.0"}, "not a tuple"),
        ({"operation": "zero"}, "has no features"),
        ({"operation": "zero", "dictionary": None}, "has no features"),
        ({"operation": "zero", "dictionary": None, "features": (), "half": "opposed"}, "no opposite"),
        ({"operation": "reconstruct"}, "whole dictionary"),
        ({"operation": "reconstruct", "features": (), "half": "opposed"}, "no opposite"),
        ({"operation": "reconstruct", "features": (), "region": "fires"}, "cannot be 'fires'"),
        ({"source": "p"}, "not a TransplantSource"),
    ],
)
def test_what_is_no_edit_is_refused_where_it_is_made(changes: dict[str, object], message: str | None):
    with pytest.raises(TypeError if message is None else DifflexError, match=message):
        edit(**changes)  # pyright: ignore


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": 5}, "text"),
        ({"prompt": "a\ud800"}, "text"),
        ({"seed": -1}, "from 0 on"),
        ({"seed": 2**64}, "whole number"),
        ({"region": Rectangle(0, 0.5, 1, 0.5)}, "empty"),
    ],
)
def test_what_is_no_source_is_refused(changes: dict[str, object], message: str):
    with pytest.raises(BadInput, match=message):
        replace(SOURCE, **changes)  # pyright: ignore


def test_the_default_strength_is_the_largest_that_keeps_most_tokens_under_the_ceiling():
    features = torch.tensor([ACTIVE])
    strength = float(SCALES.default_strengths(DICTIONARY.decoder_rows(features), features)[0])
    step = SCALES.peaks[ACTIVE] * DICTIONARY.decoder[ACTIVE]
    under = lambda p: float(((SCALES.sample + p * step).norm(dim=1) <= SCALES.ceiling).float().mean())  # noqa: E731
    assert 0 < strength < 1 and under(strength) >= 0.95 > under(strength + 0.01)


def test_scales_equal_the_plain_formula_and_are_loaded_as_saved(tmp_path: Path):
    dense = torch.stack([code(X, feature).flatten() for feature in range(SIZE)])
    torch.testing.assert_close(SCALES.peaks, dense.amax(1))
    torch.testing.assert_close(SCALES.means, dense.sum(1) / (dense > 0).sum(1).clamp(min=1))
    SCALES.save(tmp_path / "s.safetensors", "abc")
    loaded = FeatureScales.load(tmp_path / "s.safetensors", "abc")
    assert loaded is not None and torch.equal(loaded.peaks, SCALES.peaks) and loaded.norm == SCALES.norm
    assert FeatureScales.load(tmp_path / "s.safetensors", "other") is None
    (tmp_path / "s.safetensors").write_bytes(b"broken")
    with pytest.raises(BrokenFile):
        FeatureScales.load(tmp_path / "s.safetensors", "abc")


# With every family's own tiny pipeline.


@pytest.fixture(scope="module", params=TINY)
def pipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tiny_folder(request.param, tmp_path_factory.mktemp("models") / request.param, defaults={"pixels": [[16, 24]]})
    return difflex.load(folder)


@lru_cache(1)
def site_of(pipe: Pipeline) -> tuple[Site, int]:
    rows = [row for row in pipe.sites() if row.site.stream == "image"]
    return rows[len(rows) // 2].site, rows[len(rows) // 2].width


def generated(pipe: Pipeline, edits: list[SteeringHook] | None = None) -> list[bytes]:
    images = pipe.generate(["a red star", "a blue circle"], steps=2, guidance=4.0, edits=edits or [])
    return [item.image.tobytes() for item in images]


@pytest.mark.parametrize(
    ("pipe", "operation"),
    [
        pytest.param(family, operation, marks=() if family == "flux" or operation in ("set", "transplant") else pytest.mark.slow)
        for family in TINY
        for operation in OPERATIONS
    ],
    indirect=["pipe"],
)
def test_for_every_family_an_edit_of_nothing_changes_nothing_and_a_recorded_edit_makes_the_same_image(
    pipe: Pipeline, operation: str, tmp_path: Path
):
    site, width = site_of(pipe)
    dictionary = dictionary_at(site, width, pipe.name)
    features = tuple(range(SIZE))
    source = TransplantSource(prompt="a cat", seed=5) if operation == "transplant" else None
    change = Edit(operation=operation, site=site, dictionary="d", features=features, strength=30.0, unit="code", source=source)  # pyright: ignore

    def maps(item: Edit) -> TransplantMaps:
        recorder = TransplantMaps(item, dictionary_features(dictionary, item.features, None))
        assert item.source is not None
        with pipe.at(site, recorder):
            pipe.generate(item.source.prompt, seed=item.source.seed, steps=2, guidance=4.0)
        return recorder

    def steered(*edits: Edit) -> list[SteeringHook]:
        return steering_hooks(edits, lambda item: dictionary_features(dictionary, item.features, None), maps)

    plain, changed = generated(pipe), generated(pipe, steered(change))
    assert changed != plain
    shot = next(pipe.shots("a red star", steps=2, guidance=4.0))
    again = EditRecord.load(EditRecord(shot=shot, edits=(change,), checksums={}).save(tmp_path / "edit.json"))
    assert again.edits == (change,) and again.shot == shot
    assert generated(pipe, steered(*again.edits)) == changed
    nothing = replace(change, features=(SILENT,), strength={"scale": 1.0}.get(operation, 0.0))
    assert operation == "replace" or generated(pipe, steered(nothing)) == plain


@pytest.mark.parametrize(("model", "wider", "message"), [("m", 0, r"made for m, but the model is .*"), (None, 1, "width")])
def test_for_every_family_features_of_another_model_or_width_are_refused(pipe: Pipeline, model: str, wider: int, message: str):
    site, width = site_of(pipe)
    features = dictionary_features(dictionary_at(site, width + wider, model), (0,), None)
    change = Edit(operation="add", site=site, unit="code")
    with pytest.raises(DifflexError, match=message):
        generated(pipe, steering_hooks([change], lambda _: features))
    source = replace(change, operation="transplant", source=SOURCE)
    with pytest.raises(DifflexError, match=message), pipe.at(site, TransplantMaps(source, features)):
        generated(pipe)


def test_a_strength_that_makes_infinite_codes_is_refused():
    with pytest.raises(BadInput, match="is infinite"):
        steering(edit(strength=1e200))


def light(path: Path, *, mode: str = "L", size: tuple[int, int] = (6, 4), colour: object = 255) -> str:
    Image.new(mode, size, colour).save(path)  # pyright: ignore[reportArgumentType]
    return str(path)


def test_a_transparent_part_of_a_region_image_is_not_edited(tmp_path: Path):
    mask = Image.new("RGBA", (6, 4), (255, 255, 255, 0))
    mask.putpixel((2, 1), (255, 255, 255, 255))
    mask.save(tmp_path / "mask.png")
    region = read_region(str(tmp_path / "mask.png"))
    assert region is not None and region_tokens(region, GRID).nonzero()[:, 0].tolist() == [1 * 6 + 2]


def test_a_region_image_of_one_pixel_is_everywhere(tmp_path: Path):
    region = read_region(light(tmp_path / "mask.png", size=(1, 1)))
    assert region is not None and bool(region_tokens(region, GRID).all())


def test_an_image_that_is_no_region_is_refused_before_anything_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    whole = Path(light(tmp_path / "whole.png", size=(64, 64))).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    light(tmp_path / "black.png", colour=0)
    messages = {"text": "cannot be read", "folder": "a folder where a file", "half": "cannot be read", "black": "no light part"}
    for name, message in {**messages, "absent": "There is no image"}.items():
        with pytest.raises(DifflexError, match=message):
            steering(edit(region=str(tmp_path / f"{name}.png")))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(BadInput, match="exceeds limit"):
        steering(edit(region=str(tmp_path / "whole.png")))


# Directions by contrast.


def activations(values: Tensor, prompts: list[str], timestep: float = 500.0):
    shots = tuple(
        Shot(model="m", prompt=prompt, seed=number, pixels=(16, 24), steps=4, guidance=0.0, timestep=timestep)
        for number, prompt in enumerate(prompts)
    )
    return difflex.Activations(site=SITE, values=values, shots=shots, grid=GRID)


@pytest.mark.parametrize("method", ["mean", "principal"])
def test_a_contrast_finds_a_planted_direction(method: str):
    generator = torch.Generator().manual_seed(0)
    planted = 3 * F.normalize(torch.randn(16, generator=generator), dim=0)
    base = torch.randn(12, TOKENS, 16, generator=generator)
    noise = 0.02 * torch.randn(12, 1, 16, generator=generator)
    contrast = find_contrast(
        [activations(base + planted + noise, [f"a {i}" for i in range(12)])],
        [activations(base, [f"b {i}" for i in range(12)])],
        method,  # pyright: ignore
    )
    assert F.cosine_similarity(contrast.direction, planted, dim=0) > 0.999
    assert abs(float(contrast.direction.norm()) - 3) < 0.05 and contrast.pairs == 12


def test_a_contrast_is_loaded_as_saved(tmp_path: Path):
    contrast = find_contrast([activations(X + 1, ["a", "b"])], [activations(X, ["c", "d"])])
    again = Contrast.load(contrast.save(tmp_path / "red.safetensors"))
    assert torch.equal(again.direction, contrast.direction)
    assert vars(again).keys() == vars(contrast).keys()
    assert (again.positive, again.negative, again.site, again.timesteps) == (("a", "b"), ("c", "d"), SITE, (500.0,))
    with pytest.raises(UnknownName, match="red"):
        Contrast.load(tmp_path / "rad.safetensors")


@pytest.mark.parametrize(
    "changes",
    [
        {"direction": torch.full((16,), math.nan)},
        {"direction": torch.zeros(16)},
        {"norm": math.inf},
        {"method": "zzz"},
        {"pairs": "many"},
        {"model": None},
    ],
)
def test_a_contrast_that_is_not_finite_or_has_odd_fields_is_refused(changes: dict[str, object]):
    contrast = find_contrast([activations(X + 1, ["a", "b"])], [activations(X, ["c", "d"])])
    with pytest.raises(DifflexError):
        replace(contrast, **changes)  # pyright: ignore[reportArgumentType]
    with pytest.raises(NonFinite):
        find_contrast([activations(X * math.inf, ["a", "b"])], [activations(X, ["c", "d"])])


@pytest.mark.parametrize("header", [{"site": "double.1:zzz"}, {"site": 5}, {"method": "zzz"}, {"norm": "long"}, {"more": 1}])
def test_a_contrast_file_with_odd_fields_is_refused(header: dict[str, Json], tmp_path: Path):
    path = find_contrast([activations(X + 1, ["a", "b"])], [activations(X, ["c", "d"])]).save(tmp_path / "red.safetensors")
    stored = read_tensors(path, 3, "")
    write_tensors(path, 3, stored.tensors, {**stored.header, **header})
    with pytest.raises(BrokenFile, match=r"red\.safetensors cannot be read as a contrast"):
        Contrast.load(path)


def test_scales_that_are_not_finite_are_refused(tmp_path: Path):
    with pytest.raises(NonFinite):
        replace(SCALES, peaks=SCALES.peaks * math.nan)
    with pytest.raises(BadInput, match="finite"):
        replace(SCALES, norm=math.inf)


def test_a_contrast_of_sides_that_do_not_match_is_refused():
    one = [activations(X, ["a", "b"])]
    with pytest.raises(BadInput, match="pairs"):
        find_contrast(one, [activations(X[:1], ["c"])])
    with pytest.raises(BadInput, match="differ in more"):
        find_contrast(one, [activations(X, ["c", "d"], timestep=250.0)])
    with pytest.raises(BadInput, match="do not differ"):
        find_contrast(one, [activations(X, ["c", "d"])])


def test_adding_a_contrast_adds_the_mean_difference_and_ablating_it_removes_the_projection():
    contrast = find_contrast([activations(X + torch.arange(16.0), ["a", "b"])], [activations(X, ["c", "d"])])
    features = contrast_features(contrast)
    change = lambda operation: steering_hooks(  # noqa: E731
        [Edit(operation=operation, site=SITE, contrast="red")], lambda _: features
    )[0].change(X, context())
    torch.testing.assert_close(change("add"), X + torch.arange(16.0))
    ablated = change("ablate")
    assert ablated is not None
    torch.testing.assert_close(ablated @ contrast.direction, torch.zeros(2, TOKENS), atol=1e-3, rtol=0)


def test_a_direction_is_decomposed_into_the_features_it_was_made_of():
    decoder = DICTIONARY.decoder
    parts = decompose(2.0 * decoder[7] + 0.5 * decoder[21], DICTIONARY, parts=2)
    assert [part.feature for part in parts] == [7, 21]
    assert abs(parts[0].code - 2) < 1e-3 and abs(parts[1].code - 0.5) < 1e-3 and parts[-1].explained > 0.999


def record(path: Path) -> dict:
    """Save an edit and return the entries of its file, to write by hand."""
    shot = Shot(model="m", pixels=(16, 24), steps=4, guidance=0.0)
    entries = json.loads(EditRecord(shot=shot, edits=(edit(),), checksums={}).save(path).read_text())
    return {name: value for name, value in entries.items() if name != "checksum"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"format": 2', '"format": 9', "format 9"),
        ('"operation": "add"', '"operation": "zzz"', "'zzz' is unknown; known: add, set"),
        ('"operation": "add"', '"operation": null', "not one of add"),
        ('"strength": 1.0', '"strength": NaN', "not a finite number"),
        ('"strength": 1.0', '"strength": 1e999', "not a finite number"),
        ('"strength": 1.0', '"strength": ' + "9" * 400, "not a finite number"),
        ('"strength": 1.0', '"strength": ' + "9" * 9000, "not JSON"),
        ('"strength": 1.0', '"strength": "1"', "not a finite number"),
        ('"strength": 1.0', '"strength": true', "not a finite number"),
        ('"region": null', '"region": [0, 0, 2, 1]', "outside the image"),
        ('"region": null', '"region": [0, 0, 1]', "3 items, not 4"),
        ('"region": null', '"region": {}', "'region' is incomplete"),
        ('"steps": null', '"steps": [3, 1]', "START below END"),
        ('"steps": null', '"steps": [3, 1, 1]', "3 items, not 2"),
        ('"features": [', '"features": ["x", ', "whole number"),
        ('"features": [', '"features": [-1, ', "no feature -1"),
        ('"site": "double.1"', '"site": "double.1:zzz"', "not a site"),
        ('"site": "double.1"', '"site": 5', "not a site"),
        ('"unit": "peak"', '"unit": "peak", "colour": "red"', "'colour' is unknown"),
        ('"edits": [', '"edits": [7, ', "not an object"),
        ('"edits": [', '"edits": [], "ignored": [', "'ignored' is unknown"),
        ('"model": "m"', '"model": "a\\u0000b"', "without NUL"),
        ('"seed": 0', '"seed": -1', "from 0 on"),
        ('"seed": 0', '"seed": 18446744073709551616', "whole number"),
        ('"steps": 4', '"steps": 0', "1 to"),
        ('"steps": 4', '"steps": 1000000000', "1 to"),
        ('"shot": {', '"shot": 5, "more": {', "'more' is unknown"),
        ('"model": "m", ', "", "incomplete"),
        ('"checksums": {}', '"checksums": ' + "[" * 100_000, "not JSON"),
    ],
)
def test_an_edit_file_written_by_hand_with_odd_fields_is_explained(old: str, new: str, message: str, tmp_path: Path):
    text = json.dumps(record(tmp_path / "edit.json"))
    assert old in text
    (tmp_path / "edit.json").write_text(text.replace(old, new, 1))
    with pytest.raises(BrokenFile, match=message) as raised:
        EditRecord.load(tmp_path / "edit.json")
    assert "edit.json" in str(raised.value) and len(str(raised.value)) < 600


def test_a_dictionary_of_another_site_or_model_is_refused():
    with pytest.raises(StaleWork, match=r"double\.1.*single\.0"):
        check_origin("d", DICTIONARY.origin, Site("single.0"), "m", None)
    with pytest.raises(StaleWork, match=r"m, .*other"):
        check_origin("d", DICTIONARY.origin, SITE, "other", None)


def test_the_intact_strength_is_the_largest_at_which_the_loss_stays_low():
    asked = []

    def losses(strengths: Sequence[float]) -> torch.Tensor:
        asked.append(list(strengths))
        breaking = torch.tensor([1.6, 0.1, 9.0])  # each image breaks from this strength on
        return 2 * torch.where(torch.tensor(strengths) < breaking, 1.0 + 0.1 * torch.tensor(strengths), 3.0)

    chosen = intact_strengths(losses, 3)
    assert [best.strength for best in chosen] == [1.5, 0.25, 4.0]
    assert [best.loss for best in chosen] == pytest.approx([1.15, 3.0 / 1.0, 1.4])
    assert len(asked) <= 5 and asked[0] == [0.0, 0.0, 0.0]
