"""`Pipeline`: the object that a user holds; each of its methods is a short way into one file of this folder."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import cast, final

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from difflex.errors import BadInput
from difflex.pipeline.calls import check_half
from difflex.pipeline.engine import Engine
from difflex.pipeline.generation import GeneratedImage, check_batch, check_size, warn_of_unknown_words
from difflex.pipeline.harvesting import FinishedBatch, finish, harvest
from difflex.pipeline.hooks import Visit, on_copies, visiting
from difflex.pipeline.images import ImageInput, harvest_images, losses
from difflex.pipeline.loading import ModelSource, Precision
from difflex.pipeline.predicting import images, predictions
from difflex.pipeline.sites import SiteModule, SiteRow
from difflex.pipeline.table import site_rows
from difflex.records import Activations, EditOutcomes, Half, Shot, Site

__all__ = ["Pipeline"]


@final
class Pipeline:
    """A text-to-image model: a diffusers pipeline, what it is meant to be used with, and the ways into it."""

    def __init__(self, engine: Engine, source: ModelSource, precision: Precision) -> None:
        self.name = source.name
        self.revision = source.revision
        self.precision: Precision = precision
        self.engine = engine

    @property
    def diffusers(self) -> DiffusionPipeline:
        """The pipeline itself; anything that diffusers can do with it may be done, also inside `at`."""
        return self.engine.diffusers

    def generate(
        self,
        prompts: str | Sequence[str],
        seed: int = 0,
        steps: int | None = None,
        pixels: tuple[int, int] | None = None,
        guidance: float | None = None,
        batch: int = 16,
        edits: Iterable[tuple[Site | str, Visit]] = (),
    ) -> list[GeneratedImage]:
        """An image for each prompt; prompt i gets the seed `seed + i`. What is None is the model's default.

        `edits` change the activations of sites on the way, as `at` does: what `difflex.steering.steering_hooks` gives.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        check_batch(batch)
        warn_of_unknown_words(prompts, self.engine.card.words)
        plain = self._plain(steps, pixels, guidance)
        shots = [replace(plain, prompt=prompt, seed=seed + i, split=Shot.split_of(prompt)) for i, prompt in enumerate(prompts)]
        with ExitStack() as edited:
            for site, change in edits:
                edited.enter_context(self.at(site, change))
            made = [image for _, images in self.engine.batches(self._draw, shots, batch) for image in images]
        return [GeneratedImage(image, shot) for image, shot in zip(made, shots, strict=True)]

    def _draw(self, shots: Sequence[Shot]) -> list[Image.Image]:
        images = self.engine.run(shots)
        assert isinstance(images, list)
        return images

    def site(self, name: Site | str) -> Site:
        """The site called `name`, in its canonical notation; an unknown one is an error that shows the nearest."""
        return self.engine.sites.locate(name).site

    def sites(self, pattern: str = "*", pixels: tuple[int, int] | None = None) -> list[SiteRow]:
        """A row for each block and stream whose name matches `pattern`, at this image size."""
        return site_rows(self.engine, self._plain(1, pixels, None), pattern)

    def at(self, site: Site | str, fn: Visit, half: Half | None = None) -> AbstractContextManager[None]:
        """A block within which `fn` meets the activations of `site` at each step, tokens in row-major order.

        It reads where it returns None and writes where it returns a tensor. It is handed a copy: changes made to that in place
        are written if it is returned, and not otherwise. Under guidance `fn` is called once for each half, or for `half` alone.
        Blocks nest: an inner one sees what an outer one wrote.
        """
        check_half(half)
        return visiting(self.engine.clock, self.engine.sites.locate(site), on_copies(fn), half)

    def shots(
        self,
        prompts: str | Iterable[str],
        seeds: Iterable[int] = range(1),
        steps: int | None = None,
        keep_steps: Iterable[int] | None = None,
        pixels: tuple[int, int] | None = None,
        guidance: float | None = None,
    ) -> Iterator[Shot]:
        """A shot for each prompt, seed and kept step (all, if None), in this order; as lazy as `prompts`.

        Of steps at which the scheduler repeats a timestep the first is kept.
        """
        plain = self._plain(steps, pixels, guidance)
        prompts = [prompts] if isinstance(prompts, str) else prompts
        seeds, timesteps = list(seeds), self.engine.timesteps(plain)
        kept = range(len(timesteps)) if keep_steps is None else list(keep_steps)
        beyond = [step for step in kept if not 0 <= step < len(timesteps)]
        if beyond:
            raise BadInput(f"Step {beyond[0]} cannot be kept of a run of {len(timesteps)} steps, numbered from 0.")
        kept_timesteps = list(dict.fromkeys(timesteps[step] for step in kept))
        return (
            replace(plain, prompt=prompt, seed=seed, timestep=timestep, split=Shot.split_of(prompt))
            for prompt in prompts
            for seed in seeds
            for timestep in kept_timesteps
        )

    def harvest(
        self, shots: Iterable[Shot], sites: Iterable[Site | str] | Site | str, batch: int = 16, progress: bool = True
    ) -> Iterator[Activations]:
        """The activations of `sites` (patterns too) at `shots`: for each batch of runs, each kept step, each site.

        A shot without a timestep stands for all steps of its run. Under guidance the conditional half is harvested.
        """
        check_batch(batch)
        return harvest(self.engine, shots, self._located(sites), batch, progress)

    def harvest_and_finish(
        self, shots: Iterable[Shot], sites: Iterable[Site | str] | Site | str, batch: int = 16
    ) -> Iterator[FinishedBatch]:
        """The images that the runs of `shots` end in, and the activations of `sites` on the way, batch by batch.

        A shot without a timestep stands for all steps of its run. Under guidance the conditional half is harvested.
        """
        check_batch(batch)
        return finish(self.engine, shots, self._located(sites), batch)

    def harvest_images(
        self,
        images: ImageInput | Iterable[ImageInput],
        noise: float | Sequence[float],
        sites: Iterable[Site | str] | Site | str,
        prompts: str | Iterable[str] | None = None,
        names: str | Iterable[str] | None = None,
        seed: int = 0,
        batch: int = 16,
        progress: bool = True,
    ) -> Iterator[Activations]:
        """The activations of `sites` at given images, noised to one or several levels (0 the image, 1 pure noise).

        One denoiser call each, without guidance; image i is noised by the seed `seed + i`. `prompts` are one for each image,
        a single one for all of them, or else empty.
        """
        check_batch(batch)
        plain = self._plain(1, None, None, check=False)
        images = [images] if isinstance(images, (str, Path, Image.Image)) else images
        prompts = repeat(prompts or "") if prompts is None or isinstance(prompts, str) else prompts
        called = [names] if isinstance(names, str) else names or repeat(None)
        return harvest_images(self.engine, plain, images, noise, self._located(sites), prompts, called, seed, batch, progress)

    def losses(
        self,
        images: Iterable[ImageInput],
        noise: float | Sequence[float],
        prompts: str | Iterable[str] = "",
        seed: int = 0,
        batch: int = 16,
    ) -> Float[Tensor, "image level"]:
        """How far the model is from what it was trained to say of each image at each level of noise: mean squared errors.

        The more an image looks like those it was trained on, the smaller. Image i is noised by the seed `seed + i`.
        """
        check_batch(batch)
        prompts = repeat(prompts) if isinstance(prompts, str) else prompts
        plain = self._plain(1, None, None, check=False)
        return torch.cat(list(losses(self.engine, plain, images, noise, prompts, seed, batch)))

    def predictions(
        self, shots: Iterable[Shot], site: Site | str, edits: Mapping[str, Visit], batch: int = 16
    ) -> Iterator[EditOutcomes]:
        """What the denoiser predicts at `shots`, plainly and under each of `edits` of `site`, from the same noisy images.

        A shot without a timestep stands for all steps of its run. Under guidance the conditional half is edited and compared.
        """
        check_batch(batch)
        return predictions(self.engine, shots, self.engine.sites.locate(site), edits, batch)

    def images(
        self, shots: Iterable[Shot], site: Site | str, edits: Mapping[str, Visit], batch: int = 16
    ) -> Iterator[EditOutcomes]:
        """The images that the runs of `shots` end in, with pixels between 0 and 1, plainly and under each of `edits`.

        An edit is made at every step, under guidance in the conditional half.
        """
        check_batch(batch)
        return images(self.engine, shots, self.engine.sites.locate(site), edits, batch)

    def _located(self, sites: Iterable[Site | str] | Site | str) -> list[SiteModule]:
        return self.engine.sites.expand([sites] if isinstance(sites, (Site, str)) else sites)

    def _plain(self, steps: int | None, pixels: tuple[int, int] | None, guidance: float | None, check: bool = True) -> Shot:
        """The settings of a shot, checked; without prompt and seed."""
        card = self.engine.card
        pixels = (int(pixels[0]), int(pixels[1])) if pixels is not None else self._default_size()
        if check:
            check_size(pixels, card, self.engine.stride)
        steps = card.steps if steps is None else steps
        if steps < 1:
            raise BadInput(f"{steps} denoising steps are not possible. Ask for 1 or more.")
        guidance = card.guidance if guidance is None else guidance
        return Shot(
            model=self.name,
            revision=self.revision,
            precision=self.precision,
            pixels=pixels,
            steps=steps,
            guidance=float(guidance),
        )

    def _default_size(self) -> tuple[int, int]:
        if self.engine.card.pixels:
            return self.engine.card.pixels[0]
        # Flux has no sample_size: its pipelines draw 128 x 128 latents.
        sample = cast("int | Sequence[int]", self.engine.config("sample_size") or 128)
        height, width = (sample, sample) if isinstance(sample, int) else sample
        return height * self.engine.factor, width * self.engine.factor
