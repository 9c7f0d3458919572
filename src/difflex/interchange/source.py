"""`ForeignSource`: the files of a dictionary that another tool wrote, read without trust.

JSON of at most a megabyte, safetensors (also in shards), and what `torch.save` wrote, of plain tensors alone: no code of a file
runs. Tensors are mapped, not copied; changing one in place changes the memory, never the file.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import safetensors
import torch
from torch import Tensor

from difflex.errors import BadInput, BrokenFile, DifflexError
from difflex.files import Json, disk_errors, file_sha256

MAX_TEXT = 2**20
MAX_HEADER = 2**24
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    RuntimeError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    TypeError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    safetensors.SafetensorError,
)
"""What reading a damaged file raises."""


@final
class ForeignSource:
    """A folder with the files of one dictionary, or one such file."""

    def __init__(self, path: Path | str) -> None:
        """Look at the folder or file at `path`."""
        self.path = Path(path)
        with disk_errors(self.path, "read"):
            self.file = self.path if self.path.is_file() else None
            self.folder = self.path.parent if self.file else self.path
            if self.file is None and not self.path.is_dir():
                raise BadInput(f"{path} is neither a folder nor a file. Name the folder with the files of the dictionary.")
        self._read: dict[str, Path] = {}

    def has(self, *names: str) -> bool:
        """Whether all these files are there; tensors may be in shards."""
        return all(self._index(name).is_file() or (self.folder / name).is_file() for name in names)

    def checksums(self) -> dict[str, Json]:
        """Return the SHA-256 of every file that was read, by name."""
        return {name: file_sha256(path) for name, path in sorted(self._read.items())}

    def text(self, name: str) -> str:
        """Return the text of a small file."""
        path = self._opened(name)
        with reading(path, "text"):
            if path.stat().st_size > MAX_TEXT:
                raise BrokenFile(f"{path} has {path.stat().st_size} bytes, more than a configuration can. Copy it again.")
            return path.read_text(encoding="utf-8")

    def json(self, name: str) -> ForeignConfig:
        """Return the entries of a JSON file; none if the file is missing."""
        if not (self.folder / name).is_file():
            return ForeignConfig(self.folder / name, {})
        text = self.text(name)
        with reading(self.folder / name, "JSON"):
            entries = json.loads(text)
        if not isinstance(entries, dict):
            raise BrokenFile(f"{self.folder / name} is not a configuration: it holds no names with values. Copy it again.")
        return ForeignConfig(self.folder / name, entries)

    def tensors(self, name: str) -> ForeignTensors:
        """Return the tensors of a file, or of the shards that its index names."""
        index = self._index(name)
        if not index.is_file():
            return ForeignTensors(self.folder / name, self._file_tensors(name))
        files = self.json(index.name).get("weight_map")
        if not isinstance(files, dict) or not files:
            raise BrokenFile(f"{index} names no shards. Copy it again.")
        tensors: dict[str, Tensor] = {}
        for shard in sorted({str(shard) for shard in files.values()}):
            if Path(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
                raise BrokenFile(
                    f"{index} names the shard {shard[:80]!r}, which is outside of the folder or no safetensors file."
                )
            tensors |= self._file_tensors(shard)
        return ForeignTensors(index, tensors)

    def _file_tensors(self, name: str) -> dict[str, Tensor]:
        path = self._opened(name)
        if path.suffix != ".safetensors":
            return _pickled_tensors(path)
        with reading(path, "safetensors"):
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
            if length > min(MAX_HEADER, path.stat().st_size):
                raise BrokenFile(f"{path} claims a header of {length} bytes: more than it can have. Copy it again.")
            with safetensors.safe_open(path, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dictionary)

    def _index(self, name: str) -> Path:
        """The index of the shards of a safetensors file."""
        return self.folder / f"{name}.index.json"

    def _opened(self, name: str) -> Path:
        path = self._read[name] = self.folder / name
        if not path.is_file():
            raise BadInput(f"{self.folder} lacks the file {name}. Copy the whole folder.")
        return path


@final
class ForeignConfig:
    """The entries of the configuration of another tool, each checked when it is read."""

    def __init__(self, path: Path, entries: Mapping[str, Any]) -> None:
        """`path` names the file in errors."""
        self.path, self.entries = path, dict(entries)

    def get(self, name: str, default: Any = None) -> Any:
        """Return an entry as it is."""
        return self.entries.get(name, default)

    def count(self, name: str) -> int:
        """Return an entry that is a whole number above 0."""
        count = self.entries.get(name)
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise BrokenFile(
                f"{self.path}: the entry {name} is {str(count)[:60]}; it must be a number of 1 or more. Copy it again."
            )
        return count

    def flag(self, name: str, default: bool) -> bool:
        """Return an entry that is true or false."""
        flag = self.entries.get(name, default)
        if not isinstance(flag, bool):
            raise BrokenFile(f"{self.path}: the entry {name} is {str(flag)[:60]}; it must be true or false. Copy it again.")
        return flag

    def inner(self, name: str) -> ForeignConfig:
        """Return an entry that has entries itself; none if it is missing."""
        entries = self.entries.get(name)
        return ForeignConfig(self.path, entries if isinstance(entries, dict) else {})


@final
class ForeignTensors:
    """The tensors of a file of another tool, each checked when it is read."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """`path` names the file in errors."""
        self.path, self._tensors = path, dict(tensors)

    @property
    def names(self) -> set[str]:
        """The names of all tensors."""
        return set(self._tensors)

    def matrix(self, name: str) -> Tensor:
        """Return a matrix of floating-point numbers, in its own precision."""
        tensor = self._floats(name)
        if tensor.ndim != 2 or not tensor.numel():
            raise self._misshapen(name, tensor, "two axes")
        return tensor.float() if tensor.dtype == torch.float64 else tensor

    def vector(self, name: str, length: int) -> Tensor:
        """Return a vector in float32."""
        tensor = self._floats(name)
        if tensor.shape != (length,):
            raise self._misshapen(name, tensor, f"[{length}]")
        return tensor.float()

    def integers(self, name: str) -> Tensor:
        """Return a tensor of whole numbers."""
        tensor = self._tensor(name)
        if tensor.dtype not in (torch.int64, torch.int32):
            raise BrokenFile(f"{self.path}: {name or 'the tensor'} is of {tensor.dtype}, not of whole numbers. Copy it again.")
        return tensor

    def count(self, name: str) -> int:
        """Return a tensor of one whole number above 0."""
        self.integers(name)
        if (count := self.number(name)) < 1:
            raise BrokenFile(f"{self.path}: {name} is {count:g}; it must be 1 or more. Copy it again.")
        return int(count)

    def number(self, name: str) -> float:
        """Return a tensor of one number."""
        tensor = self._tensor(name)
        if tensor.numel() != 1:
            raise self._misshapen(name, tensor, "one number")
        return float(tensor)

    def _tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            names = ", ".join(sorted(self._tensors))[:300]
            raise BrokenFile(f"{self.path} lacks the tensor {name}; it has {names}. Copy it again.")
        return self._tensors[name]

    def _floats(self, name: str) -> Tensor:
        tensor = self._tensor(name)
        if tensor.dtype not in FLOATS:
            raise BrokenFile(
                f"{self.path}: {name or 'the tensor'} is of {tensor.dtype}, not of floating-point numbers. Copy it again."
            )
        return tensor

    def _misshapen(self, name: str, tensor: Tensor, expected: str) -> BrokenFile:
        return BrokenFile(f"{self.path}: {name} has the shape {[*tensor.shape]}, expected is {expected}. Copy it again.")


@contextmanager
def reading(path: Path, content: str) -> Iterator[None]:
    """Turn any error of reading a file into one that names it."""
    try:
        yield
    except DifflexError:
        raise
    except (*UNREADABLE, RecursionError) as error:
        raise BrokenFile(f"{path} cannot be read as {content}: {str(error)[:300]}. Copy it again.") from error


def _pickled_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors that `torch.save` wrote to a file: one alone (under the name ""), or by name, nested names with dots."""
    with reading(path, "tensors of torch.save"):
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise BrokenFile(f"{path} is compressed, which torch.save never does. Copy it again.")
        if max((entry.file_size for entry in entries if entry.filename.endswith(".pkl")), default=0) > MAX_HEADER:
            raise BrokenFile(f"{path} describes its tensors in more bytes than it can need. Copy it again.")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    tensors = dict(_flat(content, ""))
    for name, tensor in tensors.items():
        # A view of few numbers may claim any size.
        if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.device.type != "cpu" or not _is_whole(tensor):
            raise BrokenFile(f"{path} holds {name or 'a tensor'} as a view of other numbers. Copy it again.")
    return tensors


def _flat(content: object, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested mappings by name."""
    if isinstance(content, Tensor):
        yield name, content.detach() if type(content) is not torch.nn.Parameter else content.data
    elif isinstance(content, Mapping):
        for key, inner in content.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))


def _is_whole(tensor: Tensor) -> bool:
    """Whether every number of a tensor is stored on its own."""
    return tensor.is_contiguous() or (tensor.ndim == 2 and tensor.T.is_contiguous())
