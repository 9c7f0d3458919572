"""Rows cut into batches: gathered from mapped shards into memory that is used again as soon as nobody holds it any more."""

import sys
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import NamedTuple, final

import torch
from jaxtyping import Num
from torch import Tensor

from difflex.errors import BadInput
from difflex.records import Rows
from difflex.store.order import Order, Window
from difflex.store.shard import DTYPES, Form, Mapped, Packed, unpack

__all__ = ["Cut", "Reader", "cut"]

SLABS = 2


class Cut(NamedTuple):
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


def cut(size: int, rank: int, of: int, start: int, window: int) -> Cut:
    """The cut into batches of `size` for `rank` of `of`, checked."""
    if size < 1:
        raise BadInput(f"Batches of {size} rows are not possible. Ask for 1 or more.")
    if not 0 <= rank < of:
        raise BadInput(f"Rank {rank} of {of} does not exist. Ranks count from 0 to {of - 1}.")
    if start < 0:
        raise BadInput(f"There is no batch {start} to start at. Batches count from 0.")
    if window < 1:
        raise BadInput(f"A window of {window} rows cannot be shuffled. Ask for 1 or more.")
    return Cut(size, rank, of)


@final
class Slabs:
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


@final
class Reader:
    """Rows at ascending places of an order, read from the shards that `opened` gives; only those in use are open."""

    def __init__(self, form: Form, shots_per_shard: int, order: Order, opened: Callable[[int], Mapped]) -> None:
        self._form = form
        self._shots_per_shard = shots_per_shard
        self._order = order
        self._opened = opened
        self._slabs = Slabs()
        self._open: dict[int, Mapped] = {}
        self._windows: Iterator[Window] | None = None
        self._window: Window | None = None
        self._start = 0

    def rows(self, share: range) -> Rows:
        """The rows at the places `share`, grouped by shard."""
        values = self._slabs.empty(len(share), self._form.width, DTYPES[self._form.dtype])
        scales = torch.empty(len(share)) if self._form.dtype == "int8" else None
        shots, tokens, filled = [], [], 0
        while filled < len(share):
            part = self._part(share.start + filled, len(share) - filled)
            end = filled + len(part.of)
            shots.append(self._gather(part, values[filled:end], None if scales is None else scales[filled:end]))
            tokens.append(part.tokens)
            filled = end
        nothing = torch.empty(0, dtype=torch.int64)
        return Rows(unpack(Packed(values, scales)), torch.cat([nothing, *shots]), torch.cat([nothing, *tokens]))

    def _part(self, start: int, count: int) -> Window:
        """At most `count` rows from place `start` on that are in one window, grouped by shard."""
        if self._windows is None:
            self._windows, self._start = self._order.windows(start), start
        while self._window is None or start >= self._start + len(self._window.of):
            self._start += 0 if self._window is None else len(self._window.of)
            self._window = next(self._windows)
            self._turn_to(self._window.shards)
        here = slice(start - self._start, start - self._start + count)
        by_shard = torch.argsort(self._window.of[here], stable=True)
        return Window(self._window.shards, *(part[here][by_shard] for part in self._window[1:]))

    def _turn_to(self, shards: tuple[int, ...]) -> None:
        for mapped in self._open.values():
            mapped.give_back()
        self._open = {shard: self._open.get(shard) or self._opened(shard) for shard in shards}

    def _gather(self, part: Window, values: Tensor, scales: Tensor | None) -> Tensor:
        """The numbers of the rows' shots; their values and scales are put where they belong."""
        rows = part.shots * self._form.tokens + part.tokens
        counts = torch.bincount(part.of, minlength=len(part.shards)).tolist()
        for shard, count, end in zip(part.shards, counts, accumulate(counts), strict=True):
            if count:
                mapped, mine = self._open[shard], slice(end - count, end)
                torch.index_select(mapped.values, 0, rows[mine], out=values[mine])
                if scales is not None and mapped.scales is not None:
                    torch.index_select(mapped.scales, 0, rows[mine], out=scales[mine])
        return torch.tensor(part.shards)[part.of] * self._shots_per_shard + part.shots
