"""The files that describe a store: the manifest, the list of the shots of each shard, and the statistics of all rows."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import reduce
from pathlib import Path
from threading import BoundedSemaphore, Event, Thread
from typing import ClassVar, NamedTuple, final

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from difflex._version import __version__
from difflex.choices import StoredDtype
from difflex.errors import BadInput, BrokenFile, DifflexError, StaleWork, UnknownName
from difflex.files import disk_errors, file_sha256, parsing, read_json, write_json
from difflex.records import Shot, Site, Split
from difflex.store.basis import LARGEST_WIDTH, QuantisationBasis, read_basis
from difflex.store.shard import REMEDY, MappedShard, PackedRows, RowMoments, ShardFormat, block_sums, unpack
from difflex.tensors import read_tensors, write_tensors
from difflex.values import check_fields

FORMAT = 3
MANIFEST = "manifest.json"
STATISTICS = "statistics.safetensors"
STATISTICS_FORMAT = 2
SPLITS: tuple[Split, ...] = ("train", "held-out")
REWRITE = "Run the same harvest again: it writes the manifest from the shards, which it keeps."
RECOMPUTE = "Run the same harvest again: it computes them from the shards."
OLD_INT8 = (
    "{} holds int8 with a scale for each row, as earlier versions of difflex stored it: its rounding drowns the small principal "
    "axes. Move it away and harvest again."
)
SAMPLE = 16
"""Rows in the sample for the covariance, as a multiple of the width."""
STRIP = 256
CHUNK = 1024


@dataclass(frozen=True, kw_only=True)
class StoreHeader:
    """The properties of a store that are fixed before its first row."""

    site: Site
    model: str
    revision: str | None
    precision: str | None = None
    """Of the model's weights."""
    dtype: StoredDtype
    width: int
    tokens: int
    """Per shot."""
    grid: tuple[int, int] | None
    """Rows and columns of the tokens; None for text."""
    shots_per_shard: int
    """Of every shard but the last, so that the number of a shot tells its shard."""
    batch: int
    """Runs that the model makes at once; another number changes the last bits of the values."""
    source: str
    """The source of the shots, as the caller describes it."""
    basis: str | None = None
    """For int8: the checksum of the basis in whose units rows are stored."""
    difflex: str = __version__
    """The version that began the store."""

    @property
    def form(self) -> ShardFormat:
        return ShardFormat(self.site, self.dtype, self.tokens, self.width)

    @property
    def origin(self) -> str:
        """A description of the rows, without the checksum of their basis."""
        entries = {**asdict(self), "site": str(self.site), "basis": None, "difflex": ""}
        return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()

    def read_basis(self, folder: Path) -> QuantisationBasis | None:
        """Read the basis of int8 in the folder of the store; None for other types."""
        return None if self.basis is None else read_basis(folder, self.width, self.basis)


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """A finished shard."""

    shots: int
    held_out: tuple[int, ...]
    """Its shots of split `held-out`, counted from the first of the shard."""
    sha256: str
    shots_sha256: str
    """Of the file that lists its shots."""
    sums: str | None = None
    """A checksum that is quick to compute, for reading; None in a store that was written without it."""

    @classmethod
    def read(cls, folder: Path, number: int) -> "ShardEntry":
        """Read the entry of a shard from its list of shots, as after a kill or from another rank."""
        shots, sha256, sums = read_shots(folder, number)
        return cls.of(shots, sha256, sums, file_sha256(shard_paths(folder, number)[1]))

    @classmethod
    def write(cls, folder: Path, number: int, site: Site, shots: tuple[Shot, ...], sha256: str) -> "ShardEntry":
        """Finish a shard: list its shots in the file beside it, and return its entry."""
        shard, path = shard_paths(folder, number)
        checksums = {"sha256": sha256, "sums": (sums := block_sums(shard))}
        entries = {"site": str(site), "shard": number, **checksums, "shots": [shot.as_json() for shot in shots]}
        write_json(path, FORMAT, entries, indent=None)
        return cls.of(shots, sha256, sums, file_sha256(path))

    @classmethod
    def of(cls, shots: tuple[Shot, ...], sha256: str, sums: str | None, shots_sha256: str) -> "ShardEntry":
        """Return the entry of a shard that holds `shots`."""
        held_out = tuple(i for i, shot in enumerate(shots) if shot.split == "held-out")
        return cls(shots=len(shots), held_out=held_out, sha256=sha256, shots_sha256=shots_sha256, sums=sums)

    def shots_of(self, split: Split) -> Int[Tensor, " shot"]:
        """Return the numbers of its shots of `split`."""
        in_split = torch.full((self.shots,), split == "train")
        in_split[torch.tensor(self.held_out, dtype=torch.int64)] = split == "held-out"
        return in_split.nonzero().squeeze(1)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The header of a store and the list of its finished shards."""

    head: StoreHeader
    shards: dict[int, ShardEntry]
    statistics: str | None
    """The checksum of the statistics, which are written when all shards are finished; None before."""

    def write(self, folder: Path) -> None:
        shards = {str(number): asdict(self.shards[number]) for number in sorted(self.shards)}
        head = {**asdict(self.head), "site": str(self.head.site)}
        write_json(folder / MANIFEST, FORMAT, {**head, "statistics": self.statistics, "shards": shards}, indent=None)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        path = folder / MANIFEST
        if not path.is_file():
            if finished_shards(folder):
                raise BrokenFile(f"{path} is missing, but the folder holds shards. {REWRITE}")
            raise UnknownName(f"{folder} is not a store of activations: it has no {MANIFEST}. difflex harvest makes one.")
        entries = read_json(path, FORMAT, REWRITE, header=True)
        with parsing(path, "the manifest of a store", REWRITE):
            listed = (
                (int(number), {**shard, "held_out": tuple(shard["held_out"])}) for number, shard in entries["shards"].items()
            )
            shards = {number: ShardEntry(**shard) for number, shard in listed}
            for entry in shards.values():
                check_fields(entry)
            head = {field.name: entries[field.name] for field in fields(StoreHeader) if field.name in entries}
            head |= {"site": Site.parse(head["site"]), "grid": head["grid"] and tuple(head["grid"])}
            check_fields(header := StoreHeader(**head))
            if header.dtype == "int8" and header.basis is None:
                raise BrokenFile(OLD_INT8.format(folder))
            return cls(head=header, shards=shards, statistics=entries["statistics"])

    @classmethod
    def read_if_intact(cls, folder: Path) -> "Manifest | None":
        """Read the manifest; None if it is missing or damaged. One of another format is an error: it may be a newer one."""
        try:
            return cls.read(folder)
        except (BrokenFile, UnknownName):
            check_format(folder / MANIFEST)
            return None


def shard_paths(folder: Path, number: int) -> tuple[Path, Path]:
    """Return the path of a shard and that of the list of its shots."""
    return folder / f"shard-{number:05d}.safetensors", folder / f"shard-{number:05d}.json"


def check_format(path: Path) -> None:
    """Raise an error for a file of another format, and for a manifest of earlier int8; a damaged or missing file passes."""
    try:
        entries = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return
    if isinstance(entries, dict) and entries.get("format") != FORMAT:
        read_json(path, FORMAT, "")
    if isinstance(entries, dict) and entries.get("dtype") == "int8" and entries.get("basis") is None:
        raise StaleWork(OLD_INT8.format(path.parent), path.parent)


def finished_shards(folder: Path) -> list[int]:
    """Return the numbers of the finished shards in `folder`: those with the list of shots, which is written last."""
    names = (re.fullmatch(r"shard-(\d{5,})\.json", path.name) for path in folder.glob("shard-*.json"))
    numbers = (int(name[1]) for name in names if name)
    return sorted(number for number in numbers if shard_paths(folder, number)[0].is_file())


def map_shard(folder: Path, manifest: Manifest, number: int) -> MappedShard:
    return MappedShard(shard_paths(folder, number)[0], manifest.head.form, manifest.shards[number].shots)


def matches(path: Path, checksum: str | None, function: Callable[[Path], str] = file_sha256) -> bool:
    """Return whether the file at `path` exists and has this checksum, by default its SHA-256."""
    try:
        with disk_errors(path, "read"):
            return function(path) == checksum
    except FileNotFoundError:
        return False


@final
class ShardChecks:
    """Compares shards with their checksums at their first use in this process, in threads that read ahead."""

    _intact: ClassVar[set[tuple[Path, str]]] = set()
    """Shards that this process has compared, with the checksum that they had."""
    _slots = BoundedSemaphore(min(max(2, (os.cpu_count() or 2) // 2), 8))
    """How many threads compute checksums at once, in the order of `begin`."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._files = {n: (shard_paths(folder.absolute(), n)[0], entry.sha256) for n, entry in manifest.shards.items()}
        self._sums = {n: entry.sums for n, entry in manifest.shards.items()}
        self._threads: dict[int, Thread] = {}
        self._ended = Event()

    def begin(self, shards: Iterable[int]) -> None:
        """Compare `shards` in the background."""
        for number in shards:
            if self._files[number] not in self._intact and number not in self._threads:
                self._threads[number] = Thread(target=self._compare, args=(number,), daemon=True)
                self._threads[number].start()

    def require(self, shards: Iterable[int]) -> None:
        """Wait until `shards` are compared; raise an error for the first that is damaged."""
        self.begin(shards := [*shards])
        for number in shards:
            if number in self._threads:
                self._threads[number].join()
            if self._files[number] not in self._intact:
                raise BrokenFile(f"{self._files[number][0]} does not match its checksum: it is damaged. {REMEDY}")

    def end(self) -> None:
        """Compare no further shards."""
        self._ended.set()

    def _compare(self, number: int) -> None:
        (path, sha256), sums = self._files[number], self._sums[number]
        # An error of reading is raised where the shard is mapped.
        with self._slots, suppress(DifflexError):
            if not self._ended.is_set() and (matches(path, sha256) if sums is None else matches(path, sums, block_sums)):
                self._intact.add((path, sha256))


