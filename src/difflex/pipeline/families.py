"""The families of pipelines, one row of plain data each: where the blocks are, what they return, how they are called."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from difflex.records import Stream

__all__ = ["FAMILIES", "BlockPattern", "Family", "FewStepDefaults", "family_of"]

Guidance = Literal["doubled", "separate", "none"]
Latents = Literal["plain", "packed", "patchified"]


@dataclass(frozen=True, kw_only=True)
class BlockPattern:
    """A kind of block: `*` stands for an index, the same ones in `name` and `path`."""

    name: str
    """Short name, as in `double.*`."""
    path: str
    """Module path from the pipeline, as in `transformer.transformer_blocks.*`."""
    outputs: Mapping[Stream, int] = field(default_factory=lambda: MappingProxyType({"image": 0}))
    """Which element of a returned tuple is which stream. A block that returns one tensor for two streams holds text first."""
    neurons: Mapping[Stream, str] = field(default_factory=lambda: MappingProxyType({}))
    """The module whose output is the MLP after its activation. The same module for both streams: text tokens first."""


@dataclass(frozen=True, kw_only=True)
class FewStepDefaults:
    """How the few-step models of a family, distilled to need no guidance, are told and used."""

    signs: Mapping[str, object]
    """Entries of the configs, as in `scheduler.timestep_spacing`, and the values that together tell such a model."""
    steps: int = 4
    text_length: int | None = None
    """Where it differs from the family's."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What difflex must know of a family of pipelines; all of it may be left at its default for an unknown one."""

    name: str
    pipelines: tuple[str, ...] = ()
    """Names of the diffusers classes."""
    denoiser: str = "transformer"
    """The component that is called once per step: `transformer` or `unet`."""
    blocks: tuple[BlockPattern, ...] = ()
    timestep_scale: float = 1.0
    """The scheduler's timestep divided by what the denoiser is given."""
    guidance: Guidance = "none"
    """`doubled`: one call, unconditional half first; `separate`: a call for each half."""
    folded: str | None = None
    """The entry of the denoiser's or pipeline's config that, where it is true, says that guidance is an input or is folded in."""
    guided: str | None = None
    """The argument of `__call__`, beside `guidance_scale`, that takes the guidance where there are two halves."""
    embeds: tuple[str | None, ...] = ()
    """What `encode_prompt` returns, by the names that `__call__` takes; None for what it does not take."""
    encode: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    """Further arguments of `encode_prompt`."""
    text_length: int | None = None
    """Default of `max_sequence_length`; None where the pipeline takes no such argument."""
    large_text: str = ""
    """The text encoder that is worth quantising."""
    tokenizer: str = "tokenizer"
    """The tokenizer that decides how long a prompt may be."""
    arguments: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    """Further arguments of `__call__`."""
    steps: int = 50
    default_guidance: float = 0.0
    few: FewStepDefaults | None = None
    latents: Latents = "plain"
    """What the denoiser takes: latents as the autoencoder gives them, packed in 2 x 2 patches, or patchified and normalised."""
    flow: bool = False
    """Noise is mixed in along a straight line (flow matching), not by a variance-preserving schedule."""


BOTH: Mapping[Stream, int] = MappingProxyType({"text": 0, "image": 1})


def _double(name: str, path: str, image: str, text: str) -> BlockPattern:
    return BlockPattern(name=name, path=path, outputs=BOTH, neurons=MappingProxyType({"image": image, "text": text}))


def _attention(name: str, path: str) -> tuple[BlockPattern, BlockPattern]:
    """The rows of a U-Net's attention stack and of the layers inside it."""
    inner = BlockPattern(name=f"{name}.*", path=f"{path}.transformer_blocks.*", neurons=MappingProxyType({"image": "ff.net.0"}))
    return BlockPattern(name=name, path=path), inner


UNET = (
    *_attention("down.*.*", "unet.down_blocks.*.attentions.*"),
    *_attention("mid.*", "unet.mid_block.attentions.*"),
    *_attention("up.*.*", "unet.up_blocks.*.attentions.*"),
)

FLUX2 = (
    _double("double.*", "transformer.transformer_blocks.*", "ff.act_fn", "ff_context.act_fn"),
    _double("single.*", "transformer.single_transformer_blocks.*", "attn.mlp_act_fn", "attn.mlp_act_fn"),
)

