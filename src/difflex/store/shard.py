"""One shard: a safetensors file that is written as its rows arrive and read through a memory map."""

import json
import math
import mmap
import warnings
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple, final

import torch
from jaxtyping import Float, Float32, Num
from torch import Tensor

from difflex.errors import BrokenFile, NonFinite
from difflex.files import AtomicFile
from difflex.records import Shot, Site
from difflex.store.statistics import MomentsTally, RowMoments

__all__ = [
    "MappedShard",
    "PackedRows",
    "ShardFormat",
    "ShardWriter",
    "Stored",
    "header",
    "pack",
    "parts_of",
    "shard_size",
    "unpack",
]

Stored = Literal["bf16", "fp16", "int8"]
DTYPES: dict[Stored, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.float32: "F32",
    torch.float64: "F64",
}
SCALE = torch.float32
# What a reader has gone past is given back to the system; where that cannot be asked for, the system takes it when it needs it.
GIVE_BACK = getattr(mmap, "MADV_DONTNEED", None)
MEND = "Delete the shard's two files and give the command that wrote it again: it makes this shard again and no other."


class ShardFormat(NamedTuple):
    """What all shards of a store have in common."""

    site: Site
    dtype: Stored
    tokens: int
    """Of each shot."""
    width: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row on disk."""
        return self.width * DTYPES[self.dtype].itemsize + (SCALE.itemsize if self.dtype == "int8" else 0)


class PackedRows(NamedTuple):
    """Activations as they lie on disk."""

    values: Num[Tensor, "*rows width"]
    scales: Float32[Tensor, "*rows"] | None
    """What a row of int8 is multiplied with."""

    def cpu(self) -> "PackedRows":
        """The same, where files are written from."""
        return PackedRows(self.values.cpu(), None if self.scales is None else self.scales.cpu())


def pack(values: Float[Tensor, "*rows width"], dtype: Stored) -> PackedRows:
    """`values` rounded to `dtype`; int8 has a scale for each row, so that its largest entry is 127."""
    values = values.detach()
    if dtype != "int8":
        return PackedRows(values.to(DTYPES[dtype]), None)
    scales = values.abs().amax(-1).to(SCALE) / 127
    rounded = (values / scales.clamp_min(torch.finfo(SCALE).tiny).unsqueeze(-1)).round()
    return PackedRows(rounded.to(torch.int8), scales)


def unpack(packed: PackedRows) -> Float[Tensor, "*rows width"]:
    """The values that training reads: bf16 and fp16 as they are, int8 as float32."""
    return packed.values if packed.scales is None else packed.values.float() * packed.scales.unsqueeze(-1)


class TensorSlot(NamedTuple):
    """Where a tensor lies in a shard."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """In bytes from the beginning of the file."""


def parts_of(form: ShardFormat, shots: int) -> dict[str, TensorSlot]:
    """The tensors of a shard in the order of the file, `start` counted from the end of the header."""
    rows = shots * form.tokens
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"values": (DTYPES[form.dtype], (rows, form.width))}
    if form.dtype == "int8":
        shapes["scales"] = (SCALE, (rows,))
    if padding := -rows * form.row_bytes % 8:
        shapes["padding"] = (torch.uint8, (padding,))
    shapes |= {"mean": (torch.float64, (form.width,)), "squares": (torch.float64, (form.width,)), "totals": (torch.float64, (3,))}
    parts, start = {}, 0
    for name, (dtype, shape) in shapes.items():
        parts[name] = TensorSlot(dtype, shape, start)
        start += math.prod(shape) * dtype.itemsize
    return parts


def header(form: ShardFormat, shots: int) -> bytes:
    """The first bytes of a shard: with the same form and number of shots always the same."""
    entries: dict[str, object] = {"__metadata__": {"format": "difflex activations 1", "site": str(form.site)}}
    for name, (dtype, shape, start) in parts_of(form, shots).items():
        ends = [start, start + math.prod(shape) * dtype.itemsize]
        entries[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": ends}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def shard_size(form: ShardFormat, shots: int) -> int:
    """Bytes of the file that holds so many shots."""
    return len(header(form, shots)) + parts_of(form, shots)["totals"].start + 3 * torch.float64.itemsize


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data


@final
class ShardWriter:
    """A shard in the making; rows come in the order of its shots."""

    def __init__(self, path: Path, rank: int, form: ShardFormat, shots: int) -> None:
        self._form = form
        self._missing = shots
        self._padding = parts_of(form, shots).get("padding")
        self._scales: list[Tensor] = []
        self._tally = MomentsTally(form.width)
        self._file = AtomicFile(path, rank)
        self._file.write(header(form, shots))

    def append(self, packed: PackedRows, shots: Sequence[Shot]) -> None:
        """Nothing; writes the rows of further shots."""
        self._missing -= len(shots)
        if packed.scales is not None:
            self._scales.append(packed.scales)
        self._file.write(_bytes(packed.values))
        self._count(unpack(packed), shots)

    def _count(self, rows: Float[Tensor, "shot token width"], shots: Sequence[Shot]) -> None:
        """Take in the rows of split `train`; a row that is not finite is an error."""
        start, finite = 0, True
        for split, alike in groupby(shot.split for shot in shots):
            end = start + len(list(alike))
            here = rows[start:end].flatten(0, 1)
            finite &= self._tally.add(here) if split == "train" else math.isfinite(float(here.sum(dtype=torch.float32)))
            start = end
        if not finite:
            shot = shots[int((~torch.isfinite(rows)).flatten(1).any(1).nonzero()[0])]
            raise NonFinite(
                f"The activations of {shot.image or shot.prompt!r} (seed {shot.seed}) at the site '{self._form.site}' are not "
                "finite as they are stored. fp16 ends at 65504: store bf16 instead."
            )

    def keep(self) -> str:
        """The SHA-256 of the finished file."""
        assert self._missing == 0, "a shard is kept when all its shots are there"
        for scales in self._scales:
            self._file.write(_bytes(scales))
        if self._padding is not None:
            self._file.write(bytes(self._padding.shape[0]))
        for tensor in self._tally.moments():
            self._file.write(_bytes(tensor))
        return self._file.commit()

    def discard(self) -> None:
        """Nothing; the unfinished file is gone."""
        self._file.discard()


@final
class MappedShard:
    """A shard seen through a memory map: opening it reads nothing but its header."""

    def __init__(self, path: Path, form: ShardFormat, shots: int) -> None:
        head, parts = header(form, shots), parts_of(form, shots)
        size = shard_size(form, shots)
        try:
            with path.open("rb") as file:
                same = file.read(len(head)) == head
                found = file.seek(0, 2)
                if same and found == size:
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError as error:
            raise BrokenFile(f"{path} is missing. {MEND}") from error
        if found != size or not same:
            what = f"has {found} bytes where {size} are right" if found != size else "has a header that is not its own"
            raise BrokenFile(f"{path} {what}: it is damaged. {MEND}")
        self._tensors = {name: self._tensor(part, len(head)) for name, part in parts.items()}
        self.values: Num[Tensor, "row width"] = self._tensors["values"]
        self.scales: Float32[Tensor, " row"] | None = self._tensors.get("scales")

    def moments(self) -> RowMoments:
        """The running statistics of its `train` rows."""
        return RowMoments(self._tensors["mean"].clone(), self._tensors["squares"].clone(), self._tensors["totals"].clone())

    def give_back(self) -> None:
        """Nothing; the pages seen so far no longer count as this process's memory."""
        if GIVE_BACK is not None:
            self._map.madvise(GIVE_BACK)

    def _tensor(self, part: TensorSlot, start: int) -> Tensor:
        with warnings.catch_warnings():
            # The map is read-only and so is every use of it here: what leaves the store is a copy.
            warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)
            flat = torch.frombuffer(self._map, dtype=part.dtype, count=math.prod(part.shape), offset=start + part.start)
        return flat.view(part.shape)
