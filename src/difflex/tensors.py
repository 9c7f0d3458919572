"""Tensor files: safetensors with a JSON header and a checksum over both, written atomically, always with the same bytes."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from difflex.errors import BrokenFile
from difflex.files import CHUNK, HEADER, Json, disk_errors, replacing

__all__ = ["TensorFile", "check_tensors", "read_tensors", "write_tensors"]

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
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = memoryview(save(contiguous, metadata={HEADER: text}))
    start = 8 + int.from_bytes(content[:8], "little")
    head = bytes(content[:start])
    checksum = hashlib.sha256(head)
    checksum.update(content[start:])
    with replacing(path, keep=keep) as temporary, temporary.open("wb") as file:
        file.write(head.replace(UNKNOWN.encode(), checksum.hexdigest().encode(), 1))
        file.write(content[start:])
    return path


def read_tensors(
    path: Path, format: int, advice: str, *, device: torch.device | str = "cpu", rows: Mapping[str, slice] | None = None
) -> TensorFile:
    """Return the contents of the tensor file at `path`, which must be of `format`; `advice` says what to do about a damaged one.

    Of a tensor named in `rows` only these rows are read.
    """
    try:
        with disk_errors(path, "read"):
            header = _checked_header(path, format, advice)
        with safe_open(path, "pt", device=str(device)) as file:
            # Cloned, because a product of tensors that start at odd addresses of a mapped file may differ in its last bit.
            names = list(file.keys())
            tensors = {name: file.get_slice(name)[(rows or {}).get(name, ...)].clone() for name in names}
    except FileNotFoundError as error:
        raise BrokenFile(f"{path} is missing. {advice}") from error
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BrokenFile(f"{path} cannot be read ({error}): it is damaged. {advice}") from error
    return TensorFile(header, tensors)


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
