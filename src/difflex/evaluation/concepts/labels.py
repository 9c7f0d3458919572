"""Labelled activations: the concepts that each token shows, its image, and its noise level."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import tee
from typing import NamedTuple, Protocol, final

import torch
from jaxtyping import Bool, Float, Int, Int8
from PIL import Image
from torch import Tensor

from difflex.dictionaries.normalisation import VectorMoments
from difflex.errors import BadInput, NonFinite
from difflex.evaluation.concepts.results import Concept
from difflex.records import Activations, Site

NO_IMAGES = "No image was given, so no concept can be matched. Give at least one."
Harvest = Callable[[Iterable[Image.Image], Iterable[str], Iterable[str]], Iterator[Activations]]
"""Yields the activations of images at one or several sites, given images, prompts and names, which are consumed lazily."""


class LabelledImage(NamedTuple):
    """An image with the places of its concepts."""

    image: Image.Image
    name: str
    """Unique among the images that are labelled together."""
    prompt: str
    shares: Callable[[int, int], Float[Tensor, "concept row column"]]
    """Returns, for a grid of rows and columns, the share of each cell's area that each concept covers."""


@dataclass(frozen=True, kw_only=True)
class TokenLabels:
    """What the tokens of all images at all noise levels show, concatenated."""

    site: Site
    concepts: tuple[Concept, ...]
    truth: Int8[Tensor, "concept token"]
    """1 where a token shows a concept, 0 where it does not, -1 where it is ignored."""
    images: Int[Tensor, " token"]
    """The number of each token's image."""
    noise: Float[Tensor, " token"]
    """Between 0 (the image) and 1 (pure noise)."""
    held_out: Bool[Tensor, " token"]

    @property
    def noise_levels(self) -> list[float]:
        """The noise levels, ascending."""
        return sorted(set(self.noise.tolist()))


class LabelledSource(Protocol):
    """Labelled activations of one site, which can be read several times, batch by batch."""

    @property
    def labels(self) -> TokenLabels:
        """The labels of all tokens."""
        ...

    @property
    def width(self) -> int:
        """The width of the activations."""
        ...

    @property
    def moments(self) -> VectorMoments:
        """Mean and covariance of the tokens that are not held out."""
        ...

    @property
    def is_kept(self) -> bool:
        """Whether reading them again is cheap, because they are in memory."""
        ...

    def batches(self) -> Iterator[Float[Tensor, "token width"]]:
        """Yield the activations of all tokens, in order."""
        ...


@dataclass(frozen=True, kw_only=True)
class LabelledActivations(TokenLabels):
    """Labelled activations of one site, in memory."""

    values: Float[Tensor, "token width"]

    @classmethod
    def concatenate(cls, parts: Sequence[LabelledActivations]) -> LabelledActivations:
        """Return the tokens of all `parts`, which are of one site and the same concepts."""
        columns = {name: torch.cat([getattr(part, name) for part in parts]) for name in TOKEN_FIELDS}
        return replace(parts[0], truth=torch.cat([part.truth for part in parts], dim=1), **columns)

    @property
    def labels(self) -> TokenLabels:
        return self

    @property
    def is_kept(self) -> bool:
        return True

    @property
    def width(self) -> int:
        return self.values.shape[1]

    @property
    def moments(self) -> VectorMoments:
        return _moments(self)

    def batches(self) -> Iterator[Float[Tensor, "token width"]]:
        yield self.values


TOKEN_FIELDS = ("values", "images", "noise", "held_out")
"""The fields of `LabelledActivations` whose first axis is the token."""


@final
class LabelledStream:
    """Labelled activations of one site that are kept in memory if they fit into `room` bytes, else harvested at each reading."""

    def __init__(self, harvest: Callable[[], Iterator[LabelledActivations]], room: int) -> None:
        self._harvest, self._room = harvest, room
        self._kept: list[Tensor] | None = []
        """None once they do not fit."""
        self._labels: TokenLabels | None = None
        self._moments: VectorMoments | None = None

    @property
    def labels(self) -> TokenLabels:
        self._labels = self._labels or self._read()
        return self._labels

    def _read(self) -> TokenLabels:
        """Harvest for the first time, and return the labels."""
        parts, size = [], 0
        for part in self._harvest():
            self._device, self._width = part.values.device, part.width
            size += part.values.nbytes
            if size > self._room or self._kept is None:
                self._kept = None
            else:
                self._kept.append(part.values.cpu())
            parts.append(replace(part, values=torch.empty(len(part.values), 0)))
        if not parts:
            raise BadInput(NO_IMAGES)
        return LabelledActivations.concatenate(parts)

    @property
    def width(self) -> int:
        assert self.labels, "they are read"
        return self._width

    @property
    def moments(self) -> VectorMoments:
        self._moments = self._moments or _moments(self)
        return self._moments

    @property
    def is_kept(self) -> bool:
        assert self.labels, "they are read"
        return self._kept is not None

    def batches(self) -> Iterator[Float[Tensor, "token width"]]:
        if self.is_kept:
            yield from (values.to(self._device) for values in self._kept or ())
        else:
            yield from (part.values for part in self._harvest())


