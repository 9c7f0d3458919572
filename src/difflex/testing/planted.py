"""Data whose truth is known: activations that mix planted directions, and a feature book of plain images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from difflex.features import BookInfo, BookWriter, ImageAlbum
from difflex.features.entries import Example, ExampleKind, FeatureNeighbour, FeatureStats, ImageFile, TokenMap
from difflex.records import ActivationBatch, Shot, Split

GRID = (4, 4)
PEAK = 20.0


class PlantedRecovery(NamedTuple):
    """How well a dictionary recovers the planted directions: the mean of each one's best cosine."""

    mean: float
    rarest: float
    """Mean over the rarest quarter."""


@dataclass(frozen=True, kw_only=True)
class PlantedDictionary:
    """A source of activations with `truths` planted directions, of which `active` fire at a token on average."""

    width: int = 256
    truths: int = 1024
    active: float = 12.0
    exponent: float = 0.5
    """The i-th direction fires with a frequency proportional to `i ** -exponent`."""
    stretched: int = 16
    """Number of axes that are `stretch` times as wide as the others, as large models have them."""
    stretch: float = 8.0
    noise: float = 0.05
    """Variance of the noise over the variance of the mixture, before stretching."""
    seed: int = 0

    @cached_property
    def frequencies(self) -> Float[Tensor, " truth"]:
        """The share of tokens at which each direction fires, in falling order."""
        ranks = torch.arange(1, self.truths + 1, dtype=torch.float64) ** -self.exponent
        return (ranks * self.active / ranks.sum()).float().clamp_max(1)

    @cached_property
    def directions(self) -> Float[Tensor, "truth width"]:
        """The planted directions in model space, with unit length."""
        return F.normalize(self._mixed * self._axes, dim=1)

    def batches(self, batch: int, start: int = 0) -> Iterator[ActivationBatch]:
        """Yield endless batches of `batch` rows from number `start` on; each depends on its number and the seed only."""
        for number in count(start):
            generator = self._generator(number + 1)
            fires = torch.rand(batch, self.truths, generator=generator) < self.frequencies
            amounts = fires * (0.5 + torch.rand(batch, self.truths, generator=generator))
            noise = torch.randn(batch, self.width, generator=generator) * self._noise_scale
            values = (amounts @ self._mixed + noise) * self._axes
            first = number * batch
            yield ActivationBatch(values, torch.arange(first, first + batch), torch.zeros(batch).long())

    def recovery(self, decoder: Float[Tensor, "size width"]) -> PlantedRecovery:
        """Compare the rows of `decoder` with the planted directions, without the stretch, so that all axes count alike."""
        rows = F.normalize(decoder / self._axes, dim=1)
        best = torch.cat([(part @ rows.T).amax(1) for part in self._mixed.split(1024)])
        return PlantedRecovery(float(best.mean()), float(best[-(self.truths // 4) :].mean()))

    @cached_property
    def _mixed(self) -> Float[Tensor, "truth width"]:
        return F.normalize(torch.randn(self.truths, self.width, generator=self._generator(0)), dim=1)

    @cached_property
    def _axes(self) -> Float[Tensor, " width"]:
        axes = torch.ones(self.width)
        axes[: self.stretched] = self.stretch
        return axes

    @cached_property
    def _noise_scale(self) -> float:
        """Standard deviation of the noise on every axis."""
        square = 1 + 1 / 12  # mean square of an amount that is uniform between 0.5 and 1.5
        return (self.noise * float(self.frequencies.sum()) * square / self.width) ** 0.5

    def _generator(self, number: int) -> torch.Generator:
        """A generator with a seed that no one uses elsewhere: else the first weights of an SAE could be the truth."""
        return torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + number)


def plain_colour(number: int) -> tuple[int, int, int]:
    """Return a colour (red, green, blue) that differs for each of the first 60,000 numbers."""
    return number * 37 % 256, number // 256 % 256, number * 91 % 256


def plain_book(folder: Path, features: int, tops: int = 6, sampled: int = 8, shared: int = 0) -> Path:
    """Write the book `folder/book.sqlite`, in which each feature fires at one token of images in its own colour; return its path.

    Each feature has `tops` top examples of each split and `sampled` random held-out ones, every one a shot of its own prompt, in
    which it also fires faintly at a second token; in the first `shared` of these the next feature fires at another token. The
    nearest decoder is that of the feature after the next. The images are in `folder/images`.
    """
    album, path = ImageAlbum(folder / "images"), folder / "book.sqlite"
    files = [album.add(Image.new("RGB", (16, 16), plain_colour(feature)))[0] for feature in range(features)]
    examples = [*_examples(features, tops, sampled)]
    shots = len(examples) // features
    weaker = [
        replace(
            example,
            feature=(example.feature + 1) % features,
            split="train",
            peak=PEAK / 2,
            map=_map((example.feature + 5) % 16, PEAK / 2),
        )
        for example in examples
        if example.kind == "quantile" and example.rank < shared
    ]
    with BookWriter.open(path, _book_info(features)) as writer:
        writer.add_images(ImageFile(number, *file) for number, file in enumerate(files))
        writer.add_shots((example.shot, example.feature, _shot(example)) for example in examples)
        writer.add_features(
            FeatureStats(feature=feature, firings=shots, shots=shots, density=0.01, peak=PEAK, mean=5.0)
            for feature in range(features)
        )
        writer.add_examples(sorted([*examples, *weaker], key=lambda example: example.shot))
        for feature in range(features):
            writer.add_neighbours(feature, [FeatureNeighbour((feature + 2) % features, "direction", 0.5)])
    return path


def _examples(features: int, tops: int, sampled: int) -> Iterator[Example]:
    """Yield the examples of each feature; their shots are numbered in this order."""
    kinds: list[tuple[ExampleKind, Split, float, int]] = [
        ("top", "train", PEAK - 0.5, tops),
        ("top", "held-out", PEAK, tops),
        ("quantile", "held-out", PEAK - 6, sampled),
    ]
    shots = count()
    for feature in range(features):
        for kind, split, highest, number in kinds:
            for rank in range(number):
                peak, shot = highest - rank, next(shots)
                codes = _map(feature % 16, peak)
                yield Example(feature=feature, kind=kind, split=split, rank=rank, shot=shot, peak=peak, map=codes)


def _map(token: int, peak: float) -> TokenMap:
    return TokenMap((token, (token + 8) % 16), (peak, PEAK / 10))


def _shot(example: Example) -> Shot:
    prompt = f"image {example.shot}"
    return Shot(model="plain", prompt=prompt, pixels=(16, 16), steps=1, guidance=0.0, split=example.split)


def _book_info(features: int) -> BookInfo:
    return BookInfo(
        dictionary="double.1/topk",
        kind="topk",
        size=features,
        k=1,
        fingerprint="plain",
        model="plain",
        data="plain images",
        grid=GRID,
        tokens=1,
        shots={"train": 1, "held-out": 1},
        images=features,
    )
