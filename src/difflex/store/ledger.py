"""`SiteRecorder`: what a site's folder already holds, compared with what is asked now, and brought up to date shard by shard."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import final

from difflex.errors import BrokenFile, StaleWork
from difflex.files import sweep
from difflex.records import Activations, Shot, Site
from difflex.store.manifest import (
    MANIFEST,
    STATISTICS,
    Manifest,
    ShardEntry,
    StoreHeader,
    found_shards,
    new_head,
    read_entry,
    read_manifest,
    read_shots,
    shard_paths,
    write_shots,
)
from difflex.store.shard import MappedShard, ShardFormat, ShardWriter
from difflex.store.summary import summarise, write_statistics

__all__ = ["SiteRecorder"]

ELSEWHERE = "Ask for the same to go on, or name another folder to begin anew; nothing was changed."


@final
class SiteRecorder:
    """The store of one site in the making; nothing is written before `open`.

    Several ranks may each hold one of the same folder: each writes its own shards.
    """

    def __init__(self, folder: Path, site: Site, rank: int, of: int) -> None:
        self.folder = folder
        self.site = site
        self._rank = rank
        self._of = of
        self._writers: set[ShardWriter] = set()
        # Without a shard nothing is bound yet: what was decided then may be decided anew.
        begun = (folder / MANIFEST).is_file()
        self._entries = {number: read_entry(folder, number) for number in found_shards(folder)}
        self._head = read_manifest(folder).head if begun else None
        if not self._entries:
            self._head = None

    @property
    def begun(self) -> bool:
        """Whether something is stored, so that what was decided for it holds."""
        return self._head is not None

    @property
    def head(self) -> StoreHeader:
        """What was decided before the first row."""
        assert self._head is not None, "a ledger is asked for its head after `begin` or where it is begun"
        return self._head

    @property
    def rows(self) -> int:
        """How many rows are stored."""
        return self.head.tokens * sum(entry.shots for entry in self._entries.values())

    def begin(
        self, form: ShardFormat, shot: Shot, grid: tuple[int, int] | None, shots_per_shard: int, batch: int, source: str
    ) -> None:
        """Nothing; decides the head. Shards that are there without a manifest are taken over if they are of this form."""
        self._head = new_head(form, shot, grid, shots_per_shard, batch, source)
        for number, entry in self._entries.items():
            MappedShard(shard_paths(self.folder, number)[0], form, entry.shots)

    def open(self) -> None:
        """Nothing; the folder, which is there, is swept of what killed processes left, and says what was decided."""
        sweep(self.folder, self._rank, self._of)
        if not (self.folder / MANIFEST).is_file() or not self._entries:
            Manifest(head=self.head, shards=self._entries, statistics=None).write(self.folder, self._rank)

    @property
    def bytes(self) -> int:
        """What is on disk, but for the statistics."""
        return sum(path.stat().st_size for path in self.folder.glob("*") if path.name != STATISTICS and path.suffix != ".tmp")

    def check(self, shot: Shot, dtype: str, batch: int, source: str) -> None:
        """Nothing; to go on with other settings than those of the stored rows is an error."""
        asked = {name: getattr(shot, name) for name in ("model", "revision", "precision")}
        for name, wanted in {**asked, "dtype": dtype, "batch": batch, "source": source}.items():
            if getattr(self.head, name) != wanted:
                what = "The prompts have changed" if name == "source" else f"{self.folder} was begun with another {name}"
                raise StaleWork(f"{what}: {getattr(self.head, name)!r} then, {wanted!r} now. {ELSEWHERE}", self.folder)

    def has(self, number: int, shots: Sequence[Shot]) -> bool:
        """Whether the shard of this number is stored, whole; one that was made from other shots is an error."""
        if number not in self._entries:
            return False
        stored = read_shots(self.folder, number)
        there, asked = set(stored), set(shots)
        if there <= asked or there > asked:
            return len(stored) >= len(shots)
        was = next(shot for shot in stored if shot not in asked)
        now = next(shot for shot in shots if shot not in there)
        raise StaleWork(
            f"The prompts or their settings have changed: shard {number} of {self.folder} was made from {_said(was)}, "
            f"asked is {_said(now)}. {ELSEWHERE}",
            self.folder,
        )

    def writer(self, number: int, shots: int) -> ShardWriter:
        """A shard in the making."""
        writer = ShardWriter(shard_paths(self.folder, number)[0], self._rank, self.head.form, shots)
        self._writers.add(writer)
        return writer

    def abandon(self) -> None:
        """Nothing; shards in the making are gone."""
        while self._writers:
            self._writers.pop().discard()

    def fits(self, activations: Activations) -> None:
        """Nothing; activations of another shape than the stored ones are an error."""
        tokens, width = activations.values.shape[1:]
        if (tokens, width) != (self.head.tokens, self.head.width):
            raise StaleWork(
                f"{self.folder} holds shots of {self.head.tokens} tokens of width {self.head.width}; "
                f"the harvest gave {tokens} of width {width}. {ELSEWHERE}",
                self.folder,
            )

    def enter(self, number: int, writer: ShardWriter, shots: Sequence[Shot]) -> None:
        """Nothing; the shard is finished and listed."""
        # A shorter shard of this number, from when fewer tokens were asked, is forgotten before its rows change.
        shard_paths(self.folder, number)[1].unlink(missing_ok=True)
        sha256 = writer.keep()
        self._writers.remove(writer)
        self._entries[number] = write_shots(self.folder, number, self.site, tuple(shots), sha256, self._rank)
        self._publish()

    def finish(self, shards: int) -> None:
        """Nothing; if all `shards` are there, whichever rank wrote them, the statistics are written and the store is complete."""
        numbers = found_shards(self.folder)
        if len(numbers) < shards or self._is_complete(numbers):
            return
        manifest = self._publish()
        checksum = write_statistics(self.folder, summarise(self.folder, manifest), self._rank)
        replace(manifest, statistics=checksum).write(self.folder, self._rank)

    def _is_complete(self, numbers: Sequence[int]) -> bool:
        try:
            manifest = read_manifest(self.folder)
        except BrokenFile:
            return False
        listed = {number: self._entry(number) for number in numbers} == manifest.shards
        return listed and manifest.statistics is not None and (self.folder / STATISTICS).is_file()

    def _publish(self) -> Manifest:
        """The manifest, now listing all finished shards of all ranks.

        Of ranks that write it at the same time the last one wins; it looks again, so that no shard of the others is left out.
        """
        while True:
            numbers = found_shards(self.folder)
            manifest = Manifest(head=self.head, shards={number: self._entry(number) for number in numbers}, statistics=None)
            manifest.write(self.folder, self._rank)
            if found_shards(self.folder) == numbers:
                return manifest

    def _entry(self, number: int) -> ShardEntry:
        if number not in self._entries:
            self._entries[number] = read_entry(self.folder, number)
        return self._entries[number]


def _said(shot: Shot) -> str:
    what = f"the image {shot.image!r}" if shot.image is not None else repr(shot.prompt)
    size = f"{shot.pixels[0]} x {shot.pixels[1]} pixels"
    return f"{what} (seed {shot.seed}, timestep {shot.timestep}, {size}, {shot.steps} steps, guidance {shot.guidance:g})"
