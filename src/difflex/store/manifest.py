"""The manifest of a store, and the file beside each shard that lists the shots of its rows."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from difflex._version import __version__
from difflex.choices import StoredDtype
from difflex.errors import BadInput, BrokenFile, UnknownName
from difflex.files import file_sha256, parsing, read_json, write_file
from difflex.records import Shot, Site, Split
from difflex.store.shard import REMEDY, MappedShard, ShardFormat

__all__ = [
    "MANIFEST",
    "STATISTICS",
    "Manifest",
    "ShardEntry",
    "StoreHeader",
    "check_split",
    "finished_shards",
    "map_shard",
    "read_shots",
    "shard_paths",
]

FORMAT = 2
MANIFEST = "manifest.json"
STATISTICS = "statistics.safetensors"
SPLITS: tuple[Split, ...] = ("train", "held-out")
REWRITE = "run the command that wrote the store again: it writes the manifest from the shards, which it keeps."


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
    """Where the shots come from, in words of the caller."""
    difflex: str = __version__
    """The version that began the store."""

    @property
    def form(self) -> ShardFormat:
        """The format of its shards."""
        return ShardFormat(self.site, self.dtype, self.tokens, self.width)


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """A finished shard."""

    shots: int
    held_out: tuple[int, ...]
    """Its shots of split `held-out`, counted from the first of the shard."""
    sha256: str
    shots_sha256: str
    """Of the file that lists its shots."""

    @classmethod
    def read(cls, folder: Path, number: int) -> "ShardEntry":
        """Read the entry of a shard from its list of shots, as after a kill or from another rank."""
        path = shard_paths(folder, number)[1]
        entries = read_json(path, FORMAT, REMEDY)
        with parsing(path, "a list of shots", REMEDY):
            return cls.of(_shots(entries), entries["sha256"], file_sha256(path))

    @classmethod
    def write(cls, folder: Path, number: int, site: Site, shots: tuple[Shot, ...], sha256: str, rank: int) -> "ShardEntry":
        """Finish a shard: list its shots in the file beside it, one per line, and return its entry."""
        lines = ",\n".join(json.dumps(asdict(shot)) for shot in shots)
        head = json.dumps({"format": FORMAT, "site": str(site), "shard": number, "sha256": sha256})
        content = f'{head[:-1]}, "shots": [\n{lines}\n]}}\n'.encode()
        return cls.of(shots, sha256, write_file(shard_paths(folder, number)[1], content, rank))

    @classmethod
    def of(cls, shots: tuple[Shot, ...], sha256: str, shots_sha256: str) -> "ShardEntry":
        """The entry of a shard that holds `shots`."""
        held_out = tuple(i for i, shot in enumerate(shots) if shot.split == "held-out")
        return cls(shots=len(shots), held_out=held_out, sha256=sha256, shots_sha256=shots_sha256)

    def shots_of(self, split: Split) -> Int[Tensor, " shot"]:
        """Return the numbers of its shots of `split`."""
        held_out = torch.tensor(self.held_out, dtype=torch.int64)
        if split == "held-out":
            return held_out
        train = torch.ones(self.shots, dtype=torch.bool)
        train[held_out] = False
        return train.nonzero().squeeze(1)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The header of a store and the list of its finished shards."""

    head: StoreHeader
    shards: dict[int, ShardEntry]
    statistics: str | None
    """The checksum of the statistics, which are written when all shards are finished; None before."""

    def write(self, folder: Path, rank: int) -> None:
        """Write the manifest to `folder`."""
        shards = {str(number): asdict(self.shards[number]) for number in sorted(self.shards)}
        head = {**asdict(self.head), "site": str(self.head.site)}
        entries = {"format": FORMAT, **head, "statistics": self.statistics, "shards": shards}
        write_file(folder / MANIFEST, _text({**entries, "checksum": _checksum(entries)}).encode(), rank)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest in `folder` and check its checksum."""
        path = folder / MANIFEST
        if not path.is_file() and finished_shards(folder):
            raise BrokenFile(f"{path} is missing, but the folder holds shards. To repair it, {REWRITE}")
        if not path.is_file():
            raise UnknownName(f"{folder} is not a store of activations: it has no {MANIFEST}. difflex harvest makes one.")
        entries = read_json(path, FORMAT, f"Delete it and {REWRITE}", header=True)
        if entries.pop("checksum", None) != _checksum(entries):
            raise BrokenFile(f"{path} is damaged: its checksum is not that of its content. Delete it and {REWRITE}")
        head = {field.name: entries[field.name] for field in fields(StoreHeader) if field.name in entries}
        grid = None if head["grid"] is None else (head["grid"][0], head["grid"][1])
        return cls(
            head=StoreHeader(**{**head, "site": Site.parse(head["site"]), "grid": grid}),
            shards={
                int(number): ShardEntry(**{**entry, "held_out": tuple(entry["held_out"])})
                for number, entry in entries["shards"].items()
            },
            statistics=entries["statistics"],
        )


def _text(entries: dict[str, Any], indent: str = "") -> str:
    """Format `entries` as JSON with one entry, or one shard, per line."""
    inner = indent + " "
    lines = [
        f"{inner}{json.dumps(key)}: {_text(value, inner) if key == 'shards' and isinstance(value, dict) else json.dumps(value)}"
        for key, value in entries.items()
    ]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def _checksum(entries: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def shard_paths(folder: Path, number: int) -> tuple[Path, Path]:
    """Return the path of a shard and that of the list of its shots."""
    return folder / f"shard-{number:05d}.safetensors", folder / f"shard-{number:05d}.json"


def finished_shards(folder: Path) -> list[int]:
    """Return the numbers of the finished shards in `folder`: those with the list of shots, which is written last."""
    names = (re.fullmatch(r"shard-(\d{5,})\.json", path.name) for path in folder.glob("shard-*.json"))
    numbers = (int(name[1]) for name in names if name)
    return sorted(number for number in numbers if shard_paths(folder, number)[0].is_file())


def map_shard(folder: Path, manifest: Manifest, number: int) -> MappedShard:
    """Open a shard of the store in `folder`."""
    return MappedShard(shard_paths(folder, number)[0], manifest.head.form, manifest.shards[number].shots)


def read_shots(folder: Path, number: int) -> tuple[Shot, ...]:
    """Return the shots of a shard, in the order of its rows."""
    path = shard_paths(folder, number)[1]
    with parsing(path, "a list of shots", REMEDY):
        return _shots(read_json(path, FORMAT, REMEDY))


def _shots(entries: dict[str, Any]) -> tuple[Shot, ...]:
    return tuple(Shot(**{**shot, "pixels": tuple(shot["pixels"])}) for shot in entries["shots"])


def check_split(shot: Shot) -> None:
    """Raise an error if the split of a shot is not that of its prompt. The split of an image depends on its content."""
    if shot.split not in SPLITS:
        raise UnknownName.among("The split", str(shot.split), SPLITS)
    if shot.image is None and shot.split != Shot.split_of(shot.prompt):
        raise BadInput(
            f"The shot of {shot.prompt!r} has the split '{shot.split}', but the hash of its prompt gives "
            f"'{Shot.split_of(shot.prompt)}'. Make shots with Pipeline.shots, or set split=Shot.split_of(prompt)."
        )
