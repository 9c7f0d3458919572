"""`LiveActivations`: the batches that a store would give, from a running harvest, with nothing on disk."""

from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import count, islice
from typing import NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from difflex.errors import UnknownName
from difflex.records import ActivationBatch, Activations, Shot, Site, Split, SplitBatches
from difflex.store.batches import BatchShares, cut
from difflex.store.manifest import check_dtype, check_split
from difflex.store.order import permutation
from difflex.store.planning import Harvest, distinct, probe
from difflex.store.shard import Stored, pack, unpack
from difflex.store.store import SPLITS, WINDOW

__all__ = ["LiveActivations"]


class LiveWindow(NamedTuple):
    """A part of the stream, in memory that the next one will take."""

    values: Float[Tensor, "row width"]
    shots: Int[Tensor, " row"]
    tokens: Int[Tensor, " row"]
    order: Int[Tensor, " row"]
    """In which its rows are read."""

    def rows(self, places: Int[Tensor, " token"]) -> ActivationBatch:
        """A copy of some rows."""
        return ActivationBatch(self.values[places.to(self.values.device)], self.shots[places], self.tokens[places])


@final
class LiveActivations:
    """Activations of one site that are made when they are asked for; to a reader it is a `Store`.

    `window` rows are harvested and shuffled, then the next ones. Shots of another split than the one that is read are not
    harvested at all. What is remembered of the past are the shots, not their activations.
    """

    def __init__(
        self,
        shots: Iterable[Shot],
        site: Site,
        harvest: Harvest,
        *,
        window: int = WINDOW,
        dtype: Stored = "bf16",
        batch: int = 16,
    ) -> None:
        check_dtype(dtype)
        self.site = site
        self._stream = distinct(shots)
        self._shots: list[Shot] = []
        self._harvest = harvest
        self._window = window
        self._dtype: Stored = dtype
        self._batch = batch

    @property
    def model(self) -> str:
        """The model that the activations are read from."""
        return self.shot(0).model

    @property
    def width(self) -> int:
        """Of a row."""
        return self._shape.values.shape[2]

    @property
    def tokens(self) -> int:
        """Of each shot."""
        return self._shape.values.shape[1]

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of the tokens, in row-major order; None for text."""
        return self._shape.grid

    @cached_property
    def _shape(self) -> Activations:
        seen = probe(self.shot(0), [self.site], self._harvest)[self.site]
        return Activations(site=seen.site, values=seen.values[:0], shots=(), grid=seen.grid)

    def shot(self, number: int) -> Shot:
        """Everything needed to make the activations of the shot with this number again."""
        number = int(number)
        self._shots.extend(islice(self._stream, max(0, number + 1 - len(self._shots))))
        if not 0 <= number < len(self._shots):
            raise UnknownName(f"There is no shot {number}: the prompts gave {len(self._shots)} shots, numbered from 0.")
        return self._shots[number]

    def batches(
        self,
        size: int,
        *,
        seed: int | None = 0,
        split: Split = "train",
        rank: int = 0,
        of: int = 1,
        start: int = 0,
        epochs: int | None = 1,
        window: int | None = None,
    ) -> SplitBatches:
        """Batches of `size` rows from batch `start` on, as long as there are prompts; in order of the harvest if `seed` is None.

        Ranks harvest their own shots, equally many each. To start at a later batch costs at most a window. Each further epoch
        harvests all shots anew, in the same order, and shuffles them in another; endless if `epochs` is None.
        """
        window = self._window if window is None else window
        mine = cut(size, rank, of, start, window)
        if split not in SPLITS:
            raise UnknownName.among("The split", split, SPLITS)
        length = max(1, -(-window // self.tokens) // self._batch) * self._batch
        return SplitBatches(self._epochs(mine, split, length, start, seed, count() if epochs is None else range(epochs)), split)

    def _epochs(
        self, mine: BatchShares, split: Split, length: int, start: int, seed: int | None, epochs: Iterable[int]
    ) -> Iterator[ActivationBatch]:
        """The batches of all epochs, but for the first `start`."""
        for epoch in epochs:
            before = self._at_most(mine, split, length, start)
            if before == start:
                skipped, first = divmod(start * mine.size, length * self.tokens)
                key = None if seed is None else f"{seed}/{epoch}/{mine.rank}"
                yield from self._cut(mine, self._windows(mine, split, length, skipped, key), first)
            if not self._at_most(mine, split, length, 1):
                return
            start -= before

    def _at_most(self, mine: BatchShares, split: Split, length: int, most: int) -> int:
        """How many batches an epoch has; `most` where they are more, so that endless prompts are read no further than that."""
        enough = (-(-most * mine.size // self.tokens) + length) * mine.of
        whole, rest = divmod(sum(1 for _ in islice(self._numbers(split), enough if most else 0)), length * mine.of)
        return min(most, -(-(whole * length + rest // mine.of) * self.tokens // mine.size))

    def _cut(self, mine: BatchShares, windows: Iterator[LiveWindow], first: int) -> Iterator[ActivationBatch]:
        """The windows as batches, from row `first` on; what is left of a window goes before the next one."""
        left: list[ActivationBatch] = []
        for window in windows:
            missing = mine.size - sum(len(rows.shots) for rows in left)
            for places in [window.order[first:][:missing], *window.order[first:][missing:].split(mine.size)]:
                left.append(window.rows(places))
                if sum(len(rows.shots) for rows in left) == mine.size:
                    yield _joined(left)
                    left = []
            first = 0
        if any(len(rows.shots) for rows in left):
            yield _joined(left)

    def _windows(self, mine: BatchShares, split: Split, length: int, skipped: int, key: str | None) -> Iterator[LiveWindow]:
        """This rank's windows of `length` shots, but for the first `skipped`. All lie in the same memory."""
        numbers, memory = self._numbers(split), None
        for place in count():
            together = list(islice(numbers, length * mine.of))
            share = len(together) // mine.of
            if not share:
                return
            if place < skipped:
                continue
            shots = torch.empty(share * self.tokens, dtype=torch.int64)
            filled = 0
            for values, number in self._passes(together[share * mine.rank : share * (mine.rank + 1)]):
                if memory is None:
                    memory = values.new_empty(length * self.tokens, self.width)
                end = filled + values.shape[0] * self.tokens
                memory[filled:end] = values.flatten(0, 1)
                shots[filled:end] = number.repeat_interleave(self.tokens)
                filled = end
            assert memory is not None and filled == len(shots), "a harvest gives every shot once"
            yield LiveWindow(memory[:filled], shots, torch.arange(filled) % self.tokens, permutation(filled, key, place))

    def _passes(self, numbers: list[int]) -> Iterator[tuple[Float[Tensor, "shot token width"], Int[Tensor, " shot"]]]:
        """Activations as a store would give them back, with the numbers of their shots."""
        asked: dict[Shot, list[int]] = {}
        for number in numbers:
            check_split(self.shot(number))
            asked.setdefault(self.shot(number), []).append(number)
        for activations in self._harvest(list(asked), [self.site], self._batch):
            values = unpack(pack(activations.values, self._dtype))
            # A shot that the prompts repeat has several numbers.
            here = [(row, number) for row, shot in enumerate(activations.shots) for number in asked[shot]]
            rows, meant = torch.tensor(here).T
            yield values[rows.to(values.device)], meant

    def _numbers(self, split: Split) -> Iterator[int]:
        """The numbers of all shots of `split`."""
        for number in count():
            try:
                shot = self.shot(number)
            except UnknownName:
                return
            if shot.split == split:
                yield number


def _joined(parts: list[ActivationBatch]) -> ActivationBatch:
    return ActivationBatch(*(torch.cat(each) for each in zip(*parts, strict=True)))
