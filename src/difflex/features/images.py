"""Images of a study's books: the album of image files, overlays that show where a feature fires, and sheets of examples."""

from __future__ import annotations

import hashlib
import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, final, get_args

from PIL import Image, ImageDraw, ImageFont

from difflex.choices import HighlightStyle
from difflex.errors import BadInput, BrokenFile, UnknownName
from difflex.features.book import Book
from difflex.features.entries import COVER_THRESHOLD, Example, ExampleKind, FeatureStats, TokenMap
from difflex.files import disk_errors, write_file
from difflex.images import open_image

LOSSLESS_PIXELS = 128 * 128
"""Images of up to this many pixels are stored without loss."""
QUALITY = 92
REPAIR = "Run difflex collect: it makes the image again."

BLUE, MAX_OPACITY = (8, 48, 160), 0.75
"""Colour of the overlay, and its opacity at the feature's peak."""

BACKGROUND, INK, FAINT, BAR = "white", "#222222", "#777777", "#0830a0"
GAP, LINE, LETTERS = 8, 17, 13
LEFT = 150
"""Width of the row labels."""
PLOT = (240, 64)
NEIGHBOURS = 5
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
ROW_LABELS: dict[ExampleKind, tuple[str, str]] = {
    "top": ("strongest", "shots"),
    "quantile": ("random, where it", "fires"),
    "silent": ("random, where it", "is silent"),
}


class StoredImage(NamedTuple):
    """An image in an album."""

    file: str
    width: int
    height: int


@final
class ImageAlbum:
    """A folder of WebP files named by their checksums, shared by all books of a study."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def add(self, image: Image.Image) -> tuple[StoredImage, bool]:
        """Store `image` unless it is in the album, and return its file and whether it is new; a damaged file is written again."""
        image, buffer = image.convert("RGB"), io.BytesIO()
        is_small = image.width * image.height <= LOSSLESS_PIXELS
        image.save(buffer, "WEBP", lossless=is_small, quality=20 if is_small else QUALITY, method=1 if is_small else 4)
        stored = StoredImage(_file_name(buffer.getvalue()), image.width, image.height)
        path = self.folder / stored.file
        is_new = not path.exists()
        if self.damage(stored.file) is not None:
            write_file(path, buffer.getvalue())
        return stored, is_new

    def damage(self, file: str) -> str | None:
        """Return a sentence about a file that is missing or damaged; None for one that is whole."""
        try:
            self.read(file)
        except BrokenFile as error:
            return str(error)
        return None

    def read(self, file: str) -> bytes:
        """Return the content of a file, which is compared with its checksum."""
        path = self.folder / file
        if not re.fullmatch(r"[0-9a-f]{32}\.webp", file):
            raise BrokenFile(f"'{file}' is not the name of an image in {self.folder}. {REPAIR}")
        try:
            with disk_errors(path, "read"):
                content = path.read_bytes()
        except FileNotFoundError as error:
            raise BrokenFile(f"The image {path} is missing. {REPAIR}") from error
        if _file_name(content) != file:
            raise BrokenFile(f"The image {path} does not match its name, which is its checksum: it is damaged. {REPAIR}")
        return content

    def open(self, file: str) -> Image.Image:
        """Return the image in this file."""
        if (sentence := self.damage(file)) is not None:
            raise BrokenFile(sentence)
        return open_image(self.folder / file, "RGB")


def _file_name(content: bytes) -> str:
    return f"{hashlib.sha256(content).hexdigest()[:32]}.webp"


def overlaid(
    image: Image.Image,
    where: TokenMap,
    grid: tuple[int, int] | None,
    peak: float,
    *,
    style: HighlightStyle = "blue",
    side: int = 0,
) -> Image.Image:
    """Return `image`, enlarged by a whole factor to at least `side` pixels, with the tokens marked at which a feature fires.

    `blue`: opacity grows with the square root of the share of `peak`, the feature's largest value anywhere, so that examples of a
    feature are comparable. `outline`: a black and white line around the covered tokens, visible on blue images and without
    colour vision. `plain`: the image alone, also used for text tokens.
    """
    if style not in (styles := get_args(HighlightStyle)):
        raise UnknownName.among("The style", style, styles)
    image = enlarged(image.convert("RGB"), side)
    if style == "plain" or grid is None or not where.tokens:
        return image
    if max(where.tokens) >= grid[0] * grid[1]:
        raise BadInput(f"Token {max(where.tokens)} is not on a grid of {grid[0]} x {grid[1]}. Pass the grid of the map.")
    return _tinted(image, where, grid, peak) if style == "blue" else _outlined(image, where, grid, peak)


def enlarged(image: Image.Image, side: int) -> Image.Image:
    """Enlarge `image` by a whole factor, without smoothing, until its longer side has at least `side` pixels."""
    factor = max(1, -(-side // max(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _tinted(image: Image.Image, where: TokenMap, grid: tuple[int, int], peak: float) -> Image.Image:
    rows, columns = grid
    opacity = bytearray(rows * columns)
    for token, value in zip(*where, strict=True):
        opacity[token] = round(255 * MAX_OPACITY * min(1.0, value / peak) ** 0.5)
    mask = Image.frombytes("L", (columns, rows), bytes(opacity)).resize(image.size, Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", image.size, BLUE), image, mask)


def _outlined(image: Image.Image, where: TokenMap, grid: tuple[int, int], peak: float) -> Image.Image:
    rows, columns = grid
    covered = {divmod(token, columns) for token, value in zip(*where, strict=True) if value >= COVER_THRESHOLD * peak}
    outlined, thickness = image.copy(), max(1, max(image.size) // 160)
    pen = ImageDraw.Draw(outlined)
    lines = [line for row, column in covered for line in _outer_sides(row, column, covered)]
    for colour, width in (("black", 3 * thickness), ("white", thickness)):
        for (top, left), (bottom, right) in lines:
            y, x = top * image.height // rows, left * image.width // columns
            end = right * image.width // columns, bottom * image.height // rows
            box = (x - width // 2, y - width // 2, end[0] + (width - 1) // 2, end[1] + (width - 1) // 2)
            pen.rectangle(box, fill=colour)
    return outlined


def _outer_sides(row: int, column: int, covered: set[tuple[int, int]]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return the sides of a cell that border on uncovered cells, each from corner to corner."""
    below, right = (row + 1, column), (row, column + 1)
    sides = {
        (row - 1, column): ((row, column), right),
        below: (below, (row + 1, column + 1)),
        (row, column - 1): ((row, column), below),
        right: (right, (row + 1, column + 1)),
    }
    return [side for neighbour, side in sides.items() if neighbour not in covered]


