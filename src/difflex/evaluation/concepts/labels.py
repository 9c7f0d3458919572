"""Labelled images and activations: which concepts each token shows, its image, and its noise level.

A user's own images are read from a folder:
```
FOLDER/images/NAME.jpg     an image (PNG, JPEG or WebP), with its prompt in NAME.txt, if any
FOLDER/labels/NAME.png     its label map, a number for each pixel
FOLDER/labels.json         the concepts of the numbers: {"1": "star", "2": {"name": "sky", "group": "background"}},
                           or the JSON of COCO panoptic, whose label maps hold segment ids as RGB colours
```
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import tee
from pathlib import Path
from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int, Int8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from difflex.errors import BadInput, BrokenFile, NonFinite
from difflex.records import Activations, Shot, Site

__all__ = [
    "Concept",
    "Harvest",
    "LabelFolder",
    "LabelThresholds",
    "LabelledActivations",
    "LabelledImage",
    "LabelledImages",
    "grid_shares",
    "label",
    "to_image",
]

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")
EXAMPLE = 'Write {"1": "star", "2": {"name": "sky", "group": "background"}}, or the JSON of COCO panoptic.'

Harvest = Callable[[Iterable[Image.Image], Iterable[str], Iterable[str]], Iterator[Activations]]
"""Yields the activations of images at one or several sites, given images, prompts and names, which are consumed lazily."""


class Concept(NamedTuple):
    """Something that an image can show at a place."""

    name: str
    group: str
    """Colour, shape, background, or the like."""


class LabelledImage(NamedTuple):
    """An image with the places of its concepts."""

    image: Image.Image
    name: str
    """Unique among the images that are labelled together."""
    prompt: str
    shares: Callable[[int, int], Float[Tensor, "concept row column"]]
    """Returns, for a grid of rows and columns, the share of each cell's area that each concept covers."""


class LabelledImages(NamedTuple):
    """A source of labelled images."""

    name: str
    """Identifies the source in records; it changes when the images do."""
    concepts: tuple[Concept, ...]
    load: Callable[[], Iterable[LabelledImage]]
    """Yields the images, the same at each call."""


@dataclass(frozen=True, kw_only=True)
class LabelThresholds:
    """Thresholds on the covered share of a token's area; between them the token is ignored for that concept."""

    present_above: float = 0.5
    """From this share on, the token shows the concept."""
    absent_below: float = 0.0
    """Up to this share, it does not."""

    def __post_init__(self) -> None:
        if not 0 <= self.absent_below <= self.present_above <= 1 or not self.present_above:
            raise BadInput(
                f"A concept cannot be absent up to a share of {self.absent_below:g} and present from {self.present_above:g} on. "
                "Choose 0 <= absent_below <= present_above <= 1, present_above above 0."
            )

    def truth(self, shares: Float[Tensor, "concept token"]) -> Int8[Tensor, "concept token"]:
        """Return 1 where a token shows a concept, 0 where it does not, -1 where it is ignored."""
        return torch.where(shares >= self.present_above, 1, torch.where(shares <= self.absent_below, 0, -1)).to(torch.int8)


@dataclass(frozen=True, kw_only=True)
class LabelledActivations:
    """Labelled activations of one site; the tokens of all images and noise levels in one row."""

    site: Site
    concepts: tuple[Concept, ...]
    values: Float[Tensor, "token width"]
    truth: Int8[Tensor, "concept token"]
    """1 where a token shows a concept, 0 where it does not, -1 where it is ignored."""
    images: Int[Tensor, " token"]
    """The number of each token's image."""
    noise: Float[Tensor, " token"]
    """Between 0 (the image) and 1 (pure noise)."""
    held_out: Bool[Tensor, " token"]

    def select(self, mask: Bool[Tensor, " token"]) -> LabelledActivations:
        """Return the tokens in `mask`."""
        return replace(
            self,
            values=self.values[mask],
            truth=self.truth[:, mask],
            images=self.images[mask],
            noise=self.noise[mask],
            held_out=self.held_out[mask],
        )

    def with_concepts(self, indices: Sequence[int]) -> LabelledActivations:
        """Return the same tokens labelled only with the concepts at `indices`."""
        return replace(self, concepts=tuple(self.concepts[i] for i in indices), truth=self.truth[list(indices)])

    @property
    def noise_levels(self) -> list[float]:
        """The noise levels, ascending."""
        return sorted(set(self.noise.tolist()))


def label(
    labelled_images: Iterable[LabelledImage],
    harvest: Harvest,
    concepts: Sequence[Concept],
    thresholds: LabelThresholds = LabelThresholds(),
) -> dict[Site, LabelledActivations]:
    """Harvest the activations of images and label each token with the concepts it shows; return them by site."""
    parts: dict[Site, list[LabelledActivations]] = {}
    pending: dict[str, _PendingImage] = {}
    images, prompts, names = tee(_register(labelled_images, pending), 3)
    for batch in harvest((each.image for each in images), (each.prompt for each in prompts), (each.name for each in names)):
        current = [_image_of(shot, pending) for shot in batch.shots]
        parts.setdefault(batch.site, []).append(_label_batch(batch, current, tuple(concepts), thresholds))
        # All noise levels and sites of an image are harvested before those of the next one.
        for name in [name for name, image in pending.items() if image.harvested and image not in current]:
            del pending[name]
    if not parts:
        raise BadInput("No image was given, so no concept can be matched. Give at least one.")
    return {site: _concatenate(pieces) for site, pieces in parts.items()}


