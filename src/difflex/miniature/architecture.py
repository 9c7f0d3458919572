"""The untrained parts of a miniature FLUX: classes of diffusers and transformers in small sizes."""

import string
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from difflex.miniature.captions import WORDS

LATENT_CHANNELS = 16
CLIP_LENGTH = 32
SHIFT = 3.0
"""Moves the steps of the scheduler towards noise, where the layout is decided: four steps begin at 1, 0.9, 0.75, 0.5."""
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class MiniatureConfig:
    """The sizes of a miniature FLUX."""

    double_blocks: int = 3
    single_blocks: int = 4
    heads: int = 3
    head_width: int = 64
    rotary_axes: tuple[int, int, int] = (16, 24, 24)
    """The parts of a head's width that are rotated by the text position, the row and the column."""
    text_width: int = 128
    text_length: int = 26
    """In T5 tokens; longer captions are cut."""


def untrained_pipeline(architecture: MiniatureConfig, seed: int) -> FluxPipeline:
    """Make a pipeline with random weights; the encoder of its autoencoder is fitted later in closed form."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT, use_dynamic_shifting=False),
            vae=_autoencoder(),
            text_encoder=_clip(architecture),
            tokenizer=_clip_tokenizer(),
            text_encoder_2=_t5(architecture),
            tokenizer_2=_t5_tokenizer(architecture.text_length),
            transformer=_transformer(architecture),
        )


def _transformer(sizes: MiniatureConfig) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=sizes.double_blocks,
        num_single_layers=sizes.single_blocks,
        attention_head_dim=sizes.head_width,
        num_attention_heads=sizes.heads,
        joint_attention_dim=sizes.text_width,
        pooled_projection_dim=sizes.text_width,
        guidance_embeds=False,
        axes_dims_rope=sizes.rotary_axes,
    )


def _autoencoder() -> AutoencoderKL:
    # The closed-form encoder needs six channels in each of eight norm groups (see autoencoder.py).
    sizes = {
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "block_out_channels": [24, 48, 48],
        "layers_per_block": 1,
        "latent_channels": LATENT_CHANNELS,
        "norm_num_groups": 8,
        "sample_size": 64,
        "scaling_factor": 1.0,
        "shift_factor": 0.0,  # FluxPipeline does not accept None
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
    }
    autoencoder = AutoencoderKL.from_config(sizes)
    assert isinstance(autoencoder, AutoencoderKL)
    return autoencoder


def _clip(sizes: MiniatureConfig) -> CLIPTextModel:
    vocabulary = _clip_vocabulary()
    end = vocabulary.index(CLIP_END)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=sizes.text_width,
            intermediate_size=2 * sizes.text_width,
            projection_dim=sizes.text_width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CLIP_LENGTH,
            bos_token_id=vocabulary.index(CLIP_START),
            eos_token_id=end,
            pad_token_id=end,
        )
    )


def _t5(sizes: MiniatureConfig) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(_t5_pieces()),
            d_model=sizes.text_width,
            d_kv=sizes.text_width // 4,
            d_ff=2 * sizes.text_width,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


def _clip_tokenizer() -> CLIPTokenizer:
    vocabulary = {token: i for i, token in enumerate(_clip_vocabulary())}
    return CLIPTokenizer(vocab=vocabulary, merges=_clip_merges(), model_max_length=CLIP_LENGTH)  # pyright: ignore[reportArgumentType] (it takes pairs)


def _clip_vocabulary() -> list[str]:
    letters = [letter + end for end in ("", "</w>") for letter in string.ascii_lowercase]
    return [*letters, *sorted({"".join(pair) for pair in _clip_merges()}), CLIP_START, CLIP_END]


def _clip_merges() -> list[tuple[str, str]]:
    """Return byte pairs that join each known word letter by letter from its end to one token; other words are spelled.

    Pairs that grow from the end of a word cannot interfere with one another.
    """
    return sorted({(word[i], word[i + 1 :] + "</w>") for word in WORDS for i in range(len(word) - 1)})


def _t5_tokenizer(length: int) -> T5Tokenizer:
    return T5Tokenizer(vocab=_t5_pieces(), extra_ids=0, model_max_length=length)


def _t5_pieces() -> list[tuple[str, float]]:
    """Return pieces with log-probabilities: known words as a whole, letters for all others."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    spelled = [("▁", -8.0), *((letter, -10.0) for letter in string.ascii_lowercase)]
    return special + [("▁" + word, -2.0) for word in WORDS] + spelled