class _SheetTile(NamedTuple):
    """An image with a caption below it."""

    image: Image.Image
    caption: str


class _SheetRow(NamedTuple):
    label: Sequence[str]
    """Lines of text to the left."""
    tiles: Sequence[_SheetTile]


def sheet(
    book: Book,
    album: ImageAlbum,
    feature: int,
    *,
    style: HighlightStyle = "blue",
    columns: int = 8,
    side: int = 128,
    concept: str = "",
) -> Image.Image:
    """Draw one feature: statistics, explanations, and its top, random and silent examples of both splits.

    For an ITDA atom, also its image patch. `concept` is the known concept that it detects. The caption of an image is the
    example's peak as a share of the feature's, and the timestep.
    """
    row, rows = book.feature(feature), []
    if patch := book.patch(feature):
        prompt = patch.shot.prompt
        label = ["the patch that", "the atom is", prompt if len(prompt) < 22 else prompt[:20] + "…"]
        tiles = []
        if patch.image is not None:
            image, place = _resized(album.open(patch.image.file), side), TokenMap((patch.token,), (1.0,))
            tiles.append(_SheetTile(overlaid(image, place, book.about.grid, 1.0, style="outline"), f"token {patch.token}"))
        rows.append(_SheetRow(label, tiles))
    for kind, label in ROW_LABELS.items():
        for split in ("train", "held-out"):
            if examples := book.examples(feature, kind, split)[:columns]:
                rows.append(_SheetRow([*label, split], _example_tiles(book, album, examples, row.peak, style, side)))
    return _assembled([*_statistics(book, row), *_descriptions(book, feature, concept)], row, rows, columns, side)


def overview(
    book: Book,
    album: ImageAlbum,
    features: Sequence[int],
    *,
    style: HighlightStyle = "blue",
    columns: int = 8,
    side: int = 96,
    labels: Mapping[int, str] | None = None,
) -> Image.Image:
    """Draw a row of top examples of both splits for each of several features, with their `labels`."""
    if not features:
        raise BadInput("An overview needs at least one feature; none were given.")
    rows = []
    for feature in features:
        examples = sorted(book.examples(feature, "top"), key=lambda example: -example.peak)[:columns]
        row = book.feature(feature)
        label = [f"feature {feature}", *_wrapped((labels or {}).get(feature, ""), 22)[:3], f"at {row.density:.2%} of tokens"]
        rows.append(_SheetRow(label, _example_tiles(book, album, examples, row.peak, style, side)))
    return _assembled([book.about.dictionary], None, rows, columns, side)


def _example_tiles(
    book: Book, album: ImageAlbum, examples: Sequence[Example], peak: float, style: HighlightStyle, side: int
) -> list[_SheetTile]:
    """Draw examples of a feature with their overlays; `peak` is that of the feature."""
    shots, tiles = book.shots(example.shot for example in examples), []
    for example in examples:
        row = shots[example.shot]
        image = _resized(album.open(row.image.file), side)
        caption = f"{example.peak / peak:.2f}" if peak and example.peak else "silent"
        caption += "" if row.shot.timestep is None else f"  t {row.shot.timestep:.0f}"
        tiles.append(_SheetTile(overlaid(image, example.map, book.about.grid, peak or 1.0, style=style), caption))
    return tiles


