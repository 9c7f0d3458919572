"""How images differ in composition, detail, colour and style, and what an edit changes inside and outside a region."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from difflex.evaluation.image_similarity import CLIP, ClipModel, ImageMeasure, check_measure, load_measure, ssim
from difflex.records import Rectangle

Images = Float[Tensor, "image channel row column"]
"""Pixels between 0 and 1."""
SSIM = "ssim"
COARSE, FINE = 8, 16
"""Cells along a side on which composition and colour are compared, and blocks along a side that detail is finer than."""
BANDS = 3
"""Octaves of detail that style is compared in, from the finest one on."""
LUMINANCE = (0.299, 0.587, 0.114)
SMALLEST = 1e-5
"""Added to the energy of a band, so that a flat image has one."""


@final
class SimilarityMatrix:
    """The similarity of each of some images to each of others, by SSIM, LPIPS (1 - the distance) or a CLIP."""

    def __init__(self, name: str, *, offline: bool = False) -> None:
        """Take `ssim`, `lpips` or `clip:MODEL`; its model is loaded at the first use."""
        check_similarity(name)
        self._name, self._offline = name, offline

    def __call__(self, images: Images, others: Images) -> Float[Tensor, "image other"]:
        """Return the similarities; `others` are scaled to the size of `images`."""
        if others.shape[2:] != images.shape[2:]:
            size = list(images.shape[2:])
            others = F.interpolate(others, size=size, mode="bilinear", antialias=True, align_corners=False)
        return self._compare(images, others).double().cpu()

    @cached_property
    def _compare(self) -> Callable[[Images, Images], Float[Tensor, "image other"]]:
        if self._name.startswith(CLIP):
            clip = ClipModel(self._name.removeprefix(CLIP), offline=self._offline)
            return lambda images, others: clip.embed_images(images) @ clip.embed_images(others).T
        if self._name == SSIM:
            return partial(_by_pairs, ssim)
        distance = load_measure(self._name, offline=self._offline)
        return lambda images, others: 1 - _by_pairs(distance, images, others)


def _by_pairs(measure: ImageMeasure, images: Images, others: Images) -> Float[Tensor, "image other"]:
    values = measure(images.repeat_interleave(len(others), 0), others.repeat(len(images), 1, 1, 1))
    return values.view(len(images), len(others))


def check_similarity(name: str) -> None:
    """Refuse the name of an unknown image similarity."""
    if name != SSIM:
        check_measure(name)


class RegionChange(NamedTuple):
    """What an edit of a region changes, averaged over images."""

    colour: float
    """The mean L1 distance of pixels inside the region, per channel."""
    locality: float
    """The mean L1 distance inside over the sum of those inside and outside: 1 where nothing changes outside, 0.5 if evenly."""
    texture: float
    """The share of the squared change inside that is not of the mean colour of a block."""


def region_change(edited: Images, plain: Images, region: Rectangle) -> RegionChange:
    """Measure the change from `plain` to `edited` inside and outside a region."""
    change = (edited - plain).double()
    height, width = change.shape[2:]
    rows = slice(round(region.top * height), round(region.bottom * height))
    columns = slice(round(region.left * width), round(region.right * width))
    within, total = change[:, :, rows, columns], change.abs().sum()
    inside = float(within.abs().mean())
    outside = float((total - within.abs().sum()) / max(1, change.numel() - within.numel()))
    whole = within.square().sum()
    fine = _detail(within, max(2, min(height, width) // FINE)).square().sum()
    return RegionChange(
        colour=inside,
        locality=inside / (inside + outside) if inside + outside else 0.5,
        texture=float(fine / whole) if whole else 0.0,
    )


def _detail(images: Images, block: int) -> Images:
    """Return the images without the mean of each block; what does not fill a block is cut off."""
    images = _cut(images, block)
    means = F.avg_pool2d(images, block)
    return images - means.repeat_interleave(block, 2).repeat_interleave(block, 3)


def _cut(images: Images, block: int) -> Images:
    height, width = (side // block * block for side in images.shape[2:])
    return images[:, :, :height, :width]


def composition(images: Images, others: Images) -> Float[Tensor, " image"]:
    """Return 1 - the correlation of the luminance on 8 x 8 cells; 1 where an image is flat."""
    first, second = (_cells(_luminance(part)).flatten(1) for part in (images, others))
    first, second = (part - part.mean(1, keepdim=True) for part in (first, second))
    lengths = first.norm(dim=1) * second.norm(dim=1)
    correlation = (first * second).sum(1) / lengths.clamp(min=SMALLEST**2)
    return 1 - correlation.where(lengths > SMALLEST**2, (first == second).all(1).double())


def detail(images: Images, others: Images) -> Float[Tensor, " image"]:
    """Return the energy of the difference in fine luminance over the sum of both energies: 0 if equal, 1 if unrelated."""
    block = max(2, min(images.shape[2:]) // FINE)
    first, second = (_detail(_luminance(part), block) for part in (images, others))
    energy = (first.square() + second.square()).sum((1, 2, 3))
    return (first - second).square().sum((1, 2, 3)) / energy.clamp(min=SMALLEST)


def colour(images: Images, others: Images) -> Float[Tensor, " image"]:
    """Return the L1 distance of the means and deviations of the three channels over 8 x 8 cells, wherever a colour is."""
    first, second = (_cells(part).flatten(2) for part in (images.double(), others.double()))
    means = (first.mean(2) - second.mean(2)).abs()
    deviations = (first.std(2, correction=0) - second.std(2, correction=0)).abs()
    return (means + deviations).sum(1)


def style(images: Images, others: Images) -> Float[Tensor, " image"]:
    """Return the mean absolute difference of log energy in three octaves of detail, wherever it is: how rough an image is."""
    first, second = (_band_energies(_luminance(part)) for part in (images, others))
    return ((first + SMALLEST).log() - (second + SMALLEST).log()).abs().mean(1)


def _band_energies(images: Images) -> Float[Tensor, "image band"]:
    energies = []
    for _ in range(BANDS):
        energies.append(_detail(images, 2).square().mean((1, 2, 3)))
        images = F.avg_pool2d(images, 2)
    return torch.stack(energies, dim=1)


def _luminance(images: Images) -> Images:
    return (images.double() * torch.tensor(LUMINANCE, dtype=torch.float64, device=images.device).view(1, 3, 1, 1)).sum(
        1, keepdim=True
    )


def _cells(images: Images) -> Images:
    return F.adaptive_avg_pool2d(images, COARSE)


ASPECTS: Mapping[str, Callable[[Images, Images], Float[Tensor, " image"]]] = {
    "composition": composition,
    "detail": detail,
    "colour": colour,
    "style": style,
}
"""Distances of pairs of images by the role of a block that they measure."""
