"""`Store`: the activations of one site on disk, read in shuffled batches."""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from itertools import count as counting
from pathlib import Path
from typing import final

from jaxtyping import Int
from torch import Tensor

from difflex.errors import BadInput, BrokenFile, UnknownName
from difflex.files import file_sha256
from difflex.records import ActivationBatch, Shot, Site, Split, SplitBatches
from difflex.store.batches import BatchShares, ShardReader, cut
from difflex.store.manifest import MANIFEST, STATISTICS, Manifest, read_manifest, read_shots, shard_paths
from difflex.store.order import ReadOrder
from difflex.store.shard import MEND, MappedShard
from difflex.store.statistics import StoreStatistics
from difflex.store.summary import chosen, open_shard, read_statistics, summarise

__all__ = ["SPLITS", "WINDOW", "Store"]

SPLITS: tuple[Split, ...] = ("train", "held-out")
WINDOW = 2**15
"""Rows that are shuffled one by one: 200 MB at width 3072 in 16 bits."""


@final
class Store:
    """Activations of one site on disk, with the shot and token of every row."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self._manifest = manifest
        self._shots_of = lru_cache(maxsize=4)(lambda shard: read_shots(folder, shard))

    @classmethod
    def open(cls, folder: Path | str) -> "Store":
        """The store in `folder`; a missing shard or a damaged manifest is an error. A store in the making can be read, too."""
        folder = Path(folder)
        store = cls(folder, read_manifest(folder))
        for shard in store._manifest.shards:
            for path in shard_paths(folder, shard):
                if not path.is_file():
                    raise BrokenFile(f"{path} is missing, {MANIFEST} lists it. {MEND}")
        return store

    @property
    def site(self) -> Site:
        """Where in the model the activations were read."""
        return self._manifest.head.site

    @property
    def model(self) -> str:
        """The model they were read from."""
        return self._manifest.head.model

    @property
    def fingerprint(self) -> str:
        """Sixteen digits that change with the stored rows, and with the settings they were made by."""
        return file_sha256(self.folder / MANIFEST)[:16]

    @property
    def width(self) -> int:
        """Of a row."""
        return self._manifest.head.width

    @property
    def tokens(self) -> int:
        """Of each shot."""
        return self._manifest.head.tokens

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of the tokens, in row-major order; None for text."""
        return self._manifest.head.grid

    @property
    def complete(self) -> bool:
        """Whether its harvest came to its end."""
        return self._manifest.statistics is not None

    def count(self, split: Split = "train") -> int:
        """How many rows it has of `split`."""
        return self.tokens * sum(map(len, self._chosen(split).values()))

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
        window: int = WINDOW,
    ) -> SplitBatches:
        """Batches of `size` rows from batch `start` on; endless if `epochs` is None, in the order of writing if `seed` is.

        Batch i of several ranks together is batch i of one process that asks for `of` times the size. Which rows make a batch is
        random, within the batch they are grouped by shard. The last batch of an epoch holds what is left.
        """
        mine, form = cut(size, rank, of, start, window), self._manifest.head.form
        order = ReadOrder(shots=self._chosen(split), tokens=form.tokens, row_bytes=form.row_bytes, window=window, key=None)
        if not order.rows:
            raise BadInput(
                f"{self.folder} has no rows of the split '{split}'. Harvest more prompts: a tenth of them is held out."
            )
        begun, first = divmod(start, mine.batches(order.rows))
        parts = (
            self._epoch(replace(order, key=None if seed is None else f"{seed}/{epoch}"), mine, first if epoch == begun else 0)
            for epoch in (counting(begun) if epochs is None else range(begun, epochs))
        )
        return SplitBatches(chain.from_iterable(parts), split)

    def _epoch(self, order: ReadOrder, mine: BatchShares, first: int) -> Iterator[ActivationBatch]:
        reader = ShardReader(self._manifest.head.form, self._manifest.head.shots_per_shard, order, self._mapped)
        for share in mine.shares(order.rows, first):
            yield reader.rows(share)

    def shot(self, number: int) -> Shot:
        """Everything needed to make the activations of the shot with this number again."""
        shard, place = divmod(int(number), self._manifest.head.shots_per_shard)
        entry = self._manifest.shards.get(shard)
        if entry is None or place >= entry.shots:
            total = sum(entry.shots for entry in self._manifest.shards.values())
            raise UnknownName(f"{self.folder} has no shot {number}. It holds {total} shots, numbered from 0.")
        return self._shots_of(shard)[place]

    @property
    def statistics(self) -> StoreStatistics:
        """Moments of all `train` rows; computed at each call while the harvest is not complete."""
        return read_statistics(self.folder) if self.complete else summarise(self.folder, self._manifest)

    def verify(self) -> int:
        """How many files were read from end to end and found whole; an error names all that are not."""
        expected = {self.folder / STATISTICS: self._manifest.statistics} if self.complete else {}
        for shard, entry in self._manifest.shards.items():
            expected |= dict(zip(shard_paths(self.folder, shard), (entry.sha256, entry.shots_sha256), strict=True))
        broken = [path.name for path, checksum in expected.items() if not path.is_file() or file_sha256(path) != checksum]
        if broken:
            raise BrokenFile(
                f"In {self.folder} {len(broken)} of {len(expected)} files are not what was written: {', '.join(broken)}. "
                "Delete these, of a shard both its files, and give the command that wrote them again: it makes them alone again."
            )
        return len(expected) + 1

    def _chosen(self, split: Split) -> dict[int, Int[Tensor, " shot"]]:
        if split not in SPLITS:
            raise UnknownName.among("The split", split, SPLITS)
        return {shard: chosen(self._manifest.shards[shard], split) for shard in sorted(self._manifest.shards)}

    def _mapped(self, shard: int) -> MappedShard:
        return open_shard(self.folder, self._manifest, shard)
