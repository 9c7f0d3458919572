import json
import shutil
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from safetensors.torch import load_file, save_file

import difflex
from difflex.errors import BadInput, BrokenFile, DifflexError, DiskError, NonFinite, UnknownName
from difflex.features.firing import image_key
from difflex.pipeline import Pipeline
from difflex.testing import TINY, tiny_folder

# diffusers' schedulers meet a newer numpy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(
        "flux", tmp_path_factory.mktemp("models") / "flux", defaults={"words": ["a", "red", "star", "blue", "circle"]}
    )


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Pipeline:
    return difflex.load(folder)


@pytest.mark.parametrize("family", TINY)
def test_an_image_depends_on_prompt_and_seed_but_not_on_the_batch(family: str, tmp_path: Path) -> None:
    pipe = difflex.load(tiny_folder(family, tmp_path / family))
    first, second = pipe.generate(["a red star", "a blue circle"], seed=4)
    alone = pipe.generate("a blue circle", seed=5)[0]
    other = pipe.generate("a blue circle", seed=6)[0]
    assert np.abs(np.asarray(alone.image, float) - np.asarray(second.image, float)).max() <= 2
    assert np.abs(np.asarray(alone.image, float) - np.asarray(other.image, float)).max() > 5
    assert (first.shot.seed, second.shot.seed, second.shot.prompt) == (4, 5, "a blue circle")


def test_a_shot_holds_the_settings_of_its_image(pipe: Pipeline) -> None:
    shot = pipe.generate("a red star", steps=3, pixels=(16, 24), guidance=2.0)[0].shot
    assert (shot.steps, shot.pixels, shot.guidance, shot.timestep) == (3, (16, 24), 2.0, None)


def test_difflex_json_sets_the_defaults(pipe: Pipeline) -> None:
    generated = pipe.generate("a red star")[0]
    assert generated.image.size == (32, 32)
    assert (generated.shot.steps, generated.shot.guidance) == (2, 0.0)


def test_the_error_for_an_impossible_size_lists_the_possible_ones(pipe: Pipeline) -> None:
    with pytest.raises(BadInput, match=r"64 x 64.*32 x 32, 16 x 24"):
        pipe.generate("a red star", pixels=(64, 64))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": -1}, "-1 is not a seed"),
        ({"seed": 2**64}, "is not a seed"),
        ({"seed": 2**63 - 1}, "is not a seed"),
        ({"seed": 1.5}, r"1\.5 is not a seed"),
        ({"steps": 0}, "0 denoising steps are not possible"),
        ({"steps": 10**9}, "1000000000 denoising steps are not possible. Use 1 to 1000"),
        ({"guidance": float("nan")}, "guidance of nan"),
        ({"guidance": float("inf")}, "guidance of inf"),
        ({"pixels": (0, 32)}, "0 x 32 pixels are not possible"),
        ({"pixels": (17, 32)}, "17 x 32 pixels are not possible"),
        ({"pixels": (10**9, 10**9)}, "Use at most 67,108,864 pixels"),
        ({"pixels": (float("nan"), 32)}, "not a size of images"),
        ({"pixels": 32}, "not a size of images"),
        ({"batch": 0}, "batch of 0"),
        ({"prompts": ["a", "\ud800"]}, "halves of characters"),
        ({"prompts": [None, "a"]}, "None is not a prompt"),
    ],
)
def test_impossible_settings_are_sentences(pipe: Pipeline, settings: dict[str, Any], message: str) -> None:
    settings = {"prompts": ["a star", "a circle"], **settings}
    with pytest.raises((BadInput, TypeCheckError), match=message):
        pipe.generate(**settings)
    settings.pop("batch", None)
    if "seed" in settings:
        settings["seeds"] = [settings.pop("seed") + (message == "is not a seed")]
    if settings != {"prompts": ["a star", "a circle"]}:
        with pytest.raises((BadInput, TypeCheckError), match=message):
            list(pipe.shots(**settings))


def test_a_billion_seeds_take_no_memory(pipe: Pipeline) -> None:
    assert [shot.seed for shot in islice(pipe.shots("a star", seeds=range(10**9)), 0, 4, 2)] == [0, 1]
    with pytest.raises(BadInput, match="is not a seed"):
        pipe.shots("a star", seeds=range(2**63 - 1, 2**64))


