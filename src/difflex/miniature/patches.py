"""The VAE of a miniature: its encoder has a closed form, principal components of patches, and its decoder is trained on them.

Training both together on a small budget loses the colours; the components keep them exactly and need no training.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor, nn

GROUP = 6
"""Channels per norm group: two components, their negatives and two anchors."""
ANCHOR = 300.0
"""The value of constant channels that keep the group norm constant; large compared with components of size 1."""


def patch_vae(patch: int, latents: int) -> AutoencoderKL:
    """Return a VAE with random weights, whose encoder can hold the components of patches of 2 or 4 pixels."""
    # The closed-form encoder needs six channels in each norm group, for two components.
    groups = latents // 2
    widths = {2: [GROUP * groups] * 2, 4: [GROUP * groups // 2] + [GROUP * groups] * 2}[patch]
    sizes = {
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "block_out_channels": widths,
        "layers_per_block": 1,
        "latent_channels": latents,
        "norm_num_groups": groups,
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


class PatchComponents(NamedTuple):
    """Half-whitened principal components of square patches: the encoder as one small matrix product."""

    mean: Float[Tensor, " patch"]
    weights: Float[Tensor, "latent patch"]

    @property
    def patch(self) -> int:
        """The side of a patch in pixels."""
        return math.isqrt(self.weights.shape[1] // 3)

    @classmethod
    def of(cls, images: Float[Tensor, "image 3 height width"], patch: int = 4, latents: int = 16) -> "PatchComponents":
        """Fit the components of images in [-1, 1]: each divided by the fourth root of its variance, mean variance 1."""
        patches = F.unfold(images, patch, stride=patch).movedim(1, 2).reshape(-1, 3 * patch**2).double()
        mean = patches.mean(0)
        values, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
        values, vectors = values.flip(0)[:latents], vectors.flip(1)[:, :latents]
        scale = values.clamp(min=1e-8) ** -0.25
        scale = scale / (values * scale**2).mean().sqrt()
        return cls(mean.float(), (vectors * scale).T.float().contiguous())

    @classmethod
    def of_encoder(cls, vae: AutoencoderKL) -> "PatchComponents":
        """Read the components from an encoder that `write_encoder` has set.

        Components that are fitted on another machine may differ in their signs, and latents with them.
        """
        patch, latents = 2 ** (len(vae.config["block_out_channels"]) - 1), vae.config["latent_channels"]
        tensors, rows, channels = vae.state_dict(), [_channel(i) for i in range(latents)], 3 * (patch // 2) ** 2
        kernel, bias = (tensors[f"{_projection(patch)}.{name}"][rows] for name in ("weight", "bias"))
        weights = kernel[:, :channels, :2, :2]
        if patch == 4:
            weights = weights.unflatten(1, (3, 2, 2)).permute(0, 1, 4, 2, 5, 3)
        weights = weights.reshape(latents, -1)
        # The bias is -weights @ mean. The rows are orthogonal, so this mean gives the same one.
        return cls(weights.T @ (-bias / weights.square().sum(1)), weights)

    def encode(self, images: Float[Tensor, "image 3 height width"]) -> Float[Tensor, "image latent row column"]:
        """Return the latents, a hundred times faster than the convolutions of the encoder."""
        patches = F.unfold(images, self.patch, stride=self.patch).movedim(1, 2)
        latents = (patches - self.mean) @ self.weights.T
        return latents.movedim(1, 2).unflatten(2, [side // self.patch for side in images.shape[2:]])


def _projection(patch: int) -> str:
    """Return the name of the encoder's layer that holds the components: its last downsampling."""
    return f"encoder.down_blocks.{patch // 2 - 1}.downsamplers.0.conv"


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
    if components.patch == 4:
        _gather(weights["encoder.down_blocks.0.downsamplers.0.conv.weight"])
        for channel in range(12):
            weights["encoder.down_blocks.1.resnets.0.conv_shortcut.weight"][channel, channel, 0, 0] = 1.0
    layer = _projection(components.patch)
    _project(weights[f"{layer}.weight"], weights[f"{layer}.bias"], components)
    weights["encoder.conv_norm_out.weight"].fill_(1.0)
    scale, latents = ANCHOR * (2 / GROUP) ** 0.5, len(components.weights)
    for i in range(latents):
        weights["encoder.conv_out.weight"][i, _channel(i), 1, 1] = scale
        weights["encoder.conv_out.weight"][i, _channel(i) + 1, 1, 1] = -scale
    weights["encoder.conv_out.bias"][latents:] = -30.0  # log variance: the encoder is deterministic


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
    """Map the channels of 2 x 2 blocks to the components, and set the anchors."""
    latents = len(components.weights)
    kernel = components.weights.view(latents, 3, 2, 2) if components.patch == 2 else _blockwise(components.weights)
    offset = components.weights @ components.mean
    for i in range(latents):
        for channel, sign in ((_channel(i), 1), (_channel(i) + 1, -1)):
            weight[channel, : kernel.shape[1], :2, :2] = sign * kernel[i]
            bias[channel] = -sign * offset[i]
    for anchor in range(GROUP - 2, len(bias), GROUP):
        bias[anchor], bias[anchor + 1] = ANCHOR, -ANCHOR


def _blockwise(weights: Float[Tensor, "latent patch"]) -> Float[Tensor, "latent 12 2 2"]:
    """Arrange the weights of 4 x 4 patches by the channels that `_gather` makes of each 2 x 2 block."""
    # colour, block row, row in block, block column, column in block
    return weights.view(-1, 3, 2, 2, 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(-1, 12, 2, 2)


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
        difference = vae.decoder(latents) - images
        loss = difference.square().mean() + 0.1 * difference.abs().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.decoder.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        yield difference.square().mean().item()
