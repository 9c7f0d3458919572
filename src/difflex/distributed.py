"""One layer over `torch.distributed`: the processes that `torchrun` starts. A process alone needs no special case."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from difflex.errors import BadInput, DifflexError

__all__ = ["Ranks", "join_process_group", "process_group"]

TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others: a batch of live activations may take minutes."""


class Ranks:
    """This process among all processes of a run. Alone, a collective returns what it is given."""

    def __init__(self, rank: int | None = None, world_size: int | None = None) -> None:
        """Without arguments, the rank and world size of the process group, or 0 and 1 if none is started."""
        started = dist.is_available() and dist.is_initialized()
        self.rank = rank if rank is not None else dist.get_rank() if started else 0
        self.world_size = world_size if world_size is not None else dist.get_world_size() if started else 1

    @classmethod
    def from_torchrun(cls) -> Ranks:
        """The rank and world size that torchrun sets in the environment, for work that needs no collective."""
        return Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenate the tensors of all ranks along the first axis, in which their lengths may differ."""
        if self.world_size == 1:
            return tensor
        counts = self.gather_counts(len(tensor))
        padded = tensor.new_zeros((max(counts), *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        return torch.cat([part[:count] for part, count in zip(self._all_gather(padded), counts, strict=True)])

    def gather_columns(self, tensor: Tensor) -> Tensor:
        """Concatenate the tensors of all ranks, which have the same shape, along the second axis."""
        return tensor if self.world_size == 1 else torch.cat(self._all_gather(tensor.contiguous()), dim=1)

    def gather_counts(self, count: int) -> list[int]:
        """Return the counts of all ranks."""
        if self.world_size == 1:
            return [count]
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        return [int(part) for part in self._all_gather(torch.tensor([count], device=device))]

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks."""
        if self.world_size > 1:
            tensor = tensor.clone()
            with _lost_rank_errors():
                dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Return the tensor of rank 0 on all ranks."""
        if self.world_size > 1:
            tensor = tensor.contiguous()
            with _lost_rank_errors():
                dist.broadcast(tensor, 0)
        return tensor

    def mesh(self, device_type: str) -> DeviceMesh:
        """The one-dimensional device mesh of all ranks."""
        return init_device_mesh(device_type, (self.world_size,))

    def _all_gather(self, tensor: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        with _lost_rank_errors():
            dist.all_gather(parts, tensor)
        return parts


@contextmanager
def process_group() -> Iterator[None]:
    """Start the process group of torchrun, and end it afterwards. Without torchrun, do nothing."""
    if not dist.is_torchelastic_launched():
        yield
        return
    _start(torch.cuda.is_available())
    try:
        yield
    finally:
        dist.destroy_process_group()


def join_process_group(device: torch.device) -> Ranks:
    """Start the process group of torchrun unless it is started, and leave it running for the rest of the process."""
    if not dist.is_initialized():
        if not dist.is_torchelastic_launched():
            raise BadInput(
                "sharded=True splits a model over the processes of torchrun, and this process was not started by it. "
                "Start it with: torchrun --nproc-per-node GPUS SCRIPT"
            )
        _start(device.type == "cuda")
    return Ranks()


def _start(cuda: bool) -> None:
    dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT)


@contextmanager
def _lost_rank_errors() -> Iterator[None]:
    """Explain the error that a collective raises when another rank has ended or does not answer."""
    try:
        yield
    except RuntimeError as error:
        raise DifflexError(
            f"Another rank is gone or did not answer ({str(error).splitlines()[0]}). "
            "Start the same command again: it continues from the last checkpoint."
        ) from error
