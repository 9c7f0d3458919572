"""The order in which rows are read, and the batches: shuffled, the same for the same seed, from any batch on."""

import hashlib
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import NamedTuple, final

import torch
from jaxtyping import Int, Num
from torch import Tensor

from difflex.errors import BadInput
from difflex.records import ActivationBatch, Split
from difflex.store.basis import QuantisationBasis
from difflex.store.manifest import ShardChecks, StoreHeader
from difflex.store.shard import DTYPES, MappedShard, PackedRows, unpack

OPEN_SHARDS = 16
"""Shards that are read at the same time: 700,000 rows of width 3072."""
BLOCK_BYTES = 2**18
"""Of rows that are read together: a disk is slow at single rows."""
BUFFERS = 3
"""Batches in memory: one in use, one that waits, one that is read."""
EMPTY = torch.empty(0, dtype=torch.int64)


@final
class SplitBatches(Iterator[ActivationBatch]):
    """Batches that are all of one split."""

    def __init__(self, batches: Iterator[ActivationBatch], split: Split) -> None:
        self._batches = batches
        self.split: Split = split

    def __next__(self) -> ActivationBatch:
        return next(self._batches)


def require_split(batches: Iterator[ActivationBatch], split: Split) -> Iterator[ActivationBatch]:
    """Return `batches`, or raise an error if they are of another split. A plain iterator has no split and passes."""
    if isinstance(batches, SplitBatches) and batches.split != split:
        raise BadInput(
            f"These batches are of the split '{batches.split}', '{split}' is needed. Ask for batches(split='{split}')."
        )
    return batches


def check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise BadInput(f"Rank {rank} of {world_size} does not exist. Ranks count from 0 to {world_size - 1}.")


