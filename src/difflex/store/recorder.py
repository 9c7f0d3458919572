"""The store of one site while it is recorded, and the disk space that recordings take."""

import json
import math
import shutil
import warnings
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import final

from difflex.errors import BrokenFile, OutOfSpace, StaleWork
from difflex.files import file_sha256
from difflex.records import Activations, Shot, Site
from difflex.store.basis import BASIS, QuantisationBasis, basis_bytes, has_full_root, read_basis, write_basis
from difflex.store.manifest import (
    STATISTICS,
    Manifest,
    ShardEntry,
    StoreHeader,
    check_format,
    finished_shards,
    matches,
    read_shots,
    shard_paths,
    statistics_bytes,
    summarise,
    write_statistics,
)
from difflex.store.shard import MappedShard, ShardFormat, ShardWriter, shard_size

HEADER_BYTES = 2048
"""Of a manifest and of a statistics file, at most."""
BYTES_PER_SHARD = 512
"""In the manifest, and in the header of the list of shots, at most."""
BYTES_PER_SHOT = 2
"""In the manifest's list of held-out shots."""
ADVICE = "Use the same settings to continue, or name another folder to start again; nothing was changed."


@final
class SiteRecorder:
    """The store of one site while it is recorded; nothing is written before `open`.

    Several ranks may each hold a recorder of the same folder: each writes its own shards.
    """

    def __init__(self, folder: Path, site: Site, world_size: int) -> None:
        self.folder = folder
        self.site = site
        self._world_size = world_size
        self._writers: set[ShardWriter] = set()
        self._entries: dict[int, ShardEntry] = {}
        self._basis: QuantisationBasis | None = None
        manifest = Manifest.read_if_intact(folder)
        self._head = manifest.head if manifest and self._finished() else None  # without a shard nothing is fixed yet

    @property
    def begun(self) -> bool:
        """Whether the header is fixed."""
        return self._head is not None

    @property
    def head(self) -> StoreHeader:
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

    @property
    def lacks_basis(self) -> bool:
        """Whether the rows are int8, and their basis is not known yet or damaged."""
        if self.head.dtype != "int8" or self._basis is not None:
            return False
        with suppress(BrokenFile):
            self._basis = self.head.read_basis(self.folder)
        return self._basis is None

    def begin(self, head: StoreHeader) -> None:
        """Fix the header. Shards without a manifest are taken over if they have its format; damaged ones are made again."""
        self._head = head
        for number, entry in self._finished().items():
            path = shard_paths(self.folder, number)[0]
            try:
                MappedShard(path, head.form, entry.shots)
            except BrokenFile as error:
                if matches(path, entry.sha256):
                    raise StaleWork(
                        f"{self.folder} has no manifest, and {path} was made with other settings. {ADVICE}"
                    ) from error
        if self._finished() and head.dtype == "int8":
            self._head = replace(head, basis=self._intact_basis())

    def _intact_basis(self) -> str:
        """Return the checksum of the basis of shards without a manifest."""
        try:
            checksum = file_sha256(self.folder / BASIS)
            read_basis(self.folder, self.head.width, checksum)
        except (BrokenFile, FileNotFoundError) as error:
            raise StaleWork(
                f"{self.folder} holds int8, but neither its manifest nor its {BASIS} is intact. Move it away and harvest again."
            ) from error
        return checksum

    def set_basis(self, basis: QuantisationBasis) -> None:
        """Fix the units of int8."""
        self._basis = basis

    def open(self) -> None:
        """Delete damaged lists of shots, and write the basis and the manifest if the folder has none that is intact."""
        if self._basis is not None:
            self._write_basis(self._basis)
        for number in set(finished_shards(self.folder)) - self._finished().keys():
            shard_paths(self.folder, number)[1].unlink(missing_ok=True)
        if not self._entries or Manifest.read_if_intact(self.folder) is None:
            Manifest(head=self.head, shards=self._entries, statistics=None).write(self.folder)

    def _write_basis(self, basis: QuantisationBasis) -> None:
        """Write the basis unless the folder has it; ranks that begin a store together take that of the first."""
        path = self.folder / BASIS
        if self.head.basis is None:
            write_basis(self.folder, basis, self.head.origin, keep=self._world_size > 1)
            self._head = replace(self.head, basis=file_sha256(path))
            self._basis = self.head.read_basis(self.folder)
        elif not matches(path, self.head.basis):
            write_basis(self.folder, basis, self.head.origin, keep=False)
            if not matches(path, self.head.basis):
                path.unlink()  # without the manifest, it would be taken for that of the rows
                raise StaleWork(
                    f"{path}, in whose units the rows of {self.folder} are stored, is lost: this harvest gives another one: "
                    "the prompts, the model or the machine differ. Move the folder away and harvest again.",
                    self.folder,
                )

    def check_rows(self, shots: int) -> None:
        """Raise an error if int8 was begun with too few rows to hold this many shots well."""
        head, diagonal = self.head, self._basis is not None and self._basis.is_diagonal
        if diagonal and has_full_root(head.width, shots * head.tokens) and self._finished():
            raise StaleWork(
                f"{self.folder} was begun with too few rows to fix the units of int8 for {shots * head.tokens:,} rows. "
                "Store them in another folder, or store bf16."
            )

    def check_settings(self, shot: Shot, dtype: str, batch: int, source: str) -> None:
        """Raise an error if the stored rows were made with other settings."""
        model = {name: getattr(shot, name) for name in ("model", "revision", "precision")}
        for name, value in {**model, "dtype": dtype, "batch": batch, "source": source}.items():
            if (stored := getattr(self.head, name)) != value:
                problem = "The prompts have changed" if name == "source" else f"{self.folder} was begun with another {name}"
                raise StaleWork(f"{problem}: {stored!r} then, {value!r} now. {ADVICE}", self.folder)
        if 0 in self._entries:
            first = read_shots(self.folder, 0)[0][0]
            same = replace(first, text_length=shot.text_length, pixels=shot.pixels, steps=shot.steps, guidance=shot.guidance)
            if same != first:
                raise self._stale(0, first, same)

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
        """Return whether the shard of this number is complete and intact; raise an error if it was made from other shots."""
        if number not in self._entries:
            return False
        stored, sha256, _ = read_shots(self.folder, number)
        stored_set, shot_set = set(stored), set(shots)
        if stored_set <= shot_set or stored_set > shot_set:
            return len(stored) >= len(shots) and self._is_intact(number, sha256)
        old = next(shot for shot in stored if shot not in shot_set)
        new = next(shot for shot in shots if shot not in stored_set)
        raise self._stale(number, old, new)

    def _stale(self, number: int, old: Shot, new: Shot) -> StaleWork:
        return StaleWork(
            f"The prompts or their settings have changed: shard {number} of {self.folder} was made from {_describe(old, new)}, "
            f"now it would be made from {_describe(new, old)}. {ADVICE}",
            self.folder,
        )

    def _is_intact(self, number: int, sha256: str) -> bool:
        path = shard_paths(self.folder, number)[0]
        if intact := matches(path, sha256):
            return intact
        warnings.warn(f"{path} is damaged: it is made again.", stacklevel=5)
        return False

    def writer(self, number: int, shots: int) -> ShardWriter:
        """Begin a shard."""
        writer = ShardWriter(shard_paths(self.folder, number)[0], self.head.form, shots, self._basis)
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
        self._entries[number] = ShardEntry.write(self.folder, number, self.site, tuple(shots), sha256)
        self._write_manifest()

    def complete(self, shards: int) -> None:
        """Write the statistics, which make the store complete, if all `shards` are finished, whichever rank wrote them."""
        if len(finished_shards(self.folder)) < shards or self._is_complete():
            return
        manifest = self._write_manifest()
        checksum = write_statistics(self.folder, summarise(self.folder, manifest))
        replace(manifest, statistics=checksum).write(self.folder)

    def _is_complete(self) -> bool:
        manifest = Manifest.read_if_intact(self.folder)
        if manifest is None or manifest.statistics is None or manifest.shards != self._finished():
            return False
        return matches(self.folder / STATISTICS, manifest.statistics)

    def _write_manifest(self) -> Manifest:
        """Write the manifest with the finished shards of all ranks and return it.

        Of ranks that write it at the same time the last one wins; it checks again, so that no shard of the others is left out.
        """
        while True:
            manifest = Manifest(head=self.head, shards=self._finished(), statistics=None)
            manifest.write(self.folder)
            if finished_shards(self.folder) == [*manifest.shards]:
                return manifest

    def _finished(self) -> dict[int, ShardEntry]:
        """Return the finished shards of all ranks whose list of shots is intact."""
        numbers = finished_shards(self.folder)
        for number in (number for number in numbers if number not in self._entries):
            try:
                self._entries[number] = ShardEntry.read(self.folder, number)
            except BrokenFile:
                check_format(shard_paths(self.folder, number)[1])
        return {number: self._entries[number] for number in numbers if number in self._entries}


