"""Rows of activations in files of other tools: safetensors, NumPy and Parquet, of which only the wanted ones are read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from tokenize import TokenError
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from difflex.errors import BadInput, BrokenFile, MissingExtra, UnknownName
from difflex.files import disk_errors

ADVICE = "Export the activations again."


class RowReader(ABC):
    """The rows of a file, read in parts."""

    width: int
    tokens: int | None = None
    """Rows of an image, where the array has an axis for it."""
    dtype: torch.dtype

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def rows(self, first: int, count: int) -> Float[Tensor, "row width"]:
        """Return some rows that follow one another."""


@final
class SafetensorsRows(RowReader):
    """The rows of a tensor of a safetensors file."""

    def __init__(self, path: Path, key: str | None) -> None:
        with safe_open(path, "pt") as file:
            shapes = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            floats = [name for name, each in shapes.items() if each.get_dtype() in ("F16", "BF16", "F32")]
            name = _chosen(path, "tensor", key, [name for name in floats if len(shapes[name].get_shape()) in (2, 3)])
            shape = shapes[name].get_shape()
            self.dtype = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[shapes[name].get_dtype()]
        self._path, self._name = path, name
        self._count, self.tokens, self.width = _row_shape(path, shape)

    def __len__(self) -> int:
        return self._count

    def rows(self, first: int, count: int) -> Float[Tensor, "row width"]:
        with safe_open(self._path, "pt") as file:
            tensor = file.get_slice(self._name)
            if self.tokens is None:
                return tensor[first : first + count]
            return tensor[first // self.tokens : (first + count) // self.tokens].flatten(0, 1)


@final
class NpyRows(RowReader):
    """The rows of a NumPy file, through a memory map."""

    def __init__(self, path: Path, key: str | None) -> None:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.dtype not in (np.float16, np.float32, np.float64):
            raise BadInput(f"{path} holds {array.dtype}. Activations are float16, float32 or float64.")
        self._count, self.tokens, self.width = _row_shape(path, array.shape)
        self._array = array.reshape(self._count, self.width)
        self.dtype = torch.float16 if array.dtype == np.float16 else torch.float32

    def __len__(self) -> int:
        return self._count

    def rows(self, first: int, count: int) -> Float[Tensor, "row width"]:
        return torch.from_numpy(np.array(self._array[first : first + count], dtype=None)).to(self.dtype)


@final
class ParquetRows(RowReader):
    """The rows of a column of lists of a Parquet file, a row group at a time."""

    def __init__(self, path: Path, key: str | None) -> None:
        arrow, parquet = arrow_modules()
        self._file = parquet.ParquetFile(path)
        schema = self._file.schema_arrow
        lists = [field.name for field in schema if arrow.types.is_fixed_size_list(field.type) or arrow.types.is_list(field.type)]
        floats = [name for name in lists if arrow.types.is_floating(schema.field(name).type.value_type)]
        self._name = _chosen(path, "column", key, floats)
        self.dtype = torch.float16 if schema.field(self._name).type.value_type == arrow.float16() else torch.float32
        groups = [self._file.metadata.row_group(number).num_rows for number in range(self._file.num_row_groups)]
        self._starts = [0, *accumulate(groups)]
        self._group: tuple[int, Tensor] | None = None
        if not len(self):
            raise BadInput(f"{path} has no rows.")
        self.width = 0
        self.width = self._read(0).shape[1]

    def __len__(self) -> int:
        return self._starts[-1]

    def rows(self, first: int, count: int) -> Float[Tensor, "row width"]:
        parts, group = [], bisect_right(self._starts, first) - 1
        while group < len(self._starts) - 1 and self._starts[group] < first + count:
            start = self._starts[group]
            parts.append(self._read(group)[max(first - start, 0) : first + count - start])
            group += 1
        return torch.cat(parts)

    def _read(self, group: int) -> Float[Tensor, "row width"]:
        if self._group is None or self._group[0] != group:
            column = self._file.read_row_group(group, columns=[self._name]).column(0).combine_chunks()
            flat = torch.from_numpy(column.flatten().to_numpy(zero_copy_only=False).copy()).to(self.dtype)
            if not len(column) or column.null_count or len(flat) % len(column) or self.width not in (0, len(flat) // len(column)):
                raise BadInput(
                    f"The column '{self._name}' has lists of different lengths, or missing ones. Write rows of one width."
                )
            self._group = group, flat.view(len(column), -1)
        return self._group[1]


@final
class JoinedRows(RowReader):
    """The rows of several files, one after the other."""

    def __init__(self, parts: Sequence[RowReader], paths: Sequence[Path]) -> None:
        first = parts[0]
        for part, path in zip(parts, paths, strict=True):
            if (part.width, part.tokens) != (first.width, first.tokens):
                raise BadInput(
                    f"{path} has rows of width {part.width}, {paths[0]} of width {first.width}. Import them one by one."
                )
        self._parts, self._starts = parts, [0, *accumulate(map(len, parts))]
        self.width, self.tokens, self.dtype = first.width, first.tokens, first.dtype

    def __len__(self) -> int:
        return self._starts[-1]

    def rows(self, first: int, count: int) -> Float[Tensor, "row width"]:
        found, number = [], bisect_right(self._starts, first) - 1
        while number < len(self._parts) and self._starts[number] < first + count:
            part, start = self._parts[number], self._starts[number]
            low = max(first - start, 0)
            found.append(part.rows(low, min(first + count - start, len(part)) - low))
            number += 1
        return torch.cat(found)


READERS: Mapping[str, Callable[[Path, str | None], RowReader]] = {
    ".safetensors": SafetensorsRows,
    ".npy": NpyRows,
    ".parquet": ParquetRows,
}


def open_rows(paths: Sequence[Path], key: str | None) -> RowReader:
    """Open the files; only their headers are read."""
    readers = []
    for path in paths:
        if path.exists() and not path.is_file():  # a device or a pipe may never end
            raise BadInput(f"{path} is a folder, a device or a pipe. Name files.")
        try:
            with disk_errors(path, "read"):
                readers.append(READERS[path.suffix](path, key))
        except FileNotFoundError as error:
            raise BrokenFile(f"{path} is missing. {ADVICE}") from error
        except (SafetensorError, ValueError, TypeError, KeyError, EOFError, SyntaxError, TokenError) as error:
            if isinstance(error, (BadInput, UnknownName)):
                raise
            raise BrokenFile(f"{path} cannot be read ({str(error)[:200]}): it is damaged, or of another format.") from error
    return JoinedRows(readers, paths)


def _chosen(path: Path, what: str, key: str | None, names: Sequence[str]) -> str:
    """Return the name of what holds the activations in a file."""
    if key is not None and key not in names:
        raise UnknownName.among(f"In {path} the {what} of activations", key, names)
    if key is None and len(names) != 1:
        raise BadInput(f"{path} has {len(names)} {what}s of activations ({', '.join(names[:8])}). Name one with --key.")
    return key or names[0]


def _row_shape(path: Path, shape: Iterable[int]) -> tuple[int, int | None, int]:
    """Return rows, rows of an image if there is an axis for it, and width of an array [row, width] or [image, token, width]."""
    shape = [*map(int, shape)]
    if len(shape) not in (2, 3) or 0 in shape:
        raise BadInput(f"{path} holds an array {shape}. Activations are [row, width] or [image, token, width].")
    return (shape[0], None, shape[1]) if len(shape) == 2 else (shape[0] * shape[1], shape[1], shape[2])


def arrow_modules() -> tuple[Any, Any]:
    """Return `pyarrow` and its module for Parquet."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingExtra.of("pyarrow", "data", "Parquet") from error
    return pyarrow, parquet
