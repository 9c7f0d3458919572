"""Tiny pipelines of every family, of the real diffusers and transformers classes, with random weights.

They need no download and run in milliseconds, so that code for any family can be tested anywhere.
"""

import string
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from difflex.files import write_file, write_json
from difflex.quiet import hide_progress_bars

WIDTH = 32
LETTERS = [*string.ascii_lowercase, *string.digits, ",", ".", "'", "-"]
TEXT_LENGTH = 24
HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
BLOCKS = {"num_layers": 2, "num_single_layers": 3, **HEADS}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 32,
}
"""A VAE that halves the sides of an image."""
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def tiny_pipeline(family: str, seed: int = 0, layers: tuple[int, int] | None = None) -> DiffusionPipeline:
    """Build a random pipeline of `family`, one of `TINY`; the seed determines the weights.

    A FLUX.1 may have other numbers of double and single blocks: those of the real one are 19 and 38.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = TINY[family](**({} if layers is None else {"layers": layers}))
        _fill_zeros(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_folder(
    family: str,
    folder: Path,
    seed: int = 0,
    defaults: Mapping[str, object] | None = None,
    layers: tuple[int, int] | None = None,
) -> Path:
    """Save a `tiny_pipeline` in `folder` with a `difflex.json`, in which `defaults` replaces entries."""
    with hide_progress_bars():
        tiny_pipeline(family, seed, layers).save_pretrained(folder)
    settings = {"pixels": [[32, 32], [16, 24]], "steps": 2, "guidance": 0.0, "text_length": TEXT_LENGTH}
    write_json(folder / "difflex.json", 1, {"name": folder.name, "family": family, **settings, **(defaults or {})})
    return folder


def tiny_clip(folder: Path, seed: int = 0, side: int = 32) -> Path:
    """Save a random CLIP in `folder` that takes images of `side` pixels and reads letters."""
    vision = {"image_size": side, "patch_size": side // 4, "num_attention_heads": 2, "num_hidden_layers": 2}
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "projection_dim": WIDTH}
    with torch.random.fork_rng(), hide_progress_bars():
        torch.manual_seed(seed)
        text = _clip().config.to_dict()
        config = _transformers("CLIPConfig", text_config=text, vision_config={**vision, **sizes}, projection_dim=WIDTH)
        _transformers("CLIPModel", config).save_pretrained(folder)
        _clip_tokenizer().save_pretrained(folder)
    write_file(folder / "preprocessor_config.json", b'{"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}')
    return folder


def _diffusers(name: str, *arguments: object, **named: object) -> Any:
    """Return an object of the diffusers class `name`; its constructor is annotated with other types than it takes."""
    return getattr(diffusers, name)(*arguments, **named)


def _transformers(name: str, *arguments: object, **named: object) -> Any:
    return getattr(transformers, name)(*arguments, **named)


def _fill_zeros(pipeline: DiffusionPipeline) -> None:
    """Fill parameters that start at zero (biases, gates, projections) with small numbers: else whole branches have no effect."""
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.eval().requires_grad_(False)
            for parameter in component.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.05)


def _clip(projected: bool = False) -> Any:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "projection_dim": WIDTH, "max_position_embeddings": 77}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
    # With an end token 2, transformers would take it for a config of an old file and pool differently.
    tokens = {"vocab_size": 2 + 2 * len(LETTERS), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = _transformers("CLIPTextConfig", **sizes, **layers, **tokens)
    return _transformers("CLIPTextModelWithProjection" if projected else "CLIPTextModel", config)


def _clip_tokenizer() -> Any:
    pieces = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(letter + "</w>" for letter in LETTERS)]
    return _transformers("CLIPTokenizer", vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=77)


def _t5(width: int = WIDTH) -> Any:
    layers = {"num_layers": 2, "num_heads": 2, "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0}
    config = _transformers("T5Config", vocab_size=4 + len(LETTERS), d_model=width, d_kv=16, d_ff=2 * WIDTH, **layers)
    return _transformers("T5EncoderModel", config)


def _t5_tokenizer() -> Any:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -1.0), *((letter, -2.0) for letter in LETTERS)]
    return _transformers("T5TokenizerFast", vocab=pieces, extra_ids=0, model_max_length=512)


def _vae(shift: float | None = 0.1) -> Any:
    scale = {"latent_channels": 4, "scaling_factor": 0.5, "shift_factor": shift}
    return _diffusers("AutoencoderKL", **VAE, **scale, mid_block_add_attention=False)


def _flow(shift: float, dynamic: bool = False) -> Any:
    return _diffusers("FlowMatchEulerDiscreteScheduler", shift=shift, use_dynamic_shifting=dynamic)


def _flux(dev: bool = False, layers: tuple[int, int] = (2, 3)) -> DiffusionPipeline:
    blocks = {**HEADS, "num_layers": layers[0], "num_single_layers": layers[1]}
    sizes = {"in_channels": 16, "joint_attention_dim": WIDTH, "pooled_projection_dim": WIDTH, "axes_dims_rope": (4, 6, 6)}
    return _diffusers(
        "FluxPipeline",
        scheduler=_flow(3.0 if dev else 1.0, dynamic=dev),
        vae=_vae(),
        text_encoder=_clip(),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_t5(),
        tokenizer_2=_t5_tokenizer(),
        transformer=_diffusers("FluxTransformer2DModel", **blocks, **sizes, guidance_embeds=dev),
    )


def _flux2() -> DiffusionPipeline:
    """FLUX.2 [klein] with its small Qwen3 text encoder; all models of FLUX.2 have this class of transformer."""
    pieces = ["<|endoftext|>", *LETTERS, "Ġ", "Ċ"]
    tokenizer = _transformers("Qwen2TokenizerFast", vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    # The pipeline concatenates the outputs of layers 9, 18 and 27.
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 27, "max_position_embeddings": 512}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    encoder = _transformers("Qwen3ForCausalLM", _transformers("Qwen3Config", vocab_size=len(pieces), **sizes, **heads))
    width = {"in_channels": 16, "joint_attention_dim": 48, "timestep_guidance_channels": 16, "axes_dims_rope": (4, 4, 4, 4)}
    return _diffusers(
        "Flux2KleinPipeline",
        scheduler=_flow(1.0, dynamic=True),
        vae=_diffusers("AutoencoderKLFlux2", **VAE, latent_channels=4),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=_diffusers("Flux2Transformer2DModel", **BLOCKS, **width, guidance_embeds=False),
        is_distilled=False,
    )


def _sd3() -> DiffusionPipeline:
    # Dual attention in the first block, as in SD 3.5 medium.
    blocks = {"num_layers": 3, **HEADS, "dual_attention_layers": (0,), "qk_norm": "rms_norm"}
    latents = {"sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "pos_embed_max_size": 32}
    text = {"joint_attention_dim": 2 * WIDTH, "caption_projection_dim": WIDTH, "pooled_projection_dim": 2 * WIDTH}
    return _diffusers(
        "StableDiffusion3Pipeline",
        transformer=_diffusers("SD3Transformer2DModel", **blocks, **latents, **text),
        scheduler=_flow(3.0),
        vae=_vae(),
        text_encoder=_clip(projected=True),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_clip(projected=True),
        tokenizer_2=_clip_tokenizer(),
        # SD3 concatenates the features of the two CLIPs and pads them to the width of T5.
        text_encoder_3=_t5(2 * WIDTH),
        tokenizer_3=_t5_tokenizer(),
    )


def _unet(cross: int, **changes: object) -> Any:
    """Three levels, attention in the lower two, as in SDXL: `down.2.1`, `mid.0`, `up.0.0` and `up.0.1` exist."""
    return _diffusers(
        "UNet2DConditionModel",
        sample_size=16,
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=cross,
        **changes,
    )


def _sdxl() -> DiffusionPipeline:
    blocks = {"use_linear_projection": True, "transformer_layers_per_block": (1, 1, 2)}
    size = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + WIDTH}
    return _diffusers(
        "StableDiffusionXLPipeline",
        vae=_vae(shift=None),
        text_encoder=_clip(),
        text_encoder_2=_clip(projected=True),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_clip_tokenizer(),
        unet=_unet(2 * WIDTH, **blocks, addition_embed_type="text_time", **size),
        scheduler=_diffusers("EulerDiscreteScheduler", **BETAS),
        add_watermarker=False,
    )


def _sd1() -> DiffusionPipeline:
    return _diffusers(
        "StableDiffusionPipeline",
        vae=_vae(shift=None),
        text_encoder=_clip(),
        tokenizer=_clip_tokenizer(),
        unet=_unet(WIDTH),
        # SD 1.x comes with PNDM, which repeats a timestep: the hardest case for telling the step of a call.
        scheduler=_diffusers("PNDMScheduler", **BETAS, skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _pixart(kind: str = "PixArtAlphaPipeline") -> DiffusionPipeline:
    latents = {"in_channels": 4, "out_channels": 8, "sample_size": 16, "patch_size": 2}
    text = {"cross_attention_dim": WIDTH, "caption_channels": WIDTH, "use_additional_conditions": False}
    return _diffusers(
        kind,
        tokenizer=_t5_tokenizer(),
        text_encoder=_t5(),
        vae=_vae(shift=None),
        transformer=_diffusers("PixArtTransformer2DModel", num_layers=3, **HEADS, **latents, **text),
        scheduler=_diffusers("DPMSolverMultistepScheduler"),
    )


TINY: Mapping[str, Callable[..., DiffusionPipeline]] = MappingProxyType(
    {
        "flux": _flux,
        "flux-dev": partial(_flux, dev=True),
        "flux2": _flux2,
        "sd3": _sd3,
        "sdxl": _sdxl,
        "sd1": _sd1,
        "pixart": _pixart,
        "pixart-sigma": partial(_pixart, "PixArtSigmaPipeline"),
    }
)
"""Builders of the tiny pipelines by the name of their family."""