class ShotList(NamedTuple):
    """The list of the shots of a shard."""

    shots: tuple[Shot, ...]
    """In the order of the rows."""
    sha256: str
    """Of the shard."""
    sums: str | None
    """Of the shard, by `block_sums`."""


def read_shots(folder: Path, number: int) -> ShotList:
    """Read the list of the shots of a shard."""
    path = shard_paths(folder, number)[1]
    entries = read_json(path, FORMAT, REMEDY)
    with parsing(path, "a list of shots", REMEDY):
        shots = tuple(Shot(**{**shot, "pixels": tuple(shot["pixels"])}) for shot in entries["shots"])
        return ShotList(shots, entries["sha256"], entries.get("sums"))


def check_split(shot: Shot) -> None:
    """Raise an error if the split of a shot is not that of its prompt. The split of an image depends on its content."""
    if shot.split not in SPLITS:
        raise UnknownName.among("The split", str(shot.split), SPLITS)
    if shot.image is None and shot.split != Shot.split_of(shot.prompt):
        raise BadInput(
            f"The shot of {shot.prompt!r} has the split '{shot.split}', but the hash of its prompt gives "
            f"'{Shot.split_of(shot.prompt)}'. Make shots with Pipeline.shots, or set split=Shot.split_of(prompt)."
        )


