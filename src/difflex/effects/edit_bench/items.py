"""The items of the editing benchmark: pairs of prompts of nine edit types, and the masks of what is edited."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from difflex.errors import BadInput, UnknownName
from difflex.files import file_sha256
from difflex.images import open_image
from difflex.values import check_fields, shown

EditType = Literal["object", "add", "delete", "content", "pose", "colour", "material", "background", "style"]
"""What an edit changes, in the order of PIE-Bench: object, added object, deleted object, content, pose, colour, material, ..."""
EDIT_TYPES: tuple[EditType, ...] = (
    "object",
    "add",
    "delete",
    "content",
    "pose",
    "colour",
    "material",
    "background",
    "style",
)
EVERYTHING, BACKGROUND, NOT, FOREGROUND = "#everything", "background", "~", "foreground"
"""Words of `riebench.json` for regions: the whole image, all but the foreground, all but what follows."""
DRAWN = "drawn"
"""The name of the items of the drawn world."""
SEED = 42
"""Of all images of RIEBench."""
LEAST = 0.5
"""The lightness from which a pixel of a mask belongs to it."""
Mask = Bool[Tensor, "row column"]
Images = Float[Tensor, "image channel row column"]


@final
@dataclass(frozen=True, kw_only=True)
class EditItem:
    """A pair of prompts: the image of the first is edited to show what the second asks for."""

    id: str
    type: EditType
    source: str
    """The prompt of the image that is edited."""
    target: str
    """The prompt of the reference image, whose representation is transferred."""
    seed: int
    """Of both images."""
    source_region: str = ""
    """What is edited in the source image, in the words of a segmenter; empty in the drawn world."""
    target_region: str = ""
    """What is shown instead in the reference image."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.id or any(letter in self.id for letter in "/\\\0") or self.id.startswith("."):
            raise BadInput(f"The item {shown(self.id)} cannot be the name of a file. Use letters, digits and dashes.")
        if self.source == self.target:
            raise BadInput(f"The item {self.id} has the same prompt twice: {shown(self.source)}. Change one of them.")


class EditMasks(NamedTuple):
    """The pixels of what an item is about: in the source image, and in the reference image."""

    source: Mask
    target: Mask


class TransferMasks(NamedTuple):
    """Where a representation is read, and where it is written in the source image, by the rules of RIEBench."""

    donor: Mask
    """Where the added representation is read: in the reference image, for `delete` in the source image itself."""
    edited: Mask
    """Where the removed representation is read and removed, in the source image."""

    changed: Mask
    """What may change: all that is written to."""

    @classmethod
    def of(cls, item: EditItem, masks: EditMasks) -> TransferMasks:
        """Return the masks of an item: for `add` its new object's, for `delete` its object's and all else, else both masks."""
        if item.type == "add":
            return cls(masks.target, masks.target, masks.target)
        if item.type == "delete":
            return cls(~masks.source, masks.source, masks.source)
        return cls(masks.target, masks.source, masks.target | masks.source)


def on_tokens(mask: Mask, grid: tuple[int, int] | None) -> Bool[Tensor, " token"] | slice:
    """Return the tokens that a mask touches; all tokens without a grid, as those of text."""
    if grid is None:
        return slice(None)
    return F.adaptive_max_pool2d(mask.float()[None], grid)[0].flatten() > 0


class EditWorld(NamedTuple):
    """The items of a benchmark, their masks, and a judge where there is one."""

    name: str
    """Of the results."""
    items: tuple[EditItem, ...]
    masks: Callable[[Sequence[EditItem], Images, Images], list[EditMasks]]
    """The masks of items, from their source images and their reference images."""
    judge: Callable[[Sequence[EditItem], Images, Images], list[dict[str, float]]] | None
    """Scores of edited images, given the source images: `success` and `kept`; None without a judge."""
    check: Callable[[Sequence[EditItem], Path], None] = lambda items, folder: None
    """Refuses items whose masks are missing; the folder holds their images."""
    files: Mapping[str, str] = {}
    """SHA-256 of the files that it was read from."""


def read_riebench(path: Path) -> list[EditItem]:
    """Return the items of a file in the form of `riebench.json`."""
    try:
        entries = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} cannot be read as items: {error}. Give a JSON file in the form of riebench.json.") from error
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise BadInput(f"{path} is not a list of items, each an object. Give a JSON file in the form of riebench.json.")
    items = [_parse_item(path, number, entry) for number, entry in enumerate(entries)]
    repeated = [name for name, count in Counter(item.id for item in items if item).items() if count > 1]
    if repeated:
        raise BadInput(f"{path} has {shown(repeated[0])} twice. Give each item an id of its own.")
    return [item for item in items if item is not None]