def _resized(image: Image.Image, side: int) -> Image.Image:
    if max(image.size) <= side:
        return enlarged(image, side)
    image = image.reduce(max(1, max(image.size) // side))  # by a whole factor first: ten times faster
    image.thumbnail((side, side))
    return image


def _statistics(book: Book, row: FeatureStats) -> list[str]:
    """Return the lines of statistics at the top of a sheet."""
    facts = [
        f"at {row.density:.3%} of tokens, in {row.shots:,} shots",
        f"peak {row.peak:.4g}, mean {row.mean:.4g}",
        *([] if row.strength is None else [f"default strength {row.strength:.3g} peaks"]),
        *([f"negative at {row.negative_share:.3%}"] if row.negative_share else []),
    ]
    spatial = {"area": row.area, "spread": row.spread, "concentration": row.concentration, "border": row.border}
    spatial |= {"position": row.position, "coverage of top images": row.coverage}
    numbers = ", ".join(f"{name} {value:.2f}" for name, value in spatial.items() if value is not None)
    return [f"{book.about.dictionary}: feature {row.feature}", ", ".join(facts), numbers]


def _descriptions(book: Book, feature: int, concept: str) -> list[str]:
    """Return lines about the meaning of a feature: its concept, neighbours and explanations."""
    lines = [f"detects {concept}"] if concept else []
    neighbours = book.neighbours(feature)
    for kind, phrase in (("firing", "fires together with"), ("direction", "has a direction close to")):
        if names := [f"{entry.feature} ({entry.value:.2f})" for entry in neighbours if entry.kind == kind][:NEIGHBOURS]:
            lines.append(f"{phrase} {', '.join(names)}")
    return lines + [entry.text for entry in book.explanations(feature) if entry.state == "done" and entry.text]


def _assembled(texts: Sequence[str], row: FeatureStats | None, rows: Sequence[_SheetRow], columns: int, side: int) -> Image.Image:
    """Draw the texts, the plots of `row` and the rows of images on one image."""
    font, small = ImageFont.load_default(LETTERS), ImageFont.load_default(LETTERS - 2)
    lines = [line for text in texts for line in _wrapped(text, 110)[:3]]
    sizes = [tile.image.size for _, tiles in rows for tile in tiles] or [(side, side)]
    tile_width, tile_height = map(max, zip(*sizes, strict=True))
    plots = PLOT[1] + LINE + GAP if row is not None and row.histogram.counts else 0
    top = GAP + len(lines) * LINE + GAP + plots
    width = max(LEFT + columns * (tile_width + GAP) + GAP, LEFT + 2 * PLOT[0] + 4 * GAP)
    canvas = Image.new("RGB", (width, top + len(rows) * (tile_height + LINE + GAP) + GAP), BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        pen.text((GAP, GAP + number * LINE), line, INK, font)
    if row is not None and plots:
        _draw_plots(pen, row, (LEFT, top - plots), small)
    for number, (label, tiles) in enumerate(rows):
        y = top + number * (tile_height + LINE + GAP)
        for place, line in enumerate(label):
            pen.text((GAP, y + place * LINE), line, INK, font)
        for place, tile in enumerate(tiles):
            x = LEFT + place * (tile_width + GAP)
            canvas.paste(tile.image, (x, y))
            pen.text((x, y + tile_height + 1), tile.caption, FAINT, small)
    return canvas


def _draw_plots(pen: ImageDraw.ImageDraw, row: FeatureStats, corner: tuple[int, int], font: Font) -> None:
    """Draw the histogram of values and, to its right, the density at each timestep."""
    (x, y), (width, height), edges = corner, PLOT, row.histogram.edges
    caption = f"values where it fires, {edges[0]:.2g} to {edges[-1]:.2g}, by quarters of octaves"
    plots: list[tuple[Sequence[float], str]] = [(row.histogram.counts, caption)]
    if len(row.activity) > 1:
        plots.append((row.activity, f"density by timestep, at most {max(row.activity):.2%}"))
    for values, caption in plots:
        step, highest = width / len(values), max(values) or 1
        for number, value in enumerate(values):
            left, right = x + number * step, x + max(number * step + 1, (number + 1) * step - 1)
            if value:
                pen.rectangle((left, y + height - height * value / highest, right, y + height), fill=BAR)
        pen.line((x, y + height, x + width, y + height), fill=INK)
        pen.text((x, y + height + 2), caption, FAINT, font)
        x += width + 8 * GAP


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), width, break_long_words=False, break_on_hyphens=False)
