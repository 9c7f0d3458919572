"""What a pipeline is made of, without its weights: read from the configs of a folder or of the hub, or known to the package."""

import os
import warnings
from collections.abc import Mapping
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from difflex.errors import BadInput

__all__ = ["PLANS", "ComponentPlan", "PipelinePlan", "read_plan"]


class ComponentPlan(NamedTuple):
    """A component: its class and what that class is built from."""

    library: str
    kind: str
    config: Mapping[str, Any] | None
    """None for a tokenizer, which is read from files or stood in for."""

    def build(self) -> Any:
        """The component, on torch's default device and in its default dtype."""
        made = getattr(import_module(self.library), self.kind)
        if self.library == "diffusers":
            return made.from_config(dict(self.config or {}))
        return made(made.config_class(**dict(self.config or {})))

    def weightless(self) -> nn.Module | None:
        """The component on the meta device, where it takes no memory; None if it has no weights at all."""
        if not issubclass(getattr(import_module(self.library), self.kind), nn.Module):
            return None
        with torch.device("meta"):
            return self.build()


class PipelinePlan(NamedTuple):
    """A pipeline's class and its parts."""

    pipeline: str
    parts: Mapping[str, ComponentPlan]
    settings: Mapping[str, Any]
    """Further arguments of the pipeline's constructor, as in `is_distilled`."""
    absent: tuple[str, ...] = ()
    """Optional parts that this model does without."""

    def entry(self, path: str) -> object:
        """An entry of a part's config by `part.entry`, the default of the part's class where the config leaves it out."""
        name, key = path.split(".")
        part = self.parts.get(name)
        if part is None:
            return None
        default = signature(getattr(import_module(part.library), part.kind).__init__).parameters.get(key)
        return (part.config or {}).get(key, default and default.default)


def read_plan(source: str | Path, revision: str | None = None, offline: bool = False) -> PipelinePlan:
    """The plan in a folder or of a hub model; of the latter only its small config files are fetched."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers passes the hub an argument that it no longer has
        return _read(os.fspath(source), {"revision": revision, "local_files_only": offline or Path(source).is_dir()})


def _read(source: str, where: Mapping[str, Any]) -> PipelinePlan:
    index = cast(dict[str, Any], DiffusionPipeline.load_config(source, **where))
    entries = {name: entry for name, entry in index.items() if isinstance(entry, (list, tuple)) and len(entry) == 2}
    present = {name: entry for name, entry in entries.items() if entry[0] is not None}
    settings = {name: entry for name, entry in index.items() if isinstance(entry, (bool, int, float, str)) and name[0] != "_"}
    parts = {name: _part(entry[0], entry[1], source, name, where) for name, entry in present.items()}
    return PipelinePlan(str(index["_class_name"]), parts, settings, tuple(entries.keys() - present.keys()))


def _part(library: str, kind: str, source: str, name: str, where: Mapping[str, Any]) -> ComponentPlan:
    if library not in ("diffusers", "transformers"):
        raise BadInput(f"The part {name} of {source} is of the library {library}, which only the model's own code can build.")
    made = getattr(import_module(library), kind)
    if library == "diffusers":
        return ComponentPlan(library, kind, dict(made.load_config(source, subfolder=name, **where)))
    if not hasattr(made, "config_class"):  # tokenizers and processors have none
        return ComponentPlan(library, kind, None)
    return ComponentPlan(library, kind, made.config_class.from_pretrained(source, subfolder=name, **where).to_dict())


def _flux(guidance_embeds: bool, shift: float) -> PipelinePlan:
    """The geometry of FLUX.1."""
    scheduler = {"num_train_timesteps": 1000, "shift": shift, "use_dynamic_shifting": guidance_embeds}
    autoencoder = {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "latent_channels": 16,
        "sample_size": 1024,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    clip = {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "projection_dim": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 49407,
    }
    t5 = {
        "vocab_size": 32128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
    }
    parts = {
        "scheduler": ComponentPlan("diffusers", "FlowMatchEulerDiscreteScheduler", scheduler),
        "vae": ComponentPlan("diffusers", "AutoencoderKL", autoencoder),
        "text_encoder": ComponentPlan("transformers", "CLIPTextModel", clip),
        "tokenizer": ComponentPlan("transformers", "CLIPTokenizer", None),
        "text_encoder_2": ComponentPlan("transformers", "T5EncoderModel", t5),
        "tokenizer_2": ComponentPlan("transformers", "T5TokenizerFast", None),
        # Its defaults are the geometry of FLUX.1 [schnell].
        "transformer": ComponentPlan("diffusers", "FluxTransformer2DModel", {"guidance_embeds": guidance_embeds}),
    }
    return PipelinePlan("FluxPipeline", parts, {})


PLANS: Mapping[str, PipelinePlan] = MappingProxyType(
    {
        "black-forest-labs/FLUX.1-schnell": _flux(guidance_embeds=False, shift=1.0),
        "black-forest-labs/FLUX.1-dev": _flux(guidance_embeds=True, shift=3.0),
    }
)
"""Geometries that need no file, by the name of the model on the hub."""
