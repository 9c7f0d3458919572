"""`Study`: the folder of one model, where each of its files is, and the commands to run in it."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, cast, final

from difflex._version import __version__
from difflex.choices import Precision
from difflex.errors import BadInput, BrokenFile, StaleWork, UnknownName
from difflex.files import disk_errors, read_json, write_json
from difflex.records import Site, is_same_model, model_name
from difflex.study.packed import STUDY_FILE, study_folder
from difflex.study.settings import StudySettings

FORMAT = 1
GROWING = "growing-"
"""The first part of the folder name of a dictionary whose size, and so its name, is not known yet."""
ADVICE = "Move it away and run the command that began the study again: it writes a new one, and keeps all that is there."


class Command(ABC):
    """A command as plain data: a frozen dataclass whose fields are the flags of a verb on the command line."""

    @abstractmethod
    def __call__(self) -> Sequence[Path] | None:
        """Run the command, print the results, and return the files that it made in a study."""


class DictionaryRef(NamedTuple):
    """A dictionary of a study, by name."""

    site: Site
    label: str

    def __str__(self) -> str:
        return f"{self.site}/{self.label}"


@final
@dataclass(frozen=True, kw_only=True)
class Study:
    """A folder with everything that is known about one model."""

    folder: Path
    model: str
    """A study has one model, since dictionaries are named by their site alone."""
    revision: str | None = None
    difflex: str = __version__
    """The version that began the study."""
    commands: tuple[Command, ...] = ()
    """The commands to run in it, in this order."""
    settings: StudySettings = field(default_factory=StudySettings)
    """How its model runs, and on which prompts."""

    @classmethod
    def begin(cls, folder: Path | str, model: str, revision: str | None = None) -> Study:
        """Begin the study of `model` in `folder`, or open it if it exists."""
        study = cls.open_or_plan(folder, model, revision)
        study.write()
        return study

    @classmethod
    def open_or_plan(cls, folder: Path | str, model: str, revision: str | None = None) -> Study:
        """Open the study of `model` in `folder`; a new study is not written yet."""
        folder = Path(folder)
        if _is_file(folder / STUDY_FILE):
            study = cls.open(folder)
            study._check_model(model, revision)
            return study
        return cls(folder=folder, model=model, revision=revision)

    @classmethod
    def open(cls, folder: Path | str) -> Study:
        """Open the study in `folder`, or in a zip file that `difflex pack` wrote."""
        folder = study_folder(Path(folder))
        path = folder / STUDY_FILE
        if not _is_file(path):
            raise UnknownName(f"{folder} is not a study: it has no {STUDY_FILE}. difflex harvest begins one.")
        entries = read_json(path, FORMAT, ADVICE, header=True)
        fields = {name: entries[name] for name in ("difflex", "model", "revision") if name in entries}
        settings = entries.pop("settings", {})
        unknown = sorted(entries.keys() - fields.keys() - {"format"})
        if unknown or "model" not in fields:
            problem = f"holds the entry '{unknown[0]}', which is unknown" if unknown else "does not name a model"
            raise BrokenFile(f"{path} {problem}. {ADVICE}")
        for name, value in fields.items():
            if not (isinstance(value, str) and value.strip()) and not (name == "revision" and value is None):
                raise BrokenFile(f"In {path} the entry '{name}' is {str(value)[:60]!r} instead of a name. {ADVICE}")
        try:
            return cls(folder=folder, settings=StudySettings.from_json(settings), **fields)
        except (BadInput, UnknownName, TypeError, AttributeError) as error:
            raise BrokenFile(f"The settings in {path} cannot be used: {error} {ADVICE}") from error

    def prepare(self) -> None:
        """Make the folder, and check that it holds no study of another model."""
        if _is_file(self.folder / STUDY_FILE):
            study = Study.open(self.folder)
            study._check_model(self.model, self.revision or study.revision)  # a recipe need not know the revision
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    def write(self) -> None:
        """Write the study file if the folder has none."""
        self.prepare()
        if not _is_file(self.folder / STUDY_FILE):
            self._write()

    def _write(self) -> None:
        entries = {"model": self.model, "revision": self.revision, "settings": self.settings.as_json()}
        write_json(self.folder / STUDY_FILE, FORMAT, entries)

    def keep_settings(self, settings: StudySettings) -> None:
        """Write the study file with `settings`, unless it has them."""
        study = replace(self, settings=settings)
        study.write()
        if Study.open(self.folder).settings != settings:
            study._write()

    def run_in(self, precision: str | None) -> Study:
        """Return the study with another precision of its model in its settings; None leaves it as it is."""
        return replace(self, settings=replace(self.settings, precision=cast(Precision, precision))) if precision else self

    def _check_model(self, model: str, revision: str | None) -> None:
        """Raise an error for another model than that of the study."""
        if self.revision != revision or not is_same_model(self.model, model):
            raise StaleWork(
                f"{self.folder} studies {model_name(self.model, self.revision)}, not {model_name(model, revision)}. "
                "Name another folder: a study has one model."
            )

    @property
    def activations(self) -> Path:
        """The folder of the stores, with one folder per site."""
        return self.folder / "activations"

    def stores(self) -> dict[Site, Path]:
        """Return the folders of the stores by site."""
        # Any file counts, not the manifest alone: a store that has lost it is broken and must be noticed.
        folders = [place for place in _children(self.activations) if any(map(_is_stored, _children(place)))]
        return {_parse_site(folder): folder for folder in folders}

    def dictionary(self, site: Site | str, label: str) -> Path:
        """The folder of a dictionary."""
        return self.folder / "dictionaries" / Site.parse(site).folder / label

    def growing_dictionary(self, site: Site | str, name: str) -> Path:
        """The folder of a dictionary until its size, and so its label, is known."""
        return self.dictionary(site, GROWING + name)

    def dictionaries(self) -> list[DictionaryRef]:
        """Return the finished dictionaries, sorted by name with numbers in numerical order."""
        folders = (folder for site in _children(self.folder / "dictionaries") for folder in _children(site))
        names = [
            DictionaryRef(_parse_site(folder.parent), folder.name)
            for folder in folders
            if folder / "config.json" in _children(folder)
        ]
        finished = [name for name in names if not name.label.startswith(GROWING)]
        return sorted(finished, key=lambda name: [part.zfill(12) for part in re.split(r"(\d+)", str(name))])

    def find_dictionary(self, name: str | None = None) -> DictionaryRef:
        """Return the dictionary SITE/LABEL, that of a site with a single one, or without a name the only one of the study."""
        dictionaries = self.dictionaries()
        matches = [ref for ref in dictionaries if name is None or name in (str(ref), str(ref.site))]
        if len(matches) == 1:
            return matches[0]
        if matches:
            where, names = matches[0].site if name else self.folder, ", ".join(map(str, matches))
            raise BadInput(f"{where} has {len(matches)} dictionaries. Name one of them with --dictionary: {names}.")
        if name is None:
            raise UnknownName(f"{self.folder} has no dictionaries yet. Make some with difflex train or difflex itda.")
        advice = "difflex train and difflex itda make dictionaries."
        raise UnknownName.among(
            "The dictionary", name, [*map(str, dictionaries), *{str(ref.site) for ref in dictionaries}], advice
        )

    def select_dictionaries(self, sites: Sequence[str], names: Sequence[str]) -> list[DictionaryRef]:
        """Return the dictionaries at `sites` and those called `names` (SITE/LABEL); all if both are empty."""
        dictionaries = self.dictionaries()
        if not dictionaries:
            raise UnknownName(f"{self.folder} has no dictionaries yet. Make some with difflex train or difflex itda.")
        sites = [str(Site.parse(site)) for site in sites]
        known_sites = dict.fromkeys(str(ref.site) for ref in dictionaries)
        for kind, requested, available in (
            ("The site", sites, known_sites),
            ("The dictionary", names, [*map(str, dictionaries)]),
        ):
            for name in requested:
                if name not in available:
                    raise UnknownName.among(kind, name, available, "difflex train and difflex itda make dictionaries.")
        return [ref for ref in dictionaries if not (sites or names) or str(ref.site) in sites or str(ref) in names]

    def select_largest(self, sites: Sequence[str], names: Sequence[str]) -> list[DictionaryRef]:
        """Return the largest of the selected dictionaries of each kind at each site, with the largest k."""
        groups: dict[tuple[Site, str], list[DictionaryRef]] = {}
        for ref in self.select_dictionaries(sites, names):
            groups.setdefault((ref.site, ref.label.partition("-")[0]), []).append(ref)
        return [max(refs, key=_shape) for refs in groups.values()]

    def evaluation(self, site: Site | str, label: str) -> Path:
        """The file with the evaluation of a dictionary."""
        return self.folder / "evaluation" / Site.parse(site).folder / f"{label}.json"

    def transfer(self, site: Site | str, label: str, name: str) -> Path:
        """The file with the results of a dictionary on the runs of a model called `name`."""
        return self.folder / "transfer" / Site.parse(site).folder / label / f"{name}.json"

    def transfers(self) -> list[Path]:
        """Return all files with results of dictionaries on the runs of a model."""
        places = (place for site in _children(self.folder / "transfer") for place in _children(site))
        return [path for place in places for path in _children(place) if path.suffix == ".json"]

    @property
    def anatomy(self) -> Path:
        """The file with the anatomy of the model."""
        return self.folder / "anatomy.json"

    @property
    def anatomy_figures(self) -> Path:
        """The folder with the figures of the anatomy."""
        return self.folder / "anatomy"

    def concepts(self, site: Site | str, label: str) -> Path:
        """The file with the concepts that the features of a dictionary, or of a baseline, detect."""
        return self.folder / "concepts" / Site.parse(site).folder / f"{label}.json"

    def book(self, site: Site | str, label: str) -> Path:
        """The file of a dictionary's book."""
        return self.folder / "books" / Site.parse(site).folder / f"{label}.sqlite"

    @property
    def images(self) -> Path:
        """The folder of the images in the books."""
        return self.folder / "images"

    @property
    def explanations(self) -> Path:
        """The folder of the answers of VLMs and their evaluation."""
        return self.folder / "explanations"

    def votes(self, site: Site | str, label: str, feature: int) -> Path:
        """The file with the votes of people on the explanations of a feature."""
        return self.folder / "votes" / Site.parse(site).folder / label / f"{feature}.json"

    def scales(self, site: Site | str, label: str) -> Path:
        """The file with the units of strength of a dictionary's features."""
        return self.folder / "steering" / "scales" / Site.parse(site).folder / f"{label}.safetensors"

    def contrast(self, name: str) -> Path:
        """The file of a contrast direction."""
        return self.folder / "steering" / "contrasts" / f"{name}.safetensors"

    def contrasts(self) -> list[str]:
        """Return the names of the contrast directions."""
        files = _children(self.folder / "steering" / "contrasts")
        return [path.stem for path in files if path.suffix == ".safetensors" and _is_stored(path)]

    def steering(self, site: Site | str, label: str) -> Path:
        """The file with the results of steering with a dictionary's features."""
        return self.folder / "steering" / "judged" / Site.parse(site).folder / f"{label}.json"

    def measures(self, site: Site | str, label: str) -> Path:
        """The file with the measures of a dictionary's features."""
        return self.folder / "measures" / Site.parse(site).folder / f"{label}.json"

    @property
    def block_roles(self) -> Path:
        """The file with the roles of the model's blocks."""
        return self.folder / "block-roles.json"

    def removal(self, refs: Sequence[DictionaryRef]) -> Path:
        """The file with the results of removing concepts with the features of several dictionaries at once."""
        sites, labels = ",".join(ref.site.folder for ref in refs), [ref.label for ref in refs]
        name = labels[0] if len(set(labels)) == 1 else ",".join(labels)
        return self.folder / "steering" / "removal" / sites / f"{name}.json"

    def removals(self) -> list[Path]:
        """Return all files with results of removal."""
        sites = _children(self.folder / "steering" / "removal")
        return [path for site in sites for path in _children(site) if path.suffix == ".json"]

    def findings(self, site: Site | str) -> Path:
        """The file with the findings of steering experiments at a site."""
        return self.folder / "steering" / "findings" / f"{Site.parse(site).folder}.json"

    def addition(self, name: str) -> Path:
        """The file with what adding contrasts does to the text of the language model `name`; or with the `findings`."""
        return self.folder / "steering" / "cae" / f"{name}.json"

    def edit_bench(self, name: str) -> Path:
        """The file with the results of the editing benchmark on the items called `name`."""
        return self.folder / "steering" / "edit-bench" / f"{name}.json"

    def edit_benches(self) -> list[Path]:
        """Return all files with results of the editing benchmark."""
        return [path for path in _children(self.folder / "steering" / "edit-bench") if path.suffix == ".json"]


def _children(folder: Path) -> list[Path]:
    """Return what is in a folder, sorted; nothing if there is none. One that may not be read is an error, which glob hides."""
    with disk_errors(folder, "read"):
        return sorted(folder.iterdir()) if folder.is_dir() else []


def _is_stored(path: Path) -> bool:
    return path.suffix in (".json", ".safetensors") and not path.name.startswith(".")


def _is_file(path: Path) -> bool:
    with disk_errors(path, "read"):
        return path.is_file()


def _parse_site(folder: Path) -> Site:
    return Site.parse(folder.name.replace("+", ":"))


def _shape(ref: DictionaryRef) -> tuple[int, int, int]:
    """Return the size and the k in a label; of equal ones, the shortest label is no variant of another."""
    match = re.match(r"[^-]*-(\d+)-k(\d+)", ref.label)
    size, k = map(int, match.groups()) if match else (0, 0)
    return size, k, -len(ref.label)
