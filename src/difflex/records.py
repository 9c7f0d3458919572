"""Records that stations exchange: sites, shots, activations, codes, edits, and the base of records in JSON files.

Importing them does not import torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import EllipsisType, UnionType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from difflex.choices import Operation, Unit
from difflex.errors import BadInput
from difflex.files import parsing, read_json, write_json

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

__all__ = [
    "ActivationBatch",
    "Activations",
    "Codes",
    "Edit",
    "EditOutcomes",
    "HookContext",
    "JsonRecord",
    "Rectangle",
    "Shot",
    "Site",
]

# The types of fields below.
Kind = Literal["residual", "update", "neurons"]
Stream = Literal["image", "text"]
Split = Literal["train", "held-out"]
Half = Literal["conditional", "unconditional"]
"""The two predictions of a denoiser under classifier-free guidance."""
KINDS: tuple[Kind, ...] = ("residual", "update", "neurons")
STREAMS: tuple[Stream, ...] = ("image", "text")


@dataclass(frozen=True, order=True)
class Site:
    """A place inside a model, written `PATH[:KIND][:STREAM]`: `double.18`, `single.9:update`, `double.3:text`."""

    path: str
    """A short name of the model's family (`double.18`) or a full module path."""
    kind: Kind = "residual"
    """`residual`: the block's output; `update`: output - input; `neurons`: inside the block's MLP, after its activation."""
    stream: Stream = "image"

    @classmethod
    def parse(cls, text: str) -> Site:
        """Parse a site from its notation."""
        path, *rest = text.split(":")
        kind, stream = max(KINDS, key=rest.count), max(STREAMS, key=rest.count)  # by default the first
        if not path or len(set(rest)) < len(rest) or not set(rest) <= {kind, stream}:
            raise BadInput(f"'{text}' is not a site. Write PATH[:KIND][:STREAM], KIND one of {KINDS}, STREAM one of {STREAMS}.")
        return cls(path, kind, stream)

    def __str__(self) -> str:
        kind = "" if self.kind == "residual" else f":{self.kind}"
        return self.path + kind + ("" if self.stream == "image" else f":{self.stream}")

    @property
    def folder(self) -> str:
        """The name of its folder: `:` becomes `+`."""
        return str(self).replace(":", "+")


@dataclass(frozen=True, kw_only=True)
class Shot:
    """All that is needed to make an image, or an activation on the way to it, again."""

    model: str
    """A name inside the package, a folder, or a hub name."""
    revision: str | None = None
    """The commit on the hub; `untrained-SEED` for random weights."""
    precision: str | None = None
    """Of the weights, such as bf16; None if unknown."""
    prompt: str = ""
    seed: int = 0
    pixels: tuple[int, int]
    """Height and width."""
    steps: int
    guidance: float
    timestep: float | None = None
    """The noise level in the scheduler's units (1000 is pure noise); None for a finished image."""
    image: str | None = None
    """For activations of an existing image: its name or path. It was noised to the level `noise`."""
    noise: float | None = None
    """Between 0 (the image) and 1 (pure noise)."""
    split: Split = "train"
    """Fixed by a hash of the prompt or image, so that all seeds of a prompt are in the same split."""

    @staticmethod
    def split_of(content: str | bytes) -> Split:
        """Return the split of a prompt or image: `held-out` for a fixed tenth of all, by a hash of the content."""
        digest = hashlib.sha256(content.encode() if isinstance(content, str) else content).digest()
        return "held-out" if int.from_bytes(digest[:8], "big") % 10 == 0 else "train"


@dataclass(frozen=True, kw_only=True)
class Activations:
    """The activations of one forward pass at one site: the output of a harvest and the input of a store."""

    site: Site
    values: Float[Tensor, "shot token width"]
    shots: tuple[Shot, ...]
    grid: tuple[int, int] | None
    """Rows and columns of the image tokens, in row-major order; None for text."""


@dataclass(frozen=True)
class HookContext:
    """The state of a generation when a hook is called: an argument of functions given to `Pipeline.at`."""

    step: int
    """The index of the denoising step."""
    timestep: float
    """The noise level in the scheduler's units."""
    half: Half | None
    """The half under classifier-free guidance; None without guidance."""
    shots: tuple[Shot, ...] | None
    """The shots of the batch, if difflex runs the pipeline."""
    grid: tuple[int, int] | None
    """Rows and columns of the image tokens; None for text."""


class ActivationBatch(NamedTuple):
    """A batch of single activations for training: the output of a store or of live activations."""

    values: Float[Tensor, "token width"]
    shots: Int[Tensor, " token"]
    """The number of each row's shot in its source; `source.shot(number)` returns it."""
    tokens: Int[Tensor, " token"]
    """The position of each row's token within its shot."""


class Codes(NamedTuple):
    """The features that fire at each token; the number of slots is k, or the largest number of features at a token."""

    values: Float[Tensor, "token slot"]
    """0 in an empty slot, whatever its index."""
    indices: Int[Tensor, "token slot"]


