"""Profiles of models from their configs: shapes at sites and costs of passes."""

import json
import socket
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import difflex
from difflex.errors import BadInput, BrokenFile, UnknownName
from difflex.pipeline import profile_model
from difflex.pipeline.profile import config_site_rows
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
def test_the_profile_has_the_shape_of_every_site(family: str, tmp_path: Path):
    pipe = difflex.load(tiny_folder(family, tmp_path / family))
    profile = profile_model(str(tmp_path / family), ())
    assert dict(profile.shapes) == {row.site: (row.tokens, row.width) for row in pipe.sites()}
    assert config_site_rows(str(tmp_path / family)) == pipe.sites()
    plain = next(pipe.shots(""))
    assert (profile.shot.pixels, profile.shot.steps, profile.shot.guidance) == (plain.pixels, plain.steps, plain.guidance)


def test_configs_that_fit_no_model_are_named(tmp_path: Path):
    index = tiny_folder("flux", tmp_path / "model") / "model_index.json"
    index.write_text(json.dumps({name: entry for name, entry in json.loads(index.read_text()).items() if name != "vae"}))
    for profiled in (config_site_rows, lambda name: profile_model(name, ())):
        with pytest.raises(BrokenFile, match=r"The configs of the model .*Copy or download it again\."):
            profiled(str(tmp_path / "model"))


def test_more_layers_than_any_model_has_are_not_built(tmp_path: Path):
    config = tiny_folder("flux", tmp_path / "model") / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_single_layers": 10**9}))
    with pytest.raises(BrokenFile, match=r"'num_single_layers' 1000000000, and difflex builds at most 1,000 layers"):
        config_site_rows(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("family", "guidance"),
    [
        ("flux", 0.0),
        ("sdxl", 3.0),
        ("sd3", 3.0),
        *(pytest.param(*other, marks=pytest.mark.slow) for other in (("flux", 3.0), ("sdxl", 0.0), ("sd3", 0.0))),
    ],
)
def test_the_profiled_cost_of_steps_equals_the_operations_of_a_harvest(family: str, guidance: float, tmp_path: Path):
    pipe, site = difflex.load(tiny_folder(family, tmp_path / family)), {"sdxl": "mid.0", "sd3": "joint.1"}.get(family, "double.1")
    shots = list(pipe.shots("a star", steps=3, guidance=guidance))
    profile = profile_model(str(tmp_path / family), (site,), None, 3, None, guidance)
    list(pipe.harvest(shots, site, progress=False))  # from here on the prompts are encoded
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # no other kernel of attention is counted
        list(pipe.harvest(shots, site, progress=False))
    # Two whole steps, and one that ends at the site.
    assert counter.get_total_flops() == pytest.approx(2 * profile.step + profile.partial_step, rel=0.01)


@pytest.mark.parametrize("family", ["flux", "sdxl", "sd3", "pixart"])
def test_the_profiled_cost_of_a_prompt_excludes_only_attention(family: str, tmp_path: Path):
    pipe = difflex.load(tiny_folder(family, tmp_path / family))
    with FlopCounterMode(display=False) as counter:
        pipe.engine.encoder.encode(["a star"])
    products = [count for name, count in counter.get_flop_counts()["Global"].items() if "bmm" not in str(name)]
    assert sum(products) == pytest.approx(profile_model(str(tmp_path / family), ()).prompt, rel=0.05)


def test_the_profiled_cost_of_decoding_equals_that_of_the_vae(folder: Path):
    pipe = difflex.load(folder)
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as counter:
        pipe.diffusers.components["vae"].decode(torch.zeros(1, 4, 16, 16))
    assert counter.get_total_flops() == pytest.approx(profile_model(str(folder), ()).decode, rel=0.01)


def test_a_profile_takes_kinds_streams_and_patterns(folder: Path):
    shapes = profile_model(str(folder), ("double.*:update", "double.1:neurons", "single.0:text"), None, None, (16, 24)).shapes
    assert {str(site): shape for site, shape in shapes.items()} == {
        "double.0:update": (24, 32),
        "double.1:update": (24, 32),
        "double.1:neurons": (24, 128),
        "single.0:text": (24, 32),
    }
    with pytest.raises(UnknownName, match=r"double\.7"):
        profile_model(str(folder), ("double.7",))


def test_a_profile_at_other_sites_needs_no_other_pass(folder: Path, monkeypatch: pytest.MonkeyPatch):
    profile = profile_model(str(folder), ("double.1:neurons",))
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *_, **__: pytest.fail("a pass"))
    other = profile_model(str(folder), ("double.0:update", "single.0:text"))
    assert other.step == profile.step > other.partial_step > profile.partial_step > 0


def test_a_table_of_other_sites_or_of_a_model_loaded_again_needs_no_other_pass(folder: Path, monkeypatch: pytest.MonkeyPatch):
    rows = difflex.load(folder).sites()
    pipe = difflex.load(folder)
    block = type(pipe.engine.sites.locate("double.1").module)
    monkeypatch.setattr(block, "forward", lambda *_, **__: pytest.fail("a pass"))
    assert pipe.sites("double.*:text") == [row for row in rows if str(row.site) in ("double.0:text", "double.1:text")]


def test_flux_is_profiled_without_a_file():
    profile = profile_model("black-forest-labs/FLUX.1-schnell", ("single.9",), None, None, (256, 256))
    assert profile.shapes == {Site("single.9"): (256, 3072)} and (profile.shot.steps, profile.shot.guidance) == (4, 0.0)
    # Two operations for each of 11.9 billion weights and 512 tokens; many weights apply to one stream or one token only.
    assert 0.5 < profile.step / (2 * 11.9e9 * 512) < 0.7
    assert sum(profile.weights.bytes("bf16", torch.device("cuda")).values()) == pytest.approx(31.4 * 2**30, rel=0.01)
    # An H100 in bf16 had 31.6 GiB in use for 1 image and 34.3 for 64 (shared/card): 46 MB an image.
    assert 2 * profile.values == pytest.approx(46e6, rel=0.1)


def test_a_profile_downloads_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a network connection"))
    with pytest.raises(UnknownName, match="could not be read from the local cache"):
        profile_model("OWNER/NAME-that-is-not-here", ())


def test_a_profile_of_an_unknown_family_is_an_error(folder: Path, tmp_path: Path):
    unknown = tiny_folder("flux", tmp_path / "other")
    index = unknown / "model_index.json"
    index.write_text(index.read_text().replace("FluxPipeline", "FluxImg2ImgPipeline"))
    with pytest.raises(UnknownName, match="denoiser of a FluxImg2ImgPipeline"):
        profile_model(str(unknown), ())


def test_a_profile_of_a_site_without_tokens_is_an_error(folder: Path):
    with pytest.raises(BadInput, match="returns no tokens or has no update"):
        profile_model(str(folder), ("transformer.time_text_embed.timestep_embedder",))
