"""`collect`: one pass over images and their activations that makes the books of several dictionaries at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from difflex.errors import BadInput
from difflex.features.collector import CollectConfig, FeatureCollector
from difflex.features.firing import image_key
from difflex.features.images import ImageAlbum
from difflex.features.registry import CollectBatch, CollectCheckpoint, ShotRegistry
from difflex.features.results import AtomLocation, CollectTarget, write_book
from difflex.records import Shot

__all__ = ["AtomLocation", "BatchSource", "CollectBatch", "CollectConfig", "CollectTarget", "DrawImages", "collect"]

BatchSource = Callable[[int], Iterator[CollectBatch]]
"""Takes a number of images to skip and yields batches of all others, the same ones each time."""
DrawImages = Callable[[Sequence[Shot]], Sequence[Image.Image]]
"""Returns the final images of the runs of some shots."""
DRAWN_AT_ONCE = 32
"""Images of ITDA atoms drawn at once."""


def collect(
    targets: Sequence[CollectTarget],
    source: BatchSource,
    album: ImageAlbum,
    *,
    data: str,
    checkpoint: Path,
    config: CollectConfig = CollectConfig(),  # noqa: B008 (a constant)
    draw: DrawImages | None = None,
    save_seconds: float = 60.0,
    images: int | None = None,
    progress: bool = True,
    device: torch.device | str | None = None,
) -> list[Path]:
    """Make the books of `targets` from all images of `source` and return their paths.

    The state is saved to `checkpoint` every `save_seconds`; a killed pass continues from there and makes the same books. `data`
    describes the images: a checkpoint of other data is ignored. `draw` makes the images of ITDA atoms that the source does not
    contain. Dictionaries run on `device`, by default a GPU if there is one.
    """
    targets = _moved(targets, device)
    locations = [location for target in targets for location in target.patches.values()]
    patches = {image_key(location.shot): location.shot for location in locations if location.shot.image is None}
    collectors = [FeatureCollector(target.dictionary, config) for target in targets]
    registry = ShotRegistry(album, patches)
    fingerprints = {target.name: target.fingerprint for target in targets}
    request = {"dictionaries": fingerprints, "config": asdict(config), "data": data}
    saved = CollectCheckpoint(path=checkpoint, request=request)
    saved.restore(collectors, registry)
    last_save = time.monotonic()
    for _ in _batches_added(targets, collectors, registry, source, images, progress):
        if time.monotonic() - last_save > save_seconds:
            saved.save(collectors, registry)
            last_save = time.monotonic()
    saved.save(collectors, registry)
    for _ in _drawn_patches(patches, registry, draw, progress):
        if time.monotonic() - last_save > save_seconds:
            saved.save(collectors, registry)
            last_save = time.monotonic()
    books = [write_book(target, collector, registry, data) for target, collector in zip(targets, collectors, strict=True)]
    saved.remove()
    return books


def _moved(targets: Sequence[CollectTarget], device: torch.device | str | None) -> Sequence[CollectTarget]:
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cpu":
        return targets
    return [replace(target, dictionary=target.dictionary.to(device)) for target in targets]


def _batches_added(
    targets: Sequence[CollectTarget],
    collectors: Sequence[FeatureCollector],
    registry: ShotRegistry,
    source: BatchSource,
    images: int | None,
    progress: bool,
) -> Iterator[None]:
    """Add all batches of the source that the registry does not know yet; yield after each."""
    disable = None if progress else True
    with tqdm(total=images, initial=registry.images, unit=" images", desc="collect", disable=disable) as bar:
        for batch in source(registry.images):
            _add_batch(batch, targets, collectors, registry)
            bar.update(len(batch.images))
            yield


def _add_batch(
    batch: CollectBatch, targets: Sequence[CollectTarget], collectors: Sequence[FeatureCollector], registry: ShotRegistry
) -> None:
    images = registry.add(batch)
    used: set[int] = set()
    for target, collector in zip(targets, collectors, strict=True):
        site = target.dictionary.site
        activations = [part for part in batch.activations if part.site == site]
        if len(activations) != images.shots.shape[1] or any(len(part.shots) != len(batch.images) for part in activations):
            raise BadInput(f"The site {site} lacks activations of some of {len(batch.images)} images, at some timestep.")
        used.update(collector.add(activations, images))
    registry.register(batch, images, used)


def _drawn_patches(patches: dict[int, Shot], registry: ShotRegistry, draw: DrawImages | None, progress: bool) -> Iterator[None]:
    """Draw the images of ITDA atoms that the source did not contain; yield after each batch."""
    if draw is None:
        return
    missing = [key for key in patches if key not in registry.patches]
    disable = None if progress and missing else True
    with tqdm(total=len(missing), unit=" images", desc="patches", disable=disable) as bar:
        for first in range(0, len(missing), DRAWN_AT_ONCE):
            keys = missing[first : first + DRAWN_AT_ONCE]
            for key, image in zip(keys, draw([patches[key] for key in keys]), strict=True):
                registry.patches[key] = registry.store(image)
            bar.update(len(keys))
            yield
