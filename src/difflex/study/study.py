"""The study: a model, a folder with everything that is known of it, and what is to be done there."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, final

from difflex._version import __version__
from difflex.errors import BadInput, BrokenFile, StaleWork, UnknownName
from difflex.files import write_json
from difflex.records import Site

__all__ = ["GROWING", "Command", "DictionaryRef", "Study"]

FORMAT = 1
CARD = "study.json"
ACTIVATIONS = "activations"
GROWING = "growing-"
"""What the folder of a dictionary begins with until its size, and so its name, is known."""


class Command(ABC):
    """A piece of work as plain data: a frozen dataclass whose fields are the flags of a verb on the command line."""

    @abstractmethod
    def __call__(self) -> Sequence[Path] | None:
        """What was made, if it is of the kind that stays in a study; does the work, says what came of it."""


class DictionaryRef(NamedTuple):
    """Where in a study a dictionary is."""

    site: Site
    label: str

    def __str__(self) -> str:
        return f"{self.site}/{self.label}"


@final
@dataclass(frozen=True, kw_only=True)
class Study:
    """A folder with everything that is known of one model."""

    folder: Path
    model: str
    """The model that is studied: one a study, as dictionaries are named by their site alone."""
    revision: str | None = None
    difflex: str = __version__
    """The version that began the study."""
    commands: tuple[Command, ...] = ()
    """What is to be done in it, in this order."""

    @classmethod
    def begin(cls, folder: Path | str, model: str, revision: str | None = None) -> Study:
        """The study of `model` in `folder`, which may have been begun before."""
        study = cls.planned(folder, model, revision)
        study.write()
        return study

    @classmethod
    def planned(cls, folder: Path | str, model: str, revision: str | None = None) -> Study:
        """The study of `model` in `folder`, not yet written if it was not begun before."""
        folder = Path(folder)
        if (folder / CARD).is_file():
            study = cls.open(folder)
            study._is_about(model, revision)
            return study
        return cls(folder=folder, model=model, revision=revision)

    def prepare(self) -> None:
        """Nothing; the folder is there, and holds no study of another model."""
        if (self.folder / CARD).is_file():
            there = Study.open(self.folder)
            there._is_about(self.model, self.revision or there.revision)  # a recipe need not know the revision
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"A study cannot be written to {self.folder}: {error}. Name a folder that you may write.") from error

    def write(self) -> None:
        """Nothing; the study is begun, if it was not before."""
        self.prepare()
        if (self.folder / CARD).is_file():
            return
        try:
            write_json(self.folder / CARD, FORMAT, {"model": self.model, "revision": self.revision})
        except OSError as error:
            raise BadInput(f"A study cannot be written to {self.folder}: {error}. Name a folder that you may write.") from error

    @classmethod
    def open(cls, folder: Path | str) -> Study:
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
        known = {name: said[name] for name in ("difflex", "model", "revision") if name in said}
        unknown = sorted(said.keys() - known.keys() - {"format"})
        if unknown or "model" not in known:
            what = f"holds the entry '{unknown[0]}', which is unknown" if unknown else "does not name a model"
            raise BrokenFile(f"{path} {what}. Delete it and harvest again into the folder.")
        return cls(folder=Path(folder), **known)

    def _is_about(self, model: str, revision: str | None) -> None:
        """Nothing; to go on with another model is an error."""
        if (self.model, self.revision) != (model, revision):
            raise StaleWork(
                f"{self.folder} studies {_named(self.model, self.revision)}, asked is {_named(model, revision)}. "
                "Name another folder: a study is about one model."
            )

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

    def dictionaries(self) -> list[DictionaryRef]:
        """The finished dictionaries, numbers in their names in the order of numbers."""
        folders = (path.parent for path in (self.folder / "dictionaries").glob("*/*/config.json"))
        places = [DictionaryRef(Site.parse(folder.parent.name.replace("+", ":")), folder.name) for folder in folders]
        finished = [place for place in places if not place.label.startswith(GROWING)]
        return sorted(finished, key=lambda place: [part.zfill(12) for part in re.split(r"(\d+)", str(place))])

    def named(self, name: str) -> DictionaryRef:
        """The dictionary called `name`: SITE/LABEL, or the site alone where it has one dictionary."""
        known = self.dictionaries()
        there = [place for place in known if name in (str(place), str(place.site))]
        if len(there) == 1:
            return there[0]
        if there:
            raise BadInput(f"{there[0].site} has {len(there)} dictionaries. Name one of them: {', '.join(map(str, there))}.")
        raise UnknownName.among("The dictionary", name, map(str, known), "difflex train and difflex itda make dictionaries.")

    def scales(self, site: Site, label: str) -> Path:
        """The file with the units that a dictionary's features are steered by."""
        return self.folder / "steering" / "scales" / site.folder / f"{label}.safetensors"

    def steering(self, site: Site, label: str) -> Path:
        """The file that says what comes of steering with a dictionary's features."""
        return self.folder / "steering" / "judged" / site.folder / f"{label}.json"

    def removal(self, places: Sequence[DictionaryRef]) -> Path:
        """The file that says what comes of removing concepts with the features of these dictionaries, all at once."""
        sites, labels = ",".join(place.site.folder for place in places), [place.label for place in places]
        name = labels[0] if len(set(labels)) == 1 else ",".join(labels)
        return self.folder / "steering" / "removal" / sites / f"{name}.json"

    def removals(self) -> list[Path]:
        """The files of that kind that are there."""
        return sorted((self.folder / "steering" / "removal").glob("*/*.json"))

    def findings(self, site: Site) -> Path:
        """The file that says what experiments with steering at a site found."""
        return self.folder / "steering" / "findings" / f"{site.folder}.json"

    def contrast(self, name: str) -> Path:
        """The file of a direction found by contrast."""
        return self.folder / "steering" / "contrasts" / f"{name}.safetensors"

    def evaluation(self, site: Site, label: str) -> Path:
        """The file with a dictionary's figures."""
        return self.folder / "evaluation" / site.folder / f"{label}.json"

    @property
    def anatomy(self) -> Path:
        """The file with the anatomy of the model."""
        return self.folder / "anatomy.json"

    @property
    def anatomy_figures(self) -> Path:
        """The folder of the figures of the anatomy."""
        return self.folder / "anatomy"

    def concepts(self, site: Site, label: str) -> Path:
        """The file that says which known concepts a dictionary's features, or those of what stands beside it, detect."""
        return self.folder / "concepts" / site.folder / f"{label}.json"

    @property
    def images(self) -> Path:
        """The folder of the images that its books show."""
        return self.folder / "images"

    @property
    def explanations(self) -> Path:
        """The folder of what seeing models answered, and of what came of it."""
        return self.folder / "explanations"

    def book(self, site: Site, label: str) -> Path:
        """The file of a dictionary's book."""
        return self.folder / "books" / site.folder / f"{label}.sqlite"


def _named(model: str, revision: str | None) -> str:
    return f"{model}@{revision}" if revision else model
