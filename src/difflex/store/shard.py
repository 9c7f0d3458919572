"""One shard: a safetensors file that is written as its rows arrive and read through a memory map."""

import hashlib
import json
import math
import mmap
import warnings
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, final

import torch
from jaxtyping import Float, Float32, Float64, Num
from torch import Tensor

from difflex.choices import StoredDtype
from difflex.errors import BrokenFile, NonFinite, UnknownName
from difflex.files import CHUNK, AtomicFile, disk_errors
from difflex.records import Shot, Site
from difflex.store.basis import QuantisationBasis, group_size
from difflex.store.handover import HandedOver, to_host

DTYPES: dict[StoredDtype, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.float32: "F32",
    torch.float64: "F64",
}
SCALE = torch.float32
BLOCK = 2**19
"""Entries that are summed in float32 before float64 takes over: few enough to stay in the cache of the CPU."""
GPU_BLOCK = 2**25
"""The same on a GPU, where a block must be large enough to be worth a launch."""
PAGE = 4096
"""Bytes that `block_sums` sums."""
# Gives pages that have been read back to the system; without it the system takes them when it needs memory.
GIVE_BACK = getattr(mmap, "MADV_DONTNEED", None)
REMEDY = "Run the same harvest again: it makes this shard again and no other."


class ShardFormat(NamedTuple):
    """The format of all shards of a store."""

    site: Site
    dtype: StoredDtype
    tokens: int
    """Per shot."""
    width: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row on disk."""
        return self.width * DTYPES[self.dtype].itemsize + self.scales * SCALE.itemsize

    @property
    def scales(self) -> int:
        """Scales of one row."""
        return self.width // group_size(self.width) if self.dtype == "int8" else 0


def check_dtype(dtype: str) -> None:
    """Raise an error for an unknown storage type."""
    if dtype not in DTYPES:
        raise UnknownName.among("The storage type", dtype, DTYPES)


class PackedRows(NamedTuple):
    """Activations in their form on disk."""

    values: Num[Tensor, "*rows width"]
    scales: Float32[Tensor, "*rows group"] | None
    """For int8: the factor of each group of entries of each row."""


def pack(values: Float[Tensor, "*rows width"], dtype: StoredDtype, basis: QuantisationBasis | None) -> PackedRows:
    """Round `values` to `dtype`; int8 is in units of `basis`, scaled so that the largest entry of each group is 127."""
    values = values.detach()
    if dtype != "int8":
        return PackedRows(values.to(DTYPES[dtype]), None)
    assert basis is not None, "int8 has a basis"
    z = basis.to(values.device).encode(values).unflatten(-1, (-1, group_size(values.shape[-1])))
    scales = z.abs().amax(-1).to(SCALE) / 127
    rounded = (z / scales.clamp_min(torch.finfo(SCALE).tiny).unsqueeze(-1)).round_()
    return PackedRows(rounded.flatten(-2).to(torch.int8), scales)


def unpack(packed: PackedRows, basis: QuantisationBasis | None) -> Float[Tensor, "*rows width"]:
    """Return the values that training reads, on the device of `packed`: bf16 and fp16 as stored, int8 as float32."""
    if packed.scales is None:
        return packed.values
    assert basis is not None, "int8 has a basis"
    z = packed.values.float().unflatten(-1, (packed.scales.shape[-1], -1)).mul_(packed.scales.unsqueeze(-1))
    return basis.to(z.device).decode(z.flatten(-2))


class RowMoments(NamedTuple):
    """Moments of rows that can be merged with those of other rows."""

    mean: Float64[Tensor, " width"]
    squares: Float64[Tensor, " width"]
    """The sum of squared deviations from the mean."""
    totals: Float64[Tensor, "3"]
    """Number of rows, sum of their Euclidean norms, largest norm."""

    def merge(self, other: "RowMoments") -> "RowMoments":
        """Return the moments of the rows of both (Chan, Golub & LeVeque 1983)."""
        count, other_count = float(self.totals[0]), float(other.totals[0])
        total = max(count + other_count, 1.0)
        distance = other.mean - self.mean
        squares = self.squares + other.squares + distance.square() * (count * other_count / total)
        totals = torch.stack([*(self.totals[:2] + other.totals[:2]), torch.maximum(self.totals[2], other.totals[2])])
        return RowMoments(self.mean + distance * (other_count / total), squares, totals)


@final
class MomentsTally:
    """Moments of rows that arrive in blocks.

    A block is summed in float32 about an origin within the data, and blocks are summed in float64, so that axes whose mean is
    far from zero lose no precision.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._count, self._norms, self._peak = 0, 0.0, 0.0
        self._origin = self._block = self._sum = self._squares = torch.zeros(width, dtype=torch.float64)

    def add(self, rows: Float[Tensor, "row width"]) -> bool:
        """Add `rows`, all on one device, and return whether all of them are finite."""
        if not self._count and len(rows):
            self._begin(rows[0].float().clone())
        for block in rows.split(len(self._block)):
            x = self._block[: len(block)].copy_(block).sub_(self._origin)
            ones = torch.ones(len(x), device=x.device)
            along = x @ self._origin
            self._sum += ones @ x
            x.square_()
            self._squares += ones @ x
            norms = (x.sum(1) + 2 * along + self._origin.dot(self._origin)).clamp_min_(0).sqrt_()
            self._norms += float(norms.sum(dtype=torch.float64))
            self._peak = max(self._peak, float(norms.max()))
            self._count += len(x)
        return math.isfinite(self._norms)

    def _begin(self, origin: Float32[Tensor, " width"]) -> None:
        self._origin = origin
        self._sum, self._squares = (torch.zeros_like(origin, dtype=torch.float64) for _ in range(2))
        size = BLOCK if origin.device.type == "cpu" else GPU_BLOCK
        self._block = origin.new_empty(max(1, size // self._width), self._width)

    def moments(self) -> RowMoments:
        """Return the moments of all rows so far."""
        count = max(self._count, 1)
        squares = (self._squares - self._sum.square() / count).clamp_min(0)
        totals = torch.tensor([self._count, self._norms, self._peak], dtype=torch.float64)
        return RowMoments((self._origin.double() + self._sum / count).cpu(), squares.cpu(), totals)


class TensorSlot(NamedTuple):
    """The place of a tensor in a shard."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """In bytes from the end of the header."""


def tensor_slots(form: ShardFormat, shots: int) -> dict[str, TensorSlot]:
    """Return the places of a shard's tensors, in the order of the file."""
    rows = shots * form.tokens
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"values": (DTYPES[form.dtype], (rows, form.width))}
    if form.dtype == "int8":
        shapes["scales"] = (SCALE, (rows, form.scales))
    if padding := -rows * form.row_bytes % 8:
        shapes["padding"] = (torch.uint8, (padding,))
    shapes |= {"mean": (torch.float64, (form.width,)), "squares": (torch.float64, (form.width,)), "totals": (torch.float64, (3,))}
    slots, start = {}, 0
    for name, (dtype, shape) in shapes.items():
        slots[name] = TensorSlot(dtype, shape, start)
        start += math.prod(shape) * dtype.itemsize
    return slots


def header(form: ShardFormat, shots: int) -> bytes:
    """Return the safetensors header of a shard, which depends on its format and number of shots alone."""
    entries: dict[str, object] = {"__metadata__": {"format": "difflex activations 1", "site": str(form.site)}}
    for name, (dtype, shape, start) in tensor_slots(form, shots).items():
        ends = [start, start + math.prod(shape) * dtype.itemsize]
        entries[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": ends}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def shard_size(form: ShardFormat, shots: int) -> int:
    """Return the bytes of a shard file of `shots` shots."""
    return len(header(form, shots)) + tensor_slots(form, shots)["totals"].start + 3 * torch.float64.itemsize


def block_sums(path: Path) -> str:
    """Return a checksum of the file at `path` that finds damage, not forgery: the SHA-256 of the sums of its pages of 4 KiB.

    It is several times faster than the SHA-256 of the file.
    """
    checksum, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK))
    pages = torch.frombuffer(buffer, dtype=torch.int64).view(-1, PAGE // 8)
    with path.open("rb") as file:
        while count := file.readinto(buffer):
            whole = -(-count // PAGE)
            buffer[count : whole * PAGE] = bytes(whole * PAGE - count)
            checksum.update(pages[:whole].sum(1).numpy().data)
    return checksum.hexdigest()


def check_size(path: Path, actual: int, expected: int) -> None:
    """Raise an error if a shard has another size than its rows take."""
    if actual != expected:
        raise BrokenFile(f"{path} has {actual} bytes, expected are {expected}: it is damaged. {REMEDY}")


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data


def non_finite(rows: Float[Tensor, "shot token width"], shots: Sequence[Shot], site: Site) -> NonFinite:
    """Return the error about the first of some shots whose rows hold NaN or infinity, or are so large that their norm does."""
    finite = torch.isfinite(rows).flatten(1).all(1)
    if bool(finite.all()):
        shot = shots[int(rows.float().flatten(1).abs().amax(1).argmax())]
        return NonFinite(
            f"The activations of {shot.image or shot.prompt!r} (seed {shot.seed}) at the site '{site}' reach "
            f"{float(rows.float().abs().max()):.3g}: the square of their norm is infinite. They are damaged, or of another type."
        )
    shot = shots[int((~finite).nonzero()[0])]
    return NonFinite(
        f"The activations of {shot.image or shot.prompt!r} (seed {shot.seed}) at the site '{site}' are not finite as stored. "
        "The largest number of fp16 is 65504: store bf16 instead."
    )


@final
class ShardWriter:
    """An unfinished shard file; rows are appended in the order of its shots."""

    def __init__(self, path: Path, form: ShardFormat, shots: int, basis: QuantisationBasis | None = None) -> None:
        self._form, self._basis = form, basis
        self._missing = shots
        self._padding = tensor_slots(form, shots).get("padding")
        self._scales: list[Tensor] = []
        self._tally = MomentsTally(form.width)
        self._file = AtomicFile(path)
        self._file.write(header(form, shots))

    def append(self, activations: HandedOver, shots: Sequence[Shot]) -> None:
        """Write the rows of the next `shots`."""
        self._missing -= len(shots)
        with activations.used() as values:
            packed = pack(values, self._form.dtype, self._basis)
            self._add_to_tally(unpack(packed, self._basis), shots)
            rows = to_host(packed.values)
            if packed.scales is not None:
                self._scales.append(to_host(packed.scales))
        self._file.write(_bytes(rows))

    def _add_to_tally(self, rows: Float[Tensor, "shot token width"], shots: Sequence[Shot]) -> None:
        """Add the rows of split `train` to the moments; raise an error for rows of any split that are not finite."""
        start, finite = 0, True
        for split, group in groupby(shot.split for shot in shots):
            end = start + len(list(group))
            part = rows[start:end].flatten(0, 1)
            finite &= self._tally.add(part) if split == "train" else math.isfinite(float(part.sum(dtype=torch.float32)))
            start = end
        if not finite:
            raise non_finite(rows, shots, self._form.site)

    def commit(self) -> str:
        """Finish the file and return its SHA-256."""
        assert self._missing == 0, "a shard is finished when the rows of all its shots are written"
        for scales in self._scales:
            self._file.write(_bytes(scales))
        if self._padding is not None:
            self._file.write(bytes(self._padding.shape[0]))
        for tensor in self._tally.moments():
            self._file.write(_bytes(tensor))
        return self._file.commit()

    def discard(self) -> None:
        """Delete the unfinished file."""
        self._file.discard()


@final
class MappedShard:
    """A shard as a memory map: opening it reads its header only."""

    def __init__(self, path: Path, form: ShardFormat, shots: int) -> None:
        start, slots, size = header(form, shots), tensor_slots(form, shots), shard_size(form, shots)
        try:
            with disk_errors(path, "read"), path.open("rb") as file:
                header_matches = file.read(len(start)) == start
                actual_size = file.seek(0, 2)
                if header_matches and actual_size == size:
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError as error:
            raise BrokenFile(f"{path} is missing. {REMEDY}") from error
        check_size(path, actual_size, size)
        if not header_matches:
            raise BrokenFile(f"{path} has another header than expected: it is damaged. {REMEDY}")
        self._tensors = {name: self._tensor(slot, len(start)) for name, slot in slots.items()}
        self.values: Num[Tensor, "row width"] = self._tensors["values"]
        self.scales: Float32[Tensor, "row group"] | None = self._tensors.get("scales")

    def moments(self) -> RowMoments:
        """Return the moments of its `train` rows."""
        return RowMoments(self._tensors["mean"].clone(), self._tensors["squares"].clone(), self._tensors["totals"].clone())

    def release_pages(self) -> None:
        """Give the pages read so far back to the system, so that they no longer count as memory of this process."""
        if GIVE_BACK is not None:
            self._map.madvise(GIVE_BACK)

    def _tensor(self, slot: TensorSlot, start: int) -> Tensor:
        with warnings.catch_warnings():
            # The map is read-only and so is every use of it here: the store returns copies.
            warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)
            flat = torch.frombuffer(self._map, dtype=slot.dtype, count=math.prod(slot.shape), offset=start + slot.start)
        return flat.view(slot.shape)
