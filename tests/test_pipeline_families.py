"""The table of families, compared with the classes of diffusers."""

from inspect import signature

import diffusers
import pytest
import torch

from difflex.pipeline import Pipeline
from difflex.pipeline.engine import Engine
from difflex.pipeline.families import FAMILIES, Family, family_of
from difflex.pipeline.sources import ModelDefaults
from difflex.testing import tiny_pipeline

ROWS = [pytest.param(family, name, id=name) for family in FAMILIES for name in family.pipelines]


@pytest.mark.parametrize(("family", "name"), ROWS)
def test_the_arguments_in_a_row_exist_in_the_pipeline_class(family: Family, name: str):
    pipeline = getattr(diffusers, name)
    accepted, encode_accepted = (set(signature(method).parameters) for method in (pipeline.__call__, pipeline.encode_prompt))
    arguments = {embed for embed in family.embeds if embed} | family.arguments.keys() | ({family.guided} - {None})
    arguments |= {f"negative_{embed}" for embed in family.embeds if embed and family.guidance == "separate"}
    assert arguments <= accepted
    assert {"guidance_scale", "num_inference_steps", "height", "width", "generator"} <= accepted
    assert family.encode.keys() | {"prompt", "num_images_per_prompt", "device"} <= encode_accepted
    assert (family.text_length is not None) == ("max_sequence_length" in encode_accepted)
    components = set(signature(pipeline.__init__).parameters)
    assert {family.denoiser, family.tokenizer} <= components and (not family.large_text or family.large_text in components)


def test_the_row_of_flux2_fits_its_pipeline_with_the_large_text_encoder(monkeypatch: pytest.MonkeyPatch):
    """FLUX.2 [dev] is the same transformer behind a text encoder that has no tiny form: its embeddings are random here."""
    klein = tiny_pipeline("flux2")
    embeddings = torch.randn(1, 24, 48, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(
        diffusers.Flux2Pipeline,
        "_get_mistral_3_small_prompt_embeds",
        staticmethod(lambda prompt, **_: embeddings.expand(len(prompt), -1, -1)),
    )
    components = {name: klein.components[name] for name in ("scheduler", "vae", "tokenizer", "transformer")}
    diffusers_pipeline = diffusers.Flux2Pipeline(text_encoder=None, **components)  # pyright: ignore[reportArgumentType]
    diffusers_pipeline.set_progress_bar_config(disable=True)
    defaults = ModelDefaults(steps=2, guidance=4.0, pixels=((32, 32),), text_length=24)
    pipe = Pipeline(Engine(diffusers_pipeline, family_of("Flux2Pipeline"), defaults), "flux2", None, "fp32")
    rows = pipe.sites()
    assert {str(row.site) for row in rows} >= {"double.0", "double.1:text", "single.2"}
    shots = list(pipe.shots(["a star", "a moon"]))
    for activations in pipe.harvest(shots, ["double.1", "single.2:text"], progress=False):
        assert len(activations.values) == 2 and activations.values.isfinite().all()
    assert pipe.generate("a star")[0].image.size == (32, 32)
