"""Records that stations exchange: sites, shots, activations, codes, edits.

Importing them does not import torch.
"""

from __future__ import annotations

import hashlib
import re
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from difflex.choices import Operation, Unit
from difflex.errors import BadInput
from difflex.values import check_fields, shown

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
    "Rectangle",
    "RegionMap",
    "Shot",
    "Site",
]

# The types of fields below.
Kind = Literal["residual", "update", "neurons"]
Stream = Literal["image", "text"]
Split = Literal["train", "held-out"]
Half = Literal["conditional", "unconditional"]
"""The two predictions of a denoiser under classifier-free guidance."""
MOST_ROWS = 1024
"""Rows or columns of a region map."""
KINDS: tuple[Kind, ...] = ("residual", "update", "neurons")
STREAMS: tuple[Stream, ...] = ("image", "text")
SMOOTH = "smooth"
LAYER = "layer."
"""What the short names of the blocks of language models begin with; their only stream is text, which their names leave out."""


@dataclass(frozen=True, order=True)
class Site:
    """A place inside a model, written `PATH[:KIND][:STREAM][:smooth]`: `double.18`, `single.9:update`, `double.3:text`."""

    path: str
    """A short name of the model's family (`double.18`) or a full module path."""
    kind: Kind = "residual"
    """`residual`: the block's output; `update`: output - input; `neurons`: inside the block's MLP, after its activation."""
    stream: Stream = "image"
    smooth: bool = False
    """Image tokens are averaged: a quarter of the token, half of the 3 x 3 tokens around it, a quarter of the whole image."""

    def __post_init__(self) -> None:
        if self.path.startswith(LAYER):
            object.__setattr__(self, "stream", "text")

    @classmethod
    def parse(cls, text: str | Site) -> Site:
        """Parse a site from its notation; a site stays as it is."""
        if isinstance(text, Site):
            return text
        if not isinstance(text, str):
            raise BadInput(f"{shown(text)} is not a site. Write PATH[:KIND][:STREAM][:{SMOOTH}], such as 'double.1'.")
        path, *rest = text.split(":")
        kind, stream = max(KINDS, key=rest.count), max(STREAMS, key=rest.count)  # by default the first
        # It is also the name of a folder.
        is_name = bool(path) and not path.startswith(".") and not re.search(r"[/\\\0]", path)
        if not is_name or len(set(rest)) < len(rest) or not set(rest) <= {kind, stream, SMOOTH}:
            raise BadInput(
                f"'{text}' is not a site. Write PATH[:KIND][:STREAM][:{SMOOTH}], KIND one of {KINDS}, STREAM one of {STREAMS}."
            )
        return cls(path, kind, stream, SMOOTH in rest)

    def __str__(self) -> str:
        kind = "" if self.kind == "residual" else f":{self.kind}"
        stream = "" if self.stream == "image" or self.path.startswith(LAYER) else f":{self.stream}"
        return self.path + kind + stream + self.smooth * f":{SMOOTH}"

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
    text_length: int | None = None
    """Tokens of the prompt that the model reads, padding included; None for the model's default."""
    seed: int = 0
    pixels: tuple[int, int]
    """Height and width."""
    steps: int
    guidance: float
    timestep: float | None = None
    """The noise level in the scheduler's units (1000 is pure noise); None for a finished image."""
    temperature: float | None = None
    """Of a language model's samples, 0 for the most likely tokens; its `steps` are the tokens to write. None for images."""
    image: str | None = None
    """For activations of an existing image: its name or path. It was noised to the level `noise`."""
    noise: float | None = None
    """Between 0 (the image) and 1 (pure noise)."""
    split: Split = "train"
    """Fixed by a hash of the prompt or image, so that all seeds of a prompt are in the same split."""

    def as_json(self) -> dict[str, Any]:
        """Return the shot as it is stored and hashed: without a text length and a temperature that it does not have."""
        entries = asdict(self)
        for name in ("text_length", "temperature"):
            if entries[name] is None:
                del entries[name]
        return entries

    @staticmethod
    def split_of(content: str | bytes, held_out: float = 0.1) -> Split:
        """Return the split of a prompt or image by a hash of the content: a share is `held-out`, part of any larger share."""
        digest = hashlib.sha256(content.encode() if isinstance(content, str) else content).digest()
        tenths, rest = int.from_bytes(digest[:8], "big") % 10, int.from_bytes(digest[8:10], "big") / 2**16
        return "held-out" if (tenths + rest) / 10 < held_out else "train"


