"""Activations whose every token is labelled: which concepts it shows, of which image it is, and how noisy that was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import tee
from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int, Int8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from difflex.errors import BadInput, NonFinite
from difflex.records import Activations, Shot, Site

__all__ = ["Concept", "LabelThresholds", "LabelledActivations", "LabelledImage", "label", "on_grid", "painted"]


class Concept(NamedTuple):
    """Something that an image can show at a place."""

    name: str
    group: str
    """What kind of thing it is: colour, shape, background ..."""


class LabelledImage(NamedTuple):
    """An image of which it is known what is where."""

    image: Image.Image
    name: str
    """Its own, among all images that are labelled together."""
    prompt: str
    """What the model is told of it; may be empty."""
    shares: Callable[[int, int], Float[Tensor, "concept row column"]]
    """From rows and columns of a grid: the share of each cell's area that each concept covers."""


@dataclass(frozen=True, kw_only=True)
class LabelThresholds:
    """What a covered share of a token's area says; between the two the token is left out, for that concept alone."""

    shown: float = 0.5
    """From this share on the token shows the concept."""
    absent: float = 0.0
    """Up to this share it does not."""

    def __post_init__(self) -> None:
        if not 0 <= self.absent <= self.shown <= 1 or not self.shown:
            raise BadInput(
                f"A concept cannot be absent up to a share of {self.absent:g} and shown from {self.shown:g} on. "
                "Choose 0 <= absent <= shown <= 1, shown above 0."
            )

    def truth(self, shares: Float[Tensor, "concept token"]) -> Int8[Tensor, "concept token"]:
        """1 where a token shows a concept, 0 where it does not, -1 where it is left out."""
        return torch.where(shares >= self.shown, 1, torch.where(shares <= self.absent, 0, -1)).to(torch.int8)


@dataclass(frozen=True, kw_only=True)
class LabelledActivations:
    """Labelled activations of one site; tokens of all images and noise levels in one row."""

    site: Site
    concepts: tuple[Concept, ...]
    values: Float[Tensor, "token width"]
    truth: Int8[Tensor, "concept token"]
    """1 where a token shows a concept, 0 where it does not, -1 where it is left out."""
    images: Int[Tensor, " token"]
    """The number of each token's image."""
    noise: Float[Tensor, " token"]
    """Between 0 (the image) and 1 (pure noise)."""
    held_out: Bool[Tensor, " token"]

    def part(self, chosen: Bool[Tensor, " token"]) -> LabelledActivations:
        """The `chosen` tokens."""
        return replace(
            self,
            values=self.values[chosen],
            truth=self.truth[:, chosen],
            images=self.images[chosen],
            noise=self.noise[chosen],
            held_out=self.held_out[chosen],
        )

    def of(self, concepts: Sequence[int]) -> LabelledActivations:
        """The same tokens, labelled with these concepts alone."""
        return replace(self, concepts=tuple(self.concepts[i] for i in concepts), truth=self.truth[list(concepts)])

    @property
    def levels(self) -> list[float]:
        """The levels of noise, rising."""
        return sorted(set(self.noise.tolist()))


Harvest = Callable[[Iterable[Image.Image], Iterable[str], Iterable[str]], Iterator[Activations]]
"""From images, their prompts and their names, taken as lazily as they come, to the activations at one or several sites."""


def label(
    labelled_images: Iterable[LabelledImage],
    harvest: Harvest,
    concepts: Sequence[Concept],
    marking: LabelThresholds = LabelThresholds(),
) -> dict[Site, LabelledActivations]:
    """The activations that `harvest` finds at images, with the truth about each of their tokens; by site."""
    parts: dict[Site, list[LabelledActivations]] = {}
    known: dict[str, _PendingImage] = {}
    images, prompts, names = tee(_noted(labelled_images, known), 3)
    for seen in harvest((one.image for one in images), (one.prompt for one in prompts), (one.name for one in names)):
        there = [_known(known, shot) for shot in seen.shots]
        parts.setdefault(seen.site, []).append(_labelled(seen, there, tuple(concepts), marking))
        for name in [name for name, one in known.items() if one.met and one not in there]:
            del known[name]  # all of an image's levels and sites come before the next one's
    if not parts:
        raise BadInput("No image was given, so nothing is known of any concept. Give at least one.")
    return {site: _joined(pieces) for site, pieces in parts.items()}


@final
class _PendingImage:
    """An image on its way through a harvest."""

    def __init__(self, number: int, shares: Callable[[int, int], Tensor]) -> None:
        self.number, self.shares, self.met = number, cache(shares), False


def _noted(labelled_images: Iterable[LabelledImage], known: dict[str, _PendingImage]) -> Iterator[LabelledImage]:
    for number, one in enumerate(labelled_images):
        if one.name in known:
            raise BadInput(f"Two images are called '{one.name}': which masks are whose cannot be told. Name each differently.")
        known[one.name] = _PendingImage(number, one.shares)
        yield one


def _known(known: dict[str, _PendingImage], shot: Shot) -> _PendingImage:
    if shot.image not in known:
        raise BadInput(f"The activations are those of '{shot.image or shot.prompt}', not of an image whose concepts are known.")
    known[shot.image].met = True
    return known[shot.image]


def _labelled(
    seen: Activations, there: Sequence[_PendingImage], concepts: tuple[Concept, ...], marking: LabelThresholds
) -> LabelledActivations:
    if seen.grid is None:
        raise BadInput(f"The site {seen.site} has no grid: concepts have a place in the image, tokens of text have none.")
    if not bool(torch.isfinite(seen.values).all()):
        raise NonFinite(f"The activations of {seen.site} at '{seen.shots[0].image}' hold NaN or infinity. Harvest them again.")
    rows, columns = seen.grid
    shares = torch.stack([one.shares(rows, columns) for one in there], dim=1)
    each = torch.ones(len(there), rows * columns)
    return LabelledActivations(
        site=seen.site,
        concepts=concepts,
        values=seen.values.flatten(0, 1).float().cpu(),
        truth=marking.truth(shares.flatten(1)),
        images=(torch.tensor([one.number for one in there])[:, None] * each.long()).flatten(),
        noise=(torch.tensor([shot.noise or 0.0 for shot in seen.shots])[:, None] * each).flatten(),
        held_out=(torch.tensor([shot.split == "held-out" for shot in seen.shots])[:, None] & each.bool()).flatten(),
    )


def _joined(parts: Sequence[LabelledActivations]) -> LabelledActivations:
    return replace(
        parts[0],
        values=torch.cat([part.values for part in parts]),
        truth=torch.cat([part.truth for part in parts], dim=1),
        images=torch.cat([part.images for part in parts]),
        noise=torch.cat([part.noise for part in parts]),
        held_out=torch.cat([part.held_out for part in parts]),
    )


def painted(pixels: Float[Tensor, "3 height width"]) -> Image.Image:
    """The image of these pixels: red, green, blue in [0, 1]."""
    return Image.fromarray((pixels.permute(1, 2, 0) * 255).round().byte().numpy())


def on_grid(masks: Bool[Tensor, "concept height width"], rows: int, columns: int) -> Float[Tensor, "concept row column"]:
    """The share of each cell's area that each mask covers; any size of mask, cells as equal as pixels allow."""
    return F.adaptive_avg_pool2d(masks.float()[None], (rows, columns))[0]
