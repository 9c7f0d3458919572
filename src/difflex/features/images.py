"""Images of a study's books: the album of image files, overlays that show where a feature fires, and sheets of examples."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, final, get_args

from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

from difflex.choices import HighlightStyle
from difflex.errors import BadInput, BrokenFile, OutOfSpace, UnknownName
from difflex.features.book import Book
from difflex.features.entries import COVER_THRESHOLD, Example, FeatureStats, ShotRow, TokenMap
from difflex.files import replacing

__all__ = ["ImageAlbum", "StoredImage", "enlarged", "overlaid", "overview", "sheet"]

STYLES: tuple[HighlightStyle, ...] = get_args(HighlightStyle)
LOSSLESS_PIXELS = 128 * 128
"""Images of up to this many pixels are stored without loss."""
QUALITY = 92

BLUE, MAX_OPACITY = (8, 48, 160), 0.75
"""Colour of the overlay, and its opacity at the feature's peak."""

BACKGROUND, INK, FAINT, BAR = "white", "#222222", "#777777", "#0830a0"
GAP, LINE, LETTERS = 8, 17, 13
LEFT = 150
"""Width of the row labels."""
PLOT = (240, 64)
NEIGHBOURS = 5
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
ROW_LABELS = {
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
    """A folder of WebP files named by their content, shared by all books of a study."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def add(self, image: Image.Image) -> tuple[StoredImage, bool]:
        """Store `image` unless it is in the album, and return its file and whether it is new."""
        image = image.convert("RGB")
        content = f"{image.mode} {image.width} {image.height} ".encode() + image.tobytes()
        stored = StoredImage(f"{hashlib.sha256(content).hexdigest()[:24]}.webp", image.width, image.height)
        path = self.folder / stored.file
        if path.exists():
            return stored, False
        lossless = image.width * image.height <= LOSSLESS_PIXELS
        try:
            with replacing(path) as temporary:
                image.save(temporary, "WEBP", lossless=lossless, quality=20 if lossless else QUALITY, method=1 if lossless else 4)
        except OSError as error:
            raise OutOfSpace(f"{path} cannot be written ({error}). Free some space and run the command again.") from error
        return stored, True

    def open(self, file: str) -> Image.Image:
        """Return the image in this file."""
        path = self.folder / file
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except FileNotFoundError as error:
            raise UnknownName(
                f"The image {path} is missing. Copy the study's images, or delete the book and run difflex collect again."
            ) from error
        except (OSError, UnidentifiedImageError) as error:
            raise BrokenFile(
                f"The image {path} is damaged ({error}). Delete it and the book, and run difflex collect again."
            ) from error

    def remove(self, file: str) -> None:
        """Delete an image."""
        (self.folder / file).unlink(missing_ok=True)


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
    if style not in STYLES:
        raise UnknownName.among("The style", style, STYLES)
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
    row, examples = book.feature(feature), book.examples(feature)
    keys = [(kind, split) for kind in ROW_LABELS for split in ("train", "held-out")]
    groups = {key: [each for each in examples if (each.kind, each.split) == key][:columns] for key in keys}
    renderer = _SheetRenderer(book, album, book.shots(each.shot for group in groups.values() for each in group), style, side)
    rows = [
        _SheetRow([*ROW_LABELS[kind], split], [renderer.tile(example, row.peak) for example in group])
        for (kind, split), group in groups.items()
        if group
    ]
    if patch := book.patch(feature):
        prompt = patch.shot.prompt
        label = ["the patch that", "the atom is", prompt if len(prompt) < 22 else prompt[:20] + "…"]
        image = None if patch.image is None else album.open(patch.image.file)
        rows.insert(0, _SheetRow(label, [] if image is None else [renderer.patch(image, patch.token)]))
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
        renderer = _SheetRenderer(book, album, book.shots(example.shot for example in examples), style, side)
        row = book.feature(feature)
        label = [f"feature {feature}", *_wrapped((labels or {}).get(feature, ""), 22)[:3], f"at {row.density:.2%} of tokens"]
        rows.append(_SheetRow(label, [renderer.tile(example, row.peak) for example in examples]))
    return _assembled([book.about.dictionary], None, rows, columns, side)


class _SheetRenderer(NamedTuple):
    """Draws examples of one book."""

    book: Book
    album: ImageAlbum
    shots: Mapping[int, ShotRow]
    style: HighlightStyle
    side: int

    def tile(self, example: Example, peak: float) -> _SheetTile:
        """Draw an example with its overlay."""
        row = self.shots[example.shot]
        image = self._resized(self.album.open(row.image.file))
        image = overlaid(image, example.map, self.book.about.grid, peak or 1.0, style=self.style)
        timestep = row.shot.timestep
        share = f"{example.peak / peak:.2f}" if peak and example.peak else "silent"
        return _SheetTile(image, share if timestep is None else f"{share}  t {timestep:.0f}")

    def patch(self, image: Image.Image, token: int) -> _SheetTile:
        """Draw an image with one token outlined."""
        outlined = overlaid(self._resized(image), TokenMap((token,), (1.0,)), self.book.about.grid, 1.0, style="outline")
        return _SheetTile(outlined, f"token {token}")

    def _resized(self, image: Image.Image) -> Image.Image:
        if max(image.size) > self.side:
            image = image.reduce(max(1, max(image.size) // self.side))  # by a whole factor first: ten times faster
            image.thumbnail((self.side, self.side))
            return image
        return enlarged(image, self.side)


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
    """Return what is known about the meaning of a feature, a line each."""
    lines = [f"detects {concept}"] * bool(concept)
    neighbours = book.neighbours(feature)
    for kind, phrase in (("firing", "fires together with"), ("direction", "has a direction close to")):
        names = [f"{each.feature} ({each.value:.2f})" for each in neighbours if each.kind == kind][:NEIGHBOURS]
        lines += [f"{phrase} {', '.join(names)}"] * bool(names)
    return lines + [each.text for each in book.explanations(feature) if each.state == "done" and each.text]


def _assembled(texts: Sequence[str], row: FeatureStats | None, rows: Sequence[_SheetRow], columns: int, side: int) -> Image.Image:
    """Draw the texts, the plots of `row` and the rows of images on one image."""
    font, small = ImageFont.load_default(LETTERS), ImageFont.load_default(LETTERS - 2)
    lines = [line for text in texts for line in _wrapped(text, 110)[:3]]
    tile_height = max([tile.image.height for each in rows for tile in each.tiles], default=side)
    tile_width = max([tile.image.width for each in rows for tile in each.tiles], default=side)
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
    x, y = corner
    edges = row.histogram.edges
    caption = f"values where it fires, {edges[0]:.2g} to {edges[-1]:.2g}, by quarters of octaves"
    _draw_bars(pen, row.histogram.counts, (x, y), caption, font)
    if len(row.activity) > 1:
        caption = f"density by timestep, at most {max(row.activity):.2%}"
        _draw_bars(pen, row.activity, (x + PLOT[0] + 8 * GAP, y), caption, font)


def _draw_bars(pen: ImageDraw.ImageDraw, values: Sequence[float], corner: tuple[int, int], caption: str, font: Font) -> None:
    (x, y), (width, height) = corner, PLOT
    step, highest = width / len(values), max(values) or 1
    for number, value in enumerate(values):
        left, right = x + number * step, x + max(number * step + 1, (number + 1) * step - 1)
        if value:
            pen.rectangle((left, y + height - height * value / highest, right, y + height), fill=BAR)
    pen.line((x, y + height, x + width, y + height), fill=INK)
    pen.text((x, y + height + 2), caption, FAINT, font)


def _wrapped(text: str, width: int) -> list[str]:
    """Break `text` into lines of at most `width` letters."""
    lines = [""] if text else []
    for word in text.split():
        if len(lines[-1]) + len(word) >= width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