@dataclass(frozen=True, kw_only=True)
class StoreStatistics:
    """Moments of all `train` rows."""

    count: int
    mean: Float64[Tensor, " width"]
    variance: Float64[Tensor, " width"]
    """Of the population: divided by the count."""
    mean_norm: float
    peak_norm: float
    """The largest Euclidean norm of a row."""
    covariance: Float64[Tensor, "width width"] | None
    """Of an even sample of at most 16 x width rows, about the sample's own mean; None for a width over 8192."""
    sampled: int
    """Rows in that sample."""


def statistics_bytes(width: int) -> int:
    """Return the bytes of the tensors of a statistics file."""
    return (2 * width + (width**2 if width <= LARGEST_WIDTH else 0)) * torch.float64.itemsize


def summarise(folder: Path, manifest: Manifest) -> StoreStatistics:
    """Compute the statistics of all `train` rows in `folder`; which rank wrote which shard makes no difference."""
    width = manifest.head.width
    zeros = torch.zeros(width, dtype=torch.float64)
    moments = (map_shard(folder, manifest, shard).moments() for shard in sorted(manifest.shards))
    mean, squares, totals = reduce(RowMoments.merge, moments, RowMoments(zeros, zeros, torch.zeros(3, dtype=torch.float64)))
    count, norms, peak = totals.tolist()
    sampled = min(int(count), SAMPLE * width) if width <= LARGEST_WIDTH else 0
    return StoreStatistics(
        count=int(count),
        mean=mean,
        variance=squares / max(count, 1),
        mean_norm=norms / max(count, 1),
        peak_norm=peak,
        covariance=_covariance(_sample(folder, manifest, int(count), sampled), mean) if sampled else None,
        sampled=sampled,
    )


