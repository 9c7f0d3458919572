"""The parts of a miniature FLUX: classes of diffusers and transformers in small sizes, untrained, and the training of the VAE.

The encoder of the VAE has a closed form (principal components of 4 x 4 patches), and its decoder is trained on these latents.
Training both together on a small budget loses the colours; the components keep them exactly and need no training.
"""

import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from difflex.miniature.captions import WORDS

LATENT_CHANNELS = 16
CLIP_LENGTH = 32
SHIFT = 3.0
"""Moves the steps of the scheduler towards noise, where the layout is decided: four steps begin at 1, 0.9, 0.75, 0.5."""
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
PATCH = 4
GROUP = 6
"""Channels per norm group."""
PROJECTION = "encoder.down_blocks.1.downsamplers.0.conv"
"""The layer of the VAE that holds the components."""
ANCHOR = 300.0
"""The value of constant channels that keep the group norm constant; large compared with components of size 1."""


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
    """Make a pipeline with random weights; `write_encoder` sets those of its VAE's encoder later."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT, use_dynamic_shifting=False),
            vae=_vae(),
            text_encoder=_clip(architecture),
            tokenizer=_clip_tokenizer(),
            text_encoder_2=_t5(architecture),
            tokenizer_2=T5Tokenizer(vocab=_t5_pieces(), extra_ids=0, model_max_length=architecture.text_length),
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


def _vae() -> AutoencoderKL:
    # The closed-form encoder needs six channels in each of eight norm groups.
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
    vae = AutoencoderKL.from_config(sizes)
    assert isinstance(vae, AutoencoderKL)
    return vae


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


def _t5_pieces() -> list[tuple[str, float]]:
    """Return pieces with log-probabilities: known words as a whole, letters for all others."""
    special = [(name, 0.0) for name in ("<pad>", "</s>", "<unk>")]
    return [*special, *(("▁" + word, -2.0) for word in WORDS), ("▁", -8.0), *((x, -10.0) for x in string.ascii_lowercase)]


class PatchComponents(NamedTuple):
    """Half-whitened principal components of 4 x 4 patches: the encoder as one small matrix product."""

    mean: Float[Tensor, " patch"]
    weights: Float[Tensor, "latent patch"]

    @classmethod
    def of(cls, images: Float[Tensor, "image 3 height width"]) -> "PatchComponents":
        """Fit the components of images in [-1, 1]: each divided by the fourth root of its variance, mean variance 1."""
        patches = F.unfold(images, PATCH, stride=PATCH).movedim(1, 2).reshape(-1, 3 * PATCH**2).double()
        mean = patches.mean(0)
        values, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
        values, vectors = values.flip(0)[:LATENT_CHANNELS], vectors.flip(1)[:, :LATENT_CHANNELS]
        scale = values.clamp(min=1e-8) ** -0.25
        scale = scale / (values * scale**2).mean().sqrt()
        return cls(mean.float(), (vectors * scale).T.float().contiguous())

    @classmethod
    def of_encoder(cls, vae: AutoencoderKL) -> "PatchComponents":
        """Read the components from an encoder that `write_encoder` has set.

        Components that are fitted on another machine may differ in their signs, and latents with them.
        """
        tensors, rows = vae.state_dict(), [_channel(i) for i in range(LATENT_CHANNELS)]
        kernel, bias = tensors[f"{PROJECTION}.weight"][rows, :12, :2, :2], tensors[f"{PROJECTION}.bias"][rows]
        weights = kernel.unflatten(1, (3, 2, 2)).permute(0, 1, 4, 2, 5, 3).reshape(LATENT_CHANNELS, -1)
        # The bias is -weights @ mean. The rows are orthogonal, so this mean gives the same one.
        return cls(weights.T @ (-bias / weights.square().sum(1)), weights)

    def encode(self, images: Float[Tensor, "image 3 height width"]) -> Float[Tensor, "image latent row column"]:
        """Return the latents, a hundred times faster than the convolutions of the encoder."""
        patches = F.unfold(images, PATCH, stride=PATCH).movedim(1, 2)
        latents = (patches - self.mean) @ self.weights.T
        return latents.movedim(1, 2).unflatten(2, [side // PATCH for side in images.shape[2:]])


@torch.no_grad()
def write_encoder(vae: AutoencoderKL, components: PatchComponents) -> None:
    """Set the weights of the encoder so that it computes the components.

    Components are pairs y, -y: silu(y) - silu(-y) = y, and their mean is 0. Two constant channels +-ANCHOR in each norm group
    make its variance constant, so that the norm divides by a known number, by which the last convolution multiplies.
    """
    weights = {name: parameter for name, parameter in vae.named_parameters() if name.startswith("encoder.")}
    for parameter in weights.values():
        parameter.zero_()
    for colour in range(3):
        weights["encoder.conv_in.weight"][colour, colour, 1, 1] = 1.0
    _gather(weights["encoder.down_blocks.0.downsamplers.0.conv.weight"])
    for channel in range(12):
        weights["encoder.down_blocks.1.resnets.0.conv_shortcut.weight"][channel, channel, 0, 0] = 1.0
    _project(weights[f"{PROJECTION}.weight"], weights[f"{PROJECTION}.bias"], components)
    weights["encoder.conv_norm_out.weight"].fill_(1.0)
    scale = ANCHOR * (2 / GROUP) ** 0.5
    for i in range(LATENT_CHANNELS):
        weights["encoder.conv_out.weight"][i, _channel(i), 1, 1] = scale
        weights["encoder.conv_out.weight"][i, _channel(i) + 1, 1, 1] = -scale
    weights["encoder.conv_out.bias"][LATENT_CHANNELS:] = -30.0  # log variance: the encoder is deterministic


def _channel(component: int) -> int:
    """Return the channel of a component; the next one is its negative. A norm group has two components and two anchors."""
    return component // 2 * GROUP + component % 2 * 2


def _gather(weight: Tensor) -> None:
    """Space to depth: output c * 4 + 2 * dy + dx is colour c at (dy, dx) of each 2 x 2 block.

    diffusers pads right and below only, so the kernel's corner (0, 0) lies on the block's first pixel.
    """
    for c in range(3):
        for dy in range(2):
            for dx in range(2):
                weight[c * 4 + 2 * dy + dx, c, dy, dx] = 1.0


def _project(weight: Tensor, bias: Tensor, components: PatchComponents) -> None:
    """Map the 12 channels of 2 x 2 blocks to the components of 4 x 4 patches, and set the anchors."""
    # colour, block row, row in block, block column, column in block
    patch = components.weights.view(LATENT_CHANNELS, 3, 2, 2, 2, 2)
    kernel = patch.permute(0, 1, 3, 5, 2, 4).reshape(LATENT_CHANNELS, 12, 2, 2)
    offset = components.weights @ components.mean
    for i in range(LATENT_CHANNELS):
        for channel, sign in ((_channel(i), 1), (_channel(i) + 1, -1)):
            weight[channel, :12, :2, :2] = sign * kernel[i]
            bias[channel] = -sign * offset[i]
    for anchor in range(GROUP - 2, len(bias), GROUP):
        bias[anchor], bias[anchor + 1] = ANCHOR, -ANCHOR


def decoder_losses(
    vae: AutoencoderKL,
    components: PatchComponents,
    batches: Iterator[Float[Tensor, "image 3 height width"]],
    updates: int,
    noise: float = 0.1,
) -> Iterator[float]:
    """Train the decoder on latents with noise of up to `noise`; yield the mean squared error of each update."""
    optimiser = torch.optim.AdamW(vae.decoder.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=3e-3, total_steps=updates, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(updates):
        images = next(batches)
        with torch.no_grad():
            latents = components.encode(images)
        level = torch.rand(len(latents), 1, 1, 1, generator=generator) * noise
        latents = latents + level * torch.randn(latents.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            decoded = vae.decoder(latents)
        difference = decoded.float() - images
        loss = difference.square().mean() + 0.1 * difference.abs().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.decoder.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        yield difference.square().mean().item()
