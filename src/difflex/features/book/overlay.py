"""Where a feature fires, drawn over an image: one rendering for every kind of dictionary, in units of the feature's own peak."""

from __future__ import annotations

from typing import Literal, get_args

from PIL import Image, ImageDraw

from difflex.errors import BadInput, UnknownName
from difflex.features.book.entries import SHOWN, TokenMap

__all__ = ["STYLES", "Style", "enlarged", "overlaid"]

Style = Literal["blue", "outline", "plain"]
STYLES: tuple[Style, ...] = get_args(Style)
BLUE, STRONGEST = (8, 48, 160), 0.75
"""The colour, and how much of it hides the image where the feature is at its peak."""


def overlaid(
    image: Image.Image,
    where: TokenMap,
    grid: tuple[int, int] | None,
    peak: float,
    *,
    style: Style = "blue",
    side: int = 0,
) -> Image.Image:
    """`image` with the tokens at which a feature fires marked, enlarged by a whole factor to at least `side`.

    `blue`: the more opaque the stronger, by the root of the share of `peak`, the feature's largest value anywhere; two examples
    of a feature can be compared. `outline`: a black and white line around what the feature covers, which is seen on blue images
    and by eyes that see no blue. `plain`: the image alone, as for tokens that have no place.
    """
    if style not in STYLES:
        raise UnknownName.among("The style", style, STYLES)
    image = enlarged(image.convert("RGB"), side)
    if style == "plain" or grid is None or not where.tokens:
        return image
    if max(where.tokens) >= grid[0] * grid[1]:
        raise BadInput(f"Token {max(where.tokens)} is not on a grid of {grid[0]} x {grid[1]}. Give the grid that the map is of.")
    return _blue(image, where, grid, peak) if style == "blue" else _outlined(image, where, grid, peak)


def enlarged(image: Image.Image, side: int) -> Image.Image:
    """`image`, its longer side at least `side`, each pixel a square."""
    factor = max(1, -(-side // max(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _blue(image: Image.Image, where: TokenMap, grid: tuple[int, int], peak: float) -> Image.Image:
    rows, columns = grid
    opacity = bytearray(rows * columns)
    for token, value in zip(*where, strict=True):
        opacity[token] = round(255 * STRONGEST * min(1.0, value / peak) ** 0.5)
    mask = Image.frombytes("L", (columns, rows), bytes(opacity)).resize(image.size, Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", image.size, BLUE), image, mask)


def _outlined(image: Image.Image, where: TokenMap, grid: tuple[int, int], peak: float) -> Image.Image:
    rows, columns = grid
    covered = {divmod(token, columns) for token, value in zip(*where, strict=True) if value >= SHOWN * peak}
    made, thick = image.copy(), max(1, max(image.size) // 160)
    pen = ImageDraw.Draw(made)
    lines = [line for row, column in covered for line in _sides(row, column, covered)]
    for colour, wide in (("black", 3 * thick), ("white", thick)):
        for (top, left), (bottom, right) in lines:
            y, x = top * image.height // rows, left * image.width // columns
            end = right * image.width // columns, bottom * image.height // rows
            box = (x - wide // 2, y - wide // 2, end[0] + (wide - 1) // 2, end[1] + (wide - 1) // 2)
            pen.rectangle(box, fill=colour)
    return made


def _sides(row: int, column: int, covered: set[tuple[int, int]]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """The sides of a cell beyond which nothing is covered, each from corner to corner."""
    below, right = (row + 1, column), (row, column + 1)
    sides = {
        (row - 1, column): ((row, column), right),
        below: (below, (row + 1, column + 1)),
        (row, column - 1): ((row, column), below),
        right: (right, (row + 1, column + 1)),
    }
    return [side for beyond, side in sides.items() if beyond not in covered]