@pytest.mark.parametrize(
    "name",
    ["", " ", "a" * 300, "a/" + "b" * 300, "..", "a\0b", "https://hub.example/a/b", "~nobody-here/x", "a/b/c", "\ud800", None, 3],
)
def test_odd_names_of_models_are_sentences(name: Any) -> None:
    with pytest.raises((DifflexError, TypeCheckError)):
        difflex.load(name, offline=True)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_text("")
    with pytest.raises(BadInput, match="is a file, not a model"):
        difflex.load(tmp_path / "weights.safetensors")
    with pytest.raises(UnknownName, match="cannot be found"):
        difflex.load(tmp_path / "weights.safetensors" / "x")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(folder: Path, tmp_path: Path, value: float) -> None:
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[5]
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(NonFinite, match=rf"hold NaN or infinity: transformer\.{name}"):
        difflex.load(tmp_path / "model")


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_of_a_model_is_a_sentence(folder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(folder, tmp_path / "model")
    for number, path in enumerate(sorted(path for path in model.rglob("*") if path.is_file())):
        content = path.read_bytes()
        path.write_bytes((content[: len(content) // 2], b"[" * 100_000, b"", b"{}", b"[1]")[number % 5])
        with suppress(DifflexError):  # other exceptions fail the test
            difflex.load(model)
        path.write_bytes(content)


def test_without_difflex_json_any_multiple_of_a_token_is_a_possible_size(tmp_path: Path) -> None:
    folder = tiny_folder("flux", tmp_path / "flux")
    (folder / "difflex.json").unlink()
    pipe = difflex.load(folder)
    assert pipe.generate("a", steps=1, pixels=(8, 12))[0].image.size == (12, 8)
    with pytest.raises(BadInput, match=r"multiples of 4; the nearest size is 8 x 12"):
        pipe.generate("a", steps=1, pixels=(9, 11))


def test_unknown_words_cause_a_warning_that_names_them(pipe: Pipeline) -> None:
    with pytest.warns(UserWarning, match="does not know these words: purple, elephant"):
        pipe.generate("a purple elephant")


def test_prompts_over_the_text_length_are_counted_and_cause_one_warning(folder: Path) -> None:
    pipe = difflex.load(folder)
    with pytest.warns(UserWarning, match="1 of 2 prompts are longer than the 24 tokens"):
        pipe.generate(["a red star " * 4, "a star"])
    pipe.generate("a blue circle " * 4)
    assert pipe.engine.encoder.truncated == 2


def test_an_empty_prompt_is_allowed(pipe: Pipeline) -> None:
    assert pipe.generate("")[0].shot.prompt == ""


def test_each_prompt_is_encoded_once_for_all_its_seeds(folder: Path) -> None:
    pipe = difflex.load(folder)
    pipe.generate(["a red star"] * 3 + ["a star"])
    pipe.generate(["a red star", "a star"], seed=9)
    assert pipe.engine.encoder.encoded == 2


def test_the_error_for_an_unknown_model_says_how_to_name_a_folder() -> None:
    with pytest.raises(UnknownName, match=r"no-such-model.*Name a folder by its path"):
        difflex.load("no-such-model")


def test_the_error_for_an_unreachable_hub_model_names_its_revision() -> None:
    with pytest.raises(UnknownName, match=r"'somebody/some-model' at revision 0123abc .* cannot be reached"):
        difflex.load("somebody/some-model", revision="0123abc", offline=True)


def test_a_folder_without_a_pipeline_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"model_index\.json"):
        difflex.load(tmp_path)


@pytest.mark.parametrize("keep", [4, 400, -1])
def test_the_error_for_truncated_weights_names_the_file(tmp_path: Path, keep: int) -> None:
    folder = tiny_folder("flux", tmp_path / "flux")
    weights = next((folder / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(BrokenFile, match=weights.name):
        difflex.load(folder)


def test_the_error_for_weights_of_another_format_names_the_file(tmp_path: Path) -> None:
    folder = tiny_folder("flux", tmp_path / "flux")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes((20).to_bytes(8, "little") + b"x" * 400)
    with pytest.raises(BrokenFile, match=r"vae.*diffusion_pytorch_model"):
        difflex.load(folder)


def test_a_missing_component_is_an_error(tmp_path: Path) -> None:
    folder = tiny_folder("flux", tmp_path / "flux")
    next((folder / "transformer").glob("*.safetensors")).unlink()
    with pytest.raises(BrokenFile, match="transformer"):
        difflex.load(folder)


def test_the_error_for_a_damaged_difflex_json_names_it(tmp_path: Path) -> None:
    folder = tiny_folder("flux", tmp_path / "flux")
    (folder / "difflex.json").write_text("{", encoding="utf-8")
    with pytest.raises(BrokenFile, match=r"difflex\.json"):
        difflex.load(folder)
    (folder / "difflex.json").unlink()
    (folder / "difflex.json").mkdir()
    with pytest.raises(DiskError, match=r"difflex\.json"):
        difflex.load(folder)


def test_components_stored_in_different_precisions_are_read_in_one(tmp_path: Path) -> None:
    import torch

    from difflex.testing import tiny_pipeline

    tiny = tiny_pipeline("flux")
    tiny.transformer.to(torch.bfloat16)
    tiny.save_pretrained(tmp_path / "flux")
    pipe = difflex.load(tmp_path / "flux")
    parts = [part for part in pipe.diffusers.components.values() if isinstance(part, torch.nn.Module)]
    assert {parameter.dtype for part in parts for parameter in part.parameters()} == {torch.float32}
    assert pipe.generate("a", steps=1, pixels=(16, 16))


def test_diffusers_ignores_difflex_json(folder: Path) -> None:
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

    assert json.loads((folder / "difflex.json").read_text())["format"] == 1
    assert isinstance(FluxPipeline.from_pretrained(folder), FluxPipeline)


def test_the_text_length_is_part_of_a_shot_that_another_length_can_generate_again(pipe: Pipeline, folder: Path) -> None:
    short = difflex.load(folder, text_length=20)
    shots = list(short.shots("a red star", steps=1))
    [text] = short.harvest(shots, "double.0:text", progress=False)
    assert text.values.shape[1] == 20 == shots[0].text_length and shots[0].as_json()["text_length"] == 20
    assert {row.tokens for row in short.sites("double.*:text")} == {20}
    own = next(pipe.shots("a red star", steps=1))
    assert own.text_length is None and "text_length" not in own.as_json() and image_key(own) != image_key(shots[0])
    [again, usual] = pipe.harvest([*shots, own], "double.0", progress=False)
    [expected] = short.harvest(shots, "double.0", progress=False)
    assert torch.equal(again.values, expected.values) and not torch.equal(usual.values, expected.values)
    assert difflex.load(folder, text_length=24).engine.text_length is None, "the model's own"


def test_a_text_length_that_a_model_does_not_have_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="A text length of 513 tokens is not possible"):
        difflex.load(folder, text_length=513)
    with pytest.raises(BadInput, match=r"models like this one \(sdxl\) is fixed"):
        difflex.load(tiny_folder("sdxl", tmp_path / "sdxl"), text_length=76)
