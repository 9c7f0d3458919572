"""A book of plain images, for what reads books: every feature marks one token of images that are of one colour, its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from difflex.features import BookInfo, BookWriter, ImageAlbum
from difflex.features.entries import Example, ExampleKind, FeatureNeighbour, FeatureStats, ImageFile, TokenMap
from difflex.records import Shot, Split

__all__ = ["plain_book", "plain_colour"]

GRID = (4, 4)
PEAK = 20.0


class _ExampleTemplate(NamedTuple):
    """What an example of any feature is."""

    kind: ExampleKind
    split: Split
    rank: int
    peak: float


def plain_colour(number: int) -> tuple[int, int, int]:
    """A colour of its own for each of the first 60,000 numbers: red, green, blue."""
    return number * 37 % 256, number // 256 % 256, number * 91 % 256


def plain_book(folder: Path, features: int, tops: int = 6, sampled: int = 8, shared: int = 0) -> Path:
    """The file of a book of so many features, `folder/book.sqlite`; its images are in `folder/images`.

    Each feature has `tops` top examples of each split and `sampled` random held-out ones, every one a shot of its own prompt, in
    which it also fires faintly at a second token; in the first `shared` of these the next feature marks another token. The
    nearest decoder is that of the feature after the next.
    """
    album = ImageAlbum(folder / "images")
    filed = [album.add(Image.new("RGB", (16, 16), plain_colour(feature)))[0] for feature in range(features)]
    rows = [*_rows(tops, sampled)]
    path, examples = folder / "book.sqlite", [*_examples(features, rows, shared)]
    with BookWriter.open(path, _about(features)) as writer:
        writer.add_images(ImageFile(number, *each) for number, each in enumerate(filed))
        writer.add_shots(
            (number, number // len(rows), _shot(number, rows[number % len(rows)].split)) for number in range(features * len(rows))
        )
        writer.add_features(_figures(feature, len(rows)) for feature in range(features))
        writer.add_examples(examples)
        for feature in range(features):
            writer.add_neighbours(feature, [FeatureNeighbour((feature + 2) % features, "direction", 0.5)])
    return path


def _rows(tops: int, sampled: int) -> Iterator[_ExampleTemplate]:
    yield from (_ExampleTemplate("top", "train", rank, PEAK - 0.5 - rank) for rank in range(tops))
    yield from (_ExampleTemplate("top", "held-out", rank, PEAK - rank) for rank in range(tops))
    yield from (_ExampleTemplate("quantile", "held-out", rank, PEAK - 6 - rank) for rank in range(sampled))


def _examples(features: int, rows: list[_ExampleTemplate], shared: int) -> Iterator[Example]:
    for number in range(features * len(rows)):
        feature, row = number // len(rows), rows[number % len(rows)]
        yield _example(feature, row, number, feature % 16)
        if row.kind == "quantile" and row.rank < shared:
            there = row._replace(split="train", peak=PEAK / 2)
            yield _example((feature + 1) % features, there, number, (feature + 5) % 16)


def _example(feature: int, row: _ExampleTemplate, shot: int, token: int) -> Example:
    where = TokenMap((token, (token + 8) % 16), (row.peak, PEAK / 10))
    return Example(feature=feature, kind=row.kind, split=row.split, rank=row.rank, shot=shot, peak=row.peak, map=where)


def _shot(number: int, split: Split) -> Shot:
    return Shot(model="plain", prompt=f"image {number}", pixels=(16, 16), steps=1, guidance=0.0, split=split)


def _figures(feature: int, shots: int) -> FeatureStats:
    return FeatureStats(feature=feature, firings=shots, shots=shots, density=0.01, peak=PEAK, mean=5.0)


def _about(features: int) -> BookInfo:
    return BookInfo(
        dictionary="double.1/topk",
        kind="topk",
        size=features,
        k=1,
        fingerprint="plain",
        model="plain",
        data="plain images",
        grid=GRID,
        tokens=1,
        shots={"train": 1, "held-out": 1},
        images=features,
    )