# SDXL Turbo, SD Turbo and their kin start at the last timestep; models for many steps that do so too predict velocities.
TURBO = FewStepDefaults(
    signs=MappingProxyType({"scheduler.timestep_spacing": "trailing", "scheduler.prediction_type": "epsilon"})
)

CLIP_PAIR = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")

FAMILIES = (
    Family(
        name="flux",
        pipelines=("FluxPipeline",),
        blocks=(
            _double("double.*", "transformer.transformer_blocks.*", "ff.net.0", "ff_context.net.0"),
            _double("single.*", "transformer.single_transformer_blocks.*", "act_mlp", "act_mlp"),
        ),
        timestep_scale=1000.0,
        guidance="separate",
        folded="guidance_embeds",
        guided="true_cfg_scale",
        embeds=("prompt_embeds", "pooled_prompt_embeds", None),
        text_length=512,
        large_text="text_encoder_2",
        tokenizer="tokenizer_2",
        steps=28,
        default_guidance=3.5,
        # FLUX.1 schnell.
        few=FewStepDefaults(signs=MappingProxyType({"transformer.guidance_embeds": False}), text_length=256),
        latents="packed",
        flow=True,
    ),
    Family(
        name="flux2",
        pipelines=("Flux2Pipeline",),
        blocks=FLUX2,
        timestep_scale=1000.0,
        embeds=("prompt_embeds", None),
        text_length=512,
        large_text="text_encoder",
        steps=50,
        default_guidance=4.0,
        latents="patchified",
        flow=True,
    ),
    Family(
        name="flux2-klein",
        pipelines=("Flux2KleinPipeline",),
        blocks=FLUX2,
        timestep_scale=1000.0,
        guidance="separate",
        folded="is_distilled",
        embeds=("prompt_embeds", None),
        text_length=512,
        large_text="text_encoder",
        steps=4,
        default_guidance=1.0,
        latents="patchified",
        flow=True,
    ),
    Family(
        name="sd3",
        pipelines=("StableDiffusion3Pipeline",),
        blocks=(_double("joint.*", "transformer.transformer_blocks.*", "ff.net.0", "ff_context.net.0"),),
        guidance="doubled",
        embeds=CLIP_PAIR,
        encode=MappingProxyType({"prompt_2": None, "prompt_3": None}),
        text_length=256,
        large_text="text_encoder_3",
        tokenizer="tokenizer_3",
        steps=28,
        default_guidance=7.0,
        flow=True,
    ),
    Family(
        name="sdxl",
        pipelines=("StableDiffusionXLPipeline",),
        denoiser="unet",
        blocks=UNET,
        guidance="doubled",
        folded="time_cond_proj_dim",
        embeds=CLIP_PAIR,
        default_guidance=5.0,
        few=TURBO,
    ),
    Family(
        name="sd1",
        pipelines=("StableDiffusionPipeline",),
        denoiser="unet",
        blocks=UNET,
        guidance="doubled",
        folded="time_cond_proj_dim",
        embeds=("prompt_embeds", "negative_prompt_embeds"),
        default_guidance=7.5,
        few=TURBO,
    ),
    Family(
        name="pixart",
        pipelines=("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
        blocks=(
            BlockPattern(
                name="block.*", path="transformer.transformer_blocks.*", neurons=MappingProxyType({"image": "ff.net.0"})
            ),
        ),
        guidance="doubled",
        embeds=(
            "prompt_embeds",
            "prompt_attention_mask",
            "negative_prompt_embeds",
            "negative_prompt_attention_mask",
        ),
        encode=MappingProxyType({"clean_caption": False}),
        text_length=120,
        large_text="text_encoder",
        # Binning rounds the size to one of a table: the tokens would no longer be those of the image asked for.
        arguments=MappingProxyType({"use_resolution_binning": False, "clean_caption": False, "negative_prompt": None}),
        steps=20,
        default_guidance=4.5,
    ),
)


def family_of(pipeline: str, denoiser: str = "transformer") -> Family:
    """The row of the diffusers class `pipeline`, or an empty row whose sites are full module paths."""
    for family in FAMILIES:
        if pipeline in family.pipelines:
            return family
    return Family(name="other", denoiser=denoiser)
