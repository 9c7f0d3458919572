"""Who was met: the shots and images that some feature shows, by number."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import NamedTuple, final

import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from difflex.features.book import ImageAlbum, StoredImage
from difflex.features.drawing import key_of
from difflex.features.firing import ImageBatch
from difflex.records import Activations, Shot, Split

__all__ = ["CollectBatch", "RegisteredShot", "ShotRegistry"]

FILTER = 25
"""Bits of the numbers of places in the filter by which images are known again: right for half a million of them."""


class CollectBatch(NamedTuple):
    """Images, and what a model shows on the way to them, or at them: a batch of what is collected from."""

    images: Sequence[Image.Image]
    activations: Sequence[Activations]
    """Each of all these images, in their order, at one site and timestep; the same timesteps at each site."""


class RegisteredShot(NamedTuple):
    """A shot, and the file of its image."""

    shot: Shot
    filed: StoredImage


@final
class ShotRegistry:
    """The shots that are shown, out of all that were met."""

    def __init__(self, album: ImageAlbum, wanted: Collection[int] = ()) -> None:
        """A roll of nobody; `wanted` are the keys of runs whose images are kept whoever shows them."""
        self.album = album
        self.seats: dict[int, RegisteredShot] = {}
        self.patches: dict[int, StoredImage] = {}
        """The images of wanted runs, by key."""
        self.images = 0
        self.shots: dict[Split, int] = {"train": 0, "held-out": 0}
        """How many were met."""
        self._made: set[str] = set()
        self._met = torch.zeros(1 << FILTER, dtype=torch.bool)
        self._wanted = frozenset(wanted)

    def arrive(self, met: CollectBatch) -> ImageBatch:
        """The images of a batch, numbered."""
        first = met.activations[0]
        steps = sum(each.site == first.site for each in met.activations)
        start = sum(self.shots.values())
        count = len(met.images)
        self.images += count
        for shot in first.shots:
            self.shots[shot.split] += steps
        keys = torch.tensor([key_of(shot) for shot in first.shots])
        return ImageBatch(
            shots=torch.arange(start, start + count * steps).view(count, steps),
            keys=keys,
            held_out=torch.tensor([shot.split == "held-out" for shot in first.shots]),
            may_repeat=self._may_repeat(keys),
        )

    def _may_repeat(self, keys: Int[Tensor, " image"]) -> bool:
        """Whether one of the images may have come before; surely so if it has. A Bloom filter, which never grows."""
        found = False
        for key in keys.tolist():
            bits = torch.tensor([key >> shift & ((1 << FILTER) - 1) for shift in (0, 12, 25, 37)])
            found |= bool(self._met[bits].all())
            self._met[bits] = True
        return found

    def seat(self, met: CollectBatch, arrivals: ImageBatch, shown: Collection[int]) -> None:
        """Nothing; the images `shown`, and those of wanted runs, are in the album, and their shots known."""
        first = met.activations[0].site
        steps = [each.shots for each in met.activations if each.site == first]
        keys = arrivals.keys.tolist()
        for place in sorted({*shown, *(place for place, key in enumerate(keys) if key in self._wanted)}):
            filed = self.file(met.images[place])
            if keys[place] in self._wanted:
                self.patches[keys[place]] = filed
            if place in shown:
                numbers = arrivals.shots[place].tolist()
                self.seats |= {number: RegisteredShot(shots[place], filed) for number, shots in zip(numbers, steps, strict=True)}

    def file(self, image: Image.Image) -> StoredImage:
        """Where an image is in the album."""
        filed, is_new = self.album.file(image)
        if is_new:
            self._made.add(filed.file)
        return filed

    def keep(self, numbers: Collection[int]) -> None:
        """Nothing; of all shots those of these numbers alone are still known. Images that nobody shows are not kept either."""
        self.seats = {number: self.seats[number] for number in sorted(numbers)}
        shown = {seat.filed.file for seat in self.seats.values()} | {filed.file for filed in self.patches.values()}
        for file in self._made - shown:
            self.album.remove(file)
        self._made &= shown

    def told(self) -> bytes:
        """The roll as lines of JSON."""
        head = {"images": self.images, "shots": self.shots, "made": sorted(self._made)}
        seats = ([number, *seat.filed, asdict(seat.shot)] for number, seat in self.seats.items())
        patches = ([key, *filed] for key, filed in self.patches.items())
        return "\n".join(json.dumps(each) for each in [{**head, "patches": len(self.patches)}, *patches, *seats]).encode()

    def restore(self, told: bytes) -> None:
        """Nothing; the roll is the one that was `told`."""
        head, *lines = [json.loads(line) for line in told.decode().split("\n")]
        self.images, self.shots, self._made = head["images"], head["shots"], set(head["made"])
        self.patches = {key: StoredImage(*filed) for key, *filed in lines[: head["patches"]]}
        self.seats = {
            number: RegisteredShot(_shot(shot), StoredImage(*filed)) for number, *filed, shot in lines[head["patches"] :]
        }


def _shot(entries: dict) -> Shot:
    return Shot(**{**entries, "pixels": tuple(entries["pixels"])})
