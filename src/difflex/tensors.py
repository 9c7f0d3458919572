"""Tensor files: safetensors with a JSON header and a checksum over both, written atomically, always with the same bytes."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from difflex.errors import BrokenFile
from difflex.files import CHUNK, HEADER, Json, disk_errors, replacing

__all__ = ["TensorFile", "check_tensors", "read_tensors", "write_pickle", "write_plain_tensors", "write_tensors"]

DTYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
"""The dtypes of our files and their names in a header, in the order of safetensors."""
DTYPES = [*DTYPE_NAMES]
UNKNOWN = "0" * 64
"""In place of the checksum, while the file is summed."""


class TensorFile(NamedTuple):
    """The contents of a tensor file."""

    header: dict[str, Any]
    tensors: dict[str, Tensor]


def write_tensors(
    path: Path, format: int, tensors: Mapping[str, Tensor], header: Mapping[str, Json] | None = None, *, keep: bool = False
) -> Path:
    """Write `tensors` and `header` to `path` atomically and return `path`; the same contents give the same bytes.

    `keep`: a file that exists stays.
    """
    text = json.dumps({"format": format, "sha256": UNKNOWN, **(header or {})}, allow_nan=False)
    tensors = _ordered(tensors)
    head = _head({HEADER: text}, tensors)
    checksum = hashlib.sha256(head)
    with replacing(path, keep=keep) as temporary, temporary.open("wb") as file, ThreadPoolExecutor(1) as hasher:
        file.write(head)
        for tensor in tensors.values():
            for part in _parts(tensor.detach()):
                summed = hasher.submit(checksum.update, part)
                file.write(part)
                summed.result()
        file.seek(0)
        file.write(head.replace(UNKNOWN.encode(), checksum.hexdigest().encode(), 1))
    return path


def write_plain_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Write `tensors` to `path` as safetensors without a header of ours, atomically and without a copy of all; return `path`."""
    tensors = _ordered(tensors)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(_head(metadata, tensors))
        for tensor in tensors.values():
            file.writelines(_parts(tensor.detach()))
    return path


def write_pickle(path: Path, content: object) -> Path:
    """Write what other tools read with `torch.load`, atomically and always with the same bytes, and return `path`."""
    # Given a path, torch would name the archive after the temporary file.
    with replacing(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # such as a full disk, after which its writer does not know where it is
                raise error.__context__ from None
            raise
    return path


def _ordered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors in the order of safetensors: large items first, so that all are aligned."""
    return {name: tensors[name] for name in sorted(tensors, key=lambda name: (-DTYPES.index(tensors[name].dtype), name))}


def _head(metadata: Mapping[str, str] | None, tensors: Mapping[str, Tensor]) -> bytes:
    """Return the bytes before the tensors, which are stored in this order: the length of the header, and the header."""
    entries: dict[str, Json] = {} if metadata is None else {"__metadata__": {**metadata}}
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.nbytes
        entries[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [start, end]}
        start = end
    content = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content


def _parts(tensor: Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in the order of its indices, some rows at a time, so that no copy of all is in memory."""
    rows = max(1, CHUNK // max(1, tensor[:1].nbytes)) if tensor.ndim else 1
    for part in tensor.split(rows) if tensor.ndim else [tensor]:
        yield memoryview(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


def read_tensors(
    path: Path, format: int, advice: str, *, device: torch.device | str = "cpu", rows: Mapping[str, slice] | None = None
) -> TensorFile:
    """Return the contents of the tensor file at `path`, which must be of `format`; `advice` says what to do about a damaged one.

    Of a tensor named in `rows` only these rows are read.
    """
    try:
        with disk_errors(path, "read"):
            header = _checked_header(path, format, advice)
        tensors: dict[str, Tensor] = {}
        for name in _names(path):
            with safe_open(path, "pt", device=str(device)) as file:  # for each, so that not all of the file is mapped at once
                # Cloned, because a product of tensors that start at odd addresses of a mapped file may differ in its last bit.
                tensors[name] = file.get_slice(name)[(rows or {}).get(name, ...)].clone()
    except FileNotFoundError as error:
        raise BrokenFile(f"{path} is missing. {advice}") from error
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BrokenFile(f"{path} cannot be read ({error}): it is damaged. {advice}") from error
    return TensorFile(header, tensors)


def _names(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.keys())


def check_tensors(path: Path, advice: str) -> None:
    """Raise an error unless the tensor file at `path`, of any format, matches its checksum."""
    with disk_errors(path, "read"):
        try:
            _checked_header(path, None, advice)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BrokenFile(f"{path} cannot be read ({error}): it is damaged. {advice}") from error


def _checked_header(path: Path, format: int | None, advice: str) -> dict[str, Any]:
    """Return the header of a file, after its format (None for any) and its checksum have been compared."""
    with path.open("rb", buffering=0) as file:
        length, size = int.from_bytes(file.read(8), "little"), path.stat().st_size
        if length > size:
            raise BrokenFile(f"{path} ends within its header: it is damaged. {advice}")
        head = length.to_bytes(8, "little") + file.read(length)
        metadata = json.loads(head[8:]).get("__metadata__", {})
        header = json.loads(metadata.get(HEADER, "{}"))
        if header.pop("format", None) != format and format is not None:
            found = json.loads(metadata[HEADER])["format"] if HEADER in metadata else metadata.get("format")
            raise BrokenFile(f"{path} is of format {found}; this version of difflex reads format {format}. {advice}")
        expected = str(header.pop("sha256"))
        checksum, buffer = hashlib.sha256(head.replace(expected.encode(), UNKNOWN.encode(), 1)), memoryview(bytearray(CHUNK))
        while count := file.readinto(buffer):
            checksum.update(buffer[:count])
    if checksum.hexdigest() != expected:
        raise BrokenFile(f"{path} does not match its checksum: it is damaged. {advice}")
    return header
