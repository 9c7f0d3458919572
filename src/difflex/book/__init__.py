"""The book of a dictionary: what each of its features is, in figures, in pictures and in words; one SQLite file."""

from difflex.book.album import Album, Filed
from difflex.book.book import SORTS, Book, Condition, Covering
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
from difflex.book.overlay import STYLES, Style, enlarged, overlaid
from difflex.book.sheet import overview, sheet
from difflex.book.writing import Draft, PackedExample

__all__ = [
    "KINDS",
    "SHOWN",
    "SORTS",
    "STYLES",
    "About",
    "Album",
    "Book",
    "Condition",
    "Covering",
    "Draft",
    "Example",
    "ExampleKind",
    "Explanation",
    "FeatureRow",
    "Filed",
    "Histogram",
    "Judgement",
    "Neighbour",
    "PackedExample",
    "PatchOf",
    "PictureFile",
    "Score",
    "ShotRow",
    "Style",
    "TokenMap",
    "Usage",
    "enlarged",
    "overlaid",
    "overview",
    "sheet",
]
