"""The study folder: what is called how in it, and what `study.json` says."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import final

from difflex import __version__
from difflex.errors import BadInput, BrokenFile, StaleWork, UnknownName
from difflex.records import Site

__all__ = ["Study"]

FORMAT = 1
CARD = "study.json"
ACTIVATIONS = "activations"


@dataclass(frozen=True, kw_only=True)
class Card:
    """What `study.json` says."""

    format: int = FORMAT
    difflex: str = __version__
    """The version that began the study."""
    model: str
    """The model that is studied: one a study, as dictionaries are named by their site alone."""
    revision: str | None = None


@final
class Study:
    """A folder with everything that is known of one model."""

    def __init__(self, folder: Path, card: Card) -> None:
        self.folder = folder
        self.card = card

    @classmethod
    def begin(cls, folder: Path | str, model: str, revision: str | None = None) -> "Study":
        """The study of `model` in `folder`, which may have been begun before."""
        study = cls.planned(folder, model, revision)
        study.write()
        return study

    @classmethod
    def planned(cls, folder: Path | str, model: str, revision: str | None = None) -> "Study":
        """The study of `model` in `folder`, not yet written if it was not begun before."""
        folder = Path(folder)
        if (folder / CARD).is_file():
            study = cls.open(folder)
            if (study.card.model, study.card.revision) != (model, revision):
                raise StaleWork(
                    f"{folder} studies {_named(study.card.model, study.card.revision)}, asked is {_named(model, revision)}. "
                    "Name another folder: a study is about one model."
                )
            return study
        return cls(folder, Card(model=model, revision=revision))

    def write(self) -> None:
        """Nothing; the study is begun, if it was not before."""
        if (self.folder / CARD).is_file():
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self.folder / CARD, asdict(self.card))
        except OSError as error:
            raise BadInput(f"A study cannot be written to {self.folder}: {error}. Name a folder that you may write.") from error

    @classmethod
    def open(cls, folder: Path | str) -> "Study":
        """The study in `folder`."""
        path = Path(folder) / CARD
        if not path.is_file():
            raise UnknownName(f"{folder} is not a study: it has no {CARD}. difflex harvest begins one.")
        try:
            said = json.loads(path.read_bytes())
        except ValueError as error:
            raise BrokenFile(
                f"{path} is not JSON ({error}): it is damaged. Delete it and harvest again into the folder."
            ) from error
        found = said.get("format") if isinstance(said, Mapping) else None
        if found != FORMAT:
            raise BrokenFile(f"{path} is of format {found!r}; this difflex reads format {FORMAT}. Use the difflex that wrote it.")
        known = {name: said[name] for name in ("format", "difflex", "model", "revision") if name in said}
        unknown = sorted(said.keys() - known.keys())
        if unknown or "model" not in known:
            what = f"holds the entry '{unknown[0]}', which is unknown" if unknown else "does not name a model"
            raise BrokenFile(f"{path} {what}. Delete it and harvest again into the folder.")
        return cls(Path(folder), Card(**known))

    @property
    def activations(self) -> Path:
        """The folder of the stores, one folder for each site."""
        return self.folder / ACTIVATIONS

    def stores(self) -> dict[Site, Path]:
        """The folders of the stores that are there, by site."""
        # Not by their manifests: one that has lost it is broken, and must not go unnoticed.
        folders = sorted({path.parent for ending in ("json", "safetensors") for path in self.activations.glob(f"*/*.{ending}")})
        return {Site.parse(folder.name.replace("+", ":")): folder for folder in folders}

    def dictionary(self, site: Site, label: str) -> Path:
        """The folder of a dictionary."""
        return self.folder / "dictionaries" / site.folder / label

    def evaluation(self, site: Site, label: str) -> Path:
        """The file with a dictionary's figures."""
        return self.folder / "evaluation" / site.folder / f"{label}.json"

    def concepts(self, site: Site, label: str) -> Path:
        """The file that says which known concepts a dictionary's features, or those of what stands beside it, detect."""
        return self.folder / "concepts" / site.folder / f"{label}.json"

    def book(self, site: Site, label: str) -> Path:
        """The file of a dictionary's book."""
        return self.folder / "books" / site.folder / f"{label}.sqlite"


def _named(model: str, revision: str | None) -> str:
    return f"{model}@{revision}" if revision else model


def _write(path: Path, said: Mapping[str, object]) -> None:
    """Write so that nobody ever sees half a file; processes that begin the same study at once write the same."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(said, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
