"""Sheets: one feature on one image, with its examples and figures; or several features, a row each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from difflex.errors import BadInput
from difflex.features.book.album import ImageAlbum
from difflex.features.book.book import Book
from difflex.features.book.entries import Example, FeatureStats, ShotRow, TokenMap
from difflex.features.book.overlay import Style, enlarged, overlaid

__all__ = ["overview", "sheet"]

PAPER, INK, FAINT, BAR = "white", "#222222", "#777777", "#0830a0"
GAP, LINE, LETTERS = 8, 17, 13
LEFT = 150
"""Width of the words beside the rows."""
PLOT = (240, 64)
NEIGHBOURS = 5
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class _SheetTile(NamedTuple):
    """An image with a line below it."""

    image: Image.Image
    line: str


class _SheetRow(NamedTuple):
    words: Sequence[str]
    """Beside it, a line each."""
    tiles: Sequence[_SheetTile]


def sheet(
    book: Book, album: ImageAlbum, feature: int, *, style: Style = "blue", columns: int = 8, side: int = 128, concept: str = ""
) -> Image.Image:
    """One feature: its figures, its explanation, its strongest shots, random ones and silent ones, of both splits.

    For an ITDA atom, the very patch that it is. `concept` is what else is known of it. Under each image stands how strong the
    feature gets in it, as a share of its peak anywhere, and the timestep.
    """
    row, examples = book.feature(feature), book.examples(feature)
    known = [f"detects {concept}"] * bool(concept)
    asked = [(kind, split) for kind in ("top", "quantile", "silent") for split in ("train", "held-out")]
    shown = {key: [each for each in examples if (each.kind, each.split) == key][:columns] for key in asked}
    shots = book.shots(each.shot for some in shown.values() for each in some)
    draw = _SheetRenderer(book, album, shots, style, side)
    rows = [
        _SheetRow(_named(kind, split), [draw.tile(each, row.peak) for each in some])
        for (kind, split), some in shown.items()
        if some
    ]
    if patch := book.patch(feature):
        image = None if patch.image is None else album.open(patch.image.file)
        told = ["the patch that", "the atom is", _prompt(patch.shot.prompt)]
        rows.insert(0, _SheetRow(told, [] if image is None else [draw.patch(image, patch.token)]))
    fellows = [(each.kind, f"{each.other} ({each.value:.2f})") for each in book.neighbours(feature)]
    for kind, words in (("firing", "fires together with"), ("direction", "adds about the same as")):
        named = [name for each, name in fellows if each == kind][:NEIGHBOURS]
        known += [f"{words} {', '.join(named)}"] * bool(named)
    texts = [each.text for each in book.explanations(feature) if each.state == "done" and each.text]
    return _assembled(_head(book, row, [*known, *texts]), row, rows, columns, side)


def overview(
    book: Book,
    album: ImageAlbum,
    features: Sequence[int],
    *,
    style: Style = "blue",
    columns: int = 8,
    side: int = 96,
    labels: Mapping[int, str] | None = None,
) -> Image.Image:
    """Several features: for each a row of its strongest shots, those of both splits together, with what `labels` says of it."""
    if not features:
        raise BadInput("A sheet was asked of no features. Name at least one.")
    rows = []
    for feature in features:
        examples = sorted(book.examples(feature, "top"), key=lambda each: -each.peak)[:columns]
        draw = _SheetRenderer(book, album, book.shots(each.shot for each in examples), style, side)
        row = book.feature(feature)
        words = [f"feature {feature}", *_wrapped((labels or {}).get(feature, ""), 22)[:3], f"at {row.density:.2%} of tokens"]
        rows.append(_SheetRow(words, [draw.tile(each, row.peak) for each in examples]))
    return _assembled([book.about.dictionary], None, rows, columns, side)


class _SheetRenderer(NamedTuple):
    """What it takes to draw examples of one book."""

    book: Book
    album: ImageAlbum
    shots: Mapping[int, ShotRow]
    style: Style
    side: int

    def tile(self, example: Example, peak: float) -> _SheetTile:
        """An example with its overlay."""
        shown = self.shots[example.shot]
        image = self._fitted(self.album.open(shown.image.file))
        drawn = overlaid(image, example.map, self.book.about.grid, peak or 1.0, style=self.style)
        moment = shown.shot.timestep
        share = f"{example.peak / peak:.2f}" if peak and example.peak else "silent"
        return _SheetTile(drawn, share if moment is None else f"{share}  t {moment:.0f}")

    def patch(self, image: Image.Image, token: int) -> _SheetTile:
        """An image with one token outlined."""
        marked = overlaid(self._fitted(image), TokenMap((token,), (1.0,)), self.book.about.grid, 1.0, style="outline")
        return _SheetTile(marked, f"token {token}")

    def _fitted(self, image: Image.Image) -> Image.Image:
        """`image`, enlarged or scaled down to about the side of a tile."""
        if max(image.size) > self.side:
            image = image.reduce(max(1, max(image.size) // self.side))  # by a whole factor: ten times faster
            image.thumbnail((self.side, self.side))
            return image
        return enlarged(image, self.side)


def _named(kind: str, split: str) -> list[str]:
    words = {"top": "strongest", "quantile": "random, where it", "silent": "random, where it"}[kind]
    more = {"top": "shots", "quantile": "fires", "silent": "is silent"}[kind]
    return [words, more, split]


def _head(book: Book, row: FeatureStats, texts: Sequence[str]) -> list[str]:
    """The lines above the images."""
    figures = [
        f"at {row.density:.3%} of tokens, in {row.shots:,} shots",
        f"peak {row.peak:.4g}, mean {row.mean:.4g}",
        *([] if row.strength is None else [f"steered by {row.strength:.3g} peaks where nothing else is said"]),
        *([f"negative at {row.negative_share:.3%}"] if row.negative_share else []),
    ]
    placed = {"area": row.area, "spread": row.spread, "concentration": row.concentration, "border": row.border}
    more = {**placed, "position": row.position, "coverage of its top": row.coverage}
    lines = [f"{book.about.dictionary}: feature {row.feature}", ", ".join(figures)]
    lines += [", ".join(f"{name} {value:.2f}" for name, value in more.items() if value is not None)]
    return [line for text in [*lines, *texts] for line in _wrapped(text, 110)[:3]]


def _assembled(head: Sequence[str], row: FeatureStats | None, rows: Sequence[_SheetRow], columns: int, side: int) -> Image.Image:
    """One image of all that."""
    font, small = ImageFont.load_default(LETTERS), ImageFont.load_default(LETTERS - 2)
    high = max([tile.image.height for each in rows for tile in each.tiles], default=side)
    wide = max([tile.image.width for each in rows for tile in each.tiles], default=side)
    plots = PLOT[1] + LINE + GAP if row is not None and row.histogram.counts else 0
    top = GAP + len(head) * LINE + GAP + plots
    size = (LEFT + columns * (wide + GAP) + GAP, top + len(rows) * (high + LINE + GAP) + GAP)
    made = Image.new("RGB", (max(size[0], LEFT + 2 * PLOT[0] + 4 * GAP), size[1]), PAPER)
    pen = ImageDraw.Draw(made)
    for number, line in enumerate(head):
        pen.text((GAP, GAP + number * LINE), line, INK, font)
    if row is not None and plots:
        _plots(pen, row, (LEFT, top - plots), small)
    for number, each in enumerate(rows):
        y = top + number * (high + LINE + GAP)
        for place, words in enumerate(each.words):
            pen.text((GAP, y + place * LINE), words, INK, font)
        for place, tile in enumerate(each.tiles):
            x = LEFT + place * (wide + GAP)
            made.paste(tile.image, (x, y))
            pen.text((x, y + high + 1), tile.line, FAINT, small)
    return made


def _plots(pen: ImageDraw.ImageDraw, row: FeatureStats, corner: tuple[int, int], font: Font) -> None:
    """The histogram of values, and beside it the density at each timestep."""
    x, y = corner
    edges = row.histogram.edges
    _bars(
        pen,
        row.histogram.counts,
        (x, y),
        f"values where it fires, {edges[0]:.2g} to {edges[-1]:.2g}, by quarters of octaves",
        font,
    )
    if len(row.activity) > 1:
        told = f"density by step, at most {max(row.activity):.2%}"
        _bars(pen, row.activity, (x + PLOT[0] + 8 * GAP, y), told, font)


def _bars(pen: ImageDraw.ImageDraw, values: Sequence[float], corner: tuple[int, int], told: str, font: Font) -> None:
    (x, y), (width, height) = corner, PLOT
    step, most = width / len(values), max(values) or 1
    for number, value in enumerate(values):
        bar = (
            x + number * step,
            y + height - height * value / most,
            x + max(number * step + 1, (number + 1) * step - 1),
            y + height,
        )
        if value:
            pen.rectangle(bar, fill=BAR)
    pen.line((x, y + height, x + width, y + height), fill=INK)
    pen.text((x, y + height + 2), told, FAINT, font)


def _prompt(text: str) -> str:
    return text if len(text) < 22 else text[:20] + "…"


def _wrapped(text: str, most: int) -> list[str]:
    """`text` in lines of at most so many letters."""
    lines = [""] if text else []
    for word in text.split():
        if len(lines[-1]) + len(word) >= most and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
