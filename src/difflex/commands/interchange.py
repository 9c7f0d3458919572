"""`difflex import` and `difflex export`: dictionaries in the file formats of other tools."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, final

from tyro.conf import FlagCreatePairsOff, Positional, arg

from difflex.commands.flags import LARGEST, SIZE, located, numbers
from difflex.commands.inputs import check_site
from difflex.dictionary_config import read_config
from difflex.errors import BadInput
from difflex.records import Site
from difflex.study import Command, DictionaryRef, Study

if TYPE_CHECKING:
    from difflex.dictionaries import Dictionary
    from difflex.records import ActivationBatch

HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)((?:/[\w.-]+)*)")
BATCH, BATCHES = 1024, 16
"""Stored activations by which features that fire, and differences, are counted."""


@final
@dataclass(frozen=True, kw_only=True)
class ImportCommand(Command):
    """Import a dictionary that another tool wrote into a study.

    It is a dictionary like any other then, whose config keeps where it came from.
    """

    path: Annotated[Positional[str], arg(metavar="PATH")]
    """The folder or file of the dictionary, or OWNER/NAME[/FOLDER] on the hub."""
    site: Annotated[str, arg(metavar="SITE")]
    """The site of its activations, which the files of other tools do not name in the words of difflex: double.18."""
    out: Annotated[Path, arg(metavar="STUDY")]
    """The study; a new one is begun."""
    model: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="(default: that of the study)")] = None
    """The model that it was trained on: an embedded model, a folder, or a name on the hub."""
    format: Annotated[str | None, arg(metavar="FORMAT", help_behavior_hint="(default: recognised)")] = None
    """saelens, sparsify, saeuron, dictionary-learning, sdxl-unbox, fae, itda-flux, itda or overcomplete."""
    label: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: the format)")] = None
    """Added to the name of the dictionary: topk-5120-k10-NAME."""
    k: Annotated[int | None, SIZE, arg(help_behavior_hint="(default: read, or counted on stored activations)")] = None
    """Features that fire for a token, where the files do not say it."""
    exclude: Annotated[tuple[int, ...], numbers(LARGEST, 0), arg(help_behavior_hint="(default: none)")] = ()
    """Features that its publisher leaves out of lists of what fires in an image."""
    revision: Annotated[str | None, arg(metavar="REVISION", help_behavior_hint="(default: the newest)")] = None
    """The revision of a repository on the hub."""
    offline: FlagCreatePairsOff[bool] = False
    """Use only the local cache of the hub."""

    def __call__(self) -> list[Path]:
        from difflex.dictionaries import CodeStatistics
        from difflex.interchange import read_code_statistics, read_dictionary

        (path, source), site, study = self._files(), Site.parse(self.site), self._study()
        width = _stored_width(study, site)
        dictionary = read_dictionary(
            path,
            site=site,
            model=study.model,
            revision=study.revision,
            format=self.format,
            k=self.k,
            label=self.label,
            activations=None if width is None else lambda: _stored(study, site, "train"),
            source=source,
            exclude=self.exclude,
            keep_halves=True,
        )
        statistics = read_code_statistics(path, dictionary.size, self.format)
        if width not in (None, dictionary.width):
            raise BadInput(f"{path} is of width {dictionary.width}; the activations of {site} in {study.folder} have {width}.")
        if width is None:
            check_site(study.model, study.revision, site, dictionary.width)
        folder, imported = study.dictionary(site, dictionary.label), dictionary.origin.training["imported"]
        if (folder / "config.json").is_file():
            before = read_config(folder).training.get("imported")
            if not isinstance(before, dict) or not isinstance(imported, dict) or before["sha256"] != imported["sha256"]:
                raise BadInput(f"{study.folder} has another dictionary {dictionary.name}. Name this one with --label.")
            if before.get("excluded") != imported.get("excluded"):
                raise BadInput(f"{dictionary.name} was imported with another --exclude. Name this one with --label.")
            print(f"{dictionary.name}: up to date")
        else:
            study.write()
            dictionary.save(folder)
            features = f"{dictionary.size:,} features of width {dictionary.width}"
            print(f"{dictionary.name}: {features}, imported {read_config(folder).imported}")
            if self.exclude:
                print(f"{len({*self.exclude})} features are left out of lists of what fires in an image.")
            print(f"\ndifflex evaluate {shlex.quote(str(self.out))} --dictionary {dictionary.name}")
        if statistics is not None and CodeStatistics.load(folder) is None:
            statistics.save(folder)
        return [folder]

    def _files(self) -> tuple[Path, str]:
        """Return the files on this machine and where they are from; those of a repository are downloaded."""
        match = HUB_NAME.fullmatch(self.path)
        if Path(self.path).exists() or match is None:
            return Path(self.path), self.path
        from difflex.hub import snapshot

        inner = match[2].strip("/")
        folder = snapshot(match[1], self.revision, self.offline, [f"{inner}/*"] if inner else ())
        return folder / inner, f"{self.path} at {folder.name}"

    def _study(self) -> Study:
        """Return the study, which is written only when the dictionary was read."""
        if (self.out / "study.json").is_file():
            study = Study.open(self.out)
            return study if self.model is None else Study.open_or_plan(self.out, located(self.model), study.revision)
        if self.model is None:
            raise BadInput(f"{self.out} is no study yet. Name the model of the dictionary with --model.")
        return Study.open_or_plan(self.out, located(self.model))


@final
@dataclass(frozen=True, kw_only=True)
class ExportCommand(Command):
    """Write a dictionary of a study for another tool; what its format cannot express is refused with the reason."""

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A study with dictionaries."""
    dictionary: Annotated[Positional[str], arg(metavar="DICTIONARY")]
    """SITE/LABEL, or the site alone if it has one dictionary."""
    to: Annotated[str, arg(metavar="FORMAT")]
    """saelens, sparsify, saeuron, dictionary-learning, sdxl-unbox, itda-flux, itda or overcomplete."""
    out: Annotated[Path, arg(metavar="FOLDER")]
    """A new folder for the files."""
    approximate: FlagCreatePairsOff[bool] = False
    """Leave out what the format cannot express, and measure the difference on held-out activations of the study."""

    def __call__(self) -> list[Path]:
        from difflex.dictionaries import Dictionary
        from difflex.interchange import write_dictionary

        study = Study.open(self.study)
        ref = study.find_dictionary(self.dictionary)
        dictionary = Dictionary.load(study.dictionary(*ref))
        result = write_dictionary(dictionary, self.to, self.out, approximate=self.approximate)
        print(f"{ref}: written to {', '.join(map(str, result.files))}")
        if ref.site.smooth:
            print("Its site is smooth: image tokens are averaged before they are encoded, which no file says. Average them too.")
        if result.approximations:
            print(
                "\n".join(
                    ["It is an approximation:", *result.approximations, _difference(study, ref, dictionary, result.written)]
                )
            )
        return []


def _stored_width(study: Study, site: Site) -> int | None:
    """Return the width of the stored activations of a site; None if there are none."""
    from difflex.store import Store

    folder = study.stores().get(site)
    return None if folder is None else Store.open(folder).width


def _stored(study: Study, site: Site, split: str) -> "Iterator[ActivationBatch]":
    """Return some batches of the stored activations of a site."""
    from difflex.store import Store

    return islice(Store.open(study.stores()[site]).batches(BATCH, split=split), BATCHES)  # pyright: ignore[reportArgumentType]


def _difference(study: Study, ref: DictionaryRef, dictionary: "Dictionary", written: "Dictionary") -> str:
    """Return by how much the reconstructions of what was written differ, measured on held-out activations."""
    from difflex.interchange import compare_reconstructions

    if ref.site not in study.stores():
        return f"The difference is unknown: {study.folder} has no activations of {ref.site}. Harvest some to measure it."
    measured = compare_reconstructions(dictionary, written, _stored(study, ref.site, "held-out"))
    return (
        f"On {measured.tokens:,} held-out tokens the reconstruction leaves {measured.fvu_after:.4f} of the variance instead of "
        f"{measured.fvu_before:.4f}; the two reconstructions differ by {measured.difference:.2g} of it."
    )
