"""The families of diffusers pipelines, a row each: where their blocks are, what these return, how the pipeline is called."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from difflex.records import Stream

Guidance = Literal["doubled", "separate", "none"]
Latents = Literal["plain", "packed", "patchified"]


@dataclass(frozen=True, kw_only=True)
class BlockPattern:
    """A kind of block. A `*` stands for an index, the same one in `name` and `path`."""

    name: str
    """Short name, as in `double.*`."""
    path: str
    """Module path from the pipeline, as in `transformer.transformer_blocks.*`."""
    outputs: Mapping[Stream, int] = field(default_factory=lambda: MappingProxyType({"image": 0}))
    """The element of a returned tuple that holds each stream. A single tensor for two streams holds text first."""
    neurons: Mapping[Stream, str] = field(default_factory=lambda: MappingProxyType({}))
    """The module that returns the MLP's neurons after their activation. If both streams share it, it returns text first."""


@dataclass(frozen=True, kw_only=True)
class FewStepDefaults:
    """How to recognise and use the few-step models of a family, which are distilled to need no guidance."""

    config: Mapping[str, object]
    """Config entries, such as `scheduler.timestep_spacing`, with the values that such a model has."""
    steps: int = 4
    text_length: int | None = None
    """If it differs from the family's."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What difflex needs to know about a family of pipelines; the defaults serve an unknown one."""

    name: str
    pipelines: tuple[str, ...] = ()
    """Names of the diffusers classes."""
    denoiser: str = "transformer"
    """The component that is called once per step: `transformer` or `unet`."""
    blocks: tuple[BlockPattern, ...] = ()
    timestep_scale: float = 1.0
    """The scheduler's timestep divided by what the denoiser is given."""
    guidance: Guidance = "none"
    """`doubled`: one call for both halves, the unconditional one first; `separate`: a call for each half."""
    folded: str | None = None
    """The config entry of the denoiser or pipeline that is true if guidance is an input of the model or distilled into it."""
    guided: str | None = None
    """The argument of `__call__`, besides `guidance_scale`, that takes the guidance if there are two halves."""
    embeds: tuple[str | None, ...] = ()
    """The outputs of `encode_prompt`, as arguments of `__call__`; None for those that it does not take."""
    encode: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    """Further arguments of `encode_prompt`."""
    text_length: int | None = None
    """Default of `max_sequence_length`; None if the pipeline takes no such argument."""
    large_text: str = ""
    """The text encoder that is large enough to quantise."""
    tokenizer: str = "tokenizer"
    """The tokenizer that limits the length of a prompt."""
    arguments: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    """Further arguments of `__call__`."""
    steps: int = 50
    default_guidance: float = 0.0
    few: FewStepDefaults | None = None
    latents: Latents = "plain"
    """The denoiser's input: latents as the VAE returns them, packed in 2 x 2 patches, or patchified and normalised."""
    flow: bool = False
    """Trained with flow matching, which mixes in noise linearly, not with a variance-preserving schedule."""

    def is_guided(self, guidance: float, config: Callable[[str], object]) -> bool:
        """Whether the denoiser computes a conditional and an unconditional half; `config` looks up a config entry."""
        folded = self.folded is not None and bool(config(self.folded))
        return self.guidance != "none" and guidance > 1 and not folded


BOTH: Mapping[Stream, int] = MappingProxyType({"text": 0, "image": 1})


def _double(name: str, path: str, image: str, text: str) -> BlockPattern:
    return BlockPattern(name=name, path=path, outputs=BOTH, neurons=MappingProxyType({"image": image, "text": text}))


def _image_only(name: str, path: str) -> BlockPattern:
    return BlockPattern(name=name, path=path, neurons=MappingProxyType({"image": "ff.net.0"}))


def _attention(name: str, path: str) -> tuple[BlockPattern, BlockPattern]:
    """The rows of an attention stack of a U-Net and of the layers inside it."""
    return BlockPattern(name=name, path=path), _image_only(f"{name}.*", f"{path}.transformer_blocks.*")


UNET_BLOCKS = (
    *_attention("down.*.*", "unet.down_blocks.*.attentions.*"),
    *_attention("mid.*", "unet.mid_block.attentions.*"),
    *_attention("up.*.*", "unet.up_blocks.*.attentions.*"),
)

# SDXL Turbo, SD Turbo and similar models start at the last timestep; many-step models that do so too predict velocities.
TURBO = FewStepDefaults(
    config=MappingProxyType({"scheduler.timestep_spacing": "trailing", "scheduler.prediction_type": "epsilon"})
)

CLIP_PAIR = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")

FLUX2 = Family(
    name="flux2",
    pipelines=("Flux2Pipeline",),
    blocks=(
        _double("double.*", "transformer.transformer_blocks.*", "ff.act_fn", "ff_context.act_fn"),
        _double("single.*", "transformer.single_transformer_blocks.*", "attn.mlp_act_fn", "attn.mlp_act_fn"),
    ),
    timestep_scale=1000.0,
    embeds=("prompt_embeds", None),
    text_length=512,
    large_text="text_encoder",
    steps=50,
    default_guidance=4.0,
    latents="patchified",
    flow=True,
)

SDXL = Family(
    name="sdxl",
    pipelines=("StableDiffusionXLPipeline",),
    denoiser="unet",
    blocks=UNET_BLOCKS,
    guidance="doubled",
    folded="time_cond_proj_dim",
    embeds=CLIP_PAIR,
    default_guidance=5.0,
    few=TURBO,
)

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
        few=FewStepDefaults(config=MappingProxyType({"transformer.guidance_embeds": False}), text_length=256),
        latents="packed",
        flow=True,
    ),
    FLUX2,
    replace(
        FLUX2,
        name="flux2-klein",
        pipelines=("Flux2KleinPipeline",),
        guidance="separate",
        folded="is_distilled",
        steps=4,
        default_guidance=1.0,
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
    SDXL,
    replace(
        SDXL,
        name="sd1",
        pipelines=("StableDiffusionPipeline",),
        embeds=("prompt_embeds", "negative_prompt_embeds"),
        default_guidance=7.5,
    ),
    Family(
        name="pixart",
        pipelines=("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
        blocks=(_image_only("block.*", "transformer.transformer_blocks.*"),),
        guidance="doubled",
        embeds=("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask"),
        encode=MappingProxyType({"clean_caption": False}),
        text_length=120,
        large_text="text_encoder",
        # Binning would round the size to one of a table, and with it the number of tokens.
        arguments=MappingProxyType({"use_resolution_binning": False, "clean_caption": False, "negative_prompt": None}),
        steps=20,
        default_guidance=4.5,
    ),
)


def family_of(pipeline: str, denoiser: str = "transformer") -> Family:
    """Return the row of the diffusers class `pipeline`, or an empty row whose sites are full module paths."""
    matches = (family for family in FAMILIES if pipeline in family.pipelines)
    return next(matches, Family(name="other", denoiser=denoiser))
