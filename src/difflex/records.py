"""What travels between stations: frozen records without behaviour beyond their own notation."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from difflex.errors import BadInput

if TYPE_CHECKING:  # importing a record must not import torch
    from jaxtyping import Float, Int
    from torch import Tensor

Kind = Literal["residual", "update", "neurons"]
Stream = Literal["image", "text"]
Split = Literal["train", "held-out"]
Half = Literal["conditional", "unconditional"]
"""The two answers of a denoiser under classifier-free guidance."""
KINDS: tuple[Kind, ...] = ("residual", "update", "neurons")
STREAMS: tuple[Stream, ...] = ("image", "text")


@dataclass(frozen=True, order=True)
class Site:
    """A named place inside a model; written `PATH[:KIND][:STREAM]`, as in `double.18`, `single.9:update`, `double.3:text`."""

    path: str
    """A short name of the model's family (`double.18`) or a full module path."""
    kind: Kind = "residual"
    """`residual`: the block's output; `update`: output - input; `neurons`: inside the block's MLP, after its activation."""
    stream: Stream = "image"

    @classmethod
    def parse(cls, text: str) -> Site:
        """The site written as `text`."""
        path, *rest = text.split(":")
        kind, stream = max(KINDS, key=rest.count), max(STREAMS, key=rest.count)  # where none is named, the first: the default
        if not path or len(set(rest)) < len(rest) or not set(rest) <= {kind, stream}:
            raise BadInput(f"'{text}' is not a site. Write PATH[:KIND][:STREAM], KIND one of {KINDS}, STREAM one of {STREAMS}.")
        return cls(path, kind, stream)

    def __str__(self) -> str:
        kind = "" if self.kind == "residual" else f":{self.kind}"
        return self.path + kind + ("" if self.stream == "image" else f":{self.stream}")

    @property
    def folder(self) -> str:
        """The name for files: `:` becomes `+`."""
        return str(self).replace(":", "+")


@dataclass(frozen=True, kw_only=True)
class Shot:
    """Everything needed to make an image, or an activation on the way to it, again."""

    model: str
    """A name inside the package, a folder, or a hub name."""
    revision: str | None = None
    """The commit on the hub; `untrained-SEED` for random weights."""
    precision: str | None = None
    """What the weights were held in, as in bf16; None if nobody said."""
    prompt: str = ""
    seed: int = 0
    pixels: tuple[int, int]
    """Height and width."""
    steps: int
    guidance: float
    timestep: float | None = None
    """What the scheduler calls the noise level (1000 is pure noise); None for a finished image."""
    image: str | None = None
    """For activations met on a given image: its name or path; then `noise` holds the level it was noised to."""
    noise: float | None = None
    """Between 0 (the image) and 1 (pure noise)."""
    split: Split = "train"
    """Fixed by a hash of the prompt or image, so that all seeds of a prompt stay together."""


def split_of(content: str | bytes) -> Split:
    """`held-out` for a fixed tenth of all prompts or images, chosen by a hash of the content."""
    digest = hashlib.sha256(content.encode() if isinstance(content, str) else content).digest()
    return "held-out" if int.from_bytes(digest[:8], "big") % 10 == 0 else "train"


@dataclass(frozen=True, kw_only=True)
class Activations:
    """What one forward pass shows at one site: what a pipeline's harvest yields and a store takes in."""

    site: Site
    values: Float[Tensor, "shot token width"]
    shots: tuple[Shot, ...]
    grid: tuple[int, int] | None
    """Rows and columns of the image tokens, in row-major order; None for text."""


@dataclass(frozen=True)
class HookContext:
    """When a site is met: what a function given to `at` is told beside the activations."""

    step: int
    """Index among the scheduler's timesteps."""
    timestep: float
    """What the scheduler calls the noise level."""
    half: Half | None
    """Which half under classifier-free guidance; None without guidance."""
    shots: tuple[Shot, ...] | None
    """The shots of the batch, where difflex itself runs the pipeline."""
    grid: tuple[int, int] | None
    """Rows and columns of the image tokens; None for text."""


class ActivationBatch(NamedTuple):
    """A batch of single activations on their way to training: what a store, or a live stream, yields."""

    values: Float[Tensor, "token width"]
    shots: Int[Tensor, " token"]
    """The number of each row's shot in its source; `source.shot(number)` gives it back."""
    tokens: Int[Tensor, " token"]
    """The position of each row's token within its shot."""


class EditOutcomes(NamedTuple):
    """What a model makes of the same shots, left alone and under each of several edits: predictions, or images."""

    shots: tuple[Shot, ...]
    plain: Float[Tensor, "shot ..."]
    edited: Mapping[str, Float[Tensor, "shot ..."]]
    """By the name of the edit."""


Operation = Literal["add", "set", "scale", "ablate", "replace", "transplant"]
Unit = Literal["peak", "mean", "norm", "code"]


class Rectangle(NamedTuple):
    """A part of an image, in fractions of its width and height."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True, kw_only=True)
class TransplantSource:
    """The generation that a transplant takes the maps of its features from."""

    prompt: str
    seed: int = 0
    region: Rectangle | str | None = None
    """Which part of it, as `Edit.region` has it; it is laid onto the edit's region, middle on middle."""


@dataclass(frozen=True, kw_only=True)
class Edit:
    """A change of the activations at one site, as data: enough to make it again."""

    operation: Operation
    """`add` a strength times what the features write, without looking at the activation. The others change the features' codes
    and leave alone what the dictionary does not explain: `set` them to the strength, `scale` them by it, `ablate` them, or
    `transplant` them from another generation. `replace`: nothing but the strength times what the features write."""
    site: Site
    dictionary: str | None = None
    """The label of the dictionary that the features are of."""
    features: tuple[int, ...] = ()
    contrast: str | None = None
    """Instead of a dictionary: the name of a direction found by contrast, taken as the only feature."""
    strength: float = 1.0
    unit: Unit = "peak"
    """What a strength of 1 is: a feature's largest code; its mean code where it fires; as long as a mean activation; a code of 1.
    A scale has no unit."""
    region: Rectangle | str | None = None
    """Which part of the image: a rectangle, the name of an image that is light there, `fires` for the tokens at which one of
    the features fires; None for all of it."""
    steps: tuple[int, int] | None = None
    """The first step, and the first no longer; None for all."""
    half: Literal["conditional", "both", "opposed"] = "conditional"
    """Under guidance: the conditional half alone, both alike, or the unconditional one with the opposite sign."""
    source: TransplantSource | None = None
    """Of a transplant."""


class Codes(NamedTuple):
    """Which features fire at each token and how strongly; slots are k, or the largest count where k is not fixed."""

    values: Float[Tensor, "token slot"]
    """0 marks an empty slot, whatever its index."""
    indices: Int[Tensor, "token slot"]
