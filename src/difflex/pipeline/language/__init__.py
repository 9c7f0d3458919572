"""Causal language models of transformers: load them, write text, harvest and edit the activations of their sites."""

from difflex import quiet  # noqa: F401  first: it imports diffusers without its messages
from difflex.pipeline.language.loading import load_language
from difflex.pipeline.language.model import GeneratedText, LanguagePipeline, refusal
from difflex.pipeline.sources import is_language_model

__all__ = ["GeneratedText", "LanguagePipeline", "is_language_model", "load_language", "refusal"]
