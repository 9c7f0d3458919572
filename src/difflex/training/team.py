"""A team: the processes that train together, or the one that trains alone.

`data`: every rank holds every feature and encodes its share of the batch; what they found is gathered, and all ranks make the
same update from it, so that their weights stay equal bit for bit and no gradient is ever sent.
`features`: every rank holds size / N features and sees the whole batch; the k largest scores are chosen among all ranks'
k largest, so the choice is exact.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal, final

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

from difflex.errors import BadInput, DifflexError

__all__ = ["Team", "joined"]

PATIENCE = timedelta(minutes=10)
"""How long a rank waits for the others: a batch of a live stream may take minutes, an hour means that one hangs."""


@final
class Team:
    """What ranks do together; alone, everything is the identity."""

    def __init__(self, split: Literal["data", "features"] = "data") -> None:
        """The team of all processes of `torch.distributed` (just this one, where that is not started)."""
        started = dist.is_available() and dist.is_initialized()
        self.rank, self.count = (dist.get_rank(), dist.get_world_size()) if started else (0, 1)
        self.split = split

    @property
    def shards(self) -> int:
        """Parts that the features are split into."""
        return self.count if self.split == "features" else 1

    def rows(self, size: int) -> slice:
        """The features that this rank holds."""
        if size % self.shards:
            raise BadInput(f"Size {size} cannot be split evenly over {self.shards} ranks: choose a multiple of {self.shards}.")
        part = size // self.shards
        return slice(part * self.rank, part * (self.rank + 1)) if self.shards > 1 else slice(0, size)

    def share(self, tokens: int) -> slice:
        """The tokens of a whole batch that this rank brings."""
        return slice(tokens * self.rank // self.count, tokens * (self.rank + 1) // self.count)

    def seen(self, share: Tensor) -> Tensor:
        """The tokens that this rank encodes, from its share of the batch."""
        return self.gathered(share) if self.split == "features" else share

    def first_token(self, count: int) -> int:
        """The place, in what `pooled` gives, of the first of the `count` tokens that this rank encoded."""
        if self.count == 1 or self.split == "features":
            return 0
        return int(self.gathered(torch.tensor([count]))[: self.rank].sum())

    def pooled(self, found: Tensor) -> Tensor:
        """What the ranks found for the tokens they encoded, one after another, where each encoded its own."""
        return self.gathered(found) if self.split == "data" else found

    def total(self, part: Tensor) -> Tensor:
        """The sum over ranks of what each has from its own features."""
        return self.summed(part) if self.split == "features" else part

    def over_tokens(self, part: Tensor) -> Tensor:
        """The sum over ranks of what each has from the tokens it encoded."""
        return self.summed(part) if self.split == "data" else part

    def summed(self, part: Tensor) -> Tensor:
        """The sum over all ranks."""
        if self.count > 1:
            part = part.clone()
            with _together():
                dist.all_reduce(part)
        return part

    def largest(self, values: Float[Tensor, "token k"], k: int) -> Bool[Tensor, "token k"]:
        """Which of the largest values of this rank's features are among the k largest of all features."""
        if self.shards == 1:
            return torch.ones_like(values, dtype=torch.bool)
        parts = [torch.empty_like(values) for _ in range(self.count)]
        with _together():
            dist.all_gather(parts, values.contiguous())
        chosen = torch.cat(parts, dim=1).topk(k, dim=1).indices - self.rank * values.shape[1]
        mine = (chosen >= 0) & (chosen < values.shape[1])
        kept = torch.zeros(len(values), values.shape[1] + 1, dtype=torch.bool, device=values.device)
        return kept.scatter_(1, torch.where(mine, chosen, values.shape[1]), True)[:, :-1]

    def gathered(self, tensor: Tensor) -> Tensor:
        """The ranks' tensors one after another, along the first axis; their lengths may differ."""
        if self.count == 1:
            return tensor
        lengths = [torch.zeros(1, dtype=torch.long, device=tensor.device) for _ in range(self.count)]
        with _together():
            dist.all_gather(lengths, torch.tensor([len(tensor)], device=tensor.device))
            counts = [int(length) for length in lengths]
            padded = tensor.new_zeros((max(counts), *tensor.shape[1:]))
            padded[: len(tensor)] = tensor
            parts = [torch.empty_like(padded) for _ in range(self.count)]
            dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


@contextmanager
def joined() -> Iterator[None]:
    """`torch.distributed` started from what `torchrun` left in the environment, and ended after; without torchrun, nothing."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _together() -> Iterator[None]:
    """A clear end where a rank is gone."""
    try:
        yield
    except RuntimeError as error:
        raise DifflexError(
            f"Another rank is gone or did not answer ({str(error).splitlines()[0]}). "
            "Start the same command again: training goes on from the last checkpoint, on any number of ranks."
        ) from error
