"""Text-to-image models as diffusers pipelines: load them, generate images, harvest and edit the activations of their sites."""

from difflex import quiet  # noqa: F401  first: it imports diffusers without its messages
from difflex.pipeline.engine import shots_of_rank
from difflex.pipeline.loading import choose_precision, load
from difflex.pipeline.noising import open_image
from difflex.pipeline.pipeline import GeneratedImage, Pipeline
from difflex.pipeline.profile import ModelProfile, profile_model
from difflex.pipeline.prompts import read_prompts
from difflex.pipeline.sources import embedded

__all__ = [
    "GeneratedImage",
    "ModelProfile",
    "Pipeline",
    "choose_precision",
    "embedded",
    "load",
    "open_image",
    "profile_model",
    "read_prompts",
    "shots_of_rank",
]
