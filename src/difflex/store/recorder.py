"""The store of one site while it is recorded, and the disk space that recordings take."""

import json
import math
import shutil
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import final

from difflex.errors import BrokenFile, OutOfSpace, StaleWork
from difflex.files import sweep
from difflex.records import Activations, Shot, Site
from difflex.store.manifest import (
    MANIFEST,
    STATISTICS,
    Manifest,
    ShardEntry,
    StoreHeader,
    finished_shards,
    read_shots,
    shard_paths,
)
from difflex.store.shard import MappedShard, ShardFormat, ShardWriter, shard_size
from difflex.store.statistics import statistics_bytes, summarise, write_statistics

__all__ = ["DiskBudget", "SiteRecorder", "format_size", "store_bytes", "text_bytes"]

HEADER_BYTES = 2048
"""Of a manifest and of a statistics file, at most."""
BYTES_PER_SHARD = 512
"""In the manifest, and in the header of the list of shots, at most."""
BYTES_PER_SHOT = 2
"""In the manifest's list of held-out shots."""
ADVICE = "Use the same settings to continue, or name another folder to begin anew; nothing was changed."


@final
class SiteRecorder:
    """The store of one site while it is recorded; nothing is written before `open`.

    Several ranks may each hold a recorder of the same folder: each writes its own shards.
    """

    def __init__(self, folder: Path, site: Site, rank: int, world_size: int) -> None:
        self.folder = folder
        self.site = site
        self._rank = rank
        self._world_size = world_size
        self._writers: set[ShardWriter] = set()
        self._entries = {number: ShardEntry.read(folder, number) for number in finished_shards(folder)}
        self._head = Manifest.read(folder).head if (folder / MANIFEST).is_file() else None
        if not self._entries:  # without a shard nothing is fixed yet
            self._head = None

    @property
    def begun(self) -> bool:
        """Whether rows are stored, so that the header is fixed."""
        return self._head is not None

    @property
    def head(self) -> StoreHeader:
        """The header of the store."""
        assert self._head is not None, "a recorder has a header after `begin` or where the store is begun"
        return self._head

    @property
    def rows(self) -> int:
        """How many rows are stored."""
        return self.head.tokens * sum(entry.shots for entry in self._entries.values())

    @property
    def bytes(self) -> int:
        """Bytes on disk, without the statistics."""
        return sum(path.stat().st_size for path in self.folder.glob("*") if path.name != STATISTICS and path.suffix != ".tmp")

    def begin(self, head: StoreHeader) -> None:
        """Fix the header. Shards without a manifest are taken over if they have its format."""
        self._head = head
        for number, entry in self._entries.items():
            MappedShard(shard_paths(self.folder, number)[0], head.form, entry.shots)

    def open(self) -> None:
        """Delete the temporary files of killed processes and write the manifest if the folder has none."""
        sweep(self.folder, self._rank, self._world_size)
        if not (self.folder / MANIFEST).is_file() or not self._entries:
            Manifest(head=self.head, shards=self._entries, statistics=None).write(self.folder, self._rank)

    def check_settings(self, shot: Shot, dtype: str, batch: int, source: str) -> None:
        """Raise an error if the stored rows were made with other settings."""
        model = {name: getattr(shot, name) for name in ("model", "revision", "precision")}
        for name, value in {**model, "dtype": dtype, "batch": batch, "source": source}.items():
            if (stored := getattr(self.head, name)) != value:
                problem = "The prompts have changed" if name == "source" else f"{self.folder} was begun with another {name}"
                raise StaleWork(f"{problem}: {stored!r} then, {value!r} now. {ADVICE}", self.folder)

    def check_shape(self, activations: Activations) -> None:
        """Raise an error for activations of another shape than the stored ones."""
        tokens, width = activations.values.shape[1:]
        if (tokens, width) != (self.head.tokens, self.head.width):
            raise StaleWork(
                f"{self.folder} holds shots of {self.head.tokens} tokens of width {self.head.width}; "
                f"the harvest gave {tokens} of width {width}. {ADVICE}",
                self.folder,
            )

    def has(self, number: int, shots: Sequence[Shot]) -> bool:
        """Return whether the shard of this number is complete; raise an error if it was made from other shots."""
        if number not in self._entries:
            return False
        stored = read_shots(self.folder, number)
        stored_set, shot_set = set(stored), set(shots)
        if stored_set <= shot_set or stored_set > shot_set:
            return len(stored) >= len(shots)
        old = next(shot for shot in stored if shot not in shot_set)
        new = next(shot for shot in shots if shot not in stored_set)
        raise StaleWork(
            f"The prompts or their settings have changed: shard {number} of {self.folder} was made from {_describe(old)}, "
            f"now it would be made from {_describe(new)}. {ADVICE}",
            self.folder,
        )

    def writer(self, number: int, shots: int) -> ShardWriter:
        """Begin a shard."""
        writer = ShardWriter(shard_paths(self.folder, number)[0], self._rank, self.head.form, shots)
        self._writers.add(writer)
        return writer

    def discard_unfinished(self) -> None:
        """Delete all unfinished shards."""
        while self._writers:
            self._writers.pop().discard()

    def add(self, number: int, writer: ShardWriter, shots: Sequence[Shot]) -> None:
        """Finish a shard and list it in the manifest."""
        # A shorter shard of this number, from a recording of fewer tokens, is unlisted before its rows change.
        shard_paths(self.folder, number)[1].unlink(missing_ok=True)
        sha256 = writer.commit()
        self._writers.remove(writer)
        self._entries[number] = ShardEntry.write(self.folder, number, self.site, tuple(shots), sha256, self._rank)
        self._write_manifest()

    def complete(self, shards: int) -> None:
        """Write the statistics, which make the store complete, if all `shards` are finished, whichever rank wrote them."""
        numbers = finished_shards(self.folder)
        if len(numbers) < shards or self._is_complete(numbers):
            return
        manifest = self._write_manifest()
        checksum = write_statistics(self.folder, summarise(self.folder, manifest), self._rank)
        replace(manifest, statistics=checksum).write(self.folder, self._rank)

    def _is_complete(self, numbers: Sequence[int]) -> bool:
        try:
            manifest = Manifest.read(self.folder)
        except BrokenFile:
            return False
        listed = {number: self._entry(number) for number in numbers} == manifest.shards
        return listed and manifest.statistics is not None and (self.folder / STATISTICS).is_file()

    def _write_manifest(self) -> Manifest:
        """Write the manifest with the finished shards of all ranks and return it.

        Of ranks that write it at the same time the last one wins; it checks again, so that no shard of the others is left out.
        """
        while True:
            numbers = finished_shards(self.folder)
            manifest = Manifest(head=self.head, shards={number: self._entry(number) for number in numbers}, statistics=None)
            manifest.write(self.folder, self._rank)
            if finished_shards(self.folder) == numbers:
                return manifest

    def _entry(self, number: int) -> ShardEntry:
        if number not in self._entries:
            self._entries[number] = ShardEntry.read(self.folder, number)
        return self._entries[number]


