"""`difflex show`: one feature's sheet as an image."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, final

from tyro.conf import Positional, arg

from difflex.commands.books import opened_book
from difflex.commands.features import detected
from difflex.commands.generate import FORMATS, write_image
from difflex.errors import BadInput
from difflex.features import ImageAlbum, sheet
from difflex.study import Command, Study

__all__ = ["ShowCommand"]


@final
@dataclass(frozen=True, kw_only=True)
class ShowCommand(Command):
    """Draw one feature's sheet: figures, strongest and random images with where it fires, images where it is silent."""

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A study with books."""
    dictionary: Annotated[Positional[str], arg(metavar="NAME")]
    """Whose feature: SITE/LABEL, or the site alone where it has one dictionary."""
    feature: Annotated[Positional[int], arg(metavar="FEATURE")]
    """Its number."""
    style: Literal["blue", "outline", "plain"] = "blue"
    """blue: the more opaque the stronger; outline: a black and white line, for blue images and eyes that see no blue."""
    columns: Annotated[int, arg(metavar="N")] = 8
    """Images of each kind."""
    side: Annotated[int, arg(metavar="PIXELS")] = 128
    """About how large an image is drawn."""
    out: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: feature-FEATURE.png)")] = None
    """Where the sheet goes."""

    def __call__(self) -> None:
        if self.columns < 1 or self.side < 1:
            raise BadInput(f"--columns {self.columns} --side {self.side} shows nothing. Ask for 1 or more.")
        out = self.out or Path(f"feature-{self.feature}.png")
        if out.suffix.lower() not in FORMATS:
            raise BadInput(f"--out {out} does not name an image file. End it with one of: {' '.join(FORMATS)}")
        study = Study.open(self.study)
        place = study.find_dictionary(self.dictionary)
        found = detected(study, place).get(self.feature)
        concept = "" if found is None else f"{found.concept} (AP {found.ap:.2f})"
        with opened_book(study, place) as book:
            drawn = sheet(
                book,
                ImageAlbum(study.images),
                self.feature,
                style=self.style,
                columns=self.columns,
                side=self.side,
                concept=concept,
            )
        write_image(drawn, out)
        print(out)
