"""Training in several processes: what they divide, and what they exchange.

`data`: every rank holds all features and encodes its share of a batch. The ranks gather the pairs that they found and make the
same update from them, so that their weights stay equal bit for bit without exchanging gradients.
`features`: every rank holds size / N features and sees the whole batch. The k largest scores are chosen among the k largest of
all ranks, so the choice is exact.
"""

from __future__ import annotations

from typing import Literal, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from difflex.distributed import Ranks
from difflex.errors import BadInput

__all__ = ["Split", "TrainingRanks"]

Split = Literal["data", "features"]


@final
class TrainingRanks(Ranks):
    """The ranks that train together. Alone, every method returns what it is given."""

    def __init__(self, split: Split = "data") -> None:
        """All ranks of the process group."""
        super().__init__()
        self.split = split

    @property
    def shards(self) -> int:
        """The number of parts that the features are split into."""
        return self.world_size if self.split == "features" else 1

    def features(self, size: int) -> slice:
        """Return the features that this rank holds."""
        if size % self.shards:
            raise BadInput(f"Size {size} cannot be split evenly over {self.shards} ranks: choose a multiple of {self.shards}.")
        part = size // self.shards
        return slice(part * self.rank, part * (self.rank + 1)) if self.shards > 1 else slice(0, size)

    def batch_share(self, tokens: int) -> slice:
        """Return the tokens of a whole batch that this rank loads."""
        return slice(tokens * self.rank // self.world_size, tokens * (self.rank + 1) // self.world_size)

    def encoded_tokens(self, share: Tensor) -> Tensor:
        """Return the tokens that this rank encodes: its share of the batch, or the whole batch."""
        return self.gather(share) if self.split == "features" else share

    def first_token(self, count: int) -> int:
        """Return the place in the whole batch of the first of the `count` tokens that this rank encodes."""
        if self.world_size == 1 or self.split == "features":
            return 0
        return sum(self.gather_counts(count)[: self.rank])

    def gather_tokens(self, tensor: Tensor) -> Tensor:
        """Concatenate the results of the ranks for the tokens that each encoded."""
        return self.gather(tensor) if self.split == "data" else tensor

    def gather_features(self, tensor: Tensor) -> Tensor:
        """Concatenate the rows of the ranks for the features that each holds."""
        return self.gather(tensor) if self.shards > 1 else tensor

    def sum_over_features(self, tensor: Tensor) -> Tensor:
        """Sum over ranks what each computed from the features that it holds."""
        return self.sum(tensor) if self.split == "features" else tensor

    def sum_over_tokens(self, tensor: Tensor) -> Tensor:
        """Sum over ranks what each computed from the tokens that it encoded."""
        return self.sum(tensor) if self.split == "data" else tensor

    def among_largest(self, values: Float[Tensor, "token k"], k: int) -> Bool[Tensor, "token k"]:
        """Return which of the largest values of this rank's features are among the k largest of all features."""
        if self.shards == 1:
            return torch.ones_like(values, dtype=torch.bool)
        winners = self.gather_columns(values).topk(k, dim=1).indices - self.rank * values.shape[1]
        own = (winners >= 0) & (winners < values.shape[1])
        mask = torch.zeros(len(values), values.shape[1] + 1, dtype=torch.bool, device=values.device)
        return mask.scatter_(1, torch.where(own, winners, values.shape[1]), True)[:, :-1]
