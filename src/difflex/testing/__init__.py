"""Fakes for tests: tiny random pipelines and CLIPs, planted features, a book of plain images, a VLM that answers by rule."""

from difflex import quiet  # noqa: F401  first: it imports diffusers without its messages
from difflex.testing.language import LANGUAGE, tiny_language_folder
from difflex.testing.pipelines import TINY, tiny_clip, tiny_folder, tiny_pipeline
from difflex.testing.planted import PlantedDictionary, plain_book, plain_colour
from difflex.testing.vlm import RuleServer

__all__ = [
    "LANGUAGE",
    "TINY",
    "PlantedDictionary",
    "RuleServer",
    "plain_book",
    "plain_colour",
    "tiny_clip",
    "tiny_folder",
    "tiny_language_folder",
    "tiny_pipeline",
]
