"""Given images, noised to a given level: their activations, where known masks meet them, and how well they are foretold."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from typing import NamedTuple, cast

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.image_processor import VaeImageProcessor
from einops import rearrange
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from tqdm import tqdm

from difflex.errors import BadInput
from difflex.pipeline.engine import Engine, StopForward
from difflex.pipeline.generation import check_size
from difflex.pipeline.harvesting import collect, yielded
from difflex.pipeline.predicting import prediction
from difflex.pipeline.sites import SiteModule
from difflex.records import Activations, Shot

__all__ = ["ImageInput", "harvest_images", "losses"]

ImageInput = Image.Image | Path | str


class GivenImage(NamedTuple):
    """An image and its shot, but for the noise."""

    image: Image.Image
    shot: Shot


def harvest_images(
    engine: Engine,
    plain: Shot,
    images: Iterable[ImageInput],
    noise: float | Sequence[float],
    sites: Sequence[SiteModule],
    prompts: Iterable[str],
    names: Iterable[str | None],
    seed: int,
    batch: int,
    progress: bool,
) -> Iterator[Activations]:
    """The activations of `sites` at `images`: for each batch of one size, each level of noise, each site."""
    if not engine.family.blocks:
        raise BadInput(
            f"{type(engine.diffusers).__name__} has no row in the table of families: how it takes in an image is not known. "
            "Harvest it from prompts."
        )
    levels = _levels(noise)
    # Two halves would be two passes for one image.
    plain = replace(plain, guidance=1.0) if engine.is_guided(plain.guidance) else plain
    asked = _given(engine, plain, images, prompts, names, seed)
    with tqdm(unit=" tokens", unit_scale=True, disable=None if progress else True, desc="harvest") as bar:
        for alike in _by_size(asked, batch):
            latents = torch.cat([latents for _, latents in engine.batches(lambda part: _encode(engine, part), alike, batch)])
            for level in levels:
                for activations in _at_level(engine, alike, latents, level, sites, batch):
                    bar.update(activations.values.shape[:2].numel() * (activations.site == sites[0].site))
                    yield activations


def losses(
    engine: Engine,
    plain: Shot,
    images: Iterable[ImageInput],
    noise: float | Sequence[float],
    prompts: Iterable[str],
    seed: int,
    batch: int,
) -> Iterator[Float[Tensor, "image level"]]:
    """How far the denoiser is from what it was trained to say of each image at each level: mean squared errors.

    For each batch of one size.
    """
    levels = _levels(noise)
    for alike in _by_size(_given(engine, replace(plain, guidance=1.0), images, prompts, repeat(None), seed), batch):
        latents = torch.cat([latents for _, latents in engine.batches(lambda part: _encode(engine, part), alike, batch)])
        yield torch.stack([_losses_at(engine, alike, latents, level, batch) for level in levels], dim=1)


def _losses_at(engine: Engine, given: Sequence[GivenImage], latents: Tensor, level: float, batch: int) -> Float[Tensor, " image"]:
    noise = _noises(given, latents)
    noised, timestep = _noised(engine, latents, noise, level)

    def work(rows: Sequence[int]) -> Tensor:
        return _answer(engine, [given[row].shot for row in rows], noised[list(rows)], timestep)

    answers = torch.cat([part for _, part in engine.batches(work, range(len(given)), batch, shared=True)])
    target = _layout(engine, _target(engine, latents, noise, level))
    return (answers.float() - target.float()).square().flatten(1).mean(1).cpu()


def _levels(noise: float | Sequence[float]) -> list[float]:
    levels = [float(noise)] if isinstance(noise, (int, float)) else [float(level) for level in noise]
    for level in levels:
        if not 0 <= level <= 1:
            raise BadInput(f"Noise of {level:g} is not possible. Give a level between 0 (the image) and 1 (pure noise).")
    return levels


def _answer(engine: Engine, shots: Sequence[Shot], noised: Tensor, timestep: float) -> Float[Tensor, "shot ..."]:
    """What the denoiser says of noised latents."""
    said: list[Tensor] = []

    def answered(module: nn.Module, args: tuple[object, ...], output: object) -> None:
        said.append(prediction(engine, engine.clock.call, output))
        raise StopForward

    with _entering(engine, _layout(engine, noised), timestep), engine.clock.watching():
        handle = engine.denoiser.register_forward_hook(answered)
        try:
            engine.run(shots, timestep)
        finally:
            handle.remove()
    return said[0]


def _target(engine: Engine, latents: Tensor, noise: Tensor, level: float) -> Tensor:
    """What the denoiser was trained to say."""
    if engine.family.flow:
        return noise - latents
    scheduler = engine.diffusers.components["scheduler"]
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return latents
    share = float(scheduler.alphas_cumprod[round(level * (len(scheduler.alphas_cumprod) - 1))])
    return share**0.5 * noise - (1 - share) ** 0.5 * latents


def _noises(given: Sequence[GivenImage], latents: Tensor) -> Tensor:
    """The noise of each shot's seed."""
    return torch.stack(
        [torch.randn(latents.shape[1:], generator=torch.Generator("cpu").manual_seed(one.shot.seed)) for one in given]
    ).to(latents)


