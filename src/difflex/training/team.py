"""A team: the processes that train together, or the one that trains alone.

`data`: every rank holds every feature and encodes its share of the batch; what they found is gathered, and all ranks make the
same update from it, so that their weights stay equal bit for bit and no gradient is ever sent.
`features`: every rank holds size / N features and sees the whole batch; the k largest scores are chosen among all ranks'
k largest, so the choice is exact.
"""

from __future__ import annotations

from typing import Literal, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from difflex.distributed import Ranks
from difflex.errors import BadInput

__all__ = ["Team"]


@final
class Team(Ranks):
    """What ranks do together; alone, everything is the identity."""

    def __init__(self, split: Literal["data", "features"] = "data") -> None:
        """The team of all processes there are now."""
        super().__init__()
        self.split = split

    @property
    def shards(self) -> int:
        """Parts that the features are split into."""
        return self.world_size if self.split == "features" else 1

    def rows(self, size: int) -> slice:
        """The features that this rank holds."""
        if size % self.shards:
            raise BadInput(f"Size {size} cannot be split evenly over {self.shards} ranks: choose a multiple of {self.shards}.")
        part = size // self.shards
        return slice(part * self.rank, part * (self.rank + 1)) if self.shards > 1 else slice(0, size)

    def share(self, tokens: int) -> slice:
        """The tokens of a whole batch that this rank brings."""
        return slice(tokens * self.rank // self.world_size, tokens * (self.rank + 1) // self.world_size)

    def seen(self, share: Tensor) -> Tensor:
        """The tokens that this rank encodes, from its share of the batch."""
        return self.gather(share) if self.split == "features" else share

    def first_token(self, count: int) -> int:
        """The place, in what `pooled` gives, of the first of the `count` tokens that this rank encoded."""
        if self.world_size == 1 or self.split == "features":
            return 0
        return sum(self.gather_counts(count)[: self.rank])

    def pooled(self, found: Tensor) -> Tensor:
        """What the ranks found for the tokens they encoded, one after another, where each encoded its own."""
        return self.gather(found) if self.split == "data" else found

    def total(self, part: Tensor) -> Tensor:
        """The sum over ranks of what each has from its own features."""
        return self.sum(part) if self.split == "features" else part

    def over_tokens(self, part: Tensor) -> Tensor:
        """The sum over ranks of what each has from the tokens it encoded."""
        return self.sum(part) if self.split == "data" else part

    def largest(self, values: Float[Tensor, "token k"], k: int) -> Bool[Tensor, "token k"]:
        """Which of the largest values of this rank's features are among the k largest of all features."""
        if self.shards == 1:
            return torch.ones_like(values, dtype=torch.bool)
        chosen = self.gather_columns(values).topk(k, dim=1).indices - self.rank * values.shape[1]
        mine = (chosen >= 0) & (chosen < values.shape[1])
        kept = torch.zeros(len(values), values.shape[1] + 1, dtype=torch.bool, device=values.device)
        return kept.scatter_(1, torch.where(mine, chosen, values.shape[1]), True)[:, :-1]
