"""What a store says about itself: the manifest, and beside each shard the shots that its rows were made from."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import cast

from difflex._version import __version__
from difflex.errors import BadInput, BrokenFile, UnknownName
from difflex.files import file_sha256, read_json, write_file
from difflex.records import Shot, Site, split_of
from difflex.store.shard import DTYPES, MEND, ShardFormat, Stored

__all__ = [
    "MANIFEST",
    "STATISTICS",
    "Manifest",
    "ShardEntry",
    "StoreHeader",
    "read_manifest",
    "read_shots",
    "shard_paths",
    "write_shots",
]

FORMAT = 1
MANIFEST = "manifest.json"
STATISTICS = "statistics.safetensors"
ANEW = "give the command that wrote the store again: it writes the manifest anew from the shards and keeps them."
RESTORE = f"Delete it and {ANEW}"


@dataclass(frozen=True, kw_only=True)
class StoreHeader:
    """What was decided before the first row of a store was written."""

    site: Site
    model: str
    revision: str | None
    precision: str | None = None
    """What the model's weights were held in."""
    dtype: Stored
    width: int
    tokens: int
    """Of each shot."""
    grid: tuple[int, int] | None
    """Rows and columns of the tokens; None for text."""
    shots_per_shard: int
    """Of every shard but the last, so that the number of a shot tells its shard."""
    batch: int
    """Runs that the model made at once; another number changes the last bits of the values."""
    source: str
    """What the shots were made from, as the caller named it."""
    difflex: str
    """The version that began the store."""

    @property
    def form(self) -> ShardFormat:
        """What all its shards have in common."""
        return ShardFormat(self.site, self.dtype, self.tokens, self.width)


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """A finished shard."""

    shots: int
    held_out: tuple[int, ...]
    """Which of its shots are not for training, counted from the shard's first."""
    sha256: str
    """Of the shard."""
    shots_sha256: str
    """Of the file beside it."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A store in figures."""

    head: StoreHeader
    shards: dict[int, ShardEntry]
    statistics: str | None
    """The checksum of the statistics, which are written when all shards are there; None before."""

    def write(self, folder: Path, rank: int) -> None:
        """Nothing; the manifest in `folder` is this one."""
        shards = {str(number): asdict(self.shards[number]) for number in sorted(self.shards)}
        head = {**asdict(self.head), "site": str(self.head.site)}
        said = {"format": FORMAT, **head, "statistics": self.statistics, "shards": shards}
        write_file(folder / MANIFEST, _text({**said, "checksum": _checksum(said)}).encode(), rank)


def new_head(
    form: ShardFormat, shot: Shot, grid: tuple[int, int] | None, shots_per_shard: int, batch: int, source: str
) -> StoreHeader:
    """The head of a store that is begun now."""
    return StoreHeader(
        **form._asdict(),
        model=shot.model,
        revision=shot.revision,
        precision=shot.precision,
        grid=grid,
        shots_per_shard=shots_per_shard,
        batch=batch,
        source=source,
        difflex=__version__,
    )


def read_manifest(folder: Path) -> Manifest:
    """The manifest in `folder`, whose checksum is right."""
    path = folder / MANIFEST
    if not path.is_file() and found_shards(folder):
        raise BrokenFile(f"{path} is missing, and shards are there. To mend it, {ANEW}")
    if not path.is_file():
        raise UnknownName(f"{folder} is not a store of activations: it has no {MANIFEST}. difflex harvest makes one.")
    said = read_json(path, FORMAT, RESTORE)
    if said.pop("checksum", None) != _checksum(said):
        raise BrokenFile(f"{path} is damaged: its checksum is not that of its content. {RESTORE}")
    head = {field.name: said[field.name] for field in fields(StoreHeader) if field.name in said}
    grid = cast("list[int] | None", head["grid"])
    shards = cast("dict[str, dict[str, object]]", said["shards"])
    return Manifest(
        head=StoreHeader(**{**head, "site": Site.parse(str(head["site"])), "grid": None if grid is None else (grid[0], grid[1])}),
        shards={int(number): _entry(entry) for number, entry in shards.items()},
        statistics=cast("str | None", said["statistics"]),
    )


