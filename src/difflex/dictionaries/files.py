"""A dictionary on disk: `config.json` and `dictionary.safetensors`, each written to a temporary name, then renamed."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import safetensors
from safetensors.torch import load_file, save
from torch import Tensor

from difflex.errors import BadInput, BrokenFile, UnknownName
from difflex.files import Json, file_sha256, write_file, write_json
from difflex.records import Site

__all__ = ["FORMAT", "DictionaryConfig", "fingerprint", "read", "read_config", "write"]

FORMAT = 1


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
    write_file(folder / "dictionary.safetensors", packed)
    write_json(folder / "config.json", FORMAT, config, indent=2)
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


def fingerprint(folder: Path | str) -> str:
    """Return the fingerprint of the dictionary in `folder`: a SHA-256 over its tensors and its config."""
    sha = hashlib.sha256()
    for name in ("dictionary.safetensors", "config.json"):
        try:
            sha.update(bytes.fromhex(file_sha256(Path(folder) / name)))
        except FileNotFoundError as error:
            raise BadInput(f"{folder} holds no dictionary: it has no {name}. Name the folder that `save` wrote.") from error
    return sha.hexdigest()


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