@dataclass(frozen=True, kw_only=True)
class Activations:
    """The activations of one forward pass at one site: the output of a harvest and the input of a store."""

    site: Site
    values: Float[Tensor, "shot token width"]
    shots: tuple[Shot, ...]
    grid: tuple[int, int] | None
    """Rows and columns of the image tokens, in row-major order; None for text."""

    def __post_init__(self) -> None:
        parse_site(self)


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
    steps: int | None = None
    """The number of denoising steps, as the scheduler runs them: PNDM runs one more than requested. None if unknown."""


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
class RegionMap:
    """How much each token of an image is edited, as text that fits into a record: what a brush painted, or a feature's map."""

    rows: int
    columns: int
    weights: str
    """A byte for each token in row-major order, in base64: 0 is not edited, 255 is edited in full."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not (0 < self.rows <= MOST_ROWS and 0 < self.columns <= MOST_ROWS):
            raise BadInput(
                f"A region map of {self.rows} x {self.columns} is not possible. Use 1 to {MOST_ROWS} rows and columns."
            )
        if len(self.levels) != self.rows * self.columns or not any(self.levels):
            found = f"{len(self.levels):,} bytes" if any(self.levels) else "no byte above 0"
            raise BadInput(f"A region map of {self.rows} x {self.columns} has {found}. Give a byte for each token, some above 0.")

    @property
    def levels(self) -> bytes:
        """The weights in 255ths."""
        try:
            return b64decode(self.weights, validate=True)
        except ValueError as error:
            raise BadInput(f"The weights of a region map are not base64: {shown(self.weights)}.") from error

    @classmethod
    def of(cls, weights: Sequence[Sequence[float]]) -> RegionMap:
        """Return the map of rows of weights from 0 to 1."""
        if (
            not weights
            or len({len(row) for row in weights}) > 1
            or not all(0 <= weight <= 1 for row in weights for weight in row)
        ):
            raise BadInput("A region map is made of rows of the same length, with weights from 0 to 1.")
        levels = bytes(round(255 * weight) for row in weights for weight in row)
        return cls(rows=len(weights), columns=len(weights[0]), weights=b64encode(levels).decode())


Region = Rectangle | RegionMap | str
"""A part of an image to edit: a rectangle, a map, the name of a mask image (light where to edit), or `fires`."""


@dataclass(frozen=True, kw_only=True)
class TransplantSource:
    """The generation from which a transplant takes the maps of its features."""

    prompt: str
    seed: int = 0
    region: Region | None = None
    """A part of it, in the notation of `Edit.region`; its centre is placed at the centre of the edit's region."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.seed < 0:
            raise BadInput(f"The seed {self.seed} is below 0. Seeds are whole numbers from 0 on.")
        _check_region(self.region)