def _describe(shot: Shot) -> str:
    content = f"the image {shot.image!r}" if shot.image is not None else repr(shot.prompt)
    size = f"{shot.pixels[0]} x {shot.pixels[1]} pixels"
    return f"{content} (seed {shot.seed}, timestep {shot.timestep}, {size}, {shot.steps} steps, guidance {shot.guidance:g})"


@final
class DiskBudget:
    """The free disk space of a recording, or a smaller limit."""

    def __init__(self, recorders: Sequence[SiteRecorder], max_bytes: int | None) -> None:
        self._recorders = recorders
        self._max_bytes = max_bytes

    def check(self, total: int, run: Sequence[Shot], examples: Sequence[Shot]) -> None:
        """Raise an error if `total` shots do not fit on the disk or within the limit; it says how many would.

        Shots come in runs like `run`; the length of their descriptions is estimated from `examples`.
        """
        text = max(text_bytes(run), text_bytes(examples))
        folder = self._recorders[0].folder
        disk = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
        free = sum(recorder.bytes for recorder in self._recorders) + shutil.disk_usage(disk).free
        allowed = free if self._max_bytes is None else min(free, self._max_bytes)
        if self._store_bytes(total, text) <= allowed:
            return
        numbers = range(total // len(run) + 1)
        runs = bisect_right(numbers, allowed, key=lambda runs: self._store_bytes(runs * len(run), text)) - 1
        tokens = runs * len(run) * min(recorder.head.tokens for recorder in self._recorders)
        advice = (
            f"Ask for {tokens:,} tokens or fewer" if runs > 0 else "Not even one run fits: free some space or raise the limit"
        )
        smaller = "" if self._recorders[0].head.dtype == "int8" else " or for int8"
        limit = f"the disk has {format_size(free)} free" if allowed == free else f"the limit is {format_size(allowed)}"
        raise OutOfSpace(
            f"{total} shots at {len(self._recorders)} sites take {format_size(self._store_bytes(total, text))}; "
            f"{limit}. {advice}, or ask for fewer sites{smaller}."
        )

    def check_shard(self, shots: Sequence[Shot], recorders: Sequence[SiteRecorder]) -> None:
        """Raise an error if a shard of `shots` for each of `recorders` would exceed the limit."""
        assert self._max_bytes is not None, "without a limit the disk itself reports when it is full"
        stored = sum(each.bytes + HEADER_BYTES + statistics_bytes(each.head.width) for each in self._recorders)
        text = math.ceil(len(shots) * text_bytes(shots))
        if stored + sum(_shard_bytes(each.head.form, len(shots)) + text for each in recorders) > self._max_bytes:
            raise OutOfSpace(
                f"The next shard would exceed the limit of {format_size(self._max_bytes)}: later prompts are longer than the "
                "first ones. What is finished is kept; raise the limit, or ask for fewer tokens, and run the same command again."
            )

    def _store_bytes(self, total: int, text: float) -> int:
        return sum(store_bytes(each.head.form, each.head.shots_per_shard, total, text) for each in self._recorders)


def store_bytes(form: ShardFormat, shots_per_shard: int, total: int, text: float) -> int:
    """Return the bytes of a store of `total` shots, each of which takes `text` bytes to describe."""
    shards, rest = divmod(total, shots_per_shard)
    rows = shards * _shard_bytes(form, shots_per_shard) + (_shard_bytes(form, rest) if rest else 0)
    return rows + math.ceil(total * text) + statistics_bytes(form.width) + 2 * HEADER_BYTES


def _shard_bytes(form: ShardFormat, shots: int) -> int:
    return shard_size(form, shots) + BYTES_PER_SHARD + BYTES_PER_SHOT * shots


def text_bytes(shots: Sequence[Shot]) -> float:
    """Return the mean bytes of the description of a shot."""
    return sum(len(json.dumps(asdict(shot))) + 2 for shot in shots) / len(shots)


def format_size(count: float) -> str:
    """Format a number of bytes with its unit."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
