"""The autoencoder: an encoder in closed form (principal components of 4 x 4 patches) and a decoder trained on its latents.

Training both together on a small budget loses the colours; the components keep them exactly and need no training.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor, nn

from difflex.miniature.architecture import LATENT_CHANNELS

PATCH = 4
GROUP = 6
"""Channels per norm group."""
ANCHOR = 300.0
"""The value of constant channels that keep the group norm constant; large compared with components of size 1."""


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
    project = "encoder.down_blocks.1.downsamplers.0.conv"
    _project(weights[f"{project}.weight"], weights[f"{project}.bias"], components)
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
