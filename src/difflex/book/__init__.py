"""The book of a dictionary: what each of its features is, in figures, in pictures and in words; one SQLite file."""

from difflex.book.book import SORTS, Book, Condition
from difflex.book.entries import (
    KINDS,
    SHOWN,
    About,
    Example,
    ExampleKind,
    Explanation,
    FeatureRow,
    Histogram,
    Judgement,
    Neighbour,
    PatchOf,
    PictureFile,
    Score,
    ShotRow,
    TokenMap,
    Usage,
)
from difflex.book.writing import Draft, PackedExample

__all__ = [
    "KINDS",
    "SHOWN",
    "SORTS",
    "About",
    "Book",
    "Condition",
    "Draft",
    "Example",
    "ExampleKind",
    "Explanation",
    "FeatureRow",
    "Histogram",
    "Judgement",
    "Neighbour",
    "PackedExample",
    "PatchOf",
    "PictureFile",
    "Score",
    "ShotRow",
    "TokenMap",
    "Usage",
]
