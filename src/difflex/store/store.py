"""`Store`: the activations of one site on disk, read in shuffled batches."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, cached_property, lru_cache, partial
from itertools import chain
from itertools import count as counting
from pathlib import Path
from typing import final

import torch
from jaxtyping import Int
from torch import Tensor

from difflex.choices import StoredDtype
from difflex.errors import BadInput, BrokenFile, UnknownName
from difflex.files import file_sha256
from difflex.records import ActivationBatch, Activations, Shot, Split
from difflex.store.basis import BASIS, QuantisationBasis, require_basis
from difflex.store.manifest import (
    MANIFEST,
    SPLITS,
    STATISTICS,
    Manifest,
    ShardChecks,
    StoreStatistics,
    map_shard,
    matches,
    read_shots,
    read_statistics,
    shard_paths,
    summarise,
)
from difflex.store.reading import BatchShares, ReadOrder, ShardReader, SplitBatches, one_ahead
from difflex.store.shard import REMEDY, PackedRows, check_size, shard_size, unpack

WINDOW = 2**15
"""Rows that are shuffled one by one: 200 MB at width 3072 in 16 bits."""


@final
class Store:
    """Activations of one site on disk, with the shot and token of every row."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        head = manifest.head
        self.site, self.model, self.width, self.tokens = head.site, head.model, head.width, head.tokens
        self.grid = head.grid
        """Rows and columns of the tokens, in row-major order; None for text."""
        self.folder = folder
        self._manifest = manifest
        self._shots_of = lru_cache(maxsize=4)(lambda shard: read_shots(folder, shard).shots)

    @classmethod
    def open(cls, folder: Path | str) -> "Store":
        """Open the store in `folder`, which may still be recorded.

        A damaged manifest, and a shard that is missing or has another size than its rows take, is an error.
        """
        folder = Path(folder)
        store = cls(folder, Manifest.read(folder))
        if store._manifest.head.basis is not None:
            require_basis(folder)
        sizes = cache(partial(shard_size, store._manifest.head.form))
        for number, entry in store._manifest.shards.items():
            shard, shots = shard_paths(folder, number)
            for path in (shard, shots):
                if not path.is_file():
                    raise BrokenFile(f"{path} is missing, but {MANIFEST} lists it. {REMEDY}")
            check_size(shard, shard.stat().st_size, sizes(entry.shots))
        return store

    @staticmethod
    def begun_source(folder: Path) -> str | None:
        """Return where the shots of the store in `folder` come from; None unless it is begun and its manifest intact."""
        manifest = Manifest.read_if_intact(folder)
        return manifest.head.source if manifest and manifest.shards else None

    @cached_property
    def _basis(self) -> QuantisationBasis | None:
        return self._manifest.head.read_basis(self.folder)

    @property
    def fingerprint(self) -> str:
        """Sixteen digits that change with the rows and with the settings of the harvest."""
        return file_sha256(self.folder / MANIFEST)[:16]

    @property
    def complete(self) -> bool:
        """Whether its harvest is finished."""
        return self._manifest.statistics is not None

    def count(self, split: Split = "train") -> int:
        """Return the number of rows of `split`."""
        return self.tokens * sum(map(len, self._shots_by_shard(split).values()))

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
        window: int = WINDOW,
        device: torch.device | None = None,
    ) -> SplitBatches:
        """Yield batches of `size` rows from batch `start` on: endless without `epochs`, in the order of writing without `seed`.

        Batch i of all ranks together is batch i of one process that asks for `world_size` times the size. The rows of a batch
        are random, and within the batch they are grouped by shard. The last batch of an epoch is smaller. A thread reads the next
        batch. With `device`, the values are there: they are copied in the form of the disk, int8 as one byte each.
        """
        shares, form = BatchShares.checked(size, rank, world_size, start, window), self._manifest.head.form
        shots = self._shots_by_shard(split)
        order = ReadOrder(shots=shots, tokens=form.tokens, row_bytes=form.row_bytes, window=window, key=None)
        if not order.rows:
            raise BadInput(
                f"{self.folder} has no rows of the split '{split}'. Harvest more prompts: a tenth of them is held out."
            )
        first_epoch, first = divmod(start, shares.batches(order.rows))
        parts = (
            self._epoch(
                replace(order, key=None if seed is None else f"{seed}/{epoch}"),
                shares.shares(order.rows, first if epoch == first_epoch else 0),
                device,
            )
            for epoch in (counting(first_epoch) if epochs is None else range(first_epoch, epochs))
        )
        return SplitBatches(chain.from_iterable(parts), split)

    def _epoch(self, order: ReadOrder, shares: Iterator[range], device: torch.device | None) -> Iterator[ActivationBatch]:
        checks = ShardChecks(self.folder, self._manifest)
        open_shard, pinned = partial(map_shard, self.folder, self._manifest), device is not None and device.type == "cuda"
        reader = ShardReader(self._manifest.head, order, open_shard, checks, pinned=pinned)
        try:
            yield from (rows.to(device, self._basis) for rows in one_ahead(reader.rows, shares))
        finally:
            checks.end()

    @property
    def dtype(self) -> StoredDtype:
        """How the rows are stored."""
        return self._manifest.head.dtype

    @property
    def source(self) -> str:
        """What the recording said the source of its shots is."""
        return self._manifest.head.source

    def activations(self) -> Iterator[Activations]:
        """Yield all rows, shard by shard in the order of writing, after comparing each shard with its checksum."""
        checks = ShardChecks(self.folder, self._manifest)
        for number in sorted(self._manifest.shards):
            checks.require([number])
            shard = map_shard(self.folder, self._manifest, number)
            values = unpack(PackedRows(shard.values, shard.scales), self._basis).clone()
            shots = self._shots_of(number)
            yield Activations(site=self.site, values=values.unflatten(0, (-1, self.tokens)), shots=shots, grid=self.grid)

    def shot(self, number: int) -> Shot:
        """Return the shot with this number: all that is needed to make its activations again."""
        shard, place = divmod(int(number), self._manifest.head.shots_per_shard)
        entry = self._manifest.shards.get(shard)
        if entry is None or place >= entry.shots:
            total = sum(entry.shots for entry in self._manifest.shards.values())
            raise UnknownName(f"{self.folder} has no shot {number}. It holds {total} shots, numbered from 0.")
        return self._shots_of(shard)[place]

    @property
    def statistics(self) -> StoreStatistics:
        """Moments of all `train` rows; computed at each call while the harvest is not finished."""
        if self.complete:
            return read_statistics(self.folder)
        ShardChecks(self.folder, self._manifest).require(self._manifest.shards)
        return summarise(self.folder, self._manifest)

    def verify(self) -> int:
        """Check all files against their checksums and return their number; the error names all damaged ones."""
        checksums = self.checksums(self.folder)
        damaged = [path.name for path, checksum in checksums.items() if not matches(path, checksum)]
        if damaged:
            raise BrokenFile(
                f"In {self.folder} {len(damaged)} of {len(checksums)} files are damaged or missing: {', '.join(damaged)}. "
                "Run the same harvest again: it makes these again and no others."
            )
        return len(checksums) + 1

    @staticmethod
    def checksums(folder: Path) -> dict[Path, str]:
        """Return the checksums of all files of the store in `folder` but the manifest, which holds them.

        Statistics are among them if the harvest is finished, and the basis of int8.
        """
        manifest = Manifest.read(folder)
        checksums: dict[Path, str] = {}
        if manifest.head.basis is not None:
            checksums[folder / BASIS] = manifest.head.basis
        if manifest.statistics is not None:
            checksums[folder / STATISTICS] = manifest.statistics
        for shard, entry in manifest.shards.items():
            checksums |= dict(zip(shard_paths(folder, shard), (entry.sha256, entry.shots_sha256), strict=True))
        return checksums

    def _shots_by_shard(self, split: Split) -> dict[int, Int[Tensor, " shot"]]:
        if split not in SPLITS:
            raise UnknownName.among("The split", split, SPLITS)
        return {shard: self._manifest.shards[shard].shots_of(split) for shard in sorted(self._manifest.shards)}
