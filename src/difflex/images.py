"""Image files, and contact sheets: images in a grid with labels of rows and columns."""

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from difflex.errors import BadInput
from difflex.files import write_file

__all__ = ["check_image_path", "contact_sheet", "write_image"]

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
    side: int = 160,
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
    """Raise an error if `path` does not end like an image file."""
    if path.suffix.lower() not in FORMATS:
        raise BadInput(f"{path} does not name an image file. End it with one of: {' '.join(FORMATS)}")


def write_image(image: Image.Image, path: Path) -> None:
    """Write `image` to `path` in the format of its suffix."""
    check_image_path(path)
    buffer = io.BytesIO()
    image.save(buffer, FORMATS[path.suffix.lower()])
    try:
        write_file(path, buffer.getvalue())
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error}. Name a file that you may write.") from error