def _describe(shot: Shot, other: Shot) -> str:
    """Describe how a shot differs from another one."""
    names = (field.name for field in fields(Shot) if getattr(shot, field.name) != getattr(other, field.name))
    return ", ".join(f"{name} {getattr(shot, name)!r}" for name in names)


def check_disk(
    recorders: Sequence[SiteRecorder], max_bytes: int | None, total: int, run: Sequence[Shot], examples: Sequence[Shot]
) -> None:
    """Raise an error if `total` shots do not fit on the disk or into `max_bytes`; it says how many would.

    Shots come in runs like `run`; the length of their descriptions is estimated from `examples`.
    """
    heads, folder = [recorder.head for recorder in recorders], recorders[0].folder
    text = max(text_bytes(run), text_bytes(examples))
    needed = partial(store_bytes, [head.form for head in heads], heads[0].shots_per_shard, text)
    disk = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = sum(recorder.bytes for recorder in recorders) + shutil.disk_usage(disk).free
    allowed = free if max_bytes is None else min(free, max_bytes)
    if needed(total) <= allowed:
        return
    runs = bisect_right(range(total // len(run) + 1), allowed, key=lambda runs: needed(runs * len(run))) - 1
    tokens = runs * len(run) * min(head.tokens for head in heads)
    advice = f"Ask for {tokens:,} tokens or fewer" if runs > 0 else "Not even one run fits: free some space or raise the limit"
    smaller = "" if heads[0].dtype == "int8" else " or for int8"
    limit = f"the disk has {format_size(free)} free" if allowed == free else f"the limit is {format_size(allowed)}"
    raise OutOfSpace(
        f"{total} shots at {len(heads)} sites take {format_size(needed(total))}; {limit}. "
        f"{advice}, or ask for fewer sites{smaller}."
    )


def check_next_shard(
    recorders: Sequence[SiteRecorder], max_bytes: int, shots: Sequence[Shot], missing: Sequence[SiteRecorder]
) -> None:
    """Raise an error if a shard of `shots` for each of the `missing` sites would exceed `max_bytes`."""
    stored = sum(recorder.bytes + HEADER_BYTES + statistics_bytes(recorder.head.width) for recorder in recorders)
    text = math.ceil(len(shots) * text_bytes(shots))
    if stored + sum(_shard_bytes(recorder.head.form, len(shots)) + text for recorder in missing) > max_bytes:
        raise OutOfSpace(
            f"The next shard would exceed the limit of {format_size(max_bytes)}: later prompts are longer than the "
            "first ones. What is finished is kept; raise the limit, or ask for fewer tokens, and run the same command again."
        )


def store_bytes(forms: Sequence[ShardFormat], shots_per_shard: int, text: float, total: int) -> int:
    """Return the bytes of stores of these formats with `total` shots, each of which takes `text` bytes to describe."""
    shards, rest = divmod(total, shots_per_shard)
    size = 0
    for form in forms:
        rows = shards * _shard_bytes(form, shots_per_shard) + (_shard_bytes(form, rest) if rest else 0)
        size += rows + math.ceil(total * text) + statistics_bytes(form.width) + 2 * HEADER_BYTES
        size += HEADER_BYTES + basis_bytes(form.width, total * form.tokens) if form.dtype == "int8" else 0
    return size


def _shard_bytes(form: ShardFormat, shots: int) -> int:
    return shard_size(form, shots) + BYTES_PER_SHARD + BYTES_PER_SHOT * shots


def text_bytes(shots: Sequence[Shot]) -> float:
    """Return the mean bytes of the description of a shot."""
    return sum(len(json.dumps(shot.as_json())) + 2 for shot in shots) / len(shots)


def format_size(count: float) -> str:
    """Format a number of bytes with its unit."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
