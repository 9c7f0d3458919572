"""Given images, noised to chosen levels: the activations they cause, and the denoiser's loss on them."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.image_processor import VaeImageProcessor
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from difflex import images
from difflex.errors import BadInput
from difflex.pipeline.engine import Engine, Run, map_batches
from difflex.pipeline.harvesting import in_order, predict, progress_bar, record
from difflex.pipeline.prompts import check_prompt
from difflex.pipeline.sites import SiteModule
from difflex.pipeline.sources import check_seed
from difflex.records import Activations, Shot

ImageInput = Image.Image | Path | str
Result = TypeVar("Result")


class NoisedImage(NamedTuple):
    """An image and its shot, except for the level of noise."""

    image: Image.Image
    shot: Shot


class NoisedBatch(NamedTuple):
    """Images of one size at one level of noise."""

    shots: tuple[Shot, ...]
    latents: Float[Tensor, "image channel row column"]
    """With the noise, mixed as in training."""
    timestep: float
    """The scheduler's timestep of the level."""
    target: Float[Tensor, "image channel row column"]
    """What the denoiser is trained to predict."""


def harvest_images(
    engine: Engine,
    inputs: Iterable[NoisedImage],
    levels: Sequence[float],
    sites: Sequence[SiteModule],
    batch: int,
    progress: bool,
) -> Iterator[Activations]:
    """Yield the activations of `sites` at images: for each batch of one size, each level of noise, each site."""
    if not engine.family.blocks:
        raise BadInput(
            f"{type(engine.diffusers).__name__} has no row in the table of families: difflex does not know how it takes in an "
            "image. Harvest it from prompts."
        )
    with progress_bar(progress) as bar:
        for noised in _noised_batches(engine, inputs, levels, batch):
            for recorded in _map_rows(engine, noised, batch, lambda run: record(engine, run, sites)):
                for activations in in_order(engine, recorded, sites):
                    bar.update(activations.values.shape[:2].numel() * (activations.site == sites[0].site))
                    yield activations


def losses(engine: Engine, inputs: Iterable[NoisedImage], levels: Sequence[float], batch: int) -> Float[Tensor, "image level"]:
    """Return the mean squared error of the denoiser's prediction for each image and level."""
    columns: list[Tensor] = []
    for noised in _noised_batches(engine, inputs, levels, batch):
        results = _map_rows(engine, noised, batch, lambda run: predict(engine, run, {}))
        predicted = torch.cat([outcome.plain for outcomes in results for outcome in outcomes])
        target = _layout(engine, noised.target)
        columns.append((predicted.float() - target.float()).square().flatten(1).mean(1).cpu())
    starts = range(0, len(columns), len(levels))
    return torch.cat([torch.stack(columns[start : start + len(levels)], dim=1) for start in starts])


def differentiable_losses(
    engine: Engine, shots: Sequence[Shot], pixels: Float[Tensor, "image channel row column"], level: float
) -> Float[Tensor, " image"]:
    """Return the losses of images, pixels between 0 and 1, at one level of noise, with gradients with respect to these."""
    latents = _latents(engine, pixels * 2 - 1)
    noised = NoisedBatch(tuple(shots), *_add_noise(engine, latents, _noise(latents, shots), level))
    with _denoiser_input(engine, _layout(engine, noised.latents), noised.timestep):
        [outcome] = predict(engine, Run(noised.shots, (noised.timestep,)), {}, gradients=True)
    return (outcome.plain.float() - _layout(engine, noised.target).float()).square().flatten(1).mean(1)


def _noise(latents: Tensor, shots: Sequence[Shot]) -> Tensor:
    """Return noise like the latents of images; that of each shot depends on its seed alone."""
    generators = [torch.Generator("cpu").manual_seed(shot.seed) for shot in shots]
    return torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators]).to(latents)


def _noised_batches(engine: Engine, inputs: Iterable[NoisedImage], levels: Sequence[float], batch: int) -> Iterator[NoisedBatch]:
    """Encode neighbours of one size, at most `batch`, and yield them at each level."""
    for group in _by_size(inputs, batch):
        parts = map_batches(engine, lambda part: _encode(engine, part), group, batch)
        latents = torch.cat([part_latents for _, part_latents in parts])
        noise = _noise(latents, [image.shot for image in group])
        for level in levels:
            shots = tuple(replace(image.shot, noise=level) for image in group)
            yield NoisedBatch(shots, *_add_noise(engine, latents, noise, level))


def _add_noise(engine: Engine, latents: Tensor, noise: Tensor, level: float) -> tuple[Tensor, float, Tensor]:
    """Return the noised latents, the timestep and the target of a `NoisedBatch`."""
    if engine.family.flow:
        return (1 - level) * latents + level * noise, 1000.0 * level, noise - latents
    scheduler = engine.diffusers.components["scheduler"]
    timestep = round(level * (len(scheduler.alphas_cumprod) - 1))
    signal = float(scheduler.alphas_cumprod[timestep])
    noised = signal**0.5 * latents + (1 - signal) ** 0.5 * noise
    velocity = signal**0.5 * noise - (1 - signal) ** 0.5 * latents
    targets: dict[str, Tensor] = {"epsilon": noise, "sample": latents, "v_prediction": velocity}
    return noised, float(timestep), targets[scheduler.config.prediction_type]


def _map_rows(engine: Engine, noised: NoisedBatch, batch: int, function: Callable[[Run], Result]) -> Iterator[Result]:
    """Yield the results of `function` for runs in which the denoiser gets rows of `noised`, at most `batch` at once."""

    def call(rows: Sequence[int]) -> Result:
        with _denoiser_input(engine, _layout(engine, noised.latents[list(rows)]), noised.timestep):
            return function(Run(tuple(noised.shots[row] for row in rows), (noised.timestep,)))

    return (result for _, result in map_batches(engine, call, range(len(noised.shots)), batch, split=True))


