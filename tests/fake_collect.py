"""Images without a model: activations at two sites with known codes, and books collected from them."""

import time
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from difflex.dictionaries import DictionaryOrigin, Neurons
from difflex.features import ImageAlbum
from difflex.features.collecting import CollectBatch, CollectConfig, CollectTarget, collect
from difflex.records import Activations, Shot, Site

SITES = (Site("double.0", "neurons"), Site("single.1", "neurons"))
SIZE, GRID, BATCH = 12, (4, 4), 5
FEW = CollectConfig(top_examples=3, random_examples=4, silent_examples=2, silent_pool=10, coactive=3)


def planted_values(image: int, site: Site, timestep: float) -> Tensor:
    """Activations of an image at a site: many positive values, a few negative ones; later features fire more rarely."""
    generator = torch.Generator().manual_seed(1 + image * 100 + SITES.index(site) * 10 + int(timestep) // 250)
    tokens = GRID[0] * GRID[1]
    rare = torch.linspace(0.5, 0.005, SIZE)
    values = (torch.rand(tokens, SIZE, generator=generator) + 0.01) * (torch.rand(tokens, SIZE, generator=generator) < rare)
    is_present = torch.rand(SIZE, generator=generator) < 0.7
    values[:, 0] *= 1 - 1.5 * (torch.rand(tokens, generator=generator) < 0.1)
    values[:, -1] = 0
    return values * is_present


def fake_image(image: int) -> Image.Image:
    return Image.new("RGB", (16, 16), (image % 251, image * 7 % 256, image // 251))


def fake_shot(image: int, timestep: float) -> Shot:
    split = "held-out" if image % 5 == 0 else "train"
    return Shot(model="fake", prompt=f"image {image}", pixels=(16, 16), steps=2, guidance=0.0, timestep=timestep, split=split)


def fake_batch(images: list[int], timesteps: tuple[float, ...]) -> CollectBatch:
    """Return a batch of these images."""
    activations = [
        Activations(
            site=site,
            values=torch.stack([planted_values(image, site, timestep) for image in images]),
            shots=tuple(fake_shot(image, timestep) for image in images),
            grid=GRID,
        )
        for timestep in timesteps
        for site in SITES
    ]
    return CollectBatch([fake_image(image) for image in images], activations)


def fake_source(order: list[int], timesteps: tuple[float, ...] = (1000.0,), batch: int = BATCH, delay: float = 0.0):
    """Return a source of images in this order."""

    def stream(start: int) -> Iterator[CollectBatch]:
        for first in range(start, len(order), batch):
            time.sleep(delay)
            yield fake_batch(order[first : first + batch], timesteps)

    return stream


def targets(folder: Path) -> list[CollectTarget]:
    """Return the neurons of both sites as dictionaries."""
    return [
        CollectTarget(
            dictionary=Neurons(width=SIZE, k=SIZE, origin=DictionaryOrigin(site=site)),
            name=f"{site}/neurons-{SIZE}-k{SIZE}",
            fingerprint="abc",
            book=folder / f"{site.folder}.sqlite",
        )
        for site in SITES
    ]


def collect_fakes(
    folder: Path,
    order: list[int],
    timesteps: tuple[float, ...] = (1000.0,),
    delay: float = 0.0,
    save_seconds: float = 60.0,
    batch: int = BATCH,
) -> list[Path]:
    """Make the books of both sites."""
    return collect(
        targets(folder),
        fake_source(order, timesteps, batch, delay),
        ImageAlbum(folder / "images"),
        data="planted",
        checkpoint=folder / "state.safetensors",
        config=FEW,
        save_seconds=save_seconds,
        progress=False,
    )
