"""`difflex verify`: whether what is stored is what was written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, final

from tyro.conf import Positional, arg

from difflex.errors import BrokenFile, DifflexError, UnknownName
from difflex.store import Store
from difflex.study import Command, Study

__all__ = ["VerifyCommand"]


@final
@dataclass(frozen=True, kw_only=True)
class VerifyCommand(Command):
    """Read all stored activations of a study and compare every file with its checksum."""

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """The folder of the study."""

    def __call__(self) -> None:
        stores = Study.open(self.study).stores()
        if not stores:
            raise UnknownName(f"{self.study} has no activations yet. difflex harvest stores some.")
        broken: list[DifflexError] = []
        for site, folder in stores.items():
            try:
                store = Store.open(folder)
                files = store.verify()
                unfinished = "" if store.complete else "; its harvest is not finished"
                print(f"{site}: {files} files, all as they were written{unfinished}")
            except DifflexError as error:
                print(f"{site}: broken")
                broken.append(error)
        if broken:
            raise BrokenFile("\n".join(map(str, broken)))
