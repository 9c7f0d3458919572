"""The config of a dictionary, which identifies it: read, checked and hashed without its tensors, and without torch."""

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path

from difflex.errors import BadInput, BrokenFile, UnknownName
from difflex.files import Json, parsing, read_json, stored_checksum
from difflex.records import Site

FORMAT = 3
CONFIG, TENSORS = "config.json", "dictionary.safetensors"
STATISTICS = "code_statistics.safetensors"
"""What the tool that a dictionary was imported from measured of its codes."""
ADVICE = "Copy the dictionary again, or move its folder away and make it again."


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

    @property
    def imported(self) -> str:
        """The tool, and the file or folder, that the dictionary was imported from; empty for one that was made here."""
        entries = self.training.get("imported")
        return f"from {entries.get('tool')}: {entries.get('source')}" if isinstance(entries, dict) else ""

    @property
    def excluded(self) -> frozenset[int]:
        """The features that the publisher of the dictionary excludes from lists of what fires."""
        entries = self.training.get("imported")
        numbers = entries.get("excluded") if isinstance(entries, dict) else None
        return frozenset(number for number in numbers if isinstance(number, int)) if isinstance(numbers, list) else frozenset()


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
    check_pair(Path(folder), config)
    content = json.dumps({**vars(config), "site": str(config.site)}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def check_pair(folder: Path, config: DictionaryConfig) -> None:
    """Raise an error if the tensors in `folder` are not those of its config."""
    if stored_checksum(folder / TENSORS, ADVICE) != config.sha256:
        raise BrokenFile(f"{folder / TENSORS} and {CONFIG} are not of the same dictionary: one was replaced. {ADVICE}")
