"""The shots and images that examples use, by number, and the checkpoint from which a killed pass continues."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, final

import torch
from PIL import Image

from difflex._version import __version__
from difflex.errors import BrokenFile
from difflex.features.collector import FeatureCollector, with_prefix
from difflex.features.firing import BatchImages, image_key
from difflex.features.images import ImageAlbum, StoredImage
from difflex.records import Activations, Shot, Split
from difflex.tensors import read_tensors, write_tensors

FORMAT = 4
"""Format of the checkpoint."""


class CollectBatch(NamedTuple):
    """A batch of images and the activations that belong to them."""

    images: Sequence[Image.Image]
    activations: Sequence[Activations]
    """An entry for each site and timestep, with all images in their order; every site has the same timesteps."""


class RegisteredShot(NamedTuple):
    """A shot and the file of its image."""

    shot: Shot
    image: StoredImage


@final
class ShotRegistry:
    """Numbers all shots of a pass, and keeps those that examples use, with their images."""

    def __init__(self, album: ImageAlbum, patch_keys: Collection[int]) -> None:
        """`patch_keys` are the keys of the images that ITDA atoms come from: they are stored even if no example uses them."""
        self.album = album
        self.entries: dict[int, RegisteredShot] = {}
        self.patches: dict[int, StoredImage] = {}
        """Images that ITDA atoms come from, by key."""
        self.images = 0
        self.drawn = 0
        """Number of images of ITDA atoms that were made because the source did not contain them."""
        self.shots: dict[Split, int] = {"train": 0, "held-out": 0}
        """Number of shots in all batches."""
        self._new_files: set[str] = set()
        self._patch_keys = frozenset(patch_keys)

    def add(self, batch: CollectBatch) -> BatchImages:
        """Number and count the shots of a batch."""
        first = batch.activations[0]
        timesteps = sum(part.site == first.site for part in batch.activations)
        start, count = sum(self.shots.values()), len(batch.images)
        self.images += count
        for shot in first.shots:
            self.shots[shot.split] += timesteps
        return BatchImages(
            shots=torch.arange(start, start + count * timesteps).view(count, timesteps),
            keys=torch.tensor([image_key(shot) for shot in first.shots]),
            held_out=torch.tensor([shot.split == "held-out" for shot in first.shots]),
        )

    def register(self, batch: CollectBatch, images: BatchImages, used: Collection[int]) -> None:
        """Store the images `used` by examples, and those of ITDA atoms, and keep the shots of the former."""
        site = batch.activations[0].site
        timesteps = [part.shots for part in batch.activations if part.site == site]
        keys = images.keys.tolist()
        chosen = [place for place, key in enumerate(keys) if place in used or key in self._patch_keys]
        for place, stored in zip(chosen, self.store([batch.images[place] for place in chosen]), strict=True):
            if (key := keys[place]) in self._patch_keys:
                self.patches[key] = stored
            if place in used:
                for number, shots in zip(images.shots[place].tolist(), timesteps, strict=True):
                    self.entries[number] = RegisteredShot(shots[place], stored)

    def store(self, images: Sequence[Image.Image]) -> list[StoredImage]:
        """Store images in the album, several at a time: to compress them takes as long as a large GPU takes to generate them."""
        with ThreadPoolExecutor() as threads:
            added = list(threads.map(self.album.add, images))
        self._new_files.update(stored.file for stored, is_new in added if is_new)
        return [stored for stored, _ in added]

    def store_drawn(self, shots: Sequence[Shot], images: Sequence[Image.Image]) -> None:
        """Store images of ITDA atoms that the source did not contain."""
        self.patches.update(zip(map(image_key, shots), self.store(images), strict=True))
        self.drawn += len(images)

    def prune(self, shots: Collection[int]) -> None:
        """Keep only the `shots` of these numbers."""
        self.entries = {number: self.entries[number] for number in sorted(shots)}

    def delete_unused(self) -> None:
        """Delete new images that are no longer used."""
        used = {entry.image.file for entry in self.entries.values()} | {stored.file for stored in self.patches.values()}
        for file in self._new_files - used:
            (self.album.folder / file).unlink(missing_ok=True)
        self._new_files &= used

    def dump(self) -> bytes:
        """Return the registry as lines of JSON."""
        counts = {"images": self.images, "shots": self.shots, "drawn": self.drawn, "patches": len(self.patches)}
        counts["files"] = sorted(self._new_files)
        patches = ([key, *stored] for key, stored in self.patches.items())
        entries = ([number, *entry.image, entry.shot.as_json()] for number, entry in self.entries.items())
        return "\n".join(json.dumps(line) for line in [counts, *patches, *entries]).encode()

    def restore(self, dump: bytes) -> None:
        """Restore the registry from the result of `dump`; raise `BrokenFile` and leave it if an image is missing or damaged."""
        counts, *lines = [json.loads(line) for line in dump.decode().split("\n")]
        patches = {key: StoredImage(*stored) for key, *stored in lines[: counts["patches"]]}
        entries = {
            number: RegisteredShot(Shot(**{**shot, "pixels": tuple(shot["pixels"])}), StoredImage(*stored))
            for number, *stored, shot in lines[counts["patches"] :]
        }
        for stored in {*patches.values(), *(entry.image for entry in entries.values())}:
            if sentence := self.album.damage(stored.file):
                raise BrokenFile(sentence)
        self.images, self.shots, self.drawn = counts["images"], counts["shots"], counts["drawn"]
        self._new_files = set(counts["files"])
        self.patches, self.entries = patches, entries


@final
class CollectCheckpoint:
    """The file that holds the state of a pass, replaced atomically."""

    def __init__(self, path: Path, request: Mapping[str, object]) -> None:
        """`request` is plain JSON that identifies the pass; the state of another pass is ignored."""
        self.path = path
        self._request = json.dumps({"difflex": __version__, **request}, sort_keys=True)

    def save(self, collectors: Sequence[FeatureCollector], registry: ShotRegistry) -> None:
        """Prune the registry and write the state."""
        registry.prune({number for collector in collectors for number in collector.shots().tolist()})
        tensors = {
            f"{number}/{name}": tensor
            for number, collector in enumerate(collectors)
            for name, tensor in collector.tensors().items()
        }
        tensors["registry"] = torch.frombuffer(bytearray(registry.dump()), dtype=torch.uint8)
        write_tensors(self.path, FORMAT, tensors, {"request": self._request})
        registry.delete_unused()  # only now: a killed pass continues from the checkpoint, with all of its images

    @staticmethod
    def delete_finished(path: Path, fingerprints: Mapping[str, str]) -> None:
        """Delete the checkpoint of a pass that was killed after its last book: all of its dictionaries have current books.

        `fingerprints` are those of the dictionaries with current books, by name.
        """
        try:
            request = json.loads(read_tensors(path, FORMAT, "").header["request"])
            finished = request["dictionaries"].items() <= fingerprints.items()
        except (BrokenFile, ValueError, KeyError, AttributeError):
            return
        if finished:
            path.unlink(missing_ok=True)

    def restore(self, collectors: Sequence[FeatureCollector], registry: ShotRegistry) -> None:
        """Restore the state of this pass, if the file holds it; say so if it is damaged, or an image of it is."""
        if not self.path.is_file():
            return
        try:
            header, tensors = read_tensors(self.path, FORMAT, "")
            if header.get("request") != self._request:
                return
            registry.restore(tensors.pop("registry").numpy().tobytes())
        except BrokenFile as error:
            print(f"{str(error).strip()} The pass starts again, without the checkpoint.")
            return
        for number, collector in enumerate(collectors):
            collector.restore(with_prefix(tensors, f"{number}/"))