@final
class _PendingImage:
    """An image on its way through a harvest."""

    def __init__(self, number: int, shares: Callable[[int, int], Tensor]) -> None:
        self.number, self.shares, self.harvested = number, cache(shares), False


def _register(images: Iterable[LabelledImage], pending: dict[str, _PendingImage]) -> Iterator[LabelledImage]:
    for number, image in enumerate(images):
        if image.name in pending:
            raise BadInput(f"Two images are called '{image.name}', so their masks cannot be assigned. Use unique names.")
        pending[image.name] = _PendingImage(number, image.shares)
        yield image


def _image_of(shot: Shot, pending: dict[str, _PendingImage]) -> _PendingImage:
    if shot.image not in pending:
        raise BadInput(f"The activations are those of '{shot.image or shot.prompt}', which is not one of the labelled images.")
    pending[shot.image].harvested = True
    return pending[shot.image]


def _label_batch(
    batch: Activations, images: Sequence[_PendingImage], concepts: tuple[Concept, ...], thresholds: LabelThresholds
) -> LabelledActivations:
    if batch.grid is None:
        raise BadInput(f"The site {batch.site} has no grid: concepts are located in the image, and text tokens are not.")
    if not bool(torch.isfinite(batch.values).all()):
        raise NonFinite(f"The activations of {batch.site} at '{batch.shots[0].image}' hold NaN or infinity. Harvest them again.")
    rows, columns = batch.grid
    shares = torch.stack([image.shares(rows, columns) for image in images], dim=1)
    ones = torch.ones(len(images), rows * columns)
    return LabelledActivations(
        site=batch.site,
        concepts=concepts,
        values=batch.values.flatten(0, 1).float().cpu(),
        truth=thresholds.truth(shares.flatten(1)),
        images=(torch.tensor([image.number for image in images])[:, None] * ones.long()).flatten(),
        noise=(torch.tensor([shot.noise or 0.0 for shot in batch.shots])[:, None] * ones).flatten(),
        held_out=(torch.tensor([shot.split == "held-out" for shot in batch.shots])[:, None] & ones.bool()).flatten(),
    )


def _concatenate(parts: Sequence[LabelledActivations]) -> LabelledActivations:
    columns = {name: torch.cat([getattr(part, name) for part in parts]) for name in ("values", "images", "noise", "held_out")}
    return replace(parts[0], truth=torch.cat([part.truth for part in parts], dim=1), **columns)


def to_image(pixels: Float[Tensor, "3 height width"]) -> Image.Image:
    """Convert RGB pixels in [0, 1] to an image."""
    return Image.fromarray((pixels.permute(1, 2, 0) * 255).round().byte().numpy())


def grid_shares(masks: Bool[Tensor, "concept height width"], rows: int, columns: int) -> Float[Tensor, "concept row column"]:
    """Return the share of each grid cell that each mask covers; cells are as equal as the mask's pixels allow."""
    return F.adaptive_avg_pool2d(masks.float()[None], (rows, columns))[0]


@final
@dataclass(frozen=True, kw_only=True)
class LabelFolder:
    """A folder of images and label maps."""

    folder: Path
    concepts: tuple[Concept, ...]
    numbers: Mapping[str | None, Mapping[int, int]]
    """Index of the concept of each number, by the name of the label map; under None if all maps share one numbering."""
    images: tuple[Path, ...]

    @classmethod
    def open(cls, folder: Path) -> LabelFolder:
        """Open `folder`; its images are sorted by name."""
        images = sorted(path for path in (folder / "images").glob("*") if path.suffix.lower() in EXTENSIONS)
        if not images:
            raise BadInput(f"{folder}/images holds no image. Put PNG, JPEG or WebP files there, and label maps into labels.")
        missing = [path for path in images if not _label_map(folder, path).is_file()]
        if missing:
            raise BadInput(
                f"{missing[0]} has no label map {_label_map(folder, missing[0])}, nor have {len(missing) - 1} others. "
                "Add the maps, or remove the images."
            )
        entries = _read_labels(folder / "labels.json")
        concepts, numbers = _coco_concepts(entries) if "annotations" in entries else _plain_concepts(entries)
        return cls(folder=folder, concepts=concepts, numbers=numbers, images=tuple(images))

    @property
    def fingerprint(self) -> str:
        """A digest that changes when a file does."""
        files = [self.folder / "labels.json", *self.images, *(_label_map(self.folder, path) for path in self.images)]
        lines = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def source(self, count: int, pixels: tuple[int, int] | None = None) -> LabelledImages:
        """Return the first `count` images as a source; with `pixels` (height, width), images and maps are resized and cropped."""
        return LabelledImages(f"folder {self.fingerprint}", self.concepts, partial(self.labelled_images, count, pixels))

    def labelled_images(self, count: int, pixels: tuple[int, int] | None = None) -> Iterator[LabelledImage]:
        """Yield the first `count` images; see `source`."""
        for path in self.images[:count]:
            image, labels = _open_image(path, "RGB"), _open_image(_label_map(self.folder, path), None)
            if image.size != labels.size:
                raise BadInput(
                    f"{path} is {image.height}x{image.width}, its label map {labels.height}x{labels.width}: they must have the "
                    "same size."
                )
            if pixels is not None:
                height, width = pixels
                image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
                labels = ImageOps.fit(labels, (width, height), Image.Resampling.NEAREST)
            text = path.with_suffix(".txt")
            prompt = text.read_text(encoding="utf-8").strip() if text.is_file() else ""
            yield LabelledImage(image, path.name, prompt, self._shares(path, labels))

    def _shares(self, path: Path, labels: Image.Image) -> Callable[[int, int], Float[Tensor, "concept row column"]]:
        name = _label_map(self.folder, path).name
        numbers = self.numbers.get(None, self.numbers.get(name))
        if numbers is None:
            raise BadInput(f"{self.folder}/labels.json has no entry for {name}. Add it, or remove the image.")
        return partial(_map_shares, _pixel_numbers(labels), numbers, len(self.concepts))