def _moments(source: LabelledSource) -> VectorMoments:
    moments, count = None, 0
    for values in source.batches():
        moments = moments or VectorMoments(source.width, covariance=True, device=values.device)
        held_out = source.labels.held_out[count : count + len(values)].to(values.device)
        moments.add(values[~held_out])
        count += len(values)
    assert moments is not None, "there is at least one image"
    return moments


class _PendingImage(NamedTuple):
    """An image on its way through a harvest."""

    number: int
    shares: Callable[[int, int], Tensor]


def label(
    labelled_images: Iterable[LabelledImage],
    harvest: Harvest,
    concepts: Sequence[Concept],
    present_above: float = 0.5,
    absent_below: float = 0.0,
) -> dict[Site, LabelledActivations]:
    """Harvest the activations of images and label each token with the concepts it shows; return them by site, on the CPU.

    The thresholds are those of `ConceptsConfig`.
    """
    parts: dict[Site, list[LabelledActivations]] = {}
    for part in label_batches(labelled_images, harvest, concepts, present_above, absent_below):
        parts.setdefault(part.site, []).append(replace(part, values=part.values.float().cpu()))
    if not parts:
        raise BadInput(NO_IMAGES)
    return {site: LabelledActivations.concatenate(pieces) for site, pieces in parts.items()}


def label_batches(
    labelled_images: Iterable[LabelledImage],
    harvest: Harvest,
    concepts: Sequence[Concept],
    present_above: float = 0.5,
    absent_below: float = 0.0,
) -> Iterator[LabelledActivations]:
    """Yield the labelled activations of each batch and site of a harvest, as they are."""
    pending: dict[str, _PendingImage] = {}
    previous: set[str] = set()
    images, prompts, names = tee(_register(labelled_images, pending), 3)
    for batch in harvest((item.image for item in images), (item.prompt for item in prompts), (item.name for item in names)):
        current = [shot.image or shot.prompt for shot in batch.shots]
        if unknown := [name for name in current if name not in pending]:
            raise BadInput(f"The activations are those of '{unknown[0]}', which is not one of the labelled images.")
        yield _label_batch(batch, [pending[name] for name in current], tuple(concepts), present_above, absent_below)
        # All noise levels and sites of an image are harvested before those of the next one.
        for name in previous.difference(current):
            del pending[name]
        previous = set(current)


def _register(images: Iterable[LabelledImage], pending: dict[str, _PendingImage]) -> Iterator[LabelledImage]:
    for number, image in enumerate(images):
        if image.name in pending:
            raise BadInput(f"Two images are called '{image.name}', so their masks cannot be assigned. Use unique names.")
        pending[image.name] = _PendingImage(number, cache(image.shares))
        yield image


def _label_batch(
    batch: Activations,
    images: Sequence[_PendingImage],
    concepts: tuple[Concept, ...],
    present_above: float,
    absent_below: float,
) -> LabelledActivations:
    if batch.grid is None:
        raise BadInput(f"The site {batch.site} has no grid: concepts are located in the image, and text tokens are not.")
    if not bool(torch.isfinite(batch.values).all()):
        raise NonFinite(f"The activations of {batch.site} at '{batch.shots[0].image}' hold NaN or infinity. Harvest them again.")
    rows, columns = batch.grid
    shares = torch.stack([image.shares(rows, columns) for image in images], dim=1)
    by_image = {
        "images": torch.tensor([image.number for image in images]),
        "noise": torch.tensor([shot.noise or 0.0 for shot in batch.shots]),
        "held_out": torch.tensor([shot.split == "held-out" for shot in batch.shots]),
    }
    return LabelledActivations(
        site=batch.site,
        concepts=concepts,
        values=batch.values.flatten(0, 1),
        truth=token_labels(shares.flatten(1), present_above, absent_below),
        **{name: values.repeat_interleave(rows * columns) for name, values in by_image.items()},
    )


def token_labels(
    shares: Float[Tensor, "concept token"], present_above: float = 0.5, absent_below: float = 0.0
) -> Int8[Tensor, "concept token"]:
    """Return 1 where a token shows a concept, 0 where it does not, -1 where it is ignored, by the covered share of its area."""
    return torch.where(shares >= present_above, 1, torch.where(shares <= absent_below, 0, -1)).to(torch.int8)
