"""The guarantees of every pipeline, tested with an embedded model; and what every embedded model must be."""

import json
from contextlib import ExitStack

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import difflex
from difflex.miniature.judge import load_judge
from difflex.miniature.scoring import score
from difflex.pipeline import Pipeline
from difflex.pipeline.sources import embedded
from difflex.records import Site

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
PROMPTS = [f"a {colour} star on grass" for colour in ("red", "blue", "green", "yellow", "purple", "orange", "pink", "white")]


@pytest.fixture(scope="module")
def mini() -> Pipeline:
    return difflex.load("mini-flux")


def latents(pipe: Pipeline) -> Tensor:
    output = pipe.engine.run(list(pipe.shots(PROMPTS[:2], steps=2, keep_steps=[0])), output_type="latent")
    assert isinstance(output, Tensor)
    return output


def test_writing_back_what_was_read_at_every_site_changes_no_bit(mini: Pipeline):
    plain = latents(mini)
    with ExitStack() as stack:
        for row in mini.sites():
            for kind in row.kinds:
                stack.enter_context(mini.at(Site(row.site.path, kind, row.site.stream), lambda x, context: x))
        assert torch.equal(latents(mini), plain)


def test_the_pass_stops_after_the_last_site(mini: Pipeline):
    called: list[str] = []
    with ExitStack() as stack:
        for name in mini.engine.sites.blocks:
            hook = lambda *_, name=name: called.append(name)  # noqa: E731
            stack.callback(mini.engine.sites.locate(name).module.register_forward_hook(hook).remove)
        list(mini.harvest(mini.shots(PROMPTS[:2], steps=2, keep_steps=[0]), "double.1", progress=False))
    assert called == ["double.0", "double.1"]


def test_batches_of_one_and_eight_give_the_same_activations(mini: Pipeline):
    shots = list(mini.shots(PROMPTS, steps=2, keep_steps=[1]))
    sites = ["double.1", "single.0:text", "single.1:update"]
    harvests = []
    for batch in (1, 8):
        harvests.append(
            {
                (activations.site, shot): values
                for activations in mini.harvest(shots, sites, batch, progress=False)
                for shot, values in zip(activations.shots, activations.values, strict=True)
            }
        )
    single, batched = harvests
    assert single.keys() == batched.keys() and len(single) == 24
    for key in single:
        torch.testing.assert_close(single[key], batched[key], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", embedded())
def test_an_embedded_model_is_a_folder_in_bf16_with_a_card_and_no_path_of_a_machine(name: str):
    folder = embedded()[name]
    defaults = json.loads((folder / "difflex.json").read_text(encoding="utf-8"))
    assert defaults["name"] == name and defaults["description"].endswith(".")
    assert f"\n# {name}\n" in (folder / "README.md").read_text(encoding="utf-8")
    assert not [path for path in folder.rglob("*.json") if "_name_or_path" in path.read_text(encoding="utf-8")]
    [denoiser] = [path for part in ("transformer", "unet") for path in folder.glob(f"{part}/*.safetensors")]
    with safe_open(denoiser, "pt") as weights:
        assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"BF16"}  # noqa: SIM118


@pytest.mark.parametrize("name", embedded())
def test_an_embedded_model_draws_what_its_captions_say(name: str):
    captions = [f"a large {colour} star in the center on grass" for colour in ("red", "blue", "yellow")]
    images = difflex.load(name).generate(captions, steps=4)
    pixels = torch.stack([torch.tensor(list(each.image.tobytes())).view(64, 64, 3).movedim(2, 0) / 255 for each in images])
    correct = [verdict.correct for verdict in score(captions, pixels, load_judge())]
    assert all(each["colour"] and each["background"] for each in correct)