def _sample(folder: Path, manifest: Manifest, count: int, sampled: int) -> Iterator[Float[Tensor, "row width"]]:
    """Yield `sampled` evenly spaced rows out of the `count` rows of split `train`, in chunks."""
    tokens, first, basis = manifest.head.tokens, 0, manifest.head.read_basis(folder)
    places = torch.arange(sampled) * count // sampled
    for shard in sorted(manifest.shards):
        shots = manifest.shards[shard].shots_of("train")
        local = places[(places >= first) & (places < first + len(shots) * tokens)] - first
        rows: Int[Tensor, " row"] = shots[local // tokens] * tokens + local % tokens
        mapped = map_shard(folder, manifest, shard)
        for chunk in rows.split(CHUNK) if len(rows) else ():
            yield unpack(PackedRows(mapped.values[chunk], None if mapped.scales is None else mapped.scales[chunk]), basis)
        first += len(shots) * tokens


def _covariance(chunks: Iterable[Float[Tensor, "row width"]], mean: Float64[Tensor, " width"]) -> Float64[Tensor, "width width"]:
    """Return the covariance of all rows in `chunks` about their own mean, which is near `mean`."""
    products = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    total, count = torch.zeros_like(mean), 0
    for chunk in chunks:
        x = chunk.double() - mean
        for start in range(0, len(mean), STRIP):
            # The entries below the diagonal mirror those above it.
            products[start : start + STRIP, start:].addmm_(x[:, start : start + STRIP].T, x[:, start:])
        total += x.sum(0)
        count += len(x)
    total /= count
    return (products.triu() + products.triu(1).T) / count - torch.outer(total, total)


def write_statistics(folder: Path, statistics: StoreStatistics) -> str:
    """Write `statistics` to their file in `folder` and return its SHA-256."""
    tensors = {
        name: value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        for name, value in vars(statistics).items()
        if value is not None
    }
    return file_sha256(write_tensors(folder / STATISTICS, STATISTICS_FORMAT, tensors))


def read_statistics(folder: Path) -> StoreStatistics:
    """Read the statistics that `write_statistics` wrote."""
    path = folder / STATISTICS
    tensors = read_tensors(path, STATISTICS_FORMAT, RECOMPUTE).tensors
    with parsing(path, "statistics", RECOMPUTE):
        counts = {name: int(tensors[name]) for name in ("count", "sampled")}
        norms = {name: float(tensors[name]) for name in ("mean_norm", "peak_norm")}
        moments = {"mean": tensors["mean"], "variance": tensors["variance"], "covariance": tensors.get("covariance")}
        return StoreStatistics(**counts, **norms, **moments)