def _map_shares(
    labels: Int[Tensor, "height width"], numbers: Mapping[int, int], count: int, rows: int, columns: int
) -> Float[Tensor, "concept row column"]:
    masks: Bool[Tensor, "concept height width"] = torch.zeros(count, *labels.shape, dtype=torch.bool)
    for number, concept in numbers.items():
        masks[concept] |= labels == number
    return grid_shares(masks, rows, columns)


def _label_map(folder: Path, image: Path) -> Path:
    return folder / "labels" / f"{image.stem}.png"


def _open_image(path: Path, mode: str | None) -> Image.Image:
    try:
        with Image.open(path) as file:
            return file.convert(mode) if mode else file.copy()
    except (OSError, UnidentifiedImageError) as error:
        raise BadInput(f"{path} cannot be read as an image ({error}). Write it again.") from error


def _pixel_numbers(labels: Image.Image) -> Int[Tensor, "height width"]:
    """Return the number at each pixel: its grey or palette value, or red + 256 green + 65536 blue."""
    if labels.mode in ("RGB", "RGBA"):
        channels = torch.tensor(bytearray(labels.convert("RGB").tobytes())).view(labels.height, labels.width, 3).int()
        return channels[..., 0] + 256 * channels[..., 1] + 65536 * channels[..., 2]
    wide = labels.mode.startswith("I") or labels.mode == "F"
    values = labels.convert("I") if wide else labels
    data = torch.frombuffer(bytearray(values.tobytes()), dtype=torch.int32 if wide else torch.uint8)
    return data.view(labels.height, labels.width).int()


def _read_labels(path: Path) -> dict:
    try:
        entries = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise BadInput(f"{path} is missing, so the meaning of the numbers in the label maps is unknown. {EXAMPLE}") from error
    except ValueError as error:
        raise BrokenFile(f"{path} is not JSON ({error}). {EXAMPLE}") from error
    if not isinstance(entries, dict):
        raise BadInput(f"{path} holds a {type(entries).__name__}. {EXAMPLE}")
    return entries


ConceptNumbers = tuple[tuple[Concept, ...], dict[str | None, dict[int, int]]]


def _plain_concepts(entries: dict) -> ConceptNumbers:
    """Return the concepts of numbers with names; numbers of the same name are one concept."""
    by_number = {}
    for number, entry in entries.items():
        name, group = (entry.get("name"), entry.get("group", "object")) if isinstance(entry, dict) else (entry, "object")
        if not number.isdecimal() or not isinstance(name, str) or not isinstance(group, str):
            raise BadInput(f"labels.json holds {number!r}: {entry!r}, which is not a number with a name. {EXAMPLE}")
        by_number[int(number)] = Concept(name, group)
    concepts = tuple(dict.fromkeys(by_number.values()))
    return concepts, {None: {number: concepts.index(concept) for number, concept in by_number.items()}}


def _coco_concepts(entries: dict) -> ConceptNumbers:
    """Return COCO's categories as concepts, grouped by supercategory; numbers are segment ids of each map."""
    try:
        categories = {each["id"]: Concept(each["name"], each.get("supercategory", "object")) for each in entries["categories"]}
        concepts = tuple(dict.fromkeys(categories.values()))
        indices = {number: concepts.index(concept) for number, concept in categories.items()}
        numbers: dict[str | None, dict[int, int]] = {
            Path(each["file_name"]).name: {part["id"]: indices[part["category_id"]] for part in each["segments_info"]}
            for each in entries["annotations"]
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"labels.json has annotations but is not COCO panoptic ({error!r} is missing or wrong). {EXAMPLE}"
        ) from error
    return concepts, numbers
