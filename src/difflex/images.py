"""Image files, and contact sheets: images in a grid with labels of rows and columns."""

import errno
import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from difflex.errors import BadInput
from difflex.files import AtomicFile, disk_errors, write_file

__all__ = ["check_image_path", "check_output", "check_sheet", "contact_sheet", "open_image", "write_image"]

SIDE = 160
"""To which the longer sides of small images on a contact sheet are enlarged."""
MOST = 2**27
"""Pixels of the largest image that is read or written."""
LONGEST = {"WEBP": 16_383, "JPEG": 65_500}
"""Pixels of the longest side, by format."""
FORMATS = {".png": "PNG", ".webp": "WEBP", ".jpg": "JPEG", ".jpeg": "JPEG"}

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

PAPER, INK = "white", "#222222"
GAP = 8
LETTERS, LINE = 16, 22
"""Height of letters and of lines, in pixels."""
MARGIN = 220
"""The largest width of row labels, which are wrapped."""


def contact_sheet(
    images: Sequence[Sequence[Image.Image]],
    *,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    side: int = SIDE,
) -> Image.Image:
    """Draw `images`, given row by row, as one image.

    Images whose longer side is below `side` are enlarged to at least that, by a whole factor and without smoothing. A label
    that does not fit is cut and ends in an ellipsis.
    """
    _check([len(row) for row in images], len(row_labels), len(column_labels))
    rows = [[_enlarge(image, side) for image in row] for row in images]
    width = max(image.width for row in rows for image in row)
    height = max(image.height for row in rows for image in row)
    font = ImageFont.load_default(LETTERS)
    captions = [_wrap(label, font, MARGIN, max(1, height // LINE)) for label in row_labels]
    titles = [_wrap(label, font, width, 2) for label in column_labels]
    left = 2 * GAP + _text_width(captions, font)
    top = 2 * GAP + LINE * max(title.count("\n") + 1 for title in titles)
    sheet = Image.new("RGB", (left + len(titles) * (width + GAP), top + len(rows) * (height + GAP)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        middle = left + column * (width + GAP) + width // 2
        pen.multiline_text((middle, top - GAP), title, INK, font, anchor="md", align="center")
    for row, caption in enumerate(captions):
        y = top + row * (height + GAP)
        pen.multiline_text((left - GAP, y + height // 2), caption, INK, font, anchor="rm", align="right")
        for column, image in enumerate(rows[row]):
            sheet.paste(image, (left + column * (width + GAP), y))
    return sheet


def _check(rows: list[int], row_labels: int, column_labels: int) -> None:
    if not rows or not column_labels:
        raise BadInput("A contact sheet needs images, but there are no images. Give at least one row and one column.")
    if len(rows) != row_labels or set(rows) != {column_labels}:
        raise BadInput(
            f"The contact sheet has rows of {rows} images, {row_labels} row labels and {column_labels} column labels. "
            "Give a label for every row and column, and in every row as many images as there are columns."
        )


def _enlarge(image: Image.Image, side: int) -> Image.Image:
    factor = -(-side // max(image.size))
    return image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _wrap(text: str, font: Font, width: int, max_lines: int) -> str:
    """Break `text` into at most `max_lines` lines that are no wider than `width`."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > max_lines:
        lines[max_lines - 1 :] = [lines[max_lines - 1] + "…"]
    return "\n".join(_cut(line, font, width) for line in lines)


def _cut(line: str, font: Font, width: int) -> str:
    while font.getlength(line) > width and len(line) > 1:
        line = line.removesuffix("…")[:-1] + "…"
    return line


def _text_width(texts: list[str], font: Font) -> int:
    return int(max(font.getlength(line) for text in texts for line in text.split("\n"))) + 1


def check_image_path(path: Path) -> None:
    """Raise an error if `path` does not end like an image file, or cannot be written."""
    if path.suffix.lower() not in FORMATS:
        raise BadInput(f"{path} does not name an image file. End it with one of: {' '.join(FORMATS)}")
    check_output(path)


def check_output(path: Path) -> None:
    """Raise the error that writing `path` would raise; call this before long work. Nothing is made."""
    with disk_errors(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "")
        if path.exists() and not path.is_file():  # as /dev/null, which a file would replace
            raise BadInput(f"{path} is a device, a pipe or a socket. Name a file.")
        folder = next(folder for folder in path.parents if folder.exists())
    AtomicFile(folder / path.name).discard()


def check_sheet(path: Path, rows: int, columns: int, pixels: tuple[int, int], side: int = SIDE) -> None:
    """Refuse a contact sheet of so many images of a size (height, width) that would not fit into memory or its format."""
    factor = -(-side // max(pixels))
    height, width = (length * factor for length in pixels)
    sheet = (rows * (height + GAP) + 2 * GAP + 2 * LINE, columns * (width + GAP) + 2 * GAP + MARGIN)
    longest = LONGEST.get(FORMATS[path.suffix.lower()], MOST)
    if max(sheet) > longest or sheet[0] * sheet[1] > MOST:
        raise BadInput(
            f"{rows * columns:,} images make a sheet of {sheet[0]:,} x {sheet[1]:,} pixels, but {path.name} can have "
            f"{longest:,} on a side and {MOST:,} in all. Ask for fewer images at once."
        )


def open_image(path: Path, mode: str | None = None) -> Image.Image:
    """Return the image in a file, in a mode (None: its own), in which transparent parts are black."""
    try:
        with disk_errors(path, "read"):
            content = path.read_bytes()
    except FileNotFoundError as error:
        raise BadInput(f"There is no image {path}. Name a PNG, JPEG or WebP.") from error
    try:
        with Image.open(io.BytesIO(content)) as file:
            pixels = file.width * file.height
            image = (file if mode is None else _convert(file, mode)).copy() if pixels <= MOST else None
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError) as error:
        raise BadInput(f"{path} cannot be read as an image ({error}). Name a PNG, JPEG or WebP.") from error
    if image is None:
        raise BadInput(f"{path} has {pixels:,} pixels. Use an image of at most {MOST:,}.")
    return image


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)
    return image.convert(mode)


def write_image(image: Image.Image, path: Path) -> None:
    """Write `image` to `path` in the format of its suffix; a file with the same content is left as it is."""
    buffer = io.BytesIO()
    image.save(buffer, FORMATS[path.suffix.lower()], **({"lossless": True} if path.suffix.lower() == ".webp" else {}))
    if not path.is_file() or path.read_bytes() != buffer.getvalue():
        write_file(path, buffer.getvalue())
