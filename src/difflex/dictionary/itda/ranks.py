"""What several processes that grow one dictionary tell each other; alone, everything is the identity."""

from __future__ import annotations

from typing import final

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Ranks"]


@final
class Ranks:
    """All processes of `torch.distributed`, or just this one where that is not started."""

    def __init__(self) -> None:
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
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def counts(self, mine: int) -> list[int]:
        """The number that each rank brings."""
        if self.count == 1:
            return [mine]
        parts = [torch.zeros(1, dtype=torch.long) for _ in range(self.count)]
        dist.all_gather(parts, torch.tensor([mine]))
        return [int(part) for part in parts]

    def agreed(self, tensor: Tensor) -> Tensor:
        """What rank 0 has."""
        if self.count > 1:
            tensor = tensor.contiguous()
            dist.broadcast(tensor, 0)
        return tensor
