"""The pictures of a study, each once, for all of its books: WebP files named by their content."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple, final

from PIL import Image, UnidentifiedImageError

from difflex.errors import BrokenFile, OutOfSpace, UnknownName

__all__ = ["ImageAlbum", "StoredImage"]

EXACT = 128 * 128
"""Pictures of up to this many pixels are kept exactly; in larger ones no eye sees the loss."""
QUALITY = 92


class StoredImage(NamedTuple):
    """A picture in an album."""

    file: str
    width: int
    height: int


@final
class ImageAlbum:
    """A folder of pictures."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def name(self, picture: Image.Image) -> str:
        """The name of the file that `picture` has, or would have."""
        content = f"{picture.mode} {picture.width} {picture.height} ".encode() + picture.tobytes()
        return f"{hashlib.sha256(content).hexdigest()[:24]}.webp"

    def file(self, picture: Image.Image) -> tuple[StoredImage, bool]:
        """Where `picture` is from now on, and whether it is new there."""
        picture = picture.convert("RGB")
        filed = StoredImage(self.name(picture), picture.width, picture.height)
        path = self.folder / filed.file
        if path.exists():
            return filed, False
        self.folder.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        exact = picture.width * picture.height <= EXACT
        try:
            picture.save(part, "WEBP", lossless=exact, quality=20 if exact else QUALITY, method=1 if exact else 4)
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise OutOfSpace(f"{path} cannot be written ({error}). Free some space and give the command again.") from error
        return filed, True

    def open(self, file: str) -> Image.Image:
        """The picture in this file."""
        try:
            with Image.open(self.folder / file) as picture:
                return picture.convert("RGB")
        except FileNotFoundError as error:
            raise UnknownName(
                f"The picture {self.folder / file} is missing. Copy the study's pictures, or delete the book and collect again."
            ) from error
        except (OSError, UnidentifiedImageError) as error:
            raise BrokenFile(
                f"The picture {self.folder / file} is damaged ({error}). Delete it and the book, and collect it again."
            ) from error

    def remove(self, file: str) -> None:
        """Nothing; the picture is gone."""
        (self.folder / file).unlink(missing_ok=True)
