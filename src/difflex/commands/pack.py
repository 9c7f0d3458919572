"""`difflex pack`: write a study without its activations to one zip file, to share it."""

import os
import shlex
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, final

from tyro.conf import Positional, arg

from difflex.errors import BadInput, DifflexError
from difflex.files import disk_errors, replacing
from difflex.study import Command, Study

LEFT_OUT = ("activations", "old-", "growing-")
"""What the names of folders begin with that are not packed: activations, what recipes moved away, unfinished dictionaries."""
COMPRESSED = (".webp", ".png", ".jpg")
"""Files that compress no further."""


@final
@dataclass(frozen=True, kw_only=True)
class PackCommand(Command):
    """Put a study into a zip file: dictionaries, books with their images, records and the report, without activations.

    The file is a study for all commands that need no activations: search, show, steer, erase, report, compare and others.
    """

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """The folder of the study."""
    out: Annotated[Path | None, arg(metavar="FILE.zip", help_behavior_hint="(default: STUDY.zip)")] = None
    """The file to write."""

    def __call__(self) -> list[Path]:
        study = Study.open(self.study)
        name = study.folder.resolve().name
        out = self.out or Path(f"{name}.zip")
        if out.suffix != ".zip":
            raise BadInput(f"{out} does not name a zip file. Write a name that ends in .zip.")
        _measure_scales(study)
        files = [file for file in _files(study.folder) if file.resolve() != out.resolve()]
        with replacing(out) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in files:
                kind = zipfile.ZIP_STORED if file.suffix in COMPRESSED else zipfile.ZIP_DEFLATED
                with disk_errors(file, "read"):
                    archive.write(file, Path(name) / file.relative_to(study.folder), kind)
        print(
            f"{out}: {len(files)} files, {out.stat().st_size / 1e6:.1f} MB, without activations. Commands take it for the study:"
            f"\n\ndifflex status {shlex.quote(str(out))}"
        )
        if os.path.isabs(study.model):
            print(f"Its model is the folder {study.model}, which is not in the file: steering needs it at the same place.")
        return []


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files of a study to pack, sorted."""
    with disk_errors(folder, "read"):
        for path in sorted(folder.iterdir()):
            if path.name.startswith(".") or (path.is_dir() and path.name.startswith(LEFT_OUT)):
                continue
            if path.is_dir():
                yield from _files(path)
            elif path.is_file():
                yield path


def _measure_scales(study: Study) -> None:
    """Measure what a strength of 1 is for each dictionary: without activations that is no longer possible."""
    from difflex.steering import StudyEditor

    editor, stores = StudyEditor(study), study.stores()
    for ref in study.dictionaries():
        if ref.site in stores and not study.scales(*ref).is_file():
            try:
                editor.scales(ref)
            except DifflexError as error:
                print(f"{ref} cannot be steered with after unpacking: {error}")
