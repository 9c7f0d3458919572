"""Pictures without a model: planted activations at two sites whose every code is known. As a script it collects, to be killed."""

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from difflex.book import ImageAlbum
from difflex.dictionary import DictionaryOrigin, Neurons
from difflex.examples import CollectBatch, CollectConfig, CollectTarget, collect
from difflex.records import Activations, Shot, Site

SITES = (Site("double.0", "neurons"), Site("single.1", "neurons"))
SIZE, GRID, BATCH = 12, (4, 4), 5
FEW = CollectConfig(top=3, sampled=4, silent=2, pool=10, beside=3)


def planted(picture: int, site: Site, timestep: float) -> Tensor:
    """What a picture's tokens hold at a site: some numbers above 0, few below, the later features the more rarely."""
    generator = torch.Generator().manual_seed(1 + picture * 100 + SITES.index(site) * 10 + int(timestep) // 250)
    tokens = GRID[0] * GRID[1]
    rare = torch.linspace(0.5, 0.005, SIZE)
    values = (torch.rand(tokens, SIZE, generator=generator) + 0.01) * (torch.rand(tokens, SIZE, generator=generator) < rare)
    here = torch.rand(SIZE, generator=generator) < 0.7
    values[:, 0] *= 1 - 1.5 * (torch.rand(tokens, generator=generator) < 0.1)
    values[:, -1] = 0
    return values * here


def painted(picture: int) -> Image.Image:
    return Image.new("RGB", (16, 16), (picture % 251, picture * 7 % 256, picture // 251))


def shot(picture: int, timestep: float) -> Shot:
    split = "held-out" if picture % 5 == 0 else "train"
    return Shot(model="fake", prompt=f"picture {picture}", pixels=(16, 16), steps=2, guidance=0.0, timestep=timestep, split=split)


def met(pictures: list[int], timesteps: tuple[float, ...]) -> CollectBatch:
    """A batch of these pictures."""
    activations = [
        Activations(
            site=site,
            values=torch.stack([planted(picture, site, timestep) for picture in pictures]),
            shots=tuple(shot(picture, timestep) for picture in pictures),
            grid=GRID,
        )
        for timestep in timesteps
        for site in SITES
    ]
    return CollectBatch([painted(picture) for picture in pictures], activations)


def source(order: list[int], timesteps: tuple[float, ...] = (1000.0,), batch: int = BATCH, delay: float = 0.0):
    """All pictures in this order, but for those left out."""

    def stream(start: int) -> Iterator[CollectBatch]:
        for first in range(start, len(order), batch):
            time.sleep(delay)
            yield met(order[first : first + batch], timesteps)

    return stream


def subjects(folder: Path) -> list[CollectTarget]:
    """The neurons of both sites as dictionaries."""
    return [
        CollectTarget(
            dictionary=Neurons(width=SIZE, k=SIZE, origin=DictionaryOrigin(site=site)),
            name=f"{site}/neurons-{SIZE}-k{SIZE}",
            checksum="abc",
            book=folder / f"{site.folder}.sqlite",
        )
        for site in SITES
    ]


def collected(
    folder: Path, order: list[int], timesteps: tuple[float, ...] = (1000.0,), delay: float = 0.0, every: float = 60.0, **other
) -> list[Path]:
    """The books of both sites."""
    flow = source(order, timesteps, other.pop("batch", BATCH), delay)
    return collect(
        [replace(subject, **other) for subject in subjects(folder)],
        flow,
        ImageAlbum(folder / "pictures"),
        data="planted",
        state=folder / "state.safetensors",
        settings=FEW,
        every=every,
        progress=False,
    )


def main() -> None:
    """Collect; the flags say what."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=int, default=120)
    parser.add_argument("--delay", type=float, default=0.15)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    print("begins", flush=True)
    collected(flags.folder, [*range(flags.pictures)], (1000.0, 500.0), flags.delay, every=0.0)


if __name__ == "__main__":
    main()
