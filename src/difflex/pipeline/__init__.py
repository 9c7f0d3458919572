"""A diffusers pipeline opened up: load, generate, name its sites, read and write what passes through them, harvest it."""

from difflex import quiet  # noqa: F401  first, as it imports diffusers in silence
from difflex.pipeline.generation import GeneratedImage
from difflex.pipeline.loading import embedded
from difflex.pipeline.opening import load
from difflex.pipeline.pipeline import Pipeline
from difflex.pipeline.profile import ModelProfile, foresee
from difflex.pipeline.prompts import read_prompts
from difflex.pipeline.sharded import share
from difflex.pipeline.sites import SiteRow
from difflex.records import Activations, HookContext

__all__ = [
    "Activations",
    "GeneratedImage",
    "HookContext",
    "ModelProfile",
    "Pipeline",
    "SiteRow",
    "embedded",
    "foresee",
    "load",
    "read_prompts",
    "share",
]
