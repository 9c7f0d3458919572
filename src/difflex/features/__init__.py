"""Books about the features of dictionaries: figures, examples with maps and explanations, as records, SQLite files and images.

`difflex.features.collecting` makes books from images and activations; this door only reads them and does not import torch.
"""

from difflex.features.book import SORT_COLUMNS, Book, CoverageSummary, FeatureFilter
from difflex.features.images import ImageAlbum, overlaid, overview, sheet
from difflex.features.schema import BookInfo
from difflex.features.writer import BookWriter

__all__ = [
    "SORT_COLUMNS",
    "Book",
    "BookInfo",
    "BookWriter",
    "CoverageSummary",
    "FeatureFilter",
    "ImageAlbum",
    "overlaid",
    "overview",
    "sheet",
]
