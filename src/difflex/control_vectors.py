"""Contrast directions as control vectors of other tools: GGUF (repeng, llama.cpp), and what a `SteeringVector` holds (.pt).

Both hold a direction for each layer number. `double.18` is layer 18, and so is `single.18`: readers must know which is meant.
"""

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from difflex.errors import BadInput, BrokenFile, DifflexError, UnknownName
from difflex.files import disk_errors, replacing
from difflex.records import Site
from difflex.steering.contrast import Contrast
from difflex.tensors import write_pickle

__all__ = ["VectorFile", "contrast_of", "is_same_contrast", "layer_of", "read_vectors", "write_vectors"]

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
STRING, UINT32, ARRAY = 8, 4, 9
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of the other types of values in GGUF, by number."""
TENSOR_TYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
"""Types of tensors that are read; all others are quantised."""
LARGEST = 2**28
"""Bytes of a file; a vector of 12,288 numbers for each of 1,000 layers takes 50 MB."""
MOST, LONGEST = 10_000, 2**20
"""Entries of a file, and bytes of a text in it."""
OURS = "difflex.contrast"
"""The entry with what a contrast is besides its direction."""
DIRECTION = re.compile(r"direction\.(\d{1,6})")


class VectorFile(NamedTuple):
    """What a file of control vectors holds."""

    directions: dict[int, Float[Tensor, " width"]]
    """By layer."""
    hint: str
    """The model or kind of layers that the file names."""
    contrast: dict[str, Any] | None = None
    """What difflex wrote of the contrast; None in files of others."""


def layer_of(site: Site) -> int:
    """Return the layer number of a site: that of its block."""
    match = re.fullmatch(r"[^.\d]+\.(\d+)", site.path)
    if match is None or site.kind not in ("residual", "update"):
        reason = "its block has no number of its own" if match is None else f"{site.kind} are no part of the residual stream"
        raise BadInput(
            f"{site} has no layer number, by which control vectors are stored: {reason}. Use the output of a block such as "
            "double.18, or share the file that difflex contrast wrote."
        )
    return int(match[1])


def write_vectors(contrast: Contrast, path: Path) -> Path:
    """Write a contrast as a control vector, in the format that the name ends in, and return the path."""
    layer, direction = layer_of(contrast.site), contrast.direction.float().cpu().contiguous()
    entries = {field.name: getattr(contrast, field.name) for field in fields(contrast) if field.name != "direction"}
    text = json.dumps({**entries, "site": str(contrast.site)})
    hint = f"{contrast.model}:{contrast.site.path.partition('.')[0]}"
    if path.suffix == ".gguf":
        content = _gguf({"controlvector.model_hint": hint, "controlvector.layer_count": 1, OURS: text}, layer, direction)
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    elif path.suffix == ".pt":
        write_pickle(path, {"layer_activations": {layer: direction}, "layer_type": "decoder_block", OURS: text})
    else:
        raise BadInput(f"{path} is of no known format. End the name in .gguf (repeng, llama.cpp) or .pt (steering-vectors).")
    return path


def read_vectors(path: Path) -> VectorFile:
    """Read a file of control vectors, in the format that the name ends in."""
    if path.suffix not in (".gguf", ".pt"):
        raise BadInput(f"{path} is of no known format. Name a .gguf file (repeng, llama.cpp) or a .pt file (steering-vectors).")
    if not path.is_file():  # a device or a pipe may never end
        raise BadInput(
            f"There is no file {path}." if not path.exists() else f"{path} is a folder, a device or a pipe. Name a file."
        )
    with disk_errors(path, "read"):
        size = path.stat().st_size
        content = path.read_bytes() if size <= LARGEST else b""
    if size > LARGEST:
        raise BrokenFile(f"{path} has {size:,} bytes; control vectors have at most {LARGEST:,}.")
    try:
        vectors = _read_gguf(content) if path.suffix == ".gguf" else _read_pt(path)
    except DifflexError as error:
        raise BrokenFile(f"{path} cannot be used: {error}") from error
    except Exception as error:  # files of any content, read by struct, torch and json
        raise BrokenFile(f"{path} cannot be read as control vectors ({str(error)[:200]}): it is damaged.") from error
    if not vectors.directions:
        raise BrokenFile(f"{path} holds no direction of a layer.")
    for layer, direction in vectors.directions.items():
        if direction.ndim != 1 or not bool(torch.isfinite(direction).all()) or not bool(direction.any()):
            raise BrokenFile(f"In {path} the direction of layer {layer} is zero, not finite or not a vector.")
    return vectors


def contrast_of(vectors: VectorFile, site: Site | None, model: str, revision: str | None, norm: float | None) -> Contrast:
    """Return the direction for `site` as a contrast of `model`; a file of difflex says the site itself.

    `norm` is the mean norm of the activations there; without it the norm of the direction stands for it.
    """
    if vectors.contrast is not None:
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in vectors.contrast.items()
        }
        try:
            [direction] = vectors.directions.values()
            contrast = Contrast(**{**values, "site": Site.parse(values["site"])}, direction=direction)
        except (TypeError, KeyError, ValueError) as error:
            raise BrokenFile(f"The entry {OURS} of the file is no contrast ({error}): it is damaged.") from error
        if site not in (None, contrast.site):
            raise BadInput(f"The direction is of {contrast.site}, not {site}. Leave --site out.")
        return contrast
    layers = ", ".join(map(str, sorted(vectors.directions)))
    if site is None:
        raise BadInput(f"The file does not say at which site its directions are (layers {layers}). Name it with --site.")
    if layer_of(site) not in vectors.directions:
        raise UnknownName(f"The file has no direction of layer {layer_of(site)}, the block of {site}. It has layers {layers}.")
    direction = vectors.directions[layer_of(site)].float()
    return Contrast(
        site=site,
        model=model,
        revision=revision,
        method="principal" if vectors.hint else "mean",
        pairs=0,
        timesteps=(),
        positive=(),
        negative=(),
        norm=float(direction.norm()) if norm is None else norm,
        direction=direction,
    )


def is_same_contrast(one: Contrast, other: Contrast) -> bool:
    """Whether two contrasts are equal, with all that is known of them."""
    names = [field.name for field in fields(one) if field.name != "direction"]
    same = all(getattr(one, name) == getattr(other, name) for name in names)
    return same and torch.equal(one.direction.cpu(), other.direction.cpu())


def _gguf(entries: Mapping[str, str | int], layer: int, direction: Float[Tensor, " width"]) -> bytes:
    """Return a GGUF file with a single direction."""
    entries = {"general.architecture": "controlvector", **entries}
    parts = [MAGIC, struct.pack("<IQQ", VERSION, 1, len(entries))]
    for name, value in entries.items():
        parts += [_text(name), struct.pack("<I", UINT32 if isinstance(value, int) else STRING)]
        parts.append(struct.pack("<I", value) if isinstance(value, int) else _text(value))
    parts += [_text(f"direction.{layer}"), struct.pack("<IQIQ", 1, len(direction), 0, 0)]
    head = b"".join(parts)
    return head + bytes(-len(head) % ALIGNMENT) + direction.numpy().astype("<f4").tobytes()


def _text(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


@final
class GGUFCursor:
    """A place in a GGUF file; whatever is read is checked to be inside of the file first."""

    def __init__(self, content: bytes) -> None:
        self.content, self.place = content, 0

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        if count > len(self.content) - self.place:
            raise BrokenFile(f"it ends within its header, at byte {self.place}.")
        self.place += count
        return self.content[self.place - count : self.place]

    def number(self, form: str) -> int:
        """Return the next whole number."""
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def limited(self, form: str, most: int, what: str) -> int:
        """Return the next whole number, which must not be above `most`."""
        if (count := self.number(form)) > most:
            raise BrokenFile(f"it has {count:,} {what}; at most {most:,} are read.")
        return count

    def text(self) -> str:
        """Return the next text."""
        return self.take(self.limited("Q", LONGEST, "bytes in a text")).decode()

    def value(self) -> str | int | None:
        """Return the next value if it is a text or a number of 32 bits, else None."""
        kind = self.number("I")
        if kind == STRING:
            return self.text()
        if kind == UINT32:
            return self.number("I")
        if kind != ARRAY:
            self.take(SIZES[kind])
            return None
        inner, count = self.number("I"), self.number("Q")
        if inner == ARRAY:
            raise BrokenFile("it holds arrays of arrays.")
        for _ in range(min(count, len(self.content)) if inner == STRING else 0):
            self.text()
        self.take(0 if inner == STRING else count * SIZES[inner])
        return None


def _read_gguf(content: bytes) -> VectorFile:
    file = GGUFCursor(content)
    if file.take(4) != MAGIC or file.number("I") not in (2, VERSION):
        raise BrokenFile("it is no GGUF file of version 2 or 3.")
    tensors, count = file.limited("Q", MOST, "tensors"), file.limited("Q", MOST, "entries")
    entries = {file.text(): file.value() for _ in range(count)}
    places: list[tuple[int, int, int, int]] = []
    for _ in range(tensors):
        name, axes = file.text(), file.limited("I", 4, "axes of a tensor")
        shape, kind, offset = [file.number("Q") for _ in range(axes)], file.number("I"), file.number("Q")
        if match := DIRECTION.fullmatch(name):
            if len(shape) != 1 or kind not in TENSOR_TYPES:
                raise BrokenFile(f"the tensor {name} is quantised or no vector.")
            places.append((int(match[1]), shape[0], kind, offset))
    alignment = entries.get("general.alignment")
    alignment = alignment if isinstance(alignment, int) and alignment > 0 else ALIGNMENT
    start = file.place + -file.place % alignment
    directions: dict[int, Tensor] = {}
    for layer, width, kind, offset in places:
        dtype = TENSOR_TYPES[kind]
        if start + offset + width * dtype.itemsize > len(content) or not width:
            raise BrokenFile(f"the direction of layer {layer} ends outside of the file.")
        part = bytearray(content[start + offset : start + offset + width * dtype.itemsize])
        directions[layer] = torch.frombuffer(part, dtype=dtype).float()
    ours, hint = entries.get(OURS), entries.get("controlvector.model_hint")
    return VectorFile(directions, str(hint or ""), json.loads(ours) if isinstance(ours, str) else None)


def _read_pt(path: Path) -> VectorFile:
    entries = torch.load(path, map_location="cpu", weights_only=True)
    vectors = entries.get("layer_activations", entries) if isinstance(entries, dict) else None
    if not isinstance(vectors, dict) or not all(type(key) is int and isinstance(each, Tensor) for key, each in vectors.items()):
        raise BrokenFile("it holds no dict of layer numbers and tensors. Save vector.layer_activations with torch.save.")
    for layer, each in vectors.items():
        # A view of few numbers may claim any size, and other layouts hold no numbers that can be looked at.
        if each.layout != torch.strided or each.device.type != "cpu" or not each.is_contiguous() or each.is_complex():
            raise BrokenFile(f"the direction of layer {layer} is no plain vector of numbers.")
    ours = entries.get(OURS)
    directions = {layer: direction.float().flatten() for layer, direction in vectors.items()}
    return VectorFile(directions, "", json.loads(ours) if isinstance(ours, str) else None)
