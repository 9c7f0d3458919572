"""Write the activations of a store to files of other tools."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from difflex.activation_files.rows import arrow_modules
from difflex.errors import BadInput, UnknownName
from difflex.files import file_sha256, read_json, replacing, write_file, write_json, write_together
from difflex.progress import ProgressBar
from difflex.records import Shot
from difflex.store import Store
from difflex.tensors import write_plain_tensors

ActivationFormat = Literal["safetensors", "npy", "parquet"]
"""How activations are written for other tools."""
FORMAT = 1
INDEX, SHOTS = "index.json", "shots.jsonl"
SHOT_COLUMNS = ("prompt", "seed", "timestep", "image", "noise", "split")
"""What a table says of the shot of each row."""
CHUNK_ROWS = 2**11
"""Rows of a row group in Parquet; the least that is read at once."""


def export_activations(store: Store, kind: ActivationFormat, folder: Path, progress: bool = True) -> list[Path]:
    """Write all rows of a store to files in `folder` and return the files; the same export is not made twice."""
    if kind not in get_args(ActivationFormat):
        raise UnknownName.among("The format", str(kind), get_args(ActivationFormat))
    if not store.complete:
        raise BadInput(f"The harvest of {store.folder} is not finished. Run it again to its end first.")
    if (folder / INDEX).exists():
        return _existing(store, kind, folder)
    if folder.is_dir() and (other := [path.name for path in folder.iterdir() if path.suffix not in (f".{kind}", ".jsonl", "")]):
        raise BadInput(f"{folder} is not empty: it has {', '.join(sorted(other)[:5])}. Name a new folder.")
    if kind == "parquet":
        arrow_modules()
    rows = store.count() + store.count("held-out")

    def write(partial: Path) -> list[Path]:
        with ProgressBar(total=rows, unit=" tokens", unit_scale=True, desc="export", show=progress) as bar:
            paths, shots = _WRITERS[kind](store, partial, bar)
        write_file(partial / SHOTS, b"".join(json.dumps(shot.as_json()).encode() + b"\n" for shot in shots))
        head = {"kind": kind, "site": str(store.site), "model": store.model, "dtype": store.dtype, "width": store.width}
        head |= {"tokens": store.tokens, "grid": store.grid, "rows": rows, "source": store.fingerprint}
        files = {path.name: file_sha256(path) for path in paths}
        write_json(partial / INDEX, FORMAT, {**head, "files": files, "shots": file_sha256(partial / SHOTS)})
        return [*paths, partial / SHOTS, partial / INDEX]

    return write_together(folder, write)


def _existing(store: Store, kind: ActivationFormat, folder: Path) -> list[Path]:
    """Return the files of an export that is there; raise if it is another one."""
    index = read_json(folder / INDEX, FORMAT, "Name another folder.")
    names = [*(index["files"] if isinstance(index.get("files"), dict) else ()), SHOTS, INDEX]
    if (index.get("kind"), index.get("source")) != (kind, store.fingerprint) or not all((folder / n).is_file() for n in names):
        raise BadInput(f"{folder} holds other exported activations. Name another folder.")
    return [folder / name for name in names]


def _write_safetensors(store: Store, folder: Path, bar: ProgressBar) -> tuple[list[Path], list[Shot]]:
    paths, shots = [], list[Shot]()
    for number, part in enumerate(store.activations()):
        path = folder / f"activations-{number:05d}.safetensors"
        rows = part.values.flatten(0, 1).contiguous()
        tensors = {"values": rows, **_places(len(part.shots), store.tokens, len(shots))}
        paths.append(write_plain_tensors(path, tensors, {"site": str(store.site)}))
        shots.extend(part.shots)
        bar.update(len(rows))
    return paths, shots


def _write_npy(store: Store, folder: Path, bar: ProgressBar) -> tuple[list[Path], list[Shot]]:
    shots, path = list[Shot](), folder / "values.npy"
    dtype = np.dtype(np.float16 if store.dtype == "fp16" else np.float32)  # NumPy has no bfloat16
    shape = (store.count() + store.count("held-out"), store.width)
    head = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    # Written row by row: on a full disk, writing to a memory map would end the process.
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, head)
        for part in store.activations():
            rows = part.values.flatten(0, 1)
            file.write(np.ascontiguousarray(rows.float().numpy(), dtype).data)
            shots.extend(part.shots)
            bar.update(len(rows))
    paths = [path]
    for name, numbers in _places(len(shots), store.tokens, 0).items():
        with replacing(folder / f"{name}.npy") as temporary, temporary.open("wb") as file:
            np.save(file, numbers.numpy(), allow_pickle=False)
    return paths, shots


def _write_parquet(store: Store, folder: Path, bar: ProgressBar) -> tuple[list[Path], list[Shot]]:
    arrow, parquet = arrow_modules()
    paths, shots = [], list[Shot]()
    for number, part in enumerate(store.activations()):
        path = folder / f"activations-{number:05d}.parquet"
        rows = part.values.flatten(0, 1)
        flat = arrow.array((rows if rows.dtype == torch.float16 else rows.float()).flatten().numpy())
        places = _places(len(part.shots), store.tokens, len(shots))
        columns = {"values": arrow.FixedSizeListArray.from_arrays(flat, store.width)}
        columns |= {name: arrow.array(numbers.numpy()) for name, numbers in places.items()}
        for name in SHOT_COLUMNS:
            each = arrow.array([getattr(shot, name) for shot in part.shots])
            columns[name] = each.take(arrow.array((places["shots"] - len(shots)).numpy()))
        with replacing(path) as temporary:
            # Numbers of activations hardly repeat: a dictionary of them, or compression, takes time and memory for nothing.
            parquet.write_table(
                arrow.table(columns), temporary, row_group_size=CHUNK_ROWS, use_dictionary=[*SHOT_COLUMNS], compression="none"
            )
        paths.append(path)
        shots.extend(part.shots)
        bar.update(len(rows))
    return paths, shots


_WRITERS: Mapping[str, Callable[[Store, Path, ProgressBar], tuple[list[Path], list[Shot]]]] = {
    "safetensors": _write_safetensors,
    "npy": _write_npy,
    "parquet": _write_parquet,
}


def _places(shots: int, tokens: int, first: int) -> dict[str, Tensor]:
    """Return the number of the shot of each row, and of its token within the shot."""
    return {
        "shots": torch.arange(first, first + shots).repeat_interleave(tokens),
        "tokens": torch.arange(tokens).repeat(shots),
    }
