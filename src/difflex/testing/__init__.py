"""Public fakes: tiny random pipelines of every family, a tiny CLIP, a book of plain images, a model that sees by rule."""

from difflex.testing.books import plain_book, plain_colour
from difflex.testing.pipelines import TINY, tiny_clip, tiny_folder, tiny_pipeline
from difflex.testing.seeing import MOODS, RuleServer, ServedCall, by_colour

__all__ = [
    "MOODS",
    "TINY",
    "RuleServer",
    "ServedCall",
    "by_colour",
    "plain_book",
    "plain_colour",
    "tiny_clip",
    "tiny_folder",
    "tiny_pipeline",
]
