"""One denoiser over several cards: each rank holds a share of every block's weights and gathers the block it computes."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import groupby, islice

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from difflex.distributed import Ranks
from difflex.records import Shot

__all__ = ["settle", "shard", "share"]


def shard(denoiser: nn.Module, place: torch.device) -> None:
    """Nothing; each repeated block of `denoiser`, and what is left of it, is now shared over all ranks.

    Activations are those of the whole model, bit for bit: a block's weights are gathered before it computes.
    """
    if place.type == "cuda":
        torch.cuda.set_device(place)
    mesh = Ranks().mesh(place.type)
    for repeated in denoiser.children():
        for block in repeated.children() if isinstance(repeated, nn.ModuleList) else ():
            fully_shard(block, mesh=mesh)
    fully_shard(denoiser, mesh=mesh)


def settle(denoiser: nn.Module) -> None:
    """Nothing; weights that a stopped pass has gathered are given back."""
    for module in denoiser.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def share(shots: Iterable[Shot], ranks: Ranks | None = None) -> Iterator[Shot]:
    """The shots of this process, where each process of `torchrun` holds a whole model: every n-th run with all its steps."""
    ranks = ranks or Ranks()
    for _, run in islice(groupby(shots, key=lambda shot: replace(shot, timestep=None)), ranks.rank, None, ranks.world_size):
        yield from run