def _parse_item(path: Path, number: int, entry: Mapping[str, Any]) -> EditItem | None:
    """Return an item; None for one that is marked as not good, or whose prompts do not differ."""
    try:
        kind = str(entry["editing_type_id"])
        if not kind.isdigit() or not 1 <= int(kind) <= len(EDIT_TYPES):
            raise UnknownName.among("The editing_type_id", kind, [str(i + 1) for i in range(len(EDIT_TYPES))])
        source, target = (_without_brackets(str(entry[name])) for name in ("original_prompt", "editing_prompt"))
        if source == target or entry.get("is_good") is False:
            return None
        # The first version of the file calls the regions edit_source and edit_target.
        regions = (
            entry.get("original_gsam_prompt", entry.get("edit_source")),
            entry.get("editing_gsam_prompt", entry.get("edit_target")),
        )
        return EditItem(
            id=str(entry["id"]),
            type=EDIT_TYPES[int(kind) - 1],
            source=source,
            target=target,
            seed=int(entry.get("seed", SEED)),
            source_region=str(regions[0] or EVERYTHING),
            target_region=str(regions[1] or EVERYTHING),
        )
    except KeyError as error:
        raise BadInput(f"Item {number} of {path} has no {error}. Give a JSON file in the form of riebench.json.") from error
    except (BadInput, UnknownName, ValueError) as error:
        raise BadInput(f"Item {number} of {path}: {error}") from error


def _without_brackets(prompt: str) -> str:
    return prompt.replace("[", "").replace("]", "").strip()


def masked_world(path: Path, masks: Path | None) -> EditWorld:
    """Return the items of a file in the form of `riebench.json`, with masks that a segmenter wrote to the folder `masks`."""
    items = tuple(read_riebench(path))
    folder = masks or Path("masks")
    files = [folder / name for item in items for name, _ in required_masks(item).values()]
    known = {"items": file_sha256(path)} | {file.name: file_sha256(file) for file in files if masks and file.is_file()}

    def read(items: Sequence[EditItem], sources: Images, references: Images) -> list[EditMasks]:
        pixels = sources.shape[2], sources.shape[3]
        return [EditMasks(*(_read_mask(item, side, folder, pixels) for side in ("source", "target"))) for item in items]

    def check(items: Sequence[EditItem], images: Path) -> None:
        missing = [
            (folder / name, words, images / item.id / f"{side}.png")
            for item in items
            for side, (name, words) in required_masks(item).items()
            if masks is None or not (folder / name).is_file()
        ]
        if missing:
            listed = "\n".join(f"  {file}: '{words}' in {image}" for file, words, image in missing[:5])
            more = f"\n  and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise BadInput(
                f"{len(missing)} masks are missing. Segment these images with a tool of your own, write each mask as a PNG "
                f"that is white where the words hold, and give the folder with --masks:\n{listed}{more}"
            )

    name = path.stem if path.stem != DRAWN else f"{DRAWN} (file)"
    return EditWorld(name, items, read, None, check, known)


def required_masks(item: EditItem) -> dict[str, tuple[str, str]]:
    """Return the masks that an item needs: for `source` and `target`, if needed, the file name and the words to segment by."""
    regions = {"source": item.source_region, "target": item.target_region}
    sides = {"add": ("target",), "delete": ("source",), "style": ()}.get(item.type, ("source", "target"))
    return {side: (f"{item.id}-{side}.png", _segmented_words(regions[side])) for side in sides if regions[side] != EVERYTHING}


def _segmented_words(region: str) -> str:
    """Return what to segment: the foreground for `background`, x for `~x`; the mask is inverted when it is read."""
    return FOREGROUND if BACKGROUND in region else region.removeprefix(NOT).strip()


def _read_mask(item: EditItem, side: Literal["source", "target"], folder: Path, pixels: tuple[int, int]) -> Mask:
    region = item.source_region if side == "source" else item.target_region
    if side not in required_masks(item):
        return torch.ones(pixels, dtype=torch.bool)
    path = folder / required_masks(item)[side][0]
    grey = open_image(path, "L").resize((pixels[1], pixels[0]))
    light = torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).view(pixels) >= 255 * LEAST
    mask = ~light if BACKGROUND in region or region.startswith(NOT) else light
    if not bool(mask.any()):
        raise BadInput(f"The mask {path} for '{region}' covers no pixel. Segment the image again, or leave the item out.")
    return mask
