"""`collect`: one pass over images and what a model shows of them, for several dictionaries at once, into their books."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from difflex.errors import BadInput
from difflex.features.book import ImageAlbum
from difflex.features.checkpoint import CollectCheckpoint
from difflex.features.drawing import key_of
from difflex.features.gathering import CollectConfig, FeatureCollector
from difflex.features.roll import CollectBatch, ShotRegistry
from difflex.features.writing import CollectTarget, write
from difflex.records import Shot

__all__ = ["Draw", "Source", "collect"]

Source = Callable[[int], Iterator[CollectBatch]]
"""From how many images to leave out, to the batches of all others: the same ones each time."""
Draw = Callable[[Sequence[Shot]], Sequence[Image.Image]]
"""The images that the runs of shots end in."""
AT_ONCE = 32
"""Images of atoms drawn at once."""


def collect(
    subjects: Sequence[CollectTarget],
    source: Source,
    album: ImageAlbum,
    *,
    data: str,
    state: Path,
    settings: CollectConfig = CollectConfig(),  # noqa: B008 (a constant)
    draw: Draw | None = None,
    every: float = 60.0,
    images: int | None = None,
    progress: bool = True,
    device: torch.device | str | None = None,
) -> list[Path]:
    """The books of `subjects`, made from all images of `source`; killed and called again, it ends with the same books.

    `data` says what the source shows: what was begun from other data is not gone on with. The state of the pass is kept in the
    file `state`, every so many seconds. `draw` makes the images of atoms that the source does not show. Dictionaries work on
    `device`, a card where there is one.
    """
    subjects = _placed(subjects, device)
    wanted = {key_of(at.shot): at.shot for subject in subjects for at in subject.patches.values() if at.shot.image is None}
    gathered = [FeatureCollector(subject.dictionary, settings) for subject in subjects]
    roll = ShotRegistry(album, wanted)
    kept = CollectCheckpoint(path=state, asked=_asked(subjects, settings, data))
    kept.restore(gathered, roll)
    saved = time.monotonic()
    with tqdm(total=images, initial=roll.images, unit=" images", desc="collect", disable=None if progress else True) as bar:
        for met in source(roll.images):
            _meet(met, subjects, gathered, roll)
            bar.update(len(met.images))
            if time.monotonic() - saved > every:
                _save(kept, gathered, roll)
                saved = time.monotonic()
    _save(kept, gathered, roll)
    for _ in _patched(wanted, roll, draw, progress):
        if time.monotonic() - saved > every:
            _save(kept, gathered, roll)
            saved = time.monotonic()
    books = [write(subject, one, roll, data) for subject, one in zip(subjects, gathered, strict=True)]
    kept.remove()
    return books


def _placed(subjects: Sequence[CollectTarget], device: torch.device | str | None) -> Sequence[CollectTarget]:
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place.type == "cpu":
        return subjects
    return [replace(subject, dictionary=subject.dictionary.to(place)) for subject in subjects]


def _asked(subjects: Sequence[CollectTarget], settings: CollectConfig, data: str) -> dict[str, object]:
    names = {subject.name: subject.checksum for subject in subjects}
    return {"dictionaries": names, "settings": asdict(settings), "data": data}


def _meet(met: CollectBatch, subjects: Sequence[CollectTarget], gathered: Sequence[FeatureCollector], roll: ShotRegistry) -> None:
    """Nothing; a batch of images is taken into account."""
    arrivals = roll.arrive(met)
    shown: set[int] = set()
    for subject, one in zip(subjects, gathered, strict=True):
        site = subject.dictionary.site
        seen = [each for each in met.activations if each.site == site]
        if len(seen) != arrivals.shots.shape[1] or any(len(each.shots) != len(met.images) for each in seen):
            raise BadInput(f"Of {len(met.images)} images the site {site} does not show all, at every timestep.")
        shown.update(one.meet(seen, arrivals))
    roll.seat(met, arrivals, shown)


def _save(kept: CollectCheckpoint, gathered: Sequence[FeatureCollector], roll: ShotRegistry) -> None:
    roll.keep({number for one in gathered for number in one.shots().tolist()})
    kept.save(gathered, roll)


def _patched(wanted: dict[int, Shot], roll: ShotRegistry, draw: Draw | None, progress: bool) -> Iterator[None]:
    """Nothing, after each batch of images of atoms that were not shown yet."""
    missing = [key for key in wanted if key not in roll.patches] if draw else []
    silent = None if progress and missing else True
    with tqdm(total=len(missing), unit=" images", desc="patches", disable=silent) as bar:
        for first in range(0, len(missing), AT_ONCE):
            assert draw is not None
            keys = missing[first : first + AT_ONCE]
            for key, image in zip(keys, draw([wanted[key] for key in keys]), strict=True):
                roll.patches[key] = roll.file(image)
            bar.update(len(keys))
            yield
