"""`LiveSites` and `LiveActivations`: the batches of a store from a running harvest, with nothing on disk."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count, islice, pairwise
from typing import Literal, final

import torch

from difflex.devices import cached_memory
from difflex.errors import BadInput, UnknownName
from difflex.records import ActivationBatch, Activations, Shot, Site, Split
from difflex.store.manifest import SPLITS, check_split
from difflex.store.reading import BatchShares, SplitBatches, permutation
from difflex.store.recording import Harvest, distinct, probe
from difflex.store.shard import DTYPES
from difflex.store.store import WINDOW
from difflex.store.windows import HarvestThread, LiveWindow, WindowMemory, WindowPool, copy_rows

LiveDtype = Literal["bf16", "fp16"]
SiteBatch = Mapping[Site, ActivationBatch]
"""The rows of a batch at each site."""


@dataclass(frozen=True, kw_only=True)
class LivePlan:
    """What a reader asked for."""

    shares: BatchShares
    split: Split
    key: str | None
    """The seed of the shuffling."""
    length: int
    """Shots of a window, on each rank."""
    start: int
    """The first batch."""
    stop: int | None
    """The batch before which the reader ends; nothing is harvested for later ones."""
    epochs: Iterable[int]


@final
class LiveSites(AbstractContextManager["LiveSites"]):
    """Activations of several sites that are harvested while they are read: one pass of the model for all of them.

    `window` rows are harvested and shuffled, then the next ones. A batch has rows of the same shots at all sites; of a site with
    more tokens per shot than another one, a random part is read. Shots of another split than the requested one are not harvested
    at all. Shots are remembered, activations are not. With `ahead`, a thread harvests the next window while one is read; leaving
    the context ends it.
    """

    def __init__(
        self,
        shots: Iterable[Shot],
        sites: Sequence[Site],
        harvest: Harvest,
        *,
        window: int = WINDOW,
        dtype: LiveDtype = "bf16",
        batch: int = 16,
        ahead: bool = True,
    ) -> None:
        if dtype not in ("bf16", "fp16"):
            raise UnknownName.among("The dtype of live activations", dtype, ("bf16", "fp16"))
        self.sites = tuple(dict.fromkeys(sites))
        self._stream = distinct(shots)
        self._shots: list[Shot] = []
        self._reading = threading.Lock()
        self._harvest, self._batch = harvest, batch
        self._window, self._dtype, self._ahead = window, DTYPES[dtype], ahead
        self._thread: HarvestThread | None = None
        self._cuda = torch.cuda.Stream() if ahead and torch.cuda.is_available() else None
        """The harvest has a stream of its own, so that the GPU works on it and on a training at the same time."""

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the thread that harvests ahead."""
        if self._thread is not None:
            self._thread.stop()
            self._thread = None

    @property
    def model(self) -> str:
        """The model that the activations are of."""
        return self.shot(0).model

    @property
    def tokens(self) -> int:
        """Rows that are read of each shot: the tokens of the site with the fewest."""
        return min(activations.values.shape[1] for activations in self.examples.values())

    @property
    def widths(self) -> dict[Site, int]:
        """The width of a row at each site."""
        return {site: activations.values.shape[2] for site, activations in self.examples.items()}

    @cached_property
    def examples(self) -> dict[Site, Activations]:
        """Activations without a shot at each site, for their shapes."""
        with self._on_stream():
            by_site = probe(self.shot(0), self.sites, self._harvest)
        return {
            site: Activations(site=site, values=by_site[site].values[:0], shots=(), grid=by_site[site].grid)
            for site in self.sites
        }

    def count(self, split: Split = "train", most: int | None = None) -> int:
        """Return the rows of an epoch: all prompts are read, which must end, or as many as give `most` rows."""
        shots = None if most is None else -(-most // self.tokens)
        return self.tokens * sum(1 for _ in islice(self._numbers(split), shots))

    def fill_memory(self) -> int:
        """Harvest two batches of the largest size, drop them, and return the bytes of a GPU that torch keeps for the next ones.

        `free_memory` counts these bytes as free, but the harvest needs them. Two batches, because a GPU computes the next one
        before the last is used.
        """
        numbers = list(islice(self._numbers("train"), 2 * self._batch * self._shots_per_run()))
        if self._cuda is not None:
            torch.cuda.empty_cache()
        with self._on_stream():
            for _ in self._harvest([self.shot(number) for number in numbers], self.sites, self._batch):
                pass
        return 0 if self._cuda is None else cached_memory()

    def shot(self, number: int) -> Shot:
        """Return the shot with this number: all that is needed to make its activations again."""
        number = int(number)
        with self._reading:  # prompts are read by the thread of the harvest, too
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
        stop: int | None = None,
        epochs: int | None = 1,
        window: int | None = None,
    ) -> Iterator[SiteBatch]:
        """Yield batches of `size` rows from batch `start` on until the prompts end; in order of the shots without `seed`.

        Each rank harvests its own shots, as many as every other. Starting at a later batch costs at most a window. Each further
        epoch harvests all shots again, in the same order, and shuffles them in another; without `epochs` there is no last one.
        What batches hold depends on the window, and on `stop` in the last one, but not on the speed or batches of the harvest.
        """
        window = self._window if window is None else window
        shares = BatchShares.checked(size, rank, world_size, start, window)
        if split not in SPLITS:
            raise UnknownName.among("The split", split, SPLITS)
        run = self._shots_per_run()
        plan = LivePlan(
            shares=shares,
            split=split,
            key=None if seed is None else str(seed),
            length=max(1, -(-window // self.tokens) // run) * run,
            start=start,
            stop=stop,
            epochs=count() if epochs is None else range(epochs),
        )
        return self._read(plan)

    def _read(self, plan: LivePlan) -> Iterator[SiteBatch]:
        """Yield the batches of `plan`."""
        pool = WindowPool(1 + self._ahead)
        windows = self._epochs(plan, pool)
        if self._ahead:
            self.stop()  # an earlier reader's: the model runs once at a time
            self._thread = thread = HarvestThread(windows, pool, self._on_stream)
            windows = thread.windows()
        batches = self._cut(plan.shares.size, windows, pool)
        yield from batches if plan.stop is None else islice(batches, max(0, plan.stop - plan.start))

    def _epochs(self, plan: LivePlan, pool: WindowPool) -> Iterator[LiveWindow | None]:
        """Yield the windows of all epochs after the first `start` batches, and None at the end of each epoch."""
        start, stop = plan.start, plan.stop
        for epoch in plan.epochs:
            if stop is not None and stop <= 0:
                return
            total = self._count_batches(plan, start)
            if total == start:
                key = plan.key and f"{plan.key}/{epoch}/{plan.shares.rank}"
                yield from self._windows(plan, start, stop, key, pool)
                yield None
                total = start if stop is None else self._count_batches(plan, stop)
            if not self._count_batches(plan, 1):
                return
            start, stop = max(0, start - total), None if stop is None else stop - total

    def _count_batches(self, plan: LivePlan, most: int) -> int:
        """Return how many batches an epoch has, at most `most`: endless prompts are read no further than that."""
        shares, length = plan.shares, plan.length
        enough = (-(-most * shares.size // self.tokens) + length) * shares.world_size
        shots = sum(1 for _ in islice(self._numbers(plan.split), enough if most else 0))
        windows, rest = divmod(shots, length * shares.world_size)
        return min(most, -(-(windows * length + rest // shares.world_size) * self.tokens // shares.size))

    def _windows(self, plan: LivePlan, start: int, stop: int | None, key: str | None, pool: WindowPool) -> Iterator[LiveWindow]:
        """Yield this rank's windows of an epoch from batch `start` on, as far as they are needed before batch `stop`."""
        shares, run, numbers = plan.shares, self._shots_per_run(), self._numbers(plan.split)
        skipped, first = divmod(start * shares.size, plan.length * self.tokens)
        for place in count():
            length = plan.length
            if stop is not None:
                needed = -(-stop * shares.size // self.tokens) - place * length
                length = min(length, -(-needed // run) * run)
            window = list(islice(numbers, max(0, length) * shares.world_size))
            share = len(window) // shares.world_size
            if not share:
                return
            if place < skipped:
                continue
            own = window[share * shares.rank : share * (shares.rank + 1)]
            memory = pool.take()
            self._fill(memory, own, plan.length, pool)
            rows = slice(first if place == skipped else 0, share * self.tokens)
            lengths = {activations.values.shape[1] for activations in self.examples.values()}
            order = {tokens: permutation(share * tokens, key, place)[rows] for tokens in sorted(lengths)}
            yield LiveWindow(memory, torch.tensor(own), order)

    def _fill(self, memory: WindowMemory, numbers: Sequence[int], length: int, pool: WindowPool) -> None:
        """Harvest shots into `memory`, each at its place, so that the size of the harvest's batches makes no difference."""
        places: dict[Shot, list[int]] = {}  # a shot that the prompts repeat has several places
        for place, number in enumerate(numbers):
            check_split(self.shot(number))
            places.setdefault(self.shot(number), []).append(place)
        filled = dict.fromkeys(self.sites, 0)
        for activations in self._harvest(list(places), self.sites, self._batch):
            pool.check()
            site, values = activations.site, activations.values.detach().to(self._dtype)
            if site not in memory:
                shape = (length, *values.shape[1:])
                memory[site] = torch.empty(shape, dtype=self._dtype, pin_memory=values.is_cuda)
            pairs = [(row, place) for row, shot in enumerate(activations.shots) for place in places[shot]]
            copy_rows(memory[site], values, pairs)
            filled[site] += len(pairs)
        if wrong := [site for site, shots in filled.items() if shots != len(numbers)]:
            raise BadInput(f"The harvest gave other shots at the site '{wrong[0]}' than requested.")

    def _cut(self, size: int, windows: Iterator[LiveWindow | None], pool: WindowPool) -> Iterator[SiteBatch]:
        """Cut the windows into batches; the last rows of a window go before those of the next one."""
        parts: list[SiteBatch] = []
        missing = size
        for window in windows:
            if window is not None:
                rows = len(next(iter(window.order.values())))
                edges = [0, *range(min(missing, rows), rows, size), rows] if rows else []
                for first, last in pairwise(edges):
                    parts.append(self._rows(window, slice(first, last)))
                    missing -= last - first
                    if not missing:
                        yield _concatenate(parts)
                        parts, missing = [], size
                pool.give_back(window.memory)
            elif parts:
                yield _concatenate(parts)
                parts, missing = [], size

    def _rows(self, window: LiveWindow, part: slice) -> SiteBatch:
        """Return a part of a window in the order of reading."""
        batch = {}
        for site in self.sites:
            memory = window.memory[site]
            rows = window.order[memory.shape[1]][part]
            values = memory.view(-1, memory.shape[2]).index_select(0, rows)
            batch[site] = ActivationBatch(values, window.shots[rows // memory.shape[1]], rows % memory.shape[1])
        return batch

    def _numbers(self, split: Split) -> Iterator[int]:
        """Yield the numbers of all shots of `split`."""
        for number in count():
            try:
                shot = self.shot(number)
            except UnknownName:
                return
            if shot.split == split:
                yield number

    def _shots_per_run(self) -> int:
        """Return the shots of a run of the model, which differ in their timestep; a window holds whole runs."""
        first = replace(self.shot(0), timestep=None)
        for number in count(1):
            try:
                if replace(self.shot(number), timestep=None) != first:
                    return number
            except UnknownName:
                return number
        raise AssertionError("numbers have no end")

    def _on_stream(self) -> AbstractContextManager[object]:
        if self._cuda is None:
            return nullcontext()
        self._cuda.wait_stream(torch.cuda.default_stream())  # on which the model was made
        return torch.cuda.stream(self._cuda)


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
        dtype: LiveDtype = "bf16",
        batch: int = 16,
    ) -> None:
        self.site = site
        self._sites = LiveSites(shots, [site], harvest, window=window, dtype=dtype, batch=batch, ahead=False)

    @property
    def model(self) -> str:
        """The model that the activations are of."""
        return self._sites.model

    @property
    def width(self) -> int:
        """The width of a row."""
        return self._sites.widths[self.site]

    @property
    def tokens(self) -> int:
        """Tokens per shot."""
        return self._sites.tokens

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of the tokens, in row-major order; None for text."""
        return self._sites.examples[self.site].grid

    def shot(self, number: int) -> Shot:
        """Return the shot with this number: all that is needed to make its activations again."""
        return self._sites.shot(number)

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
        """Yield batches of `size` rows from batch `start` on, as `LiveSites.batches` does."""
        batches = self._sites.batches(
            size,
            seed=seed,
            split=split,
            rank=rank,
            world_size=world_size,
            start=start,
            epochs=epochs,
            window=window,
        )
        return SplitBatches((rows[self.site] for rows in batches), split)


def _concatenate(parts: Sequence[SiteBatch]) -> SiteBatch:
    if len(parts) == 1:
        return parts[0]
    return {
        site: ActivationBatch(*(torch.cat(columns) for columns in zip(*(part[site] for part in parts), strict=True)))
        for site in parts[0]
    }
