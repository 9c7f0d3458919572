"""Books about the features of dictionaries: figures, examples with maps and explanations, as records, SQLite files and images.

`difflex.features.collecting` makes books from images and activations; this door only reads them and does not import torch.
"""

from difflex.features.book import Book, FeatureFilter, select_features
from difflex.features.detected import BestConcept
from difflex.features.entries import CoverageSummary
from difflex.features.images import ImageAlbum, overlaid, sheet
from difflex.features.tables import BookInfo
from difflex.features.writing import BookWriter

__all__ = [
    "BestConcept",
    "Book",
    "BookInfo",
    "BookWriter",
    "CoverageSummary",
    "FeatureFilter",
    "ImageAlbum",
    "overlaid",
    "select_features",
    "sheet",
]
