"""`LiveActivations`: the batches of a store from a running harvest, with nothing on disk."""

from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import count, islice
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from difflex.choices import StoredDtype
from difflex.errors import UnknownName
from difflex.records import ActivationBatch, Activations, Shot, Site, Split
from difflex.store.manifest import SPLITS, check_split
from difflex.store.reading import BatchShares, SplitBatches, permutation
from difflex.store.recording import Harvest, distinct, probe
from difflex.store.shard import check_dtype, pack, unpack
from difflex.store.store import WINDOW


@final
class LiveActivations:
    """Activations of one site that are harvested while they are read; a drop-in replacement of a `Store`.

    `window` rows are harvested and shuffled, then the next ones. Shots of another split than the requested one are not
    harvested at all. Shots are remembered, activations are not.
    """

    def __init__(
        self,
        shots: Iterable[Shot],
        site: Site,
        harvest: Harvest,
        *,
        window: int = WINDOW,
        dtype: StoredDtype = "bf16",
        batch: int = 16,
    ) -> None:
        check_dtype(dtype)
        self.site = site
        self._stream = distinct(shots)
        self._shots: list[Shot] = []
        self._harvest = harvest
        self._window = window
        self._dtype: StoredDtype = dtype
        self._batch = batch

    @property
    def model(self) -> str:
        """The model that the activations are of."""
        return self.shot(0).model

    @property
    def width(self) -> int:
        """The width of a row."""
        return self._example.values.shape[2]

    @property
    def tokens(self) -> int:
        """Tokens per shot."""
        return self._example.values.shape[1]

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of the tokens, in row-major order; None for text."""
        return self._example.grid

    @cached_property
    def _example(self) -> Activations:
        """Activations without a shot, for their shape."""
        activations = probe(self.shot(0), [self.site], self._harvest)[self.site]
        return Activations(site=activations.site, values=activations.values[:0], shots=(), grid=activations.grid)

    def shot(self, number: int) -> Shot:
        """Return the shot with this number: all that is needed to make its activations again."""
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
        world_size: int = 1,
        start: int = 0,
        epochs: int | None = 1,
        window: int | None = None,
    ) -> SplitBatches:
        """Yield batches of `size` rows from batch `start` on until the prompts end; in order of the harvest without `seed`.

        Each rank harvests its own shots, as many as every other. Starting at a later batch costs at most a window. Each further
        epoch harvests all shots again, in the same order, and shuffles them in another; without `epochs` there is no last one.
        """
        window = self._window if window is None else window
        shares = BatchShares.checked(size, rank, world_size, start, window)
        if split not in SPLITS:
            raise UnknownName.among("The split", split, SPLITS)
        length = max(1, -(-window // self.tokens) // self._batch) * self._batch
        numbers = count() if epochs is None else range(epochs)
        return SplitBatches(self._epochs(shares, split, length, start, seed, numbers), split)

    def _epochs(
        self, shares: BatchShares, split: Split, length: int, start: int, seed: int | None, epochs: Iterable[int]
    ) -> Iterator[ActivationBatch]:
        """Yield the batches of all epochs after the first `start`."""
        for epoch in epochs:
            skipped_batches = self._count_batches(shares, split, length, start)
            if skipped_batches == start:
                skipped, first = divmod(start * shares.size, length * self.tokens)
                key = None if seed is None else f"{seed}/{epoch}/{shares.rank}"
                yield from self._batches(shares, self._windows(shares, split, length, skipped, key), first)
            if not self._count_batches(shares, split, length, 1):
                return
            start -= skipped_batches

    def _count_batches(self, shares: BatchShares, split: Split, length: int, most: int) -> int:
        """Return how many batches an epoch has, at most `most`: endless prompts are read no further than that."""
        enough = (-(-most * shares.size // self.tokens) + length) * shares.world_size
        shots = sum(1 for _ in islice(self._numbers(split), enough if most else 0))
        windows, rest = divmod(shots, length * shares.world_size)
        return min(most, -(-(windows * length + rest // shares.world_size) * self.tokens // shares.size))

    def _batches(
        self, shares: BatchShares, windows: Iterator[tuple[ActivationBatch, Tensor]], first: int
    ) -> Iterator[ActivationBatch]:
        """Cut the windows into batches, from row `first` on; the last rows of a window go before those of the next one."""
        parts: list[ActivationBatch] = []
        for window, order in windows:
            missing = shares.size - sum(len(rows.shots) for rows in parts)
            for rows in [order[first:][:missing], *order[first:][missing:].split(shares.size)]:
                values = window.values[rows.to(window.values.device)]
                parts.append(ActivationBatch(values, window.shots[rows], window.tokens[rows]))
                if sum(len(rows.shots) for rows in parts) == shares.size:
                    yield _concatenate(parts)
                    parts = []
            first = 0
        if any(len(rows.shots) for rows in parts):
            yield _concatenate(parts)

    def _windows(
        self, shares: BatchShares, split: Split, length: int, skipped: int, key: str | None
    ) -> Iterator[tuple[ActivationBatch, Tensor]]:
        """Yield this rank's windows of `length` shots after the first `skipped`, with the order of their rows.

        All windows use the same memory.
        """
        numbers, memory = self._numbers(split), None
        for place in count():
            window = list(islice(numbers, length * shares.world_size))
            share = len(window) // shares.world_size
            if not share:
                return
            if place < skipped:
                continue
            shots = torch.empty(share * self.tokens, dtype=torch.int64)
            filled = 0
            for values, number in self._passes(window[share * shares.rank : share * (shares.rank + 1)]):
                if memory is None:
                    memory = values.new_empty(length * self.tokens, self.width)
                end = filled + values.shape[0] * self.tokens
                memory[filled:end] = values.flatten(0, 1)
                shots[filled:end] = number.repeat_interleave(self.tokens)
                filled = end
            assert memory is not None and filled == len(shots), "a harvest gives every shot once"
            rows = ActivationBatch(memory[:filled], shots, torch.arange(filled) % self.tokens)
            yield rows, permutation(filled, key, place)

    def _passes(self, numbers: list[int]) -> Iterator[tuple[Float[Tensor, "shot token width"], Int[Tensor, " shot"]]]:
        """Harvest the shots of these numbers and yield their activations as a store would return them."""
        numbers_of: dict[Shot, list[int]] = {}  # a shot that the prompts repeat has several numbers
        for number in numbers:
            check_split(self.shot(number))
            numbers_of.setdefault(self.shot(number), []).append(number)
        for activations in self._harvest(list(numbers_of), [self.site], self._batch):
            values = unpack(pack(activations.values, self._dtype))
            pairs = [(row, number) for row, shot in enumerate(activations.shots) for number in numbers_of[shot]]
            rows, shots = torch.tensor(pairs).T
            yield values[rows.to(values.device)], shots

    def _numbers(self, split: Split) -> Iterator[int]:
        """Yield the numbers of all shots of `split`."""
        for number in count():
            try:
                shot = self.shot(number)
            except UnknownName:
                return
            if shot.split == split:
                yield number


def _concatenate(batches: list[ActivationBatch]) -> ActivationBatch:
    return ActivationBatch(*(torch.cat(columns) for columns in zip(*batches, strict=True)))
