"""`Pipeline`: the object that a user holds; each of its methods is a short way into one file of this folder."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import final

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL import Image

from difflex.errors import BadInput
from difflex.pipeline.encoding import PromptEncoder
from difflex.pipeline.families import Family, family_of
from difflex.pipeline.generation import (
    Generated,
    arguments_of,
    call,
    check_size,
    halving,
    is_guided,
    split_of,
    stride_of,
    warn_of_unknown_words,
)
from difflex.pipeline.loading import DTYPES, Card, Precision, Source, locate, read_card, read_pipeline
from difflex.records import Shot

__all__ = ["Pipeline", "load"]

ADVICE = "Load the model in a smaller precision (precision='nf4'), with offload=True, or ask for fewer pixels."


@final
class Pipeline:
    """A text-to-image model: a diffusers pipeline, what it is meant to be used with, and the ways into it."""

    def __init__(self, diffusers: DiffusionPipeline, source: Source, family: Family, card: Card) -> None:
        self.diffusers = diffusers
        """The pipeline itself; anything that diffusers can do with it may be done."""
        self.name = source.name
        self.revision = source.revision
        self.family = family
        self.card = card
        self.encoder = PromptEncoder(diffusers, family, card.text_length)

    def generate(
        self,
        prompts: str | Sequence[str],
        seed: int = 0,
        steps: int | None = None,
        pixels: tuple[int, int] | None = None,
        guidance: float | None = None,
        batch: int = 16,
    ) -> list[Generated]:
        """A picture for each prompt; prompt i gets the seed `seed + i`. What is None is the model's default."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        warn_of_unknown_words(prompts, self.card.words)
        plain = self._shot(steps, pixels, guidance)
        shots = [self._of_prompt(plain, prompt, seed + i) for i, prompt in enumerate(prompts)]
        made = [picture for _, pictures in halving(self._draw, shots, batch, ADVICE) for picture in pictures]
        return [Generated(picture, shot) for picture, shot in zip(made, shots, strict=True)]

    def _draw(self, shots: Sequence[Shot]) -> list[Image.Image]:
        guided = is_guided(self.diffusers, self.family, shots[0].guidance)
        prompts = self.encoder([shot.prompt for shot in shots], guided)
        return call(self.diffusers, **prompts, **arguments_of(self.family, shots, guided)).images

    def _shot(self, steps: int | None, pixels: tuple[int, int] | None, guidance: float | None) -> Shot:
        """The settings of a shot, checked; without prompt and seed."""
        size = self.card.pixels[0] if self.card.pixels else self._default_size()
        pixels = (int(pixels[0]), int(pixels[1])) if pixels is not None else size
        check_size(pixels, self.card, stride_of(self.diffusers, self.family))
        steps = self.card.steps if steps is None else steps
        if steps < 1:
            raise BadInput(f"{steps} denoising steps are not possible. Ask for 1 or more.")
        guidance = self.card.guidance if guidance is None else guidance
        return Shot(model=self.name, revision=self.revision, pixels=pixels, steps=steps, guidance=float(guidance))

    def _of_prompt(self, plain: Shot, prompt: str, seed: int) -> Shot:
        return replace(plain, prompt=prompt, seed=seed, split=split_of(prompt))

    def _default_size(self) -> tuple[int, int]:
        config = self.diffusers.components[self.family.denoiser].config
        sample = config.get("sample_size") or getattr(self.diffusers, "default_sample_size", 128)
        height, width = (sample, sample) if isinstance(sample, int) else sample
        return height * self.diffusers.vae_scale_factor, width * self.diffusers.vae_scale_factor


def load(
    name: str | Path,
    precision: Precision | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    offload: bool = False,
    untrained: int | None = None,
    offline: bool = False,
) -> Pipeline:
    """The model `name`: one inside the package, a folder, or a hub name OWNER/NAME.

    Precision is fp32 on a CPU and bf16 on a GPU unless asked otherwise.
    """
    source = locate(name, revision, offline)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    precision = precision or ("fp32" if place.type == "cpu" else "bf16")
    pipeline = read_pipeline(source.folder, DTYPES[precision])
    family = family_of(type(pipeline).__name__, "unet" if "unet" in pipeline.components else "transformer")
    pipeline.to(place)
    return Pipeline(pipeline, source, family, read_card(source.folder, family))