def noise_levels(noise: float | Sequence[float]) -> list[float]:
    """Return the levels of noise as a list; raise an error for those that are not between 0 and 1."""
    levels = [float(noise)] if isinstance(noise, (int, float)) else [float(level) for level in noise]
    for level in levels:
        if not 0 <= level <= 1:
            raise BadInput(f"Noise of {level:g} is not possible. Give a level between 0 (the image) and 1 (pure noise).")
    return levels


def noised_images(
    engine: Engine,
    settings: Shot,
    images: Iterable[ImageInput],
    prompts: str | Iterable[str],
    names: Iterable[str | None] | None,
    seed: int,
    held_out: float = 0.1,
) -> Iterator[NoisedImage]:
    """Open `images` lazily and yield them with their shots; image i is noised by the seed `seed + i`."""
    prompts = repeat(prompts) if isinstance(prompts, str) else prompts
    names = repeat(None) if names is None else names
    prompts, names = iter(prompts), iter(names)
    for i, source in enumerate(images):
        prompt, name = next(prompts, None), next(names, None)
        if prompt is None:
            raise BadInput(f"There are more images than prompts: image {i} has none. Give one for each, or none at all.")
        image = open_image(source)
        pixels = (image.height, image.width)
        engine.defaults.check_pixels(pixels, engine.token_pixels)
        content = hashlib.sha256(image.tobytes()).hexdigest()
        name = name or (f"sha256:{content[:16]}" if isinstance(source, Image.Image) else str(source))
        split = Shot.split_of(content, held_out)
        yield NoisedImage(
            image,
            replace(settings, prompt=check_prompt(prompt), seed=check_seed(seed + i), pixels=pixels, image=name, split=split),
        )


def open_image(source: ImageInput) -> Image.Image:
    """Open an image in RGB."""
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    return images.open_image(Path(source)).convert("RGB")


def _by_size(images: Iterable[NoisedImage], batch: int) -> Iterator[list[NoisedImage]]:
    """Yield neighbours of one size, at most `batch`: no more images are in memory than a batch needs."""
    group: list[NoisedImage] = []
    for image in chain(images, [None]):
        if group and (image is None or len(group) == batch or image.shot.pixels != group[0].shot.pixels):
            yield group
            group = []
        if image is not None:
            group.append(image)


@torch.no_grad()
def _encode(engine: Engine, group: Sequence[NoisedImage]) -> Float[Tensor, "image channel row column"]:
    """Encode images into latents."""
    processor = cast(VaeImageProcessor, engine.diffusers.image_processor)
    return _latents(engine, processor.preprocess([image.image for image in group], *group[0].shot.pixels))


def _latents(engine: Engine, pixels: Float[Tensor, "image channel row column"]) -> Float[Tensor, "image channel row column"]:
    """Encode pixels between -1 and 1 into latents with the scale of the training data."""
    vae = engine.diffusers.components["vae"]
    with _exact(vae):
        latents = vae.encode(pixels.to(engine.device, vae.dtype)).latent_dist.mode().float()
    if engine.family.latents == "patchified":
        latents = rearrange(latents, "b c (h p) (w q) -> b (c p q) h w", p=2, q=2)
        mean, variance = (stats.view(1, -1, 1, 1).to(latents) for stats in (vae.bn.running_mean, vae.bn.running_var))
        return (latents - mean) / (variance + vae.config.batch_norm_eps).sqrt()
    mean, deviation = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean and deviation:  # variants of SDXL
        mean, deviation = (torch.tensor(stats).view(1, -1, 1, 1).to(latents) for stats in (mean, deviation))
        return (latents - mean) * vae.config.scaling_factor / deviation
    return (latents - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor


@contextmanager
def _exact(vae: nn.Module) -> Iterator[None]:
    """Compute in fp32 if the config of the VAE asks for it: that of SDXL overflows in fp16."""
    if next(vae.parameters()).dtype != torch.float16 or not dict(cast(ConfigMixin, vae).config).get("force_upcast"):
        yield
        return
    try:
        vae.float()
        yield
    finally:
        vae.half()


def _layout(engine: Engine, latents: Tensor) -> Tensor:
    """Rearrange latents as the denoiser of the family takes them in."""
    if engine.family.latents == "packed":
        return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
    return rearrange(latents, "b c h w -> b (h w) c") if engine.family.latents == "patchified" else latents


@contextmanager
def _denoiser_input(engine: Engine, latents: Tensor, timestep: float) -> Iterator[None]:
    """Within the block, replace the latents and the timestep that the pipeline passes to the denoiser."""

    def swap(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[tuple[object, ...], dict[str, object]]:
        # U-Nets and PixArt take their sample by position, some also their timestep.
        positional = ("sample", "timestep") if "hidden_states" not in kwargs else ()
        values = {**kwargs, **dict(zip(positional, args, strict=False))}
        name = "hidden_states" if "hidden_states" in values else "sample"
        sample, old_timestep = values[name], values["timestep"]
        assert isinstance(sample, Tensor) and isinstance(old_timestep, Tensor) and sample.shape == latents.shape
        new = (latents.to(sample), torch.full_like(old_timestep, timestep / engine.family.timestep_scale))
        replaced = {key: value for key, value in zip((name, "timestep"), new, strict=True) if key in kwargs}
        return (*new[: len(args)], *args[len(new) :]), {**kwargs, **replaced}

    with engine.denoiser.register_forward_pre_hook(swap, with_kwargs=True):
        yield
