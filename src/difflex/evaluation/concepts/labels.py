"""Labelled activations: the concepts that each token shows, its image, and its noise level."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import tee
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int8
from PIL import Image
from torch import Tensor

from difflex.errors import BadInput, NonFinite
from difflex.evaluation.concepts.results import Concept
from difflex.records import Activations, Site

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
class LabelledActivations:
    """Labelled activations of one site: the tokens of all images at all noise levels, concatenated."""

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

    @classmethod
    def concatenate(cls, parts: Sequence[LabelledActivations]) -> LabelledActivations:
        """Return the tokens of all `parts`, which are of one site and the same concepts."""
        columns = {name: torch.cat([getattr(part, name) for part in parts]) for name in TOKEN_FIELDS}
        return replace(parts[0], truth=torch.cat([part.truth for part in parts], dim=1), **columns)

    def select(self, mask: Bool[Tensor, " token"]) -> LabelledActivations:
        """Return the tokens in `mask`."""
        return replace(self, truth=self.truth[:, mask], **{name: getattr(self, name)[mask] for name in TOKEN_FIELDS})

    @property
    def noise_levels(self) -> list[float]:
        """The noise levels, ascending."""
        return sorted(set(self.noise.tolist()))


TOKEN_FIELDS = ("values", "images", "noise", "held_out")
"""The fields of `LabelledActivations` whose first axis is the token."""


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
    """Harvest the activations of images and label each token with the concepts it shows; return them by site.

    The thresholds are those of `ConceptsConfig`.
    """
    parts: dict[Site, list[LabelledActivations]] = {}
    pending: dict[str, _PendingImage] = {}
    previous: set[str] = set()
    images, prompts, names = tee(_register(labelled_images, pending), 3)
    for batch in harvest((item.image for item in images), (item.prompt for item in prompts), (item.name for item in names)):
        current = [shot.image or shot.prompt for shot in batch.shots]
        if unknown := [name for name in current if name not in pending]:
            raise BadInput(f"The activations are those of '{unknown[0]}', which is not one of the labelled images.")
        labelled = _label_batch(batch, [pending[name] for name in current], tuple(concepts), present_above, absent_below)
        parts.setdefault(batch.site, []).append(labelled)
        # All noise levels and sites of an image are harvested before those of the next one.
        for name in previous.difference(current):
            del pending[name]
        previous = set(current)
    if not parts:
        raise BadInput("No image was given, so no concept can be matched. Give at least one.")
    return {site: LabelledActivations.concatenate(pieces) for site, pieces in parts.items()}


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
        values=batch.values.flatten(0, 1).float().cpu(),
        truth=token_labels(shares.flatten(1), present_above, absent_below),
        **{name: values.repeat_interleave(rows * columns) for name, values in by_image.items()},
    )


def token_labels(
    shares: Float[Tensor, "concept token"], present_above: float = 0.5, absent_below: float = 0.0
) -> Int8[Tensor, "concept token"]:
    """Return 1 where a token shows a concept, 0 where it does not, -1 where it is ignored, by the covered share of its area."""
    return torch.where(shares >= present_above, 1, torch.where(shares <= absent_below, 0, -1)).to(torch.int8)
