"""From a name to a diffusers pipeline: where the files are, whether they are whole, in which precision they are read."""

import json
import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple

import diffusers
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from difflex.errors import BadInput, BrokenFile, UnknownName
from difflex.pipeline.families import Family
from difflex.pipeline.quiet import quiet, without_bars

__all__ = ["Card", "Precision", "Source", "check_weights", "embedded", "locate", "read_card", "read_pipeline"]

Precision = Literal["bf16", "fp16", "fp32", "nf4"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# diffusers 0.42 renamed the argument and warns of the old name.
DTYPE_ARGUMENT = "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 42) else "torch_dtype"
WORTH_A_BAR = 2**30
CARD = "difflex.json"
INDEX = "model_index.json"


class Source(NamedTuple):
    """Where a model is."""

    name: str
    """As it was asked for."""
    folder: Path
    revision: str | None
    """The commit on the hub; None for folders and embedded models."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a model is meant to be used with; `difflex.json` in its folder, else the defaults of its family."""

    steps: int
    guidance: float
    pixels: tuple[tuple[int, int], ...] = ()
    """Possible sizes, the default first; empty if any multiple of the token's size is possible."""
    text_length: int | None = None
    words: frozenset[str] = frozenset()
    """All words that the model has seen; empty if unknown."""


def embedded() -> dict[str, Path]:
    """The models inside the package, by name."""
    root = Path(str(files("difflex") / "models"))
    return {folder.parent.name: folder.parent for folder in sorted(root.glob(f"*/{INDEX}"))}


def locate(name: str | Path, revision: str | None = None, offline: bool = False) -> Source:
    """The folder of an embedded model, of a folder on disk, or of a snapshot from the hub (downloaded unless `offline`)."""
    known = embedded()
    if str(name) in known:
        return Source(str(name), known[str(name)], None)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / INDEX).is_file():
            raise BadInput(f"The folder {folder} has no {INDEX}: it is not a diffusers pipeline. Name the folder that has one.")
        return Source(str(name), folder, None)
    if not isinstance(name, str) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UnknownName.among(
            "The model", str(name), known, "Name a folder by its path (./my-model), a hub model as OWNER/NAME."
        )
    return _download(name, revision, offline)


def _download(name: str, revision: str | None, offline: bool) -> Source:
    try:
        folder = Path(DiffusionPipeline.download(name, revision=revision, local_files_only=offline))
    except (OSError, ValueError) as error:
        where = "the local cache of the hub" if offline else "the hub"
        at = f" at revision {revision}" if revision else ""
        raise UnknownName(
            f"The model '{name}'{at} could not be read from {where} ({_first_line(error)}). "
            f"Models inside the package: {', '.join(embedded()) or 'none'}; name a folder by its path (./my-model)."
        ) from error
    return Source(name, folder, folder.name)


def read_card(folder: Path, family: Family) -> Card:
    """What `difflex.json` in `folder` says, completed by the family's defaults."""
    path = folder / CARD
    if not path.is_file():
        return Card(steps=family.steps, guidance=family.default_guidance, text_length=family.text_length)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Card(
            steps=int(data.get("steps", family.steps)),
            guidance=float(data.get("guidance", family.default_guidance)),
            pixels=tuple((int(height), int(width)) for height, width in data.get("pixels", ())),
            text_length=data.get("text_length", family.text_length),
            words=frozenset(data.get("words", ())),
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise BrokenFile(f"{path} cannot be read ({_first_line(error)}). Write it anew, or delete it: it is optional.") from error


def check_weights(folder: Path) -> None:
    """Nothing; a weights file in `folder` that is truncated, damaged at its head or missing is an error that names it."""
    for path in sorted(folder.glob("*/*.safetensors")):
        _check_header(path)
    for path in sorted(folder.glob("*/*.index.json")):
        for shard in sorted(set(_read_json(path).get("weight_map", {}).values())):
            if not (path.parent / shard).is_file():
                raise BrokenFile(f"{path.parent / shard} is missing, {path.name} asks for it. Copy or download the model again.")


def _check_header(path: Path) -> None:
    """safetensors: 8 bytes length of the header, the header in JSON, then exactly the bytes that it promises."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise BrokenFile(
                f"{path} is truncated ({size} bytes, its header alone needs {length + 8}). Copy or download it again."
            )
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BrokenFile(
                f"{path} is damaged: its header is not that of a safetensors file. Copy or download it again."
            ) from error
    promised = 8 + length + max(ends, default=0)
    if size != promised:
        raise BrokenFile(f"{path} has {size} bytes where its header promises {promised}. Copy or download it again.")


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return dict(data)
    except (ValueError, TypeError) as error:
        raise BrokenFile(f"{path} is not JSON ({_first_line(error)}). Copy or download it again.") from error


def read_pipeline(folder: Path, dtype: torch.dtype) -> DiffusionPipeline:
    """The pipeline in `folder`, all its parts in one precision whatever precision they were stored in."""
    _read_json(folder / INDEX)
    check_weights(folder)
    small = sum(path.stat().st_size for path in folder.glob("*/*.safetensors")) < WORTH_A_BAR
    try:
        with quiet("transformers", "diffusers"), without_bars() if small else nullcontext():
            pipeline = DiffusionPipeline.from_pretrained(os.fspath(folder), **{DTYPE_ARGUMENT: dtype}, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise BrokenFile(f"The model in {folder} cannot be read: {_first_line(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
