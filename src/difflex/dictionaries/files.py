"""A dictionary on disk: `config.json` and `dictionary.safetensors`, each written to a temporary name, then renamed."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save
from torch import Tensor

from difflex import __version__
from difflex.errors import BadInput, BrokenFile, UnknownName
from difflex.records import Site

__all__ = [
    "FORMAT",
    "DictionaryConfig",
    "Json",
    "as_text",
    "read",
    "read_config",
    "reading_record",
    "replace_file",
    "write",
    "write_record",
]

FORMAT = 1
Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


@dataclass(frozen=True, kw_only=True)
class DictionaryConfig:
    """`config.json` of a dictionary."""

    format: int
    difflex: str
    """The version that wrote it."""
    kind: str
    site: Site
    model: str | None
    revision: str | None
    width: int
    size: int
    k: int
    settings: dict[str, Json]
    """What only this kind has."""
    training: dict[str, Json]
    """How it was made."""


def write(folder: Path, config: Mapping[str, Json], tensors: Mapping[str, Tensor]) -> Path:
    """`folder`, with both files in it; the config comes last, so that a folder with a config is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    packed = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    replace_file(folder / "dictionary.safetensors", packed)
    replace_file(folder / "config.json", as_text({"format": FORMAT, "difflex": __version__, **config}).encode())
    return folder


def read(folder: Path, device: str = "cpu") -> tuple[DictionaryConfig, dict[str, Tensor]]:
    """The two files of `folder`; an error that says what is wrong where they are not what `write` writes."""
    config = read_config(folder)
    try:
        tensors = load_file(folder / "dictionary.safetensors", device=device)
    except FileNotFoundError as error:
        raise BrokenFile(f"{folder} has a config.json but no dictionary.safetensors: save the dictionary again.") from error
    except safetensors.SafetensorError as error:
        raise BrokenFile(f"{folder}/dictionary.safetensors is damaged: {error}. Train or copy it again.") from error
    # Cloned, because a product of tensors that start at odd addresses of a mapped file may differ in its last bit.
    return config, {name: tensor.clone() for name, tensor in tensors.items()}


def replace_file(path: Path, content: bytes) -> None:
    """Put `content` at `path` in one go: a reader, or a kill, sees the old file or the new one, never a part."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def write_record(path: Path, form: int, said: Mapping[str, object], indent: int | None = 1) -> Path:
    """`path`, which now holds `said` as JSON, with its format and the version that wrote it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = json.dumps({"format": form, "difflex": __version__, **said}, indent=indent, allow_nan=False)
    replace_file(path, (written + "\n").encode())
    return path


@contextmanager
def reading_record(path: Path, form: int, what: str) -> Iterator[dict[str, Any]]:
    """What `write_record` was given; where it cannot be made sense of, `path` is said not to be `what`."""
    try:
        said = json.loads(path.read_bytes())
        if said.pop("format") != form:
            raise BrokenFile(f"{path} is not of format {form}, which this difflex reads. Delete it; it is made again.")
        del said["difflex"]
        yield said
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenFile(f"{path} cannot be read as {what} ({error!r}): it is damaged. Delete it; it is made again.") from error


def checksum(folder: Path | str) -> str:
    """The SHA-256 of a dictionary in `folder`: of its tensors, then of what its config says beside them."""
    sha = hashlib.sha256()
    for name in ("dictionary.safetensors", "config.json"):
        try:
            with (Path(folder) / name).open("rb") as file:
                sha.update(hashlib.file_digest(file, "sha256").digest())
        except FileNotFoundError as error:
            raise BadInput(f"{folder} holds no dictionary: it has no {name}. Name the folder that `save` wrote.") from error
    return sha.hexdigest()


def as_text(entries: Mapping[str, Json]) -> str:
    """`entries` as JSON for files and people."""
    return json.dumps(entries, indent=2) + "\n"


def read_config(folder: Path) -> DictionaryConfig:
    """What `config.json` of `folder` says; its tensors are not touched."""
    path = folder / "config.json"
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInput(f"{folder} holds no dictionary: it has no config.json. Name the folder that `save` wrote.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BrokenFile(f"{path} is not JSON: {error}. Train or copy the dictionary again.") from error
    names = [field.name for field in fields(DictionaryConfig)]
    if not isinstance(entries, dict) or entries.get("format") != FORMAT:
        found = entries.get("format") if isinstance(entries, dict) else type(entries).__name__
        raise BrokenFile(
            f"{path} is not a dictionary of format {FORMAT}: format {found!r}. Another tool's file must be imported."
        )
    for name in entries:
        if name not in names:
            raise UnknownName.among(f"In {path} the entry", name, names)
    if missing := [name for name in names if name not in entries]:
        raise BrokenFile(f"{path} lacks {', '.join(missing)}: train or copy the dictionary again.")
    kinds = {"kind": str, "site": str, "width": int, "size": int, "k": int, "settings": dict, "training": dict}
    if wrong := [name for name, kind in kinds.items() if not isinstance(entries[name], kind)]:
        raise BrokenFile(f"{path} says {', '.join(f'{name}: {entries[name]!r}' for name in wrong)}: copy the dictionary again.")
    return DictionaryConfig(**{**entries, "site": Site.parse(entries["site"])})
