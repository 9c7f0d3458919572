"""Parts of an image as tokens of a grid."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from difflex.errors import BadInput
from difflex.records import Rectangle

__all__ = ["covered", "rectangle"]

Grid = tuple[int, int]


def rectangle(numbers: Sequence[float], pixels: tuple[int, int] | None = None) -> Rectangle:
    """Left, top, right, bottom as a part of the image: as fractions, or in pixels where one of them is above 1."""
    said = ",".join(f"{number:g}" for number in numbers)
    if len(numbers) != 4 or not all(map(math.isfinite, numbers)):
        raise BadInput(f"The region {said} is not LEFT,TOP,RIGHT,BOTTOM. Write four numbers: 0.5,0,1,1 is the right half.")
    left, top, right, bottom = numbers
    if max(numbers) > 1:
        if pixels is None:
            raise BadInput(f"The region {said} is in pixels, and the size of the image is not known. Write fractions.")
        height, width = pixels
        left, top, right, bottom = left / width, top / height, right / width, bottom / height
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        size = f" of {pixels[1]} x {pixels[0]} pixels" if pixels else ""
        raise BadInput(f"The region {said} is empty or outside the image{size}. LEFT is below RIGHT, TOP below BOTTOM.")
    return Rectangle(left, top, right, bottom)


def covered(region: Rectangle | str, grid: Grid) -> Bool[Tensor, " token"]:
    """The tokens of which the region covers half or more; if it is too small for that, those it covers most."""
    shares = _shares(region, grid) if isinstance(region, Rectangle) else _painted(Path(region), grid)
    shares = shares.flatten()
    if not shares.any():
        raise BadInput(f"The region {region} covers no token: no part of it is light. Paint white what is meant.")
    return shares >= min(0.5, float(shares.max()))


def _shares(region: Rectangle, grid: Grid) -> Float[Tensor, "row column"]:
    def along(start: float, end: float, count: int) -> Tensor:
        edges = torch.arange(count + 1, dtype=torch.float64) / count
        return (edges[1:].clamp(max=end) - edges[:-1].clamp(min=start)).clamp(min=0) * count

    rows, columns = grid
    return torch.outer(along(region.top, region.bottom, rows), along(region.left, region.right, columns)).float()


def _painted(path: Path, grid: Grid) -> Float[Tensor, "row column"]:
    """How much of each token is light in the image at `path`."""
    try:
        with Image.open(path) as file:
            grey = file.convert("L")
    except (OSError, UnidentifiedImageError) as error:
        raise BadInput(f"The region {path} cannot be read as an image ({error}). Name a PNG: white is inside.") from error
    light = torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).view(grey.height, grey.width) >= 128
    return F.adaptive_avg_pool2d(light.float()[None], grid)[0]