class EditOutcomes(NamedTuple):
    """Predictions or images of the same shots, unedited and under each of several edits."""

    shots: tuple[Shot, ...]
    plain: Float[Tensor, "shot ..."]
    edited: Mapping[str, Float[Tensor, "shot ..."]]
    """By the name of the edit."""


class Rectangle(NamedTuple):
    """A part of an image, in fractions of its width and height."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True, kw_only=True)
class TransplantSource:
    """The generation from which a transplant takes the maps of its features."""

    prompt: str
    seed: int = 0
    region: Rectangle | str | None = None
    """A part of it, in the notation of `Edit.region`; its centre is placed at the centre of the edit's region."""


@dataclass(frozen=True, kw_only=True)
class Edit:
    """A change of the activations at one site, as data that can be saved and applied again."""

    operation: Operation
    """`add` adds strength times the features' directions, whatever the activation is. The others change the codes of the
    features and keep what the dictionary does not reconstruct: `set` them to the strength, `scale` them by it, `ablate` them,
    or `transplant` them from another generation. `replace` writes strength times the features' directions and nothing else."""
    site: Site
    dictionary: str | None = None
    """The label of the dictionary that the features are of."""
    features: tuple[int, ...] = ()
    contrast: str | None = None
    """Instead of a dictionary: the name of a contrast direction, which is the only feature."""
    strength: float = 1.0
    unit: Unit = "peak"
    """A strength of 1 is: the feature's largest code; its mean code where it fires; the mean norm of an activation; a code of 1.
    A scale has no unit."""
    region: Rectangle | str | None = None
    """The part of the image to edit: a rectangle, the name of a mask image (light where to edit), or `fires` for the tokens at
    which one of the features fires; None for all of it."""
    steps: tuple[int, int] | None = None
    """The range of steps to edit, its end excluded; None for all."""
    half: Literal["conditional", "both", "opposed"] = "conditional"
    """Under guidance: the conditional half alone, both alike, or the unconditional one with the opposite sign."""
    source: TransplantSource | None = None
    """For a transplant."""


Record = TypeVar("Record", bound="JsonRecord")


class JsonRecord:
    """A base of dataclasses that are stored as JSON files."""

    FORMAT: ClassVar[int]
    COMMAND: ClassVar[str]
    """The command that writes the file."""
    INDENT: ClassVar[int | None] = 1

    def save(self, path: Path | str) -> Path:
        """Write the record to `path` and return the path."""
        try:
            return write_json(Path(path), self.FORMAT, _to_json(self), self.INDENT)
        except OSError as error:
            raise BadInput(f"{path} cannot be written: {error}. Name a place that you may write to.") from error

    @classmethod
    def load(cls: type[Record], path: Path | str) -> Record:
        """Return the record in `path`."""
        path = Path(path)
        if not path.is_file():
            raise BadInput(f"There is no {path}. difflex {cls.COMMAND} makes it.")
        advice = f"Delete it and run difflex {cls.COMMAND} again."
        entries = read_json(path, cls.FORMAT, advice)
        with parsing(path, f"results of difflex {cls.COMMAND}", advice):
            return _from_json(cls, entries)


def _to_json(value: object) -> Any:
    """Return `value` as JSON: dataclasses become objects, tuples become lists, sites become text."""
    if isinstance(value, Site):
        return str(value)
    if is_dataclass(value):
        return {field.name: _to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    return [_to_json(item) for item in value] if isinstance(value, tuple | list) else value


_type_hints = cache(get_type_hints)


def _from_json(kind: Any, entry: Any) -> Any:
    """Return the value of the type `kind` that `_to_json` made `entry` of.

    An unknown entry of an object raises TypeError or KeyError, a missing one or one of another type TypeError.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind in (int, float, str, bool):
        if not isinstance(entry, int | float if kind is float else kind):
            raise TypeError(f"{entry!r} is not of type {kind.__name__}")
        return entry
    if entry is None or origin is Literal:
        return entry
    if origin is UnionType:  # X | None, or X | str | None
        return entry if isinstance(entry, str) and str in arguments else _from_json(arguments[0], entry)
    if kind is Site:
        return Site.parse(entry)
    if origin is dict:
        to_key = Site.parse if arguments[0] is Site else arguments[0]
        return {to_key(key): _from_json(arguments[1], item) for key, item in entry.items()}
    if origin is tuple:
        kinds = arguments[:1] * len(entry) if isinstance(arguments[-1], EllipsisType) else arguments
        return tuple(_from_json(*pair) for pair in zip(kinds, entry, strict=True))
    hints = _type_hints(kind)
    if is_dataclass(kind):
        return kind(**{name: _from_json(hints[name], item) for name, item in entry.items()})  # pyright: ignore[reportCallIssue]
    return kind(*(_from_json(*pair) for pair in zip(hints.values(), entry, strict=True)))  # a NamedTuple
