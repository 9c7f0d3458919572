"""From a name to a diffusers pipeline: where the files are, whether they are whole, in which precision they are read."""

import json
import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from difflex.errors import BadInput, BrokenFile, UnknownName
from difflex.pipeline.families import Family
from difflex.pipeline.plans import PipelinePlan, read_plan
from difflex.quiet import quiet, without_bars

__all__ = [
    "ModelDefaults",
    "ModelSource",
    "Precision",
    "check_weights",
    "embedded",
    "fetch",
    "find",
    "plan_of",
    "read_card",
    "read_pipeline",
]

Precision = Literal["bf16", "fp16", "fp32", "nf4"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WORTH_A_BAR = 2**30
HOW_TO_NAME = "Name a folder by its path (./my-model), a hub model as OWNER/NAME."
CARD = "difflex.json"
INDEX = "model_index.json"


class ModelSource(NamedTuple):
    """Where a model is."""

    name: str
    """As it was asked for."""
    folder: Path | None
    """None for a model that is still on the hub."""
    revision: str | None
    """The commit or branch on the hub, or which random weights; None for folders and embedded models."""


@dataclass(frozen=True, kw_only=True)
class ModelDefaults:
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


def find(name: str | Path, revision: str | None = None) -> ModelSource:
    """Where the model `name` is: inside the package, in a folder, or on the hub, from which nothing is fetched yet."""
    known = embedded()
    folder = Path(name).expanduser()
    if revision is not None and (str(name) in known or folder.is_dir()):
        raise BadInput(f"The model '{name}' has no revision {revision}: revisions are those of models on the hub. Leave it out.")
    if str(name) in known:
        return ModelSource(str(name), known[str(name)], None)
    if folder.is_dir():
        if not (folder / INDEX).is_file():
            raise BadInput(f"The folder {folder} has no {INDEX}: it is not a diffusers pipeline. Name the folder that has one.")
        return ModelSource(str(name), folder, None)
    if not isinstance(name, str) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UnknownName.among("The model", str(name), known, HOW_TO_NAME)
    return ModelSource(name, None, revision)


def plan_of(source: ModelSource, offline: bool) -> PipelinePlan:
    """What the model is made of; of a hub model only the configs are fetched."""
    try:
        return read_plan(source.folder or source.name, source.revision, offline)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        if source.folder is not None:
            raise BrokenFile(f"The configs of the model in {source.folder} cannot be read: {_first_line(error)}") from error
        raise _unreachable(source, offline, error) from error


def fetch(source: ModelSource, offline: bool) -> ModelSource:
    """`source` with a folder: a hub model is downloaded, unless it is in the cache, and its revision is pinned."""
    if source.folder is not None:
        return source
    try:
        folder = Path(DiffusionPipeline.download(source.name, revision=source.revision, local_files_only=offline))
    except (OSError, ValueError) as error:
        raise _unreachable(source, offline, error) from error
    return ModelSource(source.name, folder, folder.name)


def _unreachable(source: ModelSource, offline: bool, error: Exception) -> UnknownName:
    where = "the local cache of the hub" if offline else "the hub"
    at = f" at revision {source.revision}" if source.revision else ""
    # diffusers says only that this file was not found, whatever the reason.
    lost = INDEX in str(error)
    why = "it holds no such diffusers pipeline, or cannot be reached from here" if lost else _first_line(error)
    return UnknownName(
        f"The model '{source.name}'{at} could not be read from {where}: {why}. "
        f"Models inside the package: {', '.join(embedded()) or 'none'}. {HOW_TO_NAME}"
    )


def read_card(folder: Path | None, family: Family, plan: PipelinePlan) -> ModelDefaults:
    """What `difflex.json` in `folder` says, completed by the family's defaults for such a model."""
    path, usual = folder / CARD if folder else None, _usual(family, plan)
    if path is None or not path.is_file():
        return usual
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return ModelDefaults(
            steps=int(data.get("steps", usual.steps)),
            guidance=float(data.get("guidance", usual.guidance)),
            pixels=tuple((int(height), int(width)) for height, width in data.get("pixels", ())),
            text_length=data.get("text_length", usual.text_length),
            words=frozenset(data.get("words", ())),
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise BrokenFile(f"{path} cannot be read ({_first_line(error)}). Write it anew, or delete it: it is optional.") from error


def _usual(family: Family, plan: PipelinePlan) -> ModelDefaults:
    if family.few and all(plan.entry(sign) == value for sign, value in family.few.signs.items()):
        return ModelDefaults(steps=family.few.steps, guidance=0.0, text_length=family.few.text_length or family.text_length)
    return ModelDefaults(steps=family.steps, guidance=family.default_guidance, text_length=family.text_length)


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


def read_pipeline(folder: Path, dtype: torch.dtype, **given: object) -> DiffusionPipeline:
    """The pipeline in `folder`, all its parts in one precision whatever they were stored in; `given` parts are not read."""
    _read_json(folder / INDEX)
    check_weights(folder)
    small = sum(path.stat().st_size for path in folder.glob("*/*.safetensors")) < WORTH_A_BAR
    try:
        with quiet("transformers", "diffusers"), without_bars() if small else nullcontext():
            pipeline = DiffusionPipeline.from_pretrained(os.fspath(folder), dtype=dtype, local_files_only=True, **given)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise BrokenFile(f"The model in {folder} cannot be read: {_first_line(error)}") from error
    return pipeline


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
