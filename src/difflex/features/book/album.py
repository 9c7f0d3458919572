"""The images of a study, each once, for all of its books: WebP files named by their content."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple, final

from PIL import Image, UnidentifiedImageError

from difflex.errors import BrokenFile, OutOfSpace, UnknownName
from difflex.files import replacing

__all__ = ["ImageAlbum", "StoredImage"]

EXACT = 128 * 128
"""Images of up to this many pixels are kept exactly; in larger ones no eye sees the loss."""
QUALITY = 92


class StoredImage(NamedTuple):
    """An image in an album."""

    file: str
    width: int
    height: int


@final
class ImageAlbum:
    """A folder of images."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def name(self, image: Image.Image) -> str:
        """The name of the file that `image` has, or would have."""
        content = f"{image.mode} {image.width} {image.height} ".encode() + image.tobytes()
        return f"{hashlib.sha256(content).hexdigest()[:24]}.webp"

    def file(self, image: Image.Image) -> tuple[StoredImage, bool]:
        """Where `image` is from now on, and whether it is new there."""
        image = image.convert("RGB")
        filed = StoredImage(self.name(image), image.width, image.height)
        path = self.folder / filed.file
        if path.exists():
            return filed, False
        exact = image.width * image.height <= EXACT
        try:
            with replacing(path) as temporary:
                image.save(temporary, "WEBP", lossless=exact, quality=20 if exact else QUALITY, method=1 if exact else 4)
        except OSError as error:
            raise OutOfSpace(f"{path} cannot be written ({error}). Free some space and give the command again.") from error
        return filed, True

    def open(self, file: str) -> Image.Image:
        """The image in this file."""
        try:
            with Image.open(self.folder / file) as image:
                return image.convert("RGB")
        except FileNotFoundError as error:
            raise UnknownName(
                f"The image {self.folder / file} is missing. Copy the study's images, or delete the book and collect again."
            ) from error
        except (OSError, UnidentifiedImageError) as error:
            raise BrokenFile(
                f"The image {self.folder / file} is damaged ({error}). Delete it and the book, and collect it again."
            ) from error

    def remove(self, file: str) -> None:
        """Nothing; the image is gone."""
        (self.folder / file).unlink(missing_ok=True)
