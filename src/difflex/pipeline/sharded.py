"""One denoiser over several cards: each rank holds a share of every block's weights and gathers the block it computes."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import groupby, islice
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from difflex.errors import BadInput
from difflex.records import Shot

__all__ = ["RankOf", "join", "ranks", "settle", "shard", "share"]


class RankOf(NamedTuple):
    """This process among those that `torchrun` started."""

    mine: int
    all: int


def ranks() -> RankOf:
    """Which process this is; (0, 1) outside of `torchrun`."""
    return RankOf(dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else RankOf(0, 1)


def join(place: torch.device) -> RankOf:
    """Which process this is, after it joined the others that `torchrun` started."""
    if not dist.is_initialized():
        if not dist.is_torchelastic_launched():
            raise BadInput("sharded=True shares a model over the processes of torchrun: torchrun --nproc-per-node CARDS ...")
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    return ranks()


def shard(denoiser: nn.Module, place: torch.device) -> None:
    """Nothing; each repeated block of `denoiser`, and what is left of it, is now shared over all ranks.

    Activations are those of the whole model, bit for bit: a block's weights are gathered before it computes.
    """
    if place.type == "cuda":
        torch.cuda.set_device(place)
    mesh = init_device_mesh(place.type, (ranks().all,))
    for repeated in denoiser.children():
        for block in repeated.children() if isinstance(repeated, nn.ModuleList) else ():
            fully_shard(block, mesh=mesh)
    fully_shard(denoiser, mesh=mesh)


def settle(denoiser: nn.Module) -> None:
    """Nothing; weights that a stopped pass has gathered are given back."""
    for module in denoiser.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def share(shots: Iterable[Shot], among: RankOf | None = None) -> Iterator[Shot]:
    """The shots of this process, where each process of `torchrun` holds a whole model: every n-th run with all its steps."""
    mine, every = among or ranks()
    for _, run in islice(groupby(shots, key=lambda shot: replace(shot, timestep=None)), mine, None, every):
        yield from run
