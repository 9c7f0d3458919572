"""A dictionary on disk: `config.json` and `dictionary.safetensors`, each written atomically."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

import safetensors
from safetensors.torch import load_file, save
from torch import Tensor

from difflex.errors import BadInput, BrokenFile, UnknownName
from difflex.files import Json, file_sha256, read_json, write_file, write_json
from difflex.records import Site

__all__ = ["DictionaryConfig", "fingerprint", "parse_choice", "read_config", "read_files", "write_files"]

Choice = TypeVar("Choice")
FORMAT = 2
CONFIG, TENSORS = "config.json", "dictionary.safetensors"
ADVICE = "Train or copy the dictionary again."


@dataclass(frozen=True, kw_only=True)
class DictionaryConfig:
    """`config.json` of a dictionary."""

    kind: str
    site: Site
    model: str | None
    revision: str | None
    width: int
    size: int
    k: int
    settings: dict[str, Json]
    """The settings that only this kind has."""
    training: dict[str, Json]
    """How the dictionary was made."""

    @property
    def normalisation(self) -> str:
        """The method of the normalisation; `none` for a kind without one."""
        settings = self.settings.get("normalisation")
        return str(settings.get("method", "none")) if isinstance(settings, dict) else "none"


def write_files(folder: Path, config: Mapping[str, Json], tensors: Mapping[str, Tensor]) -> Path:
    """Write both files and return `folder`; the config comes last, so a folder with a config is complete."""
    write_file(folder / TENSORS, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))
    write_json(folder / CONFIG, FORMAT, config, indent=2)
    return folder


def read_files(folder: Path, device: str = "cpu") -> tuple[DictionaryConfig, dict[str, Tensor]]:
    """Return the config and the tensors in `folder`."""
    config = read_config(folder)
    try:
        tensors = load_file(folder / TENSORS, device=device)
    except FileNotFoundError as error:
        raise BrokenFile(f"{folder} has a {CONFIG} but no {TENSORS}. {ADVICE}") from error
    except safetensors.SafetensorError as error:
        raise BrokenFile(f"{folder / TENSORS} is damaged: {error}. {ADVICE}") from error
    # Cloned, because a product of tensors that start at odd addresses of a mapped file may differ in its last bit.
    return config, {name: tensor.clone() for name, tensor in tensors.items()}


def read_config(folder: Path) -> DictionaryConfig:
    """Return `config.json` of the dictionary in `folder`, without reading its tensors."""
    path = folder / CONFIG
    if not path.exists():
        raise BadInput(f"{folder} holds no dictionary: it has no {CONFIG}. Name the folder that `save` wrote.")
    entries = read_json(path, FORMAT, ADVICE)
    names = [field.name for field in fields(DictionaryConfig)]
    for name in entries:
        if name not in names:
            raise UnknownName.among(f"In {path} the entry", name, names)
    if missing := [name for name in names if name not in entries]:
        raise BrokenFile(f"{path} lacks {', '.join(missing)}. {ADVICE}")
    types = {"kind": str, "site": str, "width": int, "size": int, "k": int, "settings": dict, "training": dict}
    if wrong := [f"{name}: {entries[name]!r}" for name, expected in types.items() if not isinstance(entries[name], expected)]:
        raise BrokenFile(f"{path} has entries of the wrong type ({', '.join(wrong)}). {ADVICE}")
    return DictionaryConfig(**{**entries, "site": Site.parse(entries["site"])})


def fingerprint(folder: Path | str) -> str:
    """Return the fingerprint of the dictionary in `folder`: a SHA-256 over its tensors and its config."""
    sha = hashlib.sha256()
    for name in (TENSORS, CONFIG):
        try:
            sha.update(bytes.fromhex(file_sha256(Path(folder) / name)))
        except FileNotFoundError as error:
            raise BadInput(f"{folder} holds no dictionary: it has no {name}. Name the folder that `save` wrote.") from error
    return sha.hexdigest()


def parse_choice(what: str, name: object, choices: tuple[Choice, ...]) -> Choice:
    """Return the one of `choices` that a file calls `name`; raise if there is none."""
    for choice in choices:
        if choice == name:
            return choice
    raise UnknownName.among(what, str(name), map(str, choices))
