"""Ranks: what several processes at one work tell each other; alone, everything is the identity."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from difflex.errors import DifflexError

__all__ = ["Ranks", "joined", "together"]

PATIENCE = timedelta(minutes=10)
"""How long a rank waits for the others: a batch of a live stream may take minutes, an hour means that one hangs."""


class Ranks:
    """All processes of `torch.distributed`, or just this one where that is not started."""

    def __init__(self) -> None:
        """This process among those there are now."""
        started = dist.is_available() and dist.is_initialized()
        self.rank, self.count = (dist.get_rank(), dist.get_world_size()) if started else (0, 1)

    def gathered(self, tensor: Tensor) -> Tensor:
        """The ranks' tensors one after another, along the first axis; their lengths may differ."""
        if self.count == 1:
            return tensor
        counts = self.counts(len(tensor))
        padded = tensor.new_zeros((max(counts), *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in range(self.count)]
        with together():
            dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def counts(self, mine: int) -> list[int]:
        """The number that each rank brings."""
        if self.count == 1:
            return [mine]
        parts = [torch.zeros(1, dtype=torch.long, device=self._device) for _ in range(self.count)]
        with together():
            dist.all_gather(parts, torch.tensor([mine], device=self._device))
        return [int(part) for part in parts]

    def summed(self, part: Tensor) -> Tensor:
        """The sum over all ranks."""
        if self.count > 1:
            part = part.clone()
            with together():
                dist.all_reduce(part)
        return part

    def agreed(self, tensor: Tensor) -> Tensor:
        """What rank 0 has."""
        if self.count > 1:
            tensor = tensor.contiguous()
            with together():
                dist.broadcast(tensor, 0)
        return tensor

    @property
    def _device(self) -> str:
        """Where numbers must be for the ranks to exchange them."""
        return "cuda" if dist.get_backend() == "nccl" else "cpu"


@contextmanager
def joined() -> Iterator[None]:
    """`torch.distributed` started from what `torchrun` left in the environment, and ended after; without torchrun, nothing."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def together() -> Iterator[None]:
    """A clear end where a rank is gone."""
    try:
        yield
    except RuntimeError as error:
        raise DifflexError(
            f"Another rank is gone or did not answer ({str(error).splitlines()[0]}). "
            "Start the same command again: it goes on from the last checkpoint."
        ) from error
