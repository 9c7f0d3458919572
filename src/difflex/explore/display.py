"""How objects show themselves in notebooks: small HTML that needs no other file, with images inside as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import NamedTuple

from PIL import Image

__all__ = ["Tile", "caption", "facts", "figure", "gallery", "heading", "scrolled", "table"]

SIDE = 144
"""Width of an image of a gallery on the page, in pixels."""
LARGEST = 320
"""The longest side of an image of a gallery in the file; larger ones are reduced."""
WIDEST = 1600
"""The longest side of a figure in the file."""
NARROWED, READABLE = 0.65, 640
"""On a narrow page a figure shrinks to this share of its width, or to this many pixels if that is less; then it scrolls."""
LONGEST = 200
"""Letters of a text in a table."""
GREY = "opacity:.65;font-size:85%"
BOX = f"display:inline-block;vertical-align:top;width:{SIDE}px;margin:0 8px 8px 0;font-size:85%;line-height:1.25"


class Tile(NamedTuple):
    """An image with a caption."""

    image: Image.Image
    caption: str = ""


def heading(title: str, note: str = "") -> str:
    """Return the first line of an object: its name, and what it is in grey."""
    return f'<div style="margin:.3em 0"><b>{escape(title)}</b> <span style="{GREY}">{escape(note)}</span></div>'


def caption(text: str) -> str:
    """Return a line of small grey text."""
    return f'<div style="{GREY}">{escape(text)}</div>'


def facts(values: Mapping[str, object]) -> str:
    """Return a table of names and values; what is None or empty is left out."""
    rows = [(name, value) for name, value in values.items() if value is not None and value != ""]
    return table((), rows)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table of texts with a line of column names, if there are any."""
    head = "".join(f'<th style="text-align:left">{escape(name)}</th>' for name in columns)
    lines = [f"<tr>{head}</tr>"] if columns else []
    for row in rows:
        cells = "".join(f'<td style="text-align:left">{escape(_short(str(value)))}</td>' for value in row)
        lines.append(f"<tr>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"


def gallery(tiles: Iterable[Tile]) -> str:
    """Return images side by side, each with its caption below."""
    boxes = [
        f'<div style="{BOX}">{_img(_within(tile.image, LARGEST), f"width:{SIDE}px")}<div style="{GREY}">{escape(tile.caption)}'
        "</div></div>"
        for tile in tiles
    ]
    return f"<div>{''.join(boxes)}</div>"


def figure(image: Image.Image) -> str:
    """Return one large image, as wide as the page at most, but not too small to read; `scrolled` shows the rest."""
    image = _within(image, WIDEST)
    return f"<div>{_img(image, f'max-width:100%;min-width:{min(int(NARROWED * image.width), READABLE)}px', 'auto')}</div>"


def scrolled(html: str) -> str:
    """Return `html` in a box that scrolls sideways on a narrow page."""
    return f'<div style="overflow-x:auto">{html}</div>'


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _within(image: Image.Image, side: int) -> Image.Image:
    if max(image.size) <= side:
        return image
    image = image.copy()
    image.thumbnail((side, side))
    return image


def _img(image: Image.Image, style: str, rendering: str = "pixelated") -> str:
    """Return the image as an element that holds its file; small images stay sharp when they are enlarged."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "WEBP", quality=85, method=2)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/webp;base64,{data}" style="{style};image-rendering:{rendering}" alt="">'
