"""What configs tell of a model: what its sites show and what its passes cost, without its weights."""

import socket
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import difflex
from difflex.errors import BadInput, UnknownName
from difflex.pipeline import profile_model
from difflex.records import Site
from difflex.testing import TINY, tiny_folder

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept:DeprecationWarning",
    "ignore:`torch.jit:DeprecationWarning",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder("flux", tmp_path_factory.mktemp("models") / "flux")


@pytest.mark.parametrize("family", TINY)
def test_every_site_is_foreseen_as_it_is(family: str, tmp_path: Path):
    pipe = difflex.load(tiny_folder(family, tmp_path / family))
    found = profile_model(str(tmp_path / family), ())
    assert dict(found.shapes) == {row.site: (row.tokens, row.width) for row in pipe.sites()}
    plain = next(pipe.shots(""))
    assert (found.shot.pixels, found.shot.steps, found.shot.guidance) == (plain.pixels, plain.steps, plain.guidance)


@pytest.mark.parametrize("family", ["flux", "sdxl", "sd3"])
@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_what_is_foreseen_is_what_is_computed(family: str, guidance: float, tmp_path: Path):
    pipe, site = difflex.load(tiny_folder(family, tmp_path / family)), {"sdxl": "mid.0", "sd3": "joint.1"}.get(family, "double.1")
    shots = list(pipe.shots("a star", steps=3, guidance=guidance))
    found = profile_model(str(tmp_path / family), (site,), None, 3, None, guidance)
    list(pipe.harvest(shots, site, progress=False))  # from here on the prompts are encoded
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # what else attention runs is not counted
        list(pipe.harvest(shots, site, progress=False))
    # Two whole steps, and one that ends at the site.
    assert counter.get_total_flops() == pytest.approx(2 * found.step + found.partial_step, rel=0.01)


@pytest.mark.parametrize("family", ["flux", "sdxl", "sd3", "pixart"])
def test_encoding_a_prompt_is_foreseen_but_for_its_attention(family: str, tmp_path: Path):
    pipe = difflex.load(tiny_folder(family, tmp_path / family))
    with FlopCounterMode(display=False) as counter:
        pipe.engine.encoder.encode(["a star"])
    products = [count for name, count in counter.get_flop_counts()["Global"].items() if "bmm" not in str(name)]
    assert sum(products) == pytest.approx(profile_model(str(tmp_path / family), ()).prompt, rel=0.05)


def test_drawing_the_image_at_the_end_is_foreseen(folder: Path):
    pipe = difflex.load(folder)
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as counter:
        pipe.diffusers.components["vae"].decode(torch.zeros(1, 4, 16, 16))
    assert counter.get_total_flops() == pytest.approx(profile_model(str(folder), ()).decode, rel=0.01)


def test_kinds_streams_and_patterns_are_understood(folder: Path):
    shapes = profile_model(str(folder), ("double.*:update", "double.1:neurons", "single.0:text"), None, None, (16, 24)).shapes
    assert {str(site): shape for site, shape in shapes.items()} == {
        "double.0:update": (24, 32),
        "double.1:update": (24, 32),
        "double.1:neurons": (24, 128),
        "single.0:text": (24, 32),
    }
    with pytest.raises(UnknownName, match=r"double\.7"):
        profile_model(str(folder), ("double.7",))


def test_flux_is_foreseen_without_a_file():
    found = profile_model("black-forest-labs/FLUX.1-schnell", ("single.9",), None, None, (256, 256))
    assert found.shapes == {Site("single.9"): (256, 3072)} and (found.shot.steps, found.shot.guidance) == (4, 0.0)
    # Twice 11.9 billion weights for each of 512 tokens, less what meets the image or the text alone, or one token a shot.
    assert 0.5 < found.step / (2 * 11.9e9 * 512) < 0.7


def test_of_a_hub_model_that_is_not_here_nothing_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it asked the network"))
    with pytest.raises(UnknownName, match="could not be read from the local cache"):
        profile_model("OWNER/NAME-that-is-not-here", ())


def test_a_pipeline_of_no_known_family_is_not_guessed_at(folder: Path, tmp_path: Path):
    other = tiny_folder("flux", tmp_path / "other")
    index = other / "model_index.json"
    index.write_text(index.read_text().replace("FluxPipeline", "FluxImg2ImgPipeline"))
    with pytest.raises(UnknownName, match="denoiser of a FluxImg2ImgPipeline"):
        profile_model(str(other), ())


def test_a_site_without_tokens_is_said(folder: Path):
    with pytest.raises(BadInput, match="returns no tokens"):
        profile_model(str(folder), ("transformer.time_text_embed.timestep_embedder",))
