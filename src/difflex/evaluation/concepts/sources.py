"""Sources of labelled images: a folder with label maps, and the drawn world.

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
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from difflex.errors import BadInput, BrokenFile
from difflex.evaluation.concepts.labels import Concept, LabelledImage
from difflex.files import disk_errors, file_sha256
from difflex.images import open_image
from difflex.miniature import draw
from difflex.miniature.world import CONCEPTS, HELD_OUT_SEEDS, PIXELS, check_drawn_pixels
from difflex.values import fits, shown

FIRST_SEED = HELD_OUT_SEEDS + 10**6
"""The seed of the first scene of the drawn world; mini-flux was trained on no scene from `HELD_OUT_SEEDS` on."""
BATCH = 50
"""Scenes of 64 pixels drawn at once; of larger ones fewer."""
KEPT_PIXELS = 1 << 26
"""Pixels of scenes that are drawn once; more are drawn again at each reading."""
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")
EXAMPLE = 'Write {"1": "star", "2": {"name": "sky", "group": "background"}}, or the JSON of COCO panoptic.'


class LabelledImages(NamedTuple):
    """A source of labelled images."""

    name: str
    """Identifies the source in records; it changes when the images do."""
    concepts: tuple[Concept, ...]
    load: Callable[[], Iterable[LabelledImage]]
    """Yields the images, the same at each call."""


def drawn_concepts() -> tuple[Concept, ...]:
    """Return the concepts of the drawn world."""
    return tuple(Concept(name, group) for group, names in CONCEPTS.items() for name in names)


def drawn_images(count: int, first_seed: int = FIRST_SEED, pixels: int = PIXELS) -> Iterator[LabelledImage]:
    """Yield `count` scenes of the drawn world; with the default seed none of them was trained on."""
    batch = max(1, BATCH * PIXELS**2 // pixels**2)
    for start in range(first_seed, first_seed + count, batch):
        seeds = range(start, min(start + batch, first_seed + count))
        scenes = draw(seeds, pixels=pixels)
        shares = cache(scenes.shares)
        for i, seed in enumerate(seeds):
            image = Image.fromarray((scenes.images[i].permute(1, 2, 0) * 255).round().byte().numpy())
            yield LabelledImage(image, f"drawn:{seed}", scenes.captions[i], lambda *grid, i=i, of=shares: of(*grid)[i])


def drawn_source(count: int, pixels: tuple[int, int] = (PIXELS, PIXELS)) -> LabelledImages:
    """Return the first `count` scenes as a source of labelled images; they are slow to draw, so small ones are drawn once."""
    check_drawn_pixels(pixels)
    name = f"drawn world from {FIRST_SEED}{'' if pixels[0] == PIXELS else f' of {pixels[0]} pixels'}"
    load = lambda: drawn_images(count, pixels=pixels[0])  # noqa: E731
    if count * pixels[0] ** 2 <= KEPT_PIXELS:
        load = cache(lambda: list(drawn_images(count, pixels=pixels[0])))
    return LabelledImages(name, drawn_concepts(), load)


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
        odd = [
            number for by_number in numbers.values() for number in by_number if not fits(int, number) or not 0 <= number < 2**31
        ]
        odd += [text for concept in concepts for text in concept if not fits(str, text)]
        if odd:
            raise BadInput(f"{folder}/labels.json holds {shown(odd[0])}, which is no number below 2^31 and no name. {EXAMPLE}")
        return cls(folder=folder, concepts=concepts, numbers=numbers, images=tuple(images))

    def fingerprint(self, count: int) -> str:
        """Return a digest of the contents of the first `count` images, their prompts and label maps, and of the concepts."""
        images = self.images[:count]
        files = [self.folder / "labels.json", *images, *(_label_map(self.folder, path) for path in images)]
        prompts = [path for path in (image.with_suffix(".txt") for image in images) if path.is_file()]
        lines = [f"{path.name} {file_sha256(path)}" for path in (*files, *prompts)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def source(self, count: int, pixels: tuple[int, int] | None = None) -> LabelledImages:
        """Return the first `count` images as a source; with `pixels` (height, width), images and maps are resized and cropped."""
        return LabelledImages(f"folder {self.fingerprint(count)}", self.concepts, partial(self.labelled_images, count, pixels))

    def labelled_images(self, count: int, pixels: tuple[int, int] | None = None) -> Iterator[LabelledImage]:
        """Yield the first `count` images; see `source`."""
        for path in self.images[:count]:
            image, labels = open_image(path, "RGB"), open_image(_label_map(self.folder, path))
            if image.size != labels.size:
                raise BadInput(
                    f"{path} is {image.height}x{image.width}, its label map {labels.height}x{labels.width}: they must have the "
                    "same size."
                )
            if pixels is not None:
                height, width = pixels
                image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
                labels = ImageOps.fit(labels, (width, height), Image.Resampling.NEAREST)
            prompt = _read_prompt(path.with_suffix(".txt"))
            name = _label_map(self.folder, path).name
            numbers = self.numbers.get(None, self.numbers.get(name))
            if numbers is None:
                raise BadInput(f"{self.folder}/labels.json has no entry for {name}. Add it, or remove the image.")
            shares = partial(_map_shares, _pixel_numbers(labels), numbers, len(self.concepts))
            yield LabelledImage(image, path.name, prompt, shares)


def _map_shares(
    labels: Int[Tensor, "height width"], numbers: Mapping[int, int], count: int, rows: int, columns: int
) -> Float[Tensor, "concept row column"]:
    masks: Bool[Tensor, "concept height width"] = torch.zeros(count, *labels.shape, dtype=torch.bool)
    for number, concept in numbers.items():
        masks[concept] |= labels == number
    return grid_shares(masks, rows, columns)


def _label_map(folder: Path, image: Path) -> Path:
    return folder / "labels" / f"{image.stem}.png"


def _pixel_numbers(labels: Image.Image) -> Int[Tensor, "height width"]:
    """Return the number at each pixel: its grey or palette value, or red + 256 green + 65536 blue."""
    if labels.mode in ("RGB", "RGBA"):
        channels = torch.tensor(bytearray(labels.convert("RGB").tobytes())).view(labels.height, labels.width, 3).int()
        return channels[..., 0] + 256 * channels[..., 1] + 65536 * channels[..., 2]
    wide = labels.mode.startswith("I") or labels.mode == "F"
    values = labels.convert("I") if wide else labels
    data = torch.frombuffer(bytearray(values.tobytes()), dtype=torch.int32 if wide else torch.uint8)
    return data.view(labels.height, labels.width).int()


def _read_prompt(path: Path) -> str:
    """Return the prompt in a file; empty without the file."""
    try:
        with disk_errors(path, "read"):
            return path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""
    except ValueError as error:
        raise BadInput(f"{path} is not text in UTF-8 ({error}). Write the prompt again.") from error


def _read_labels(path: Path) -> dict:
    try:
        with disk_errors(path, "read"):
            entries = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise BadInput(f"{path} is missing, so the meaning of the numbers in the label maps is unknown. {EXAMPLE}") from error
    except (ValueError, RecursionError) as error:
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
        if not number.isdecimal() or len(number) > 10 or not isinstance(name, str) or not isinstance(group, str):
            raise BadInput(f"labels.json holds {shown(number)}: {shown(entry)}, which is not a number with a name. {EXAMPLE}")
        by_number[int(number)] = Concept(name, group)
    concepts = tuple(dict.fromkeys(by_number.values()))
    return concepts, {None: {number: concepts.index(concept) for number, concept in by_number.items()}}


def _coco_concepts(entries: dict) -> ConceptNumbers:
    """Return COCO's categories as concepts, grouped by supercategory; numbers are segment ids of each map."""
    try:
        categories = {row["id"]: Concept(row["name"], row.get("supercategory", "object")) for row in entries["categories"]}
        concepts = tuple(dict.fromkeys(categories.values()))
        indices = {number: concepts.index(concept) for number, concept in categories.items()}
        numbers: dict[str | None, dict[int, int]] = {
            Path(row["file_name"]).name: {segment["id"]: indices[segment["category_id"]] for segment in row["segments_info"]}
            for row in entries["annotations"]
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"labels.json has annotations but is not COCO panoptic ({error!r} is missing or wrong). {EXAMPLE}"
        ) from error
    return concepts, numbers
