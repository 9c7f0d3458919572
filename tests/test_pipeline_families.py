"""The table of families against the classes of diffusers: what a row says is what they take, and have."""

from inspect import signature

import diffusers
import pytest
import torch

from difflex.pipeline import Pipeline
from difflex.pipeline.engine import Engine
from difflex.pipeline.families import FAMILIES, Family, family_of
from difflex.pipeline.sources import ModelDefaults, ModelSource
from difflex.testing import tiny_pipeline

ROWS = [pytest.param(family, name, id=name) for family in FAMILIES for name in family.pipelines]


@pytest.mark.parametrize(("family", "name"), ROWS)
def test_a_pipeline_takes_what_its_row_gives(family: Family, name: str):
    made = getattr(diffusers, name)
    called, encoding = (set(signature(method).parameters) for method in (made.__call__, made.encode_prompt))
    given = {embed for embed in family.embeds if embed} | family.arguments.keys() | ({family.guided} - {None})
    given |= {f"negative_{embed}" for embed in family.embeds if embed and family.guidance == "separate"}
    assert given <= called
    assert {"guidance_scale", "num_inference_steps", "height", "width", "generator"} <= called
    assert family.encode.keys() | {"prompt", "num_images_per_prompt", "device"} <= encoding
    assert (family.text_length is not None) == ("max_sequence_length" in encoding)
    parts = set(signature(made.__init__).parameters)
    assert {family.denoiser, family.tokenizer} <= parts and (not family.large_text or family.large_text in parts)


def test_the_row_of_flux2_fits_the_pipeline_with_the_large_text_encoder(monkeypatch: pytest.MonkeyPatch):
    """FLUX.2 [dev] is the same transformer behind a text encoder that has no tiny form: its embeddings are drawn."""
    klein = tiny_pipeline("flux2")
    drawn = torch.randn(1, 24, 48, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(
        diffusers.Flux2Pipeline,
        "_get_mistral_3_small_prompt_embeds",
        staticmethod(lambda prompt, **_: drawn.expand(len(prompt), -1, -1)),
    )
    parts = {name: klein.components[name] for name in ("scheduler", "vae", "tokenizer", "transformer")}
    made = diffusers.Flux2Pipeline(text_encoder=None, **parts)  # pyright: ignore[reportArgumentType]
    made.set_progress_bar_config(disable=True)
    card = ModelDefaults(steps=2, guidance=4.0, pixels=((32, 32),), text_length=24)
    pipe = Pipeline(Engine(made, family_of("Flux2Pipeline"), card), ModelSource("flux2", None, None), "fp32")
    rows = pipe.sites()
    assert {str(row.site) for row in rows} >= {"double.0", "double.1:text", "single.2"}
    shots = list(pipe.shots(["a star", "a moon"]))
    for seen in pipe.harvest(shots, ["double.1", "single.2:text"], progress=False):
        assert len(seen.values) == 2 and seen.values.isfinite().all()
    assert pipe.generate("a star")[0].image.size == (32, 32)