def _given(
    engine: Engine,
    plain: Shot,
    images: Iterable[ImageInput],
    prompts: Iterable[str],
    names: Iterable[str | None],
    seed: int,
) -> Iterator[GivenImage]:
    told, called = iter(prompts), iter(names)
    for i, given in enumerate(images):
        prompt, name = next(told, None), next(called, None)
        if prompt is None:
            raise BadInput(f"There are more images than prompts: image {i} has none. Give one for each, or none at all.")
        image = open_image(given)
        pixels = (image.height, image.width)
        check_size(pixels, engine.card, engine.stride)
        content = hashlib.sha256(image.tobytes()).hexdigest()
        name = name or (f"sha256:{content[:16]}" if isinstance(given, Image.Image) else str(given))
        yield GivenImage(
            image, replace(plain, prompt=prompt, seed=seed + i, pixels=pixels, image=name, split=Shot.split_of(content))
        )


def open_image(given: ImageInput) -> Image.Image:
    """The image, in red, green and blue."""
    if isinstance(given, Image.Image):
        return given.convert("RGB")
    try:
        with Image.open(given) as file:
            return file.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise BadInput(f"The image {given} cannot be read ({error}). Name a PNG, JPEG or WebP file.") from error


def _by_size(asked: Iterable[GivenImage], batch: int) -> Iterator[list[GivenImage]]:
    """Neighbours of one size, a batch at most: no more images are held than one batch needs."""
    group: list[GivenImage] = []
    for given in chain(asked, [None]):
        if group and (given is None or len(group) == batch or given.shot.pixels != group[0].shot.pixels):
            yield group
            group = []
        if given is not None:
            group.append(given)


def _at_level(
    engine: Engine, given: Sequence[GivenImage], latents: Tensor, level: float, sites: Sequence[SiteModule], batch: int
) -> Iterator[Activations]:
    noised, timestep = _noised(engine, latents, _noises(given, latents), level)

    def work(rows: Sequence[int]):
        shots = [replace(given[row].shot, noise=level) for row in rows]
        with _entering(engine, _layout(engine, noised[list(rows)]), timestep):
            return shots, collect(engine, shots, [timestep], sites, timestep)

    for _, (shots, found) in engine.batches(work, range(len(given)), batch, shared=True):
        yield from yielded(engine, shots, found, sites)


@torch.no_grad()
def _encode(engine: Engine, given: Sequence[GivenImage]) -> Float[Tensor, "image channel row column"]:
    """Latents of images, scaled as the denoiser was trained on."""
    vae = engine.diffusers.components["vae"]
    processor = cast(VaeImageProcessor, engine.diffusers.image_processor)
    pixels = processor.preprocess([one.image for one in given], *given[0].shot.pixels)
    with _exact(vae):
        latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float()
    if engine.family.latents == "patchified":
        latents = rearrange(latents, "b c (h p) (w q) -> b (c p q) h w", p=2, q=2)
        mean, variance = (each.view(1, -1, 1, 1).float() for each in (vae.bn.running_mean, vae.bn.running_var))
        return (latents - mean) / (variance + vae.config.batch_norm_eps).sqrt()
    mean, deviation = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean and deviation:  # of SDXL's relatives
        mean, deviation = (torch.tensor(each).view(1, -1, 1, 1).to(latents) for each in (mean, deviation))
        return (latents - mean) * vae.config.scaling_factor / deviation
    return (latents - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor


@contextmanager
def _exact(vae: nn.Module) -> Iterator[None]:
    """SDXL's autoencoder overflows in fp16 and says so in its config."""
    if next(vae.parameters()).dtype != torch.float16 or not dict(cast(ConfigMixin, vae).config).get("force_upcast"):
        yield
        return
    try:
        vae.float()
        yield
    finally:
        vae.half()


def _noised(engine: Engine, latents: Tensor, noise: Tensor, level: float) -> tuple[Tensor, float]:
    """Latents at a level of noise and what the scheduler calls it, mixed as the model was trained."""
    if engine.family.flow:
        return (1 - level) * latents + level * noise, 1000.0 * level
    remaining = engine.diffusers.components["scheduler"].alphas_cumprod
    timestep = round(level * (len(remaining) - 1))
    share = float(remaining[timestep])
    return share**0.5 * latents + (1 - share) ** 0.5 * noise, float(timestep)


def _layout(engine: Engine, latents: Tensor) -> Tensor:
    """Latents as the family's denoiser takes them in."""
    if engine.family.latents == "packed":
        return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
    return rearrange(latents, "b c h w -> b (h w) c") if engine.family.latents == "patchified" else latents


@contextmanager
def _entering(engine: Engine, latents: Tensor, timestep: float) -> Iterator[None]:
    """While it lasts, the denoiser is given these latents and this timestep in place of the pipeline's own."""

    def swap(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[tuple[object, ...], dict[str, object]]:
        # U-Nets and PixArt are given their sample, some also their timestep, by position.
        values = {**kwargs, **dict(zip(("sample", "timestep") if "hidden_states" not in kwargs else (), args, strict=False))}
        name = "hidden_states" if "hidden_states" in values else "sample"
        sample, given = values[name], values["timestep"]
        assert isinstance(sample, Tensor) and isinstance(given, Tensor) and sample.shape == latents.shape
        time = torch.full_like(given, timestep / engine.family.timestep_scale)
        new = (latents.to(sample), time)
        replaced = {key: value for key, value in zip((name, "timestep"), new, strict=True) if key in kwargs}
        return (*new[: len(args)], *args[len(new) :]), {**kwargs, **replaced}

    handle = engine.denoiser.register_forward_pre_hook(swap, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
