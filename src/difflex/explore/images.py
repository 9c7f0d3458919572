"""`Images`: generated images as a list that shows itself, beside the same images without their edits, or under other edits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import final

from PIL import Image

from difflex.explore.display import Tile, caption, figure, gallery, scrolled
from difflex.images import check_image_path, contact_sheet, write_image
from difflex.pipeline import GeneratedImage

__all__ = ["ComparedImages", "Images", "Pictures"]

SHOWN = 8
"""Rows of images that are shown."""
SMALL, LARGE = 128, 320
"""The sides that images are enlarged to at least, and reduced to at most, on a sheet."""


@final
class Images(list[GeneratedImage]):
    """Images with their shots; an item is a `GeneratedImage`, with `image` and `shot`.

    If they were generated under edits, the images of the same seeds without edits are generated when they are first needed.
    """

    def __init__(
        self, images: Iterable[GeneratedImage], edits: str = "", generate_unedited: Callable[[], Images] | None = None
    ) -> None:
        """Hold `images`, made under `edits` (in words)."""
        super().__init__(images)
        self.edits = edits
        """The edits in words; empty if there are none."""
        self._generate_unedited = generate_unedited

    @cached_property
    def unedited(self) -> Images:
        """The images of the same prompts and seeds without edits."""
        return self if self._generate_unedited is None else self._generate_unedited()

    def grid(self, unedited: bool = True) -> Image.Image:
        """Draw all images as one, a row each; edited ones beside the unedited ones, unless `unedited` is False."""
        return self._sheet(len(self), unedited)

    def save(self, path: Path | str, unedited: bool = True) -> Path:
        """Write the grid to an image file and return its path: .png, .webp or .jpg."""
        path = Path(path)
        check_image_path(path)
        write_image(self.grid(unedited), path)
        return path

    def _sheet(self, rows: int, unedited: bool) -> Image.Image:
        if unedited and self.edits:
            return _sheet([self.unedited, self], ["unedited", self.edits], rows)
        return _sheet([self], [self.edits], rows)

    def __repr__(self) -> str:
        if not self:
            return "no images"
        height, width = self[0].shot.pixels
        edits = f", {self.edits}" if self.edits else ""
        count = "1 image" if len(self) == 1 else f"{len(self)} images"
        return f"<{count} of {height} x {width} pixels by {self[0].shot.model}{edits}>"

    def _repr_html_(self) -> str:
        if not self:
            return caption("no images")
        rest = caption(f"{len(self) - SHOWN} more images are not shown.") if len(self) > SHOWN else ""
        return scrolled(figure(self._sheet(min(len(self), SHOWN), True))) + rest


@final
class ComparedImages(list[Images]):
    """Images of the same prompts and seeds, each under other edits; they show themselves side by side."""

    def __init__(self, columns: Iterable[Images], titles: Sequence[str] = ()) -> None:
        """Hold a column of images for each of several edits, under its title; by default the edits in words."""
        super().__init__(columns)
        self.titles = list(titles) or [images.edits for images in self]

    def grid(self) -> Image.Image:
        """Draw all images as one: a row for each prompt, the unedited image first, then a column for each of the edits."""
        return _sheet([self[0].unedited, *self], ["unedited", *self.titles], len(self[0]))

    def save(self, path: Path | str) -> Path:
        """Write the grid to an image file and return its path: .png, .webp or .jpg."""
        path = Path(path)
        check_image_path(path)
        write_image(self.grid(), path)
        return path

    def __repr__(self) -> str:
        return f"<images under other edits: {'; '.join(self.titles)}>"

    def _repr_html_(self) -> str:
        return scrolled(figure(self.grid())) if self else caption("no images")


@final
class Pictures(list[Image.Image]):
    """Images without captions that show themselves side by side."""

    def __repr__(self) -> str:
        return f"<{len(self)} images>"

    def _repr_html_(self) -> str:
        return gallery(map(Tile, self))


def _sheet(columns: Sequence[Sequence[GeneratedImage]], titles: Sequence[str], rows: int) -> Image.Image:
    return contact_sheet(
        [[_fitted(column[row].image) for column in columns] for row in range(rows)],
        row_labels=[f"{image.shot.prompt or '(empty prompt)'}, seed {image.shot.seed}" for image in columns[0][:rows]],
        column_labels=titles,
        side=SMALL,
    )


def _fitted(image: Image.Image) -> Image.Image:
    if max(image.size) <= LARGE:
        return image
    image = image.copy()
    image.thumbnail((LARGE, LARGE))
    return image
