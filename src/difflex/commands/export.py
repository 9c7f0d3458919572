"""`difflex export-html`: what the browser shows of a study, as files for any static web host."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, final

from tyro.conf import Positional, arg

from difflex.commands.flags import SIZE
from difflex.errors import BadInput, MissingExtra
from difflex.study import Command, Study

__all__ = ["ExportHtmlCommand"]


@final
@dataclass(frozen=True, kw_only=True)
class ExportHtmlCommand(Command):
    """Write walls, feature pages, images and the search of a study as files, for any static web host.

    They are the pages of difflex serve, without what needs a server: painting, generated images, votes.
    """

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A study with books (difflex collect); a file of difflex pack."""
    out: Annotated[Path, arg(metavar="FOLDER")]
    """The folder to write; an older export there is replaced."""
    features: Annotated[int, SIZE] = 4096
    """Features of each dictionary; of a larger one the best by average precision, explanation score and density."""
    dictionary: Annotated[tuple[str, ...], arg(metavar="SITE/LABEL...", help_behavior_hint="(default: all with a book)")] = ()
    """The dictionaries to export."""

    def __call__(self) -> None:
        study = Study.open(self.study)
        try:
            from difflex.web import export_html
        except ModuleNotFoundError as error:
            raise MissingExtra.of(error.name or "fastapi", "web", "difflex export-html") from error
        refs = [ref for ref in study.select_dictionaries((), self.dictionary) if self.dictionary or study.book(*ref).is_file()]
        if not refs:
            raise BadInput(f"No dictionary of {study.folder} has a book to export: run difflex collect {study.folder}.")
        summary = export_html(study, self.out, refs, self.features)
        for entry in summary.dictionaries:
            chosen = "all" if len(entry.features) == entry.size else f"the best {len(entry.features):,} of"
            print(f"{entry.ref}: {chosen} {entry.size:,} features")
        if summary.missing:
            print(f"{summary.missing} images are missing or damaged and are left out: run difflex collect again.")
        print(
            f"{self.out}: {summary.images:,} images, {summary.size / 1e6:,.1f} MB. Put the folder on a web host, or look at it "
            "here:\n\n"
            f"python -m http.server --directory {shlex.quote(str(self.out))}"
        )
