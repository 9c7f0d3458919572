"""`Pipeline`: the object that users work with. Its methods check their arguments and call one function of this folder each."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, get_args

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from difflex.choices import Precision
from difflex.errors import BadInput, UnknownName
from difflex.pipeline.engine import Engine, map_batches
from difflex.pipeline.harvesting import ImageBatch, edited_images, harvest, harvest_with_images, predictions
from difflex.pipeline.noising import ImageInput, differentiable_losses, harvest_images, losses, noise_levels, noised_images
from difflex.pipeline.profile import SiteRow, site_rows
from difflex.pipeline.prompts import check_prompt
from difflex.pipeline.sites import SiteFunction, SiteModule, hook_site
from difflex.pipeline.sources import check_pixels, check_seed
from difflex.records import Activations, EditOutcomes, Half, Kind, Shot, Site
from difflex.values import fits, shown

Sites = Iterable[Site | str] | Site | str


MOST_STEPS = 1000


class GeneratedImage(NamedTuple):
    """An image, and the shot that generates it again."""

    image: Image.Image
    shot: Shot


class Pipeline:
    """A text-to-image model: a diffusers pipeline with its default settings and its sites."""

    def __init__(self, engine: Engine, name: str, revision: str | None, precision: Precision) -> None:
        self.name = name
        self.revision = revision
        self.precision: Precision = precision
        self.engine = engine

    @property
    def diffusers(self) -> DiffusionPipeline:
        """The diffusers pipeline, for all that diffusers can do with it; `at` works for its runs too."""
        return self.engine.diffusers

    @property
    def denoiser(self) -> nn.Module:
        """The component that is called once per step."""
        return self.engine.denoiser

    def generate(
        self,
        prompts: str | Sequence[str],
        seed: int = 0,
        steps: int | None = None,
        pixels: tuple[int, int] | None = None,
        guidance: float | None = None,
        batch: int = 16,
        edits: Iterable[tuple[Site | str, SiteFunction]] = (),
    ) -> list[GeneratedImage]:
        """Generate an image for each prompt; prompt i gets the seed `seed + i`. None stands for the model's default.

        `edits` change the activations of sites during the run, as `at` does; `difflex.steering.steering_hooks` makes them.
        """
        prompts = [check_prompt(prompt) for prompt in ([prompts] if isinstance(prompts, str) else prompts)]
        _check_batch(batch)
        self.engine.defaults.warn_of_unknown_words(prompts)
        settings = self._settings(steps, pixels, guidance)
        seeds = range(check_seed(seed), check_seed(seed + max(len(prompts) - 1, 0)) + 1)
        shots = [
            replace(settings, prompt=prompt, seed=seed, split=Shot.split_of(prompt))
            for prompt, seed in zip(prompts, seeds, strict=False)
        ]
        with ExitStack() as stack:
            for site, function in edits:
                stack.enter_context(self.at(site, function))
            batches = [images for _, images in map_batches(self.engine, self.engine.images, shots, batch)]
        images = [image for batch_images in batches for image in batch_images]
        return [GeneratedImage(image, shot) for image, shot in zip(images, shots, strict=True)]

    def differentiable_images(
        self, shots: Sequence[Shot], edits: Iterable[tuple[Site | str, SiteFunction]] = ()
    ) -> Float[Tensor, "image channel row column"]:
        """Return the images of `shots`, one batch, as pixels between 0 and 1, with gradients with respect to what `edits` add.

        The memory for them grows with the images, the steps and the size of the model.
        """
        with ExitStack() as stack:
            for site, function in edits:
                stack.enter_context(self.at(site, function))
            return self.engine.pixels([replace(shot, timestep=None) for shot in shots], gradients=True)

    def differentiable_losses(
        self, images: Float[Tensor, "image channel row column"], noise: float, seed: int = 0
    ) -> Float[Tensor, " image"]:
        """Return the denoiser's loss on images, one batch of pixels between 0 and 1, with gradients with respect to these.

        Without a caption, at one level of noise; the noise of image i has the seed `seed + i`, as in `losses`.
        """
        pixels = (images.shape[-2], images.shape[-1])
        self.engine.defaults.check_pixels(pixels, self.engine.token_pixels)
        [level] = noise_levels(noise)
        settings = replace(self._settings(1, pixels, 1.0), noise=level, image="pixels")
        shots = [replace(settings, seed=seed + i) for i in range(len(images))]
        return differentiable_losses(self.engine, shots, images, level)

    def site(self, name: Site | str) -> Site:
        """Return the site called `name` in its canonical notation; the error for an unknown one shows the nearest."""
        return self.engine.sites.locate(name).site

    def expand(self, sites: Sites) -> list[Site]:
        """Return the sites that names and patterns such as `double.*:text` stand for, in canonical notation."""
        return [module.site for module in self.engine.sites.expand([sites] if isinstance(sites, (Site, str)) else sites)]

    def kinds(self, site: Site) -> tuple[Kind, ...]:
        """Return the kinds of site that the block of `site` has in its stream."""
        return self.engine.sites.kinds(site.path, site.stream)

    def sites(self, pattern: str = "*", pixels: tuple[int, int] | None = None) -> list[SiteRow]:
        """Return a row for each block and stream whose name matches `pattern`, with the token counts of this image size."""
        return site_rows(self.engine, self._settings(1, pixels, None), pattern)

    def at(self, site: Site | str, function: SiteFunction, half: Half | None = None) -> AbstractContextManager[None]:
        """Within the block, call `function` with the activations of `site` at each step, tokens in row-major order.

        If it returns a tensor, that replaces the activations; if it returns None, they stay. Its argument is a copy that it may
        change in place. Under guidance it is called for each half, or only for `half`. Blocks nest: an inner one sees the
        changes of an outer one. Meanwhile other threads cannot use the pipeline, and the function itself cannot.
        """
        if half is not None and half not in get_args(Half):
            raise UnknownName.among("The half", half, get_args(Half))
        if not callable(function):
            raise BadInput(
                f"At the site '{site}' a function is needed, not {shown(function)}: it gets activations and a HookContext."
            )
        return self._at(self.engine.sites.locate(site), function, half)

    @contextmanager
    def _at(self, target: SiteModule, function: SiteFunction, half: Half | None) -> Iterator[None]:
        with self.engine.tracker.claimed(at=True), hook_site(self.engine.tracker, target, function, half):
            yield

    def shots(
        self,
        prompts: str | Iterable[str],
        seeds: Iterable[int] | None = range(1),
        steps: int | None = None,
        keep_steps: Iterable[int] | None = None,
        pixels: tuple[int, int] | None = None,
        guidance: float | None = None,
    ) -> Iterator[Shot]:
        """Yield a shot for each prompt, seed and kept step (default: all steps), in this order; reads `prompts` lazily.

        Without `seeds`, prompt number i has the seed i. If the scheduler repeats a timestep, only the first of its steps is kept.
        """
        settings = self._settings(steps, pixels, guidance)
        prompts = [prompts] if isinstance(prompts, str) else prompts
        # A range may be too long for memory; its ends stand for all of it.
        seeds = seeds if seeds is None or isinstance(seeds, range) else list(seeds)
        for seed in (seeds[0], seeds[-1]) if isinstance(seeds, range) and seeds else seeds or ():
            check_seed(seed)
        timesteps = self.engine.timesteps(settings)
        kept_steps = range(len(timesteps)) if keep_steps is None else list(keep_steps)
        beyond = [step for step in kept_steps if not 0 <= step < len(timesteps)]
        if beyond:
            raise BadInput(f"Step {beyond[0]} cannot be kept of a run of {len(timesteps)} steps, numbered from 0.")
        kept_timesteps = list(dict.fromkeys(timesteps[step] for step in kept_steps))
        return (
            replace(settings, prompt=check_prompt(prompt), seed=int(seed), timestep=timestep, split=Shot.split_of(prompt))
            for number, prompt in enumerate(prompts)
            for seed in ((number,) if seeds is None else seeds)
            for timestep in kept_timesteps
        )

    def harvest(self, shots: Iterable[Shot], sites: Sites, batch: int = 16, progress: bool = True) -> Iterator[Activations]:
        """Yield the activations of `sites` (patterns too) at `shots`: for each batch of runs, each kept step, each site.

        A shot without a timestep stands for all steps of its run. Under guidance the conditional half is harvested.
        """
        _check_batch(batch)
        return harvest(self.engine, shots, self._modules(sites), batch, progress)

    def harvest_with_images(self, shots: Iterable[Shot], sites: Sites, batch: int = 16) -> Iterator[ImageBatch]:
        """Yield the images of `shots` with the activations of `sites`, batch by batch; see `harvest`."""
        _check_batch(batch)
        return harvest_with_images(self.engine, shots, self._modules(sites), batch)

    def harvest_images(
        self,
        images: ImageInput | Iterable[ImageInput],
        noise: float | Sequence[float],
        sites: Sites,
        prompts: str | Iterable[str] | None = None,
        names: str | Iterable[str] | None = None,
        seed: int = 0,
        batch: int = 16,
        progress: bool = True,
        held_out: float = 0.1,
    ) -> Iterator[Activations]:
        """Yield the activations of `sites` for given images, noised to one or several levels (0 the image, 1 pure noise).

        Each takes one call of the denoiser, without guidance; the noise of image i has the seed `seed + i`. Give a prompt for
        each image, a single one for all, or none for empty prompts. `held_out` is the share of images in the split of that name.
        """
        _check_batch(batch)
        check_seed(seed)
        settings = self._settings(1, None, None)
        # Two halves would be two passes for one image.
        settings = replace(settings, guidance=1.0) if self.engine.is_guided(settings.guidance) else settings
        images = [images] if isinstance(images, (str, Path, Image.Image)) else images
        names = [names] if isinstance(names, str) else names
        inputs = noised_images(self.engine, settings, images, "" if prompts is None else prompts, names, seed, held_out)
        return harvest_images(self.engine, inputs, noise_levels(noise), self._modules(sites), batch, progress)

    def losses(
        self,
        images: Iterable[ImageInput],
        noise: float | Sequence[float],
        prompts: str | Iterable[str] = "",
        seed: int = 0,
        batch: int = 16,
    ) -> Float[Tensor, "image level"]:
        """Return the denoiser's training loss, a mean squared error, for each image at each level of noise.

        It is the smaller, the more an image resembles the training data. The noise of image i has the seed `seed + i`.
        """
        _check_batch(batch)
        check_seed(seed)
        settings = self._settings(1, None, 1.0)
        inputs = noised_images(self.engine, settings, images, prompts, None, seed)
        return losses(self.engine, inputs, noise_levels(noise), batch)

    def predictions(
        self, shots: Iterable[Shot], site: Site | str, edits: Mapping[str, SiteFunction], batch: int = 16
    ) -> Iterator[EditOutcomes]:
        """Yield the denoiser's predictions at `shots`, plain and under each edit of `site`, for the same noisy images.

        A shot without a timestep stands for all steps of its run. Under guidance the conditional half is edited and compared.
        """
        _check_batch(batch)
        return predictions(self.engine, shots, self.engine.sites.locate(site), edits, batch)

    def images(
        self, shots: Iterable[Shot], site: Site | str, edits: Mapping[str, SiteFunction], batch: int = 16
    ) -> Iterator[EditOutcomes]:
        """Yield the images of `shots`, plain and under each edit of `site`, with pixels between 0 and 1.

        An edit is made at every step, under guidance in the conditional half.
        """
        _check_batch(batch)
        return edited_images(self.engine, shots, self.engine.sites.locate(site), edits, batch)

    def _modules(self, sites: Sites) -> list[SiteModule]:
        """Return the modules of `sites`, of which there must be one."""
        modules = [self.engine.sites.locate(site) for site in self.expand(sites)]
        if not modules:
            raise BadInput("No site is given to harvest. Give at least one; `sites` lists them.")
        return modules

    def _settings(self, steps: int | None, pixels: tuple[int, int] | None, guidance: float | None) -> Shot:
        """Return the checked settings of a run as a shot without prompt and seed."""
        defaults = self.engine.defaults
        pixels = check_pixels(pixels) if pixels is not None else self.engine.default_pixels
        defaults.check_pixels(pixels, self.engine.token_pixels)
        steps = defaults.steps if steps is None else steps
        if not fits(int, steps) or not 1 <= steps <= MOST_STEPS:
            raise BadInput(f"{shown(steps)} denoising steps are not possible. Use 1 to {MOST_STEPS}.")
        if guidance is not None and not fits(float, guidance):
            raise BadInput(f"A guidance of {shown(guidance)} is not possible. Use a finite number.")
        return Shot(
            model=self.name,
            revision=self.revision,
            precision=self.precision,
            text_length=self.engine.text_length,
            pixels=pixels,
            steps=steps,
            guidance=float(defaults.guidance if guidance is None else guidance),
        )


def _check_batch(batch: int) -> None:
    if not fits(int, batch) or batch < 1:
        raise BadInput(f"A batch of {shown(batch)} images is not possible. Use 1 or more.")
