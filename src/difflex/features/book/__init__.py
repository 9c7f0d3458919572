"""The book of a dictionary: what each of its features is, in figures, in images and in words; one SQLite file."""

from difflex.features.book.album import ImageAlbum, StoredImage
from difflex.features.book.book import SORTS, Book, CoverageSummary, FeatureFilter
from difflex.features.book.entries import (
    KINDS,
    SHOWN,
    AtomImage,
    BookInfo,
    Example,
    ExampleKind,
    Explanation,
    ExplanationScore,
    FeatureNeighbour,
    FeatureStats,
    Histogram,
    ImageFile,
    Judgement,
    RecordedUsage,
    ShotRow,
    TokenMap,
)
from difflex.features.book.overlay import STYLES, Style, enlarged, overlaid
from difflex.features.book.sheet import overview, sheet
from difflex.features.book.writing import BookWriter, PackedExample

__all__ = [
    "KINDS",
    "SHOWN",
    "SORTS",
    "STYLES",
    "AtomImage",
    "Book",
    "BookInfo",
    "BookWriter",
    "CoverageSummary",
    "Example",
    "ExampleKind",
    "Explanation",
    "ExplanationScore",
    "FeatureFilter",
    "FeatureNeighbour",
    "FeatureStats",
    "Histogram",
    "ImageAlbum",
    "ImageFile",
    "Judgement",
    "PackedExample",
    "RecordedUsage",
    "ShotRow",
    "StoredImage",
    "Style",
    "TokenMap",
    "enlarged",
    "overlaid",
    "overview",
    "sheet",
]