class BatchShares(NamedTuple):
    """The division of an epoch into batches, and of each batch among the ranks."""

    size: int
    """Rows of a batch on one rank."""
    rank: int
    world_size: int

    @classmethod
    def checked(cls, size: int, rank: int, world_size: int, start: int, window: int) -> "BatchShares":
        """The division, after a check of the arguments of `batches`."""
        if size < 1:
            raise BadInput(f"Batches of {size} rows are not possible. Ask for 1 or more.")
        check_rank(rank, world_size)
        if start < 0:
            raise BadInput(f"There is no batch {start} to start at. Batches count from 0.")
        if window < 1:
            raise BadInput(f"A window of {window} rows cannot be shuffled. Ask for 1 or more.")
        return cls(size, rank, world_size)

    def batches(self, rows: int) -> int:
        """Return how many batches an epoch of `rows` has."""
        return -(-rows // (self.size * self.world_size))

    def shares(self, rows: int, first: int) -> Iterator[range]:
        """Yield the places of this rank's rows in the order of an epoch of `rows`, from batch `first` on.

        Batch i has the same `size * world_size` rows for any number of ranks; ranks share the smaller last batch, too.
        """
        batch = self.size * self.world_size
        for start in range(first * batch, rows, batch):
            count = min(batch, rows - start)
            yield range(start + count * self.rank // self.world_size, start + count * (self.rank + 1) // self.world_size)


class RowPlaces(NamedTuple):
    """Where rows are stored."""

    shard: Int[Tensor, " row"]
    """The shard of each row, as its index among the open shards."""
    shots: Int[Tensor, " row"]
    """The index of each row's shot within its shard."""
    tokens: Int[Tensor, " row"]


class ReadWindow(NamedTuple):
    """Rows that are shuffled one by one."""

    shards: tuple[int, ...]
    """To open for them."""
    ahead: tuple[int, ...]
    """To be opened for later windows."""
    rows: RowPlaces


@dataclass(frozen=True, kw_only=True)
class ReadOrder:
    """The order of one epoch.

    Shards are shuffled and read 16 at a time; blocks of neighbouring rows in these are shuffled; `window` rows, in whole blocks,
    are shuffled row by row. So memory needs to hold one window only, and whole blocks are read from the disk.
    """

    shots: Mapping[int, Int[Tensor, " shot"]]
    """By shard: the shots to read."""
    tokens: int
    """Per shot."""
    row_bytes: int
    window: int
    """In rows."""
    key: str | None
    """The seed of the shuffling; None reads in the order of writing."""

    @property
    def rows(self) -> int:
        """How many rows an epoch has."""
        return self.tokens * sum(map(len, self.shots.values()))

    def windows(self, start: int = 0) -> Iterator["ReadWindow"]:
        """Yield all rows from place `start` of the order on, in windows."""
        shards = list(self.shots)
        shuffled = tuple(shards[i] for i in permutation(len(shards), self.key, "shards").tolist())
        for first in range(0, len(shuffled), OPEN_SHARDS):
            group, ahead = shuffled[first : first + OPEN_SHARDS], shuffled[first + OPEN_SHARDS : first + 2 * OPEN_SHARDS]
            rows = self.tokens * sum(len(self.shots[shard]) for shard in group)
            if start < rows:
                yield from (ReadWindow(group, ahead, window) for window in self._windows_of(group, f"{self.key}/{first}", start))
            start = max(0, start - rows)

    def _windows_of(self, group: tuple[int, ...], key: str, start: int) -> Iterator[RowPlaces]:
        block = _block_rows(self.tokens, self.row_bytes)
        per_shot = self.tokens // block
        bounds = torch.tensor(list(accumulate((len(self.shots[shard]) * per_shot for shard in group), initial=0)))
        blocks = permutation(int(bounds[-1]), self.key and key, "blocks")
        shots = torch.cat([self.shots[shard] for shard in group])
        step = max(1, self.window // block)
        for place in range(start // (step * block) * step, len(blocks), step):
            window = blocks[place : place + step]
            shard = torch.searchsorted(bounds, window, right=True) - 1
            local = window - bounds[shard]
            block_shots = shots[bounds[shard] // per_shot + local // per_shot]
            rows = permutation(len(window) * block, self.key and key, place)[max(0, start - place * block) :]
            row_blocks = rows // block
            tokens = local[row_blocks] % per_shot * block + rows % block
            yield RowPlaces(shard[row_blocks], block_shots[row_blocks], tokens)


def permutation(count: int, key: str | None, *parts: object) -> Int[Tensor, " count"]:
    """Return the numbers below `count`, shuffled with a seed made of `key` and `parts`; in order without a key."""
    if key is None:
        return torch.arange(count)
    seed = hashlib.sha256("/".join(map(str, (key, *parts))).encode()).digest()[:8]
    return torch.randperm(count, generator=torch.Generator().manual_seed(int.from_bytes(seed, "big") >> 1))


def _block_rows(tokens: int, row_bytes: int) -> int:
    """Return how many rows are read together: the largest divisor of a shot's tokens that is small enough."""
    divisors = (rows for rows in range(1, tokens + 1) if tokens % rows == 0)
    return max(rows for rows in divisors if rows == 1 or rows * row_bytes <= BLOCK_BYTES)


@final
class BufferPool:
    """Memory for batches that is used again: clearing new pages for every batch would take as long as filling them."""

    def __init__(self) -> None:
        self._buffers = [bytearray()]
        self._unused = sys.getrefcount(self._buffers[0])

    def empty(self, rows: int, width: int, dtype: torch.dtype) -> Num[Tensor, "{rows} {width}"]:
        """Return an uninitialised tensor that shares its memory with no other living tensor."""
        count = rows * width
        if not count:
            return torch.empty(rows, width, dtype=dtype)
        return torch.frombuffer(self._free_buffer(count * dtype.itemsize), dtype=dtype, count=count).view(rows, width)

    def _free_buffer(self, size: int) -> bytearray:
        # A tensor holds a reference to its buffer as long as the tensor or any view of it lives.
        for i in range(len(self._buffers)):
            if sys.getrefcount(self._buffers[i]) == self._unused and len(self._buffers[i]) >= size:
                return self._buffers[i]
        # A reader that keeps its batches keeps their buffers: the pool drops them.
        self._buffers = [*self._buffers[-BUFFERS + 1 :], bytearray(size)]
        return self._buffers[-1]


class HostRows(NamedTuple):
    """Rows as they are stored, in the memory of the CPU."""

    packed: PackedRows
    shots: Int[Tensor, " row"]
    tokens: Int[Tensor, " row"]

    def to(self, device: torch.device | None, basis: QuantisationBasis | None) -> ActivationBatch:
        """Copy the rows to `device` in the form of the disk and unpack them there."""
        values, scales = (
            x if x is None or device is None else x.to(device, non_blocking=x.is_pinned() if device.type == "cuda" else False)
            for x in self.packed
        )
        assert values is not None
        return ActivationBatch(unpack(PackedRows(values, scales), basis), self.shots, self.tokens)


def one_ahead(read: Callable[[range], HostRows], shares: Iterator[range]) -> Generator[HostRows, None, None]:
    """Yield what `read` returns for each of `shares`; a thread reads the next ones while one is in use."""
    with ThreadPoolExecutor(1, thread_name_prefix="reader") as pool:
        pending = deque(pool.submit(read, share) for share in islice(shares, 1))
        while pending:
            rows = pending.popleft().result()
            pending.extend(pool.submit(read, share) for share in islice(shares, 1))
            yield rows


@final
class ShardReader:
    """Reads rows at ascending places of an order; only the shards in use are open."""

    def __init__(
        self,
        head: StoreHeader,
        order: ReadOrder,
        open_shard: Callable[[int], MappedShard],
        checks: ShardChecks,
        *,
        pinned: bool = False,
    ) -> None:
        """`pinned`: read into memory from which a GPU copies without waiting."""
        self._head, self._order, self._open_shard, self._checks, self._pinned = head, order, open_shard, checks, pinned
        self._buffers = BufferPool()
        self._open: dict[int, MappedShard] = {}
        self._windows: Iterator[ReadWindow] | None = None
        self._places = RowPlaces(EMPTY, EMPTY, EMPTY)
        self._start = 0
        """The place of the current window in the order."""

    def rows(self, share: range) -> HostRows:
        """Return the rows at the places `share`, grouped by shard."""
        shape, dtype = (len(share), self._head.width), DTYPES[self._head.dtype]
        values = torch.empty(shape, dtype=dtype, pin_memory=True) if self._pinned else self._buffers.empty(*shape, dtype)
        shape = (len(share), self._head.form.scales)
        scales = torch.empty(shape, pin_memory=self._pinned) if self._head.dtype == "int8" else None
        filled, shots, tokens = 0, [EMPTY], [EMPTY]
        while filled < len(share):
            part = self._part(share.start + filled, len(share) - filled)
            end = filled + len(part.shard)
            self._gather(part, values[filled:end], None if scales is None else scales[filled:end])
            shots.append(torch.tensor(list(self._open))[part.shard.long()] * self._head.shots_per_shard + part.shots)
            tokens.append(part.tokens)
            filled = end
        return HostRows(PackedRows(values, scales), torch.cat(shots), torch.cat(tokens))

    def _part(self, start: int, count: int) -> RowPlaces:
        """Return at most `count` rows from place `start` on that are in one window, grouped by shard."""
        if self._windows is None:
            self._windows, self._start = self._order.windows(start), start
        while start >= self._start + len(self._places.shard):
            self._start += len(self._places.shard)
            self._enter(next(self._windows))
        part = slice(start - self._start, start - self._start + count)
        # For keys of 8 bits numpy counts instead of sorting: several times faster than torch.
        by_shard = torch.from_numpy(self._places.shard[part].numpy().argsort(kind="stable")) + part.start
        return RowPlaces(*(column[by_shard] for column in self._places))

    def _enter(self, window: ReadWindow) -> None:
        for mapped in self._open.values():
            mapped.release_pages()
        self._open = {shard: self._open.get(shard) or self._open_shard(shard) for shard in window.shards}
        needed = [window.shards[i] for i in window.rows.shard.unique().tolist()]
        self._checks.begin([*needed, *window.shards, *window.ahead])
        self._checks.require(needed)
        self._places = window.rows._replace(shard=window.rows.shard.to(torch.uint8))

    def _gather(self, part: RowPlaces, values: Tensor, scales: Tensor | None) -> None:
        """Copy the values and scales of `part` from the open shards."""
        counts = torch.bincount(part.shard, minlength=len(self._open)).tolist()
        places = (part.shots * self._head.tokens + part.tokens).split(counts)
        for mapped, rows, target in zip(self._open.values(), places, values.split(counts), strict=True):
            torch.index_select(mapped.values, 0, rows, out=target)
        if scales is not None:
            for mapped, rows, target in zip(self._open.values(), places, scales.split(counts), strict=True):
                assert mapped.scales is not None, "shards of int8 have scales"
                torch.index_select(mapped.scales, 0, rows, out=target)
