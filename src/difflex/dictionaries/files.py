"""A dictionary on disk: `config.json` and `dictionary.safetensors`, each written atomically.

The config holds the checksum of the tensors and has one itself, so it identifies the dictionary.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from difflex.errors import BadInput, BrokenFile, NonFinite, UnknownName
from difflex.files import Json, parsing, read_json, write_json
from difflex.records import Site
from difflex.tensors import read_tensors, stored_checksum, write_tensors

__all__ = ["DictionaryConfig", "fingerprint", "parse_choice", "read_config", "read_files", "write_files"]

Choice = TypeVar("Choice")
FORMAT = 3
CONFIG, TENSORS = "config.json", "dictionary.safetensors"
ADVICE = "Copy the dictionary again, or move its folder away and make it again."
DTYPES = {"provenance.shots": torch.int64, "provenance.tokens": torch.int64, "provenance.known": torch.uint8}
"""The dtypes of the tensors that are not float32."""


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
    sha256: str
    """The checksum of its tensors."""

    @property
    def normalisation(self) -> str:
        """The method of the normalisation; `none` for a kind without one."""
        settings = self.settings.get("normalisation")
        return str(settings.get("method", "none")) if isinstance(settings, dict) else "none"


def write_files(folder: Path, config: Mapping[str, Json], tensors: Mapping[str, Tensor]) -> Path:
    """Write both files and return `folder`; the config comes last, so a folder with a config is complete."""
    _check_tensors(folder / TENSORS, tensors)
    path = write_tensors(folder / TENSORS, FORMAT, tensors)
    write_json(folder / CONFIG, FORMAT, {**config, "sha256": stored_checksum(path, ADVICE)}, indent=2)
    return folder


def read_files(folder: Path, device: str = "cpu") -> tuple[DictionaryConfig, dict[str, Tensor]]:
    """Return the config and the tensors in `folder`, which are float32 and finite but for the provenance of atoms."""
    config = read_config(folder)
    _check_pair(folder, config)
    tensors = read_tensors(folder / TENSORS, FORMAT, ADVICE, device=device).tensors
    _check_tensors(folder / TENSORS, tensors)
    return config, tensors


def _check_pair(folder: Path, config: DictionaryConfig) -> None:
    """Raise an error if the tensors in `folder` are not those of its config."""
    if stored_checksum(folder / TENSORS, ADVICE) != config.sha256:
        raise BrokenFile(f"{folder / TENSORS} and {CONFIG} are not of the same dictionary: one was replaced. {ADVICE}")


def _check_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise an error for a tensor of another dtype than expected, or with NaN or infinity."""
    for name, tensor in tensors.items():
        expected = DTYPES.get(name, torch.float32)
        if tensor.dtype != expected:
            raise BrokenFile(f"In {path} the tensor '{name}' is {tensor.dtype}, expected is {expected}. {ADVICE}")
        # A sum of finite numbers may overflow, but one with NaN or infinity is never finite.
        if expected == torch.float32 and not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
            raise NonFinite(f"In {path} the tensor '{name}' holds NaN or infinity: no dictionary can be used so. {ADVICE}")


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
    text = dict.fromkeys(("kind", "site", "sha256"), str) | dict.fromkeys(("model", "revision"), str | None)
    types = {**text, "settings": dict, "training": dict}
    wrong = [f"{name}: {entries[name]!r}" for name, expected in types.items() if not isinstance(entries[name], expected)]
    counts = {name: entries[name] for name in ("width", "size", "k")}
    wrong += [f"{name}: {count!r}" for name, count in counts.items() if type(count) is not int or count < 1]
    if wrong:
        raise BrokenFile(f"{path} has entries that cannot be ({', '.join(wrong)[:500]}). {ADVICE}")
    with parsing(path, "the config of a dictionary", ADVICE):
        return DictionaryConfig(**{**entries, "site": Site.parse(entries["site"])})


def fingerprint(folder: Path | str) -> str:
    """Return the fingerprint of the dictionary in `folder`: a SHA-256 over its config, which holds the checksum of its tensors.

    It depends on the content alone, and is quick for a dictionary of any size.
    """
    config = read_config(Path(folder))
    _check_pair(Path(folder), config)
    content = json.dumps({**vars(config), "site": str(config.site)}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def parse_choice(what: str, name: object, choices: tuple[Choice, ...]) -> Choice:
    """Return the one of `choices` that a file calls `name`; raise if there is none."""
    for choice in choices:
        if choice == name:
            return choice
    raise UnknownName.among(what, str(name), map(str, choices))
