"""Rows cut into batches: gathered from mapped shards into memory that is used again as soon as nobody holds it any more."""

import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple, final

import torch
from jaxtyping import Int, Num
from torch import Tensor

from difflex.errors import BadInput
from difflex.records import ActivationBatch
from difflex.store.order import ReadOrder, ReadWindow
from difflex.store.shard import DTYPES, MappedShard, PackedRows, ShardFormat, unpack

__all__ = ["BatchShares", "ShardReader", "cut"]

SLABS = 2
NOTHING = torch.empty(0, dtype=torch.int64)


class BatchShares(NamedTuple):
    """Which rows of an epoch make a rank's share of each batch."""

    size: int
    """Rows that a rank gets at once."""
    rank: int
    of: int

    def batches(self, rows: int) -> int:
        """How many batches an epoch of `rows` has."""
        return -(-rows // (self.size * self.of))

    def shares(self, rows: int, first: int) -> Iterator[range]:
        """The places of this rank's rows in the order of an epoch of `rows`, from batch `first` on.

        Batch i is the same `size * of` rows however many ranks share them. What is left at the end of the epoch is shared too.
        """
        whole = self.size * self.of
        for start in range(first * whole, rows, whole):
            count = min(whole, rows - start)
            yield range(start + count * self.rank // self.of, start + count * (self.rank + 1) // self.of)


def cut(size: int, rank: int, of: int, start: int, window: int) -> BatchShares:
    """The cut into batches of `size` for `rank` of `of`, checked."""
    if size < 1:
        raise BadInput(f"Batches of {size} rows are not possible. Ask for 1 or more.")
    if not 0 <= rank < of:
        raise BadInput(f"Rank {rank} of {of} does not exist. Ranks count from 0 to {of - 1}.")
    if start < 0:
        raise BadInput(f"There is no batch {start} to start at. Batches count from 0.")
    if window < 1:
        raise BadInput(f"A window of {window} rows cannot be shuffled. Ask for 1 or more.")
    return BatchShares(size, rank, of)


@final
class BufferPool:
    """Memory for batches. To have the system clear new pages for every batch would cost as much time as to fill them."""

    def __init__(self) -> None:
        self._slabs = [bytearray()]
        self._unused = sys.getrefcount(self._slabs[0])

    def empty(self, rows: int, width: int, dtype: torch.dtype) -> Num[Tensor, "{rows} {width}"]:
        """A tensor whose memory no other living tensor shares; what it holds is left over."""
        count = rows * width
        if not count:
            return torch.empty(rows, width, dtype=dtype)
        return torch.frombuffer(self._free(count * dtype.itemsize), dtype=dtype, count=count).view(rows, width)

    def _free(self, size: int) -> bytearray:
        # A tensor made from a slab holds a reference to it as long as the tensor or any view of it lives.
        for i in range(len(self._slabs)):
            if sys.getrefcount(self._slabs[i]) == self._unused and len(self._slabs[i]) >= size:
                return self._slabs[i]
        # A reader that keeps its batches has their slabs to itself: they are forgotten here.
        self._slabs = [*self._slabs[-SLABS + 1 :], bytearray(size)]
        return self._slabs[-1]


class RowPlaces(NamedTuple):
    """Where rows are."""

    of: Int[Tensor, " row"]
    """Which of the open shards they are in."""
    rows: Int[Tensor, " row"]
    """Their place in it."""
    shots: Int[Tensor, " row"]
    """The numbers of their shots."""
    tokens: Int[Tensor, " row"]


@final
class ShardReader:
    """Rows at ascending places of an order, read from the shards that `opened` gives; only those in use are open."""

    def __init__(self, form: ShardFormat, shots_per_shard: int, order: ReadOrder, opened: Callable[[int], MappedShard]) -> None:
        self._form = form
        self._shots_per_shard = shots_per_shard
        self._order = order
        self._opened = opened
        self._slabs = BufferPool()
        self._open: dict[int, MappedShard] = {}
        self._windows: Iterator[ReadWindow] | None = None
        self._places = RowPlaces(*[NOTHING] * 4)
        self._start = 0
        """Where in the order the places begin."""

    def rows(self, share: range) -> ActivationBatch:
        """The rows at the places `share`, grouped by shard."""
        values = self._slabs.empty(len(share), self._form.width, DTYPES[self._form.dtype])
        scales = torch.empty(len(share)) if self._form.dtype == "int8" else None
        filled, shots, tokens = 0, [NOTHING], [NOTHING]
        while filled < len(share):
            part = self._part(share.start + filled, len(share) - filled)
            end = filled + len(part.of)
            self._gather(part, values[filled:end], None if scales is None else scales[filled:end])
            shots.append(part.shots)
            tokens.append(part.tokens)
            filled = end
        return ActivationBatch(unpack(PackedRows(values, scales)), torch.cat(shots), torch.cat(tokens))

    def _part(self, start: int, count: int) -> RowPlaces:
        """At most `count` rows from place `start` on that are in one window, grouped by shard."""
        if self._windows is None:
            self._windows, self._start = self._order.windows(start), start
        while start >= self._start + len(self._places.of):
            self._start += len(self._places.of)
            self._turn_to(next(self._windows))
        here = slice(start - self._start, start - self._start + count)
        # The sort of numpy counts keys of 8 bits: several times faster than torch's.
        by_shard = torch.from_numpy(self._places.of[here].numpy().argsort(kind="stable")) + here.start
        return RowPlaces(*(part[by_shard] for part in self._places))

    def _turn_to(self, window: ReadWindow) -> None:
        for mapped in self._open.values():
            mapped.give_back()
        self._open = {shard: self._open.get(shard) or self._opened(shard) for shard in window.shards}
        self._places = RowPlaces(
            of=window.of.to(torch.uint8),
            rows=window.shots * self._form.tokens + window.tokens,
            shots=torch.tensor(window.shards)[window.of] * self._shots_per_shard + window.shots,
            tokens=window.tokens,
        )

    def _gather(self, part: RowPlaces, values: Tensor, scales: Tensor | None) -> None:
        """Nothing; values and scales are put where they belong."""
        counts = torch.bincount(part.of, minlength=len(self._open)).tolist()
        parts = zip(self._open.values(), part.rows.split(counts), values.split(counts), strict=True)
        for mapped, rows, out in parts:
            torch.index_select(mapped.values, 0, rows, out=out)
        if scales is not None:
            for mapped, rows, out in zip(self._open.values(), part.rows.split(counts), scales.split(counts), strict=True):
                assert mapped.scales is not None, "shards of int8 have scales"
                torch.index_select(mapped.scales, 0, rows, out=out)
