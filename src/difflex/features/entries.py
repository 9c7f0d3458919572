"""Records of features, examples and images in a book; importing them does not import torch."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal, NamedTuple

from difflex.errors import BadInput
from difflex.records import Shot, Split

__all__ = [
    "COVER_THRESHOLD",
    "AtomImage",
    "Example",
    "ExampleKind",
    "FeatureNeighbour",
    "FeatureStats",
    "Histogram",
    "ImageFile",
    "ShotRow",
    "TokenMap",
]

ExampleKind = Literal["top", "quantile", "silent"]
COVER_THRESHOLD = 0.2
"""A feature covers a token where its value is at least this share of its peak: the same for all kinds of dictionaries."""
LEVELS = 65535
"""Maps store values as multiples of 1/65535 of the example's peak."""
BINS_PER_OCTAVE = 4


class ImageFile(NamedTuple):
    """An image file of the study's album, shared by all books."""

    id: int
    file: str
    """File name in the album: the checksum of the file."""
    width: int
    height: int


class ShotRow(NamedTuple):
    """A shot in a book and its image."""

    id: int
    image: ImageFile
    shot: Shot


class CaptionedShot(NamedTuple):
    """A shot in a book, by number, with its image and its prompt."""

    shot: int
    image: int
    caption: str


class CoverageSummary(NamedTuple):
    """Distribution of `FeatureStats.coverage` over the features of a dictionary."""

    features: int
    """Number of features that fire in enough shots."""
    mean: float
    quartiles: tuple[float, float, float]
    area: float
    """Mean of `FeatureStats.area`."""


class Histogram(NamedTuple):
    """Distribution of a feature's positive values: four equal bins from each power of 2 to the next; bin 0 starts at 1."""

    first: int
    """Number of the first bin."""
    counts: tuple[int, ...]

    @property
    def edges(self) -> tuple[float, ...]:
        """Edges of the bins, one more than there are counts."""
        bins = (divmod(self.first + i, BINS_PER_OCTAVE) for i in range(len(self.counts) + 1))
        return tuple(2.0**octave * (1 + part / BINS_PER_OCTAVE) for octave, part in bins)


@dataclass(frozen=True, kw_only=True)
class FeatureStats:
    """Statistics of a feature; it fires where its code is positive. Spatial ones are None for dead features and text tokens."""

    feature: int
    firings: int
    """Number of tokens at which the feature fires."""
    shots: int
    """Number of shots in which it fires."""
    density: float
    """Share of tokens at which it fires."""
    peak: float
    """Largest value; 0 for a dead feature."""
    mean: float
    """Mean value where it fires."""
    negative_share: float = 0.0
    """Share of tokens at which the code is negative."""
    negative_peak: float = 0.0
    """Most negative value, or 0."""
    area: float | None = None
    """Share of an image's tokens at which it fires, averaged over the shots in which it fires."""
    spread: float | None = None
    """Mean distance of a map's values from their centre, weighted by value, as a share of the grid's diagonal."""
    concentration: float | None = None
    """Share of a map's sum in the strongest quarter of its tokens."""
    border: float | None = None
    """Share of the sum of values at border tokens, divided by the share of such tokens; 1 if evenly distributed."""
    position: float | None = None
    """Preference for parts of the image: the share of the sum of values that would have to move to make 4 x 4 parts equal."""
    coverage: float | None = None
    """Share of tokens covered (`COVER_THRESHOLD`) in the top images, averaged over them."""
    strength: float | None = None
    """Default steering strength, in peaks; None if unknown."""
    histogram: Histogram = Histogram(0, ())  # noqa: RUF009 (a constant)
    activity: tuple[float, ...] = ()
    """Density at each timestep of `BookInfo.timesteps`."""


class TokenMap(NamedTuple):
    """Where a feature fires in a shot: tokens in increasing order, and the value at each."""

    tokens: tuple[int, ...]
    values: tuple[float, ...]

    def packed(self) -> bytes:
        """Return the map as little-endian uint16: all tokens, then all values in 65535ths of the largest."""
        peak = max(self.values, default=0.0)
        levels = [max(1, round(value / peak * LEVELS)) for value in self.values]
        return struct.pack(f"<{len(self.tokens) + len(levels)}H", *self.tokens, *levels)

    @classmethod
    def unpacked(cls, packed: bytes, peak: float) -> TokenMap:
        """Read a map written by `packed`, whose largest value is `peak`."""
        if len(packed) % 4:
            raise BadInput(f"A map of {len(packed)} bytes is not whole: each token takes four.")
        numbers = struct.unpack(f"<{len(packed) // 2}H", packed)
        count = len(numbers) // 2
        return cls(numbers[:count], tuple([level / LEVELS * peak for level in numbers[count:]]))


@dataclass(frozen=True, kw_only=True)
class Example:
    """A shot in which a feature fires, or a random one in which it is silent."""

    id: int = -1
    """Number in the book; -1 before it is written."""
    feature: int
    kind: ExampleKind
    """`top`: highest peaks, one shot per image; `quantile`: random among the images in which the feature fires, without the top
    ones, sorted by peak; `silent`: random among the images in which it does not fire."""
    split: Split
    rank: int
    """From 0 within feature, kind and split; strongest first."""
    shot: int
    """Number of the shot in the book."""
    peak: float
    """Largest value of the feature in this shot; 0 if silent."""
    quantile: float | None = None
    """For `quantile`: estimated share of the images (of this split) in which the feature fires that have a lower peak."""
    map: TokenMap = TokenMap((), ())  # noqa: RUF009 (a constant)


class FeatureNeighbour(NamedTuple):
    """A feature related to another one."""

    feature: int
    kind: Literal["firing", "direction"]
    value: float
    """`firing`: share of the feature's peak tokens at which the neighbour fires too; `direction`: cosine of the decoders."""


class AtomImage(NamedTuple):
    """The image patch that an ITDA atom was taken from."""

    feature: int
    token: int
    image: ImageFile | None
    shot: Shot
