"""What travels between stations: frozen records without behaviour beyond their own notation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, final

from difflex.errors import BadInput

if TYPE_CHECKING:  # importing a record must not import torch
    from jaxtyping import Float, Int
    from torch import Tensor

Kind = Literal["residual", "update", "neurons"]
Stream = Literal["image", "text"]
Split = Literal["train", "held-out"]
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
    """Everything needed to make a picture, or an activation on the way to it, again."""

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
    """What the scheduler calls the noise level (1000 is pure noise); None for a finished picture."""
    picture: str | None = None
    """For activations met on a given picture: its name or path; then `noise` holds the level it was noised to."""
    noise: float | None = None
    """Between 0 (the picture) and 1 (pure noise)."""
    split: Split = "train"
    """Fixed by a hash of the prompt or picture, so that all seeds of a prompt stay together."""


def split_of(content: str | bytes) -> Split:
    """`held-out` for a fixed tenth of all prompts or pictures, chosen by a hash of the content."""
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


class Rows(NamedTuple):
    """A batch of single activations on their way to training: what a store, or a live stream, yields."""

    values: Float[Tensor, "token width"]
    shots: Int[Tensor, " token"]
    """The number of each row's shot in its source; `source.shot(number)` gives it back."""
    tokens: Int[Tensor, " token"]
    """The position of each row's token within its shot."""


@final
class Reading(Iterator[Rows]):
    """Batches on their way to a reader, and the split that all of them are of."""

    def __init__(self, batches: Iterator[Rows], split: Split) -> None:
        self._batches = batches
        self.split: Split = split

    def __next__(self) -> Rows:
        return next(self._batches)


def of_split(batches: Iterator[Rows], split: Split) -> Iterator[Rows]:
    """`batches`; those of another split are an error: nothing is judged on what it was trained on. A plain iterator passes."""
    if isinstance(batches, Reading) and batches.split != split:
        raise BadInput(
            f"These batches are of the split '{batches.split}', needed is '{split}'. Ask for batches(split='{split}')."
        )
    return batches


class Outcomes(NamedTuple):
    """What a model makes of the same shots, left alone and under each of several edits: predictions, or pictures."""

    shots: tuple[Shot, ...]
    plain: Float[Tensor, "shot ..."]
    edited: Mapping[str, Float[Tensor, "shot ..."]]
    """By the name of the edit."""


class Codes(NamedTuple):
    """Which features fire at each token and how strongly; slots are k, or the largest count where k is not fixed."""

    values: Float[Tensor, "token slot"]
    """0 marks an empty slot, whatever its index."""
    indices: Int[Tensor, "token slot"]