def _entry(said: dict[str, object]) -> ShardEntry:
    return ShardEntry(**{**said, "held_out": tuple(cast("list[int]", said["held_out"]))})


def _text(said: dict[str, object], indent: str = "") -> str:
    """JSON with an entry, or a shard, a line."""
    inner = indent + " "
    entries = [
        f"{inner}{json.dumps(key)}: {_text(value, inner) if key == 'shards' and isinstance(value, dict) else json.dumps(value)}"
        for key, value in said.items()
    ]
    return "{\n" + ",\n".join(entries) + f"\n{indent}}}"


def _checksum(said: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def shard_paths(folder: Path, number: int) -> tuple[Path, Path]:
    """The shard of this number and the file of its shots."""
    return folder / f"shard-{number:05d}.safetensors", folder / f"shard-{number:05d}.json"


def found_shards(folder: Path) -> list[int]:
    """The numbers of the finished shards in `folder`: a shard and, written after it, its shots are there."""
    names = (re.fullmatch(r"shard-(\d{5,})\.json", path.name) for path in folder.glob("shard-*.json"))
    numbers = (int(name[1]) for name in names if name)
    return sorted(number for number in numbers if shard_paths(folder, number)[0].is_file())


def write_shots(folder: Path, number: int, site: Site, shots: tuple[Shot, ...], sha256: str, rank: int) -> ShardEntry:
    """The entry of a shard that is finished by this: its shots are written beside it, one a line."""
    lines = ",\n".join(json.dumps(asdict(shot)) for shot in shots)
    head = json.dumps({"format": FORMAT, "site": str(site), "shard": number, "sha256": sha256})
    content = f'{head[:-1]}, "shots": [\n{lines}\n]}}\n'.encode()
    checksum = write_file(shard_paths(folder, number)[1], content, rank)
    return _described(shots, sha256, checksum)


def read_shots(folder: Path, number: int) -> tuple[Shot, ...]:
    """The shots of a shard, in the order of its rows."""
    return _shots(shard_paths(folder, number)[1], read_json(shard_paths(folder, number)[1], FORMAT, MEND))


def read_entry(folder: Path, number: int) -> ShardEntry:
    """The entry of a finished shard, from the file of its shots: how a killed harvest, or another rank's, is taken over."""
    path = shard_paths(folder, number)[1]
    said = read_json(path, FORMAT, MEND)
    return _described(_shots(path, said), str(said["sha256"]), file_sha256(path))


def _described(shots: tuple[Shot, ...], sha256: str, shots_sha256: str) -> ShardEntry:
    held_out = tuple(i for i, shot in enumerate(shots) if shot.split == "held-out")
    return ShardEntry(shots=len(shots), held_out=held_out, sha256=sha256, shots_sha256=shots_sha256)


def _shots(path: Path, said: dict[str, object]) -> tuple[Shot, ...]:
    try:
        each = cast("list[dict[str, object]]", said["shots"])
        return tuple(Shot(**{**shot, "pixels": tuple(cast("list[int]", shot["pixels"]))}) for shot in each)
    except (KeyError, TypeError) as error:
        raise BrokenFile(f"{path} does not hold shots ({error}): it is damaged. {MEND}") from error


def check_split(shot: Shot) -> None:
    """Nothing; a shot whose split is not that of its prompt is an error. That of an image is fixed by its content."""
    if shot.split not in ("train", "held-out"):
        raise UnknownName.among("The split", str(shot.split), ("train", "held-out"))
    if shot.image is None and shot.split != split_of(shot.prompt):
        raise BadInput(
            f"The shot of {shot.prompt!r} says that it is '{shot.split}', the hash of its prompt says '{split_of(shot.prompt)}'. "
            "Make shots with Pipeline.shots, or set split=split_of(prompt)."
        )


def check_dtype(dtype: str) -> None:
    """Nothing; an unknown way of storing is an error."""
    if dtype not in DTYPES:
        raise UnknownName.among("The storage type", dtype, DTYPES)
