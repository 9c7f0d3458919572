"""A user's own folder of images and label maps, as images of which it is known what is where.

```
FOLDER/images/NAME.jpg   an image (PNG, JPEG or WebP); beside it NAME.txt with what the model is told of it, if anything
FOLDER/labels/NAME.png     its label map, a number for each pixel
FOLDER/labels.json         what the numbers mean: {"1": "star", "2": {"name": "sky", "group": "background"}},
                           or the JSON of COCO panoptic, whose label maps hold the ids of segments in three colours
```
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from difflex.errors import BadInput, BrokenFile
from difflex.evaluation.concepts.labelled import Concept, LabelledImage, on_grid

__all__ = ["LabelFolder"]

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
FORM = 'Write {"1": "star", "2": {"name": "sky", "group": "background"}}, or the JSON of COCO panoptic.'


@final
@dataclass(frozen=True, kw_only=True)
class LabelFolder:
    """Images and label maps in a folder."""

    folder: Path
    concepts: tuple[Concept, ...]
    numbers: Mapping[str | None, Mapping[int, int]]
    """From a number in a label map to the place of its concept; by the name of the map, or None where all share one meaning."""
    images: tuple[Path, ...]

    @classmethod
    def open(cls, folder: Path) -> LabelFolder:
        """The folder, its images in the order of their names."""
        images = sorted(path for path in (folder / "images").glob("*") if path.suffix.lower() in ENDINGS)
        if not images:
            raise BadInput(f"{folder}/images holds no image. Put PNG, JPEG or WebP files there, and label maps into labels.")
        missing = [path for path in images if not _map_of(folder, path).is_file()]
        if missing:
            wanted = _map_of(folder, missing[0])
            raise BadInput(f"{missing[0]} has no label map {wanted}, nor have {len(missing) - 1} others. Add or remove them.")
        said = _json(folder / "labels.json")
        concepts, numbers = _coco(said) if "annotations" in said else _plain(said)
        return cls(folder=folder, concepts=concepts, numbers=numbers, images=tuple(images))

    @property
    def fingerprint(self) -> str:
        """What changes when a file does."""
        files = [self.folder / "labels.json", *self.images, *(_map_of(self.folder, path) for path in self.images)]
        told = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
        return hashlib.sha256("\n".join(told).encode()).hexdigest()

    def labelled_images(self, count: int, pixels: tuple[int, int] | None = None) -> Iterator[LabelledImage]:
        """The first `count` images; with `pixels` (height, width) all are scaled and cut to that size, as are their maps."""
        for path in self.images[:count]:
            image, labels = _opened(path, "RGB"), _opened(_map_of(self.folder, path), None)
            if image.size != labels.size:
                raise BadInput(
                    f"{path} is {image.height}x{image.width}, its label map {labels.height}x{labels.width}: they must be of "
                    "one size, as a pixel of the map speaks of the pixel of the image."
                )
            if pixels is not None:
                height, width = pixels
                image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
                labels = ImageOps.fit(labels, (width, height), Image.Resampling.NEAREST)
            told = path.with_suffix(".txt")
            prompt = told.read_text(encoding="utf-8").strip() if told.is_file() else ""
            yield LabelledImage(image, path.name, prompt, self._shares(path, labels))

    def _shares(self, path: Path, labels: Image.Image) -> Callable[[int, int], Float[Tensor, "concept row column"]]:
        shared = self.numbers.get(None)
        numbers = self.numbers.get(_map_of(self.folder, path).name) if shared is None else shared
        if numbers is None:
            raise BadInput(f"{self.folder}/labels.json says nothing of {_map_of(self.folder, path).name}. Add or remove it.")
        return partial(_on_grid, _numbers(labels), numbers, len(self.concepts))


def _on_grid(
    labels: Int[Tensor, "height width"], numbers: Mapping[int, int], count: int, rows: int, columns: int
) -> Float[Tensor, "concept row column"]:
    masks: Bool[Tensor, "concept height width"] = torch.zeros(count, *labels.shape, dtype=torch.bool)
    for number, concept in numbers.items():
        masks[concept] |= labels == number
    return on_grid(masks, rows, columns)


def _map_of(folder: Path, image: Path) -> Path:
    return folder / "labels" / f"{image.stem}.png"


def _opened(path: Path, mode: str | None) -> Image.Image:
    try:
        with Image.open(path) as file:
            return file.convert(mode) if mode else file.copy()
    except (OSError, UnidentifiedImageError) as error:
        raise BadInput(f"{path} cannot be read as an image ({error}). Write it again.") from error


def _numbers(labels: Image.Image) -> Int[Tensor, "height width"]:
    """The number at each pixel: its grey or palette value, or red + 256 green + 65536 blue."""
    if labels.mode in ("RGB", "RGBA"):
        channels = torch.tensor(bytearray(labels.convert("RGB").tobytes())).view(labels.height, labels.width, 3).int()
        return channels[..., 0] + 256 * channels[..., 1] + 65536 * channels[..., 2]
    wide = labels.mode.startswith("I") or labels.mode == "F"
    values = labels.convert("I") if wide else labels
    data = torch.frombuffer(bytearray(values.tobytes()), dtype=torch.int32 if wide else torch.uint8)
    return data.view(labels.height, labels.width).int()


def _json(path: Path) -> dict:
    try:
        said = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise BadInput(f"{path} is not there: nobody says what the numbers in the label maps mean. {FORM}") from error
    except ValueError as error:
        raise BrokenFile(f"{path} is not JSON ({error}). {FORM}") from error
    if not isinstance(said, dict):
        raise BadInput(f"{path} holds a {type(said).__name__}. {FORM}")
    return said


Meaning = tuple[tuple[Concept, ...], dict[str | None, dict[int, int]]]


def _plain(said: dict) -> Meaning:
    """Concepts from numbers and names; numbers of one name are one concept."""
    named = {}
    for number, entry in said.items():
        name, group = (entry.get("name"), entry.get("group", "object")) if isinstance(entry, dict) else (entry, "object")
        if not number.isdecimal() or not isinstance(name, str) or not isinstance(group, str):
            raise BadInput(f"labels.json holds {number!r}: {entry!r}, which is no number and name. {FORM}")
        named[int(number)] = Concept(name, group)
    concepts = tuple(dict.fromkeys(named.values()))
    return concepts, {None: {number: concepts.index(concept) for number, concept in named.items()}}


def _coco(said: dict) -> Meaning:
    """Concepts from COCO's categories, their groups its supercategories; numbers are segments, map by map."""
    try:
        categories = {each["id"]: Concept(each["name"], each.get("supercategory", "object")) for each in said["categories"]}
        concepts = tuple(dict.fromkeys(categories.values()))
        places = {number: concepts.index(concept) for number, concept in categories.items()}
        numbers: dict[str | None, dict[int, int]] = {
            Path(each["file_name"]).name: {part["id"]: places[part["category_id"]] for part in each["segments_info"]}
            for each in said["annotations"]
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"labels.json has annotations but is not COCO panoptic ({error!r} is missing or wrong). {FORM}") from error
    return concepts, numbers
