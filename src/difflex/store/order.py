"""In which order the rows of a store are read: shuffled across shards, the same for the same seed, found at any row at once."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

__all__ = ["ReadOrder", "ReadWindow", "permutation"]

TOGETHER = 16
"""Shards that are read at the same time: 700,000 rows of width 3072."""
BLOCK_BYTES = 2**18
"""What is read in one piece, so that a disk that is not in memory yet is not asked for single rows."""


class ReadWindow(NamedTuple):
    """Neighbours in the order of reading; which of them comes first within a batch means nothing."""

    shards: tuple[int, ...]
    """Those that the rows are in."""
    of: Int[Tensor, " row"]
    """The shard of each row, as its place in `shards`."""
    shots: Int[Tensor, " row"]
    """The place of its shot within its shard."""
    tokens: Int[Tensor, " row"]


@dataclass(frozen=True, kw_only=True)
class ReadOrder:
    """The order of one epoch.

    Shards are shuffled and read 16 at a time; of these, blocks of neighbouring rows are shuffled; `window` rows of them, in whole
    blocks, are shuffled row by row. So memory need hold no more than a window, and a disk reads whole blocks.
    """

    shots: Mapping[int, Int[Tensor, " shot"]]
    """Shard -> the shots in it that are to be read."""
    tokens: int
    row_bytes: int
    window: int
    """In rows."""
    key: str | None
    """What the shuffling depends on; None reads in the order of writing."""

    @property
    def rows(self) -> int:
        """In one epoch."""
        return self.tokens * sum(map(len, self.shots.values()))

    def windows(self, start: int = 0) -> Iterator[ReadWindow]:
        """All rows from the one at place `start` of the order on."""
        shards = list(self.shots)
        shuffled = [shards[i] for i in permutation(len(shards), self.key, "shards").tolist()]
        for first in range(0, len(shuffled), TOGETHER):
            group = tuple(shuffled[first : first + TOGETHER])
            rows = self.tokens * sum(len(self.shots[shard]) for shard in group)
            if start < rows:
                yield from self._of_group(group, f"{self.key}/{first}", start)
            start = max(0, start - rows)

    def _of_group(self, group: tuple[int, ...], key: str, start: int) -> Iterator[ReadWindow]:
        block = _block(self.tokens, self.row_bytes)
        per_shot = self.tokens // block
        bounds = torch.tensor(list(accumulate((len(self.shots[shard]) * per_shot for shard in group), initial=0)))
        blocks = permutation(int(bounds[-1]), self.key and key, "blocks")
        chosen = torch.cat([self.shots[shard] for shard in group])
        firsts = bounds // per_shot
        step = max(1, self.window // block)
        for at in range(start // (step * block) * step, len(blocks), step):
            here = blocks[at : at + step]
            of = torch.searchsorted(bounds, here, right=True) - 1
            local = here - bounds[of]
            shots = chosen[firsts[of] + local // per_shot]
            rows = permutation(len(here) * block, self.key and key, at)[max(0, start - at * block) :]
            mine = rows // block
            yield ReadWindow(group, of[mine], shots[mine], local[mine] % per_shot * block + rows % block)


def permutation(count: int, key: str | None, *more: object) -> Int[Tensor, " count"]:
    """The numbers below `count`, shuffled as the key says; in order without one."""
    if key is None:
        return torch.arange(count)
    seed = hashlib.sha256("/".join(map(str, (key, *more))).encode()).digest()[:8]
    return torch.randperm(count, generator=torch.Generator().manual_seed(int.from_bytes(seed, "big") >> 1))


def _block(tokens: int, row_bytes: int) -> int:
    """How many rows are read in one piece: the largest part of a shot that is small enough and leaves no rest."""
    return max(rows for rows in _divisors(tokens) if rows == 1 or rows * row_bytes <= BLOCK_BYTES)


def _divisors(number: int) -> Sequence[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
