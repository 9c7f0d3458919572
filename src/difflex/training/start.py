"""The weights before the first update."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from difflex.dictionaries.sae import SAEWeights
from difflex.dictionaries.scores import EncoderSearch
from difflex.training.config import TrainingConfig

__all__ = ["first_weights", "geometric_median"]


def first_weights(config: TrainingConfig, z: Float[Tensor, "token width"]) -> SAEWeights:
    """Unit decoder rows with the encoder tied to them; `z`, some normalised tokens, gives the bias and the first floors."""
    decoder = _directions(config, z.shape[1]).to(z.device)
    encoder = decoder * config.start.gain
    bias = _bias(config, z)
    zeros = torch.zeros(config.size, device=z.device)
    floor = None
    if config.kind == "jumprelu":
        # The floor that lets k features fire on average before anything is learned.
        best = EncoderSearch(encoder).top(z - bias, min(2 * config.k, config.size)).values.flatten()
        smallest = best.kthvalue(max(1, len(best) - len(z) * config.k + 1)).values
        floor = torch.full_like(zeros, float(smallest.clamp_min(0)))
    return SAEWeights(
        encoder=encoder, decoder=decoder, bias=bias, encoder_bias=zeros if config.encoder_bias else None, floor=floor
    )


def geometric_median(z: Float[Tensor, "token width"], rounds: int = 100) -> Float[Tensor, " width"]:
    """The point with the least summed distance to the rows of `z` (Weiszfeld's iteration, in float64)."""
    z = z.double()
    median = z.mean(0)
    for _ in range(rounds):
        weights = 1 / torch.linalg.vector_norm(z - median, dim=1).clamp_min(1e-12)
        moved = weights @ z / weights.sum()
        if torch.linalg.vector_norm(moved - median) <= 1e-9 * torch.linalg.vector_norm(moved):
            break
        median = moved
    return median.float()


def _directions(config: TrainingConfig, width: int) -> Float[Tensor, "size width"]:
    generator = torch.Generator().manual_seed(config.start.seed)
    rows = torch.randn(config.size, width, generator=generator)
    if config.start.directions == "orthogonal":
        tall = rows if config.size >= width else rows.T
        orthonormal = torch.linalg.qr(tall).Q
        rows = orthonormal if config.size >= width else orthonormal.T
    return F.normalize(rows, dim=1).contiguous()


def _bias(config: TrainingConfig, z: Float[Tensor, "token width"]) -> Float[Tensor, " width"]:
    match config.start.bias:
        case "zero":
            return torch.zeros_like(z[0])
        case "mean":
            return z.mean(0)
        case "median":
            return geometric_median(z)