@dataclass(frozen=True, kw_only=True)
class Edit:
    """A change of the activations at one site, as data that can be saved and applied again."""

    operation: Operation
    """`add` adds strength times the features' directions, whatever the activation is. `set` (to the strength), `scale` (by it),
    `ablate` and `transplant` (from another generation) change the codes of the features and keep what the dictionary does not
    reconstruct. Three write the activation itself: `replace` strength times the features' directions and nothing else,
    `reconstruct` the dictionary's reconstruction, `zero` nothing, so that a block whose `update` it is returns its input."""
    site: Site
    """The site of the dictionary or contrast, and of the edit. A text such as `double.18` is parsed."""
    at: tuple[Site, ...] = ()
    """Sites to edit in place of it, of the same width: FLUX from layer 18 on by a dictionary of `double.18`."""
    dictionary: str | None = None
    """The label of the dictionary that the features are of, or SITE/LABEL."""
    features: tuple[int, ...] = ()
    contrast: str | None = None
    """Instead of a dictionary: the name of a contrast direction, which is the only feature."""
    strength: float = 1.0
    unit: Unit = "peak"
    """A strength of 1 is: the feature's largest code; its mean code where it fires; the mean norm of the site's activations in
    training; the mean norm of the image's activations at the moment of the edit; a code of 1. A scale has no unit."""
    region: Region | None = None
    """The part of the image to edit: a rectangle, a map, the name of a mask image (light where to edit), or `fires` for the
    tokens at which one of the features fires; None for all of it. A map multiplies the change at each token; a replace edits
    the tokens of half weight or more."""
    steps: tuple[int, int] | None = None
    """The range of steps to edit, its end excluded; None for all."""
    half: Literal["conditional", "both", "opposed"] = "conditional"
    """Under guidance: the conditional half alone, both alike, or the unconditional one with the opposite sign."""
    source: TransplantSource | None = None
    """For a transplant."""

    def __post_init__(self) -> None:
        """Refuse what is no edit: values of another type, unknown choices, numbers out of range, impossible combinations."""
        parse_site(self)
        if isinstance(self.dictionary, str):
            object.__setattr__(self, "dictionary", self.dictionary.removeprefix(f"{self.site}/"))
        if isinstance(self.at, tuple | list):
            object.__setattr__(self, "at", tuple(map(Site.parse, self.at)))
        check_fields(self)
        _check_region(self.region)
        self._check_features()
        if len(set(self.at)) < len(self.at) or (self.at and self.operation == "transplant"):
            problem = "has maps of its own site alone" if self.operation == "transplant" else "names a site twice"
            raise BadInput(
                f"An edit at {', '.join(map(str, self.at))} {problem}. Name each site once, and none for a transplant."
            )
        if self.steps is not None and not 0 <= self.steps[0] < self.steps[1]:
            raise BadInput(f"Steps {self.steps[0]}:{self.steps[1]} are empty. Write START:END with START below END, from 0 on.")
        if self.operation == "set" and self.unit in ("norm", "current-norm"):
            raise BadInput(f"A code cannot be set in units of {self.unit}, which is a length. Use peak, mean or code.")
        if self.half == "opposed" and self.replaces:
            raise BadInput(f"{self.operation} has no opposite. Use half='both' or 'conditional'.")
        if (self.operation == "transplant") != (self.source is not None):
            raise BadInput(
                "A transplant needs a source: the prompt and seed of the image that its maps are taken from."
                if self.source is None
                else f"A source is for a transplant, but the operation is {self.operation}. Leave the source out."
            )
        if self.region == "fires" and (self.replaces or self.operation == "transplant"):
            raise BadInput(f"The region of {self.operation} cannot be 'fires': it does not read the codes of the image.")

    @property
    def has_unit(self) -> bool:
        """Whether the strength is in a unit: that of a scale is a factor, and other operations have none."""
        return self.operation in ("add", "set", "replace")

    @property
    def replaces(self) -> bool:
        """Whether it writes the activation itself, and does not add to it."""
        return self.operation in ("replace", "reconstruct", "zero")

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites that are edited."""
        return self.at or (self.site,)

    def _check_features(self) -> None:
        if self.operation == "zero" and (self.dictionary is not None or self.features or self.contrast is not None):
            raise BadInput("An edit to zero has no features. Leave out the dictionary, its features and the contrast.")
        if self.operation == "reconstruct":
            if self.features or self.contrast is not None:
                raise BadInput("A reconstruction is that of a whole dictionary. Leave out features and contrast.")
            return
        if self.contrast is not None and (self.dictionary is not None or self.features):
            raise BadInput(
                f"The edit at {self.site} must name a dictionary or a contrast: one of the two. A contrast is its own feature."
            )
        if self.contrast is not None:
            check_contrast_name(self.contrast)
        if self.dictionary is not None and not self.features:
            raise BadInput(f"The edit names no feature of {self.site}/{self.dictionary}. Name one or more by their numbers.")
        if self.features and min(self.features) < 0:
            raise BadInput(f"There is no feature {min(self.features)}: they are numbered from 0.")
        if len(set(self.features)) < len(self.features):
            raise BadInput(f"A feature is named twice: {shown(self.features)}. Name each once.")


def parse_site(record: Any) -> None:
    """Replace the text in the field `site` of a frozen record by the site that it names."""
    object.__setattr__(record, "site", Site.parse(record.site))


def is_same_model(name: str, other: str) -> bool:
    """Return whether two names are of one model: equal, or the same folder."""
    return name == other or (Path(name).is_dir() and Path(name).resolve() == Path(other).resolve())


def model_name(model: str, revision: str | None) -> str:
    """Return how messages name a model."""
    return f"{model}@{revision}" if revision else model


def check_contrast_name(name: str) -> None:
    """Refuse what cannot be the name of a contrast, which is part of a file name."""
    if not re.fullmatch(r"\w[\w.-]*", name) or len(name.encode()) > 100:
        raise BadInput(f"{shown(name)} cannot be the name of a contrast. Use up to 100 letters, digits, '.', '_' and '-'.")


def _check_region(region: Region | None) -> None:
    if isinstance(region, Rectangle) and not (0 <= region.left < region.right <= 1 and 0 <= region.top < region.bottom <= 1):
        text = ",".join(f"{edge:g}" for edge in region)
        raise BadInput(
            f"The region {text} is empty or outside the image. Its edges are shares of the image, from 0 to 1: left is below "
            "right, and top below bottom."
        )
