"""A diffusers pipeline opened up: load, generate, name its sites, read and write what passes through them, harvest it."""

from difflex.pipeline.loading import Precision, embedded
from difflex.pipeline.pipeline import Generated, Pipeline, load

__all__ = ["Generated", "Pipeline", "Precision", "embedded", "load"]
