"""What goes into a book and comes out of it: plain records, light enough for readers that never need a tensor."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

from difflex.records import Shot, Split

__all__ = [
    "KINDS",
    "SHOWN",
    "AtomImage",
    "BookInfo",
    "Example",
    "ExampleKind",
    "Explanation",
    "ExplanationScore",
    "FeatureNeighbour",
    "FeatureStats",
    "Histogram",
    "ImageFile",
    "Judgement",
    "RecordedUsage",
    "ShotRow",
    "TokenMap",
]

ExampleKind = Literal["top", "quantile", "silent"]
KINDS: tuple[ExampleKind, ...] = get_args(ExampleKind)
SHOWN = 0.2
"""A feature covers a token where its value is at least this share of its own peak: one threshold for every kind of dictionary."""
LEVELS = 65535
OCTAVE = 4
"""Bins of a histogram in which values double."""


@dataclass(frozen=True, kw_only=True)
class BookInfo:
    """What a book is about, and what it was made from."""

    dictionary: str
    """`SITE/LABEL`."""
    kind: str
    """Of the dictionary: topk, itda, neurons ..."""
    size: int
    k: int
    checksum: str
    """Of the dictionary's files when the book was made."""
    model: str
    revision: str | None = None
    data: str
    """What was shown to it, and by which settings: books of the same words have the same examples."""
    grid: tuple[int, int] | None
    """Rows and columns of the tokens, in row-major order; None for text."""
    tokens: int
    """How many were looked at."""
    shots: Mapping[Split, int]
    """How many, by split."""
    images: int
    timesteps: tuple[float, ...] = ()
    """That `FeatureStats.activity` speaks of, falling."""
    difflex: str = ""
    """The version that made it."""


class ImageFile(NamedTuple):
    """An image, once for all books of a study."""

    id: int
    file: str
    """In the study's folder of images; named by its content."""
    width: int
    height: int


class ShotRow(NamedTuple):
    """A shot and the image that it belongs to."""

    id: int
    image: ImageFile
    shot: Shot


class Histogram(NamedTuple):
    """How often a feature takes which value: four bins of one width from each power of 2 to the next; bin 0 begins at 1."""

    first: int
    """The number of the first bin."""
    counts: tuple[int, ...]

    @property
    def edges(self) -> tuple[float, ...]:
        """The bounds of the bins, one more than there are counts."""
        bins = (divmod(self.first + i, OCTAVE) for i in range(len(self.counts) + 1))
        return tuple(2.0**octave * (1 + part / OCTAVE) for octave, part in bins)


@dataclass(frozen=True, kw_only=True)
class FeatureStats:
    """A feature in figures; it fires where its code is positive. Figures of place are None where it never fires, or for text."""

    feature: int
    fired: int
    """Tokens at which it fires."""
    shots: int
    """Shots in which it fires."""
    density: float
    """The share of tokens at which it fires."""
    peak: float
    """Its largest value; 0 if it never fires."""
    mean: float
    """Of its values where it fires."""
    negative_share: float = 0.0
    """The share of tokens at which its code is negative."""
    negative_peak: float = 0.0
    """Its most negative value; 0 if it has none."""
    area: float | None = None
    """The share of an image's tokens at which it fires, mean over the shots in which it does."""
    spread: float | None = None
    """Distance of what it marks from the middle of that, weighted by value, as a share of the grid's diagonal."""
    concentration: float | None = None
    """The share of its values' sum that lies in the strongest quarter of the tokens at which it fires."""
    border: float | None = None
    """How much of its values' sum lies in the outermost tokens, over their share of the grid: 1 if it does not care."""
    position: float | None = None
    """How far it prefers some parts of the image: the share of its values' sum that would have to move for all parts (4 x 4)
    to get the same."""
    coverage: float | None = None
    """The share of tokens that it covers (`SHOWN`) in its top images, mean over these."""
    strength: float | None = None
    """How strongly it is added to an image where no strength is named, in peaks as steering has them; None if nobody knows."""
    histogram: Histogram = Histogram(0, ())  # noqa: RUF009 (a constant)
    activity: tuple[float, ...] = ()
    """Its density at each timestep of `BookInfo.timesteps`."""


class TokenMap(NamedTuple):
    """Where in a shot a feature fires: tokens in rising order, and its value at each."""

    tokens: tuple[int, ...]
    values: tuple[float, ...]

    def packed(self) -> bytes:
        """The map in 4 bytes a token: all tokens, then all values as whole 65535ths of the largest; little-endian uint16."""
        peak = max(self.values, default=0.0)
        levels = [max(1, round(value / peak * LEVELS)) for value in self.values]
        return _bytes(array("H", self.tokens)) + _bytes(array("H", levels))

    @classmethod
    def unpacked(cls, blob: bytes, peak: float) -> TokenMap:
        """The map that `packed` wrote, whose largest value is `peak`."""
        numbers = array("H", blob)
        if sys.byteorder == "big":
            numbers.byteswap()
        count = len(numbers) // 2
        return cls(tuple(numbers[:count]), tuple(level / LEVELS * peak for level in numbers[count:]))


@dataclass(frozen=True, kw_only=True)
class Example:
    """A shot at which a feature fires, or a random one at which it is silent."""

    id: int = -1
    """In the book; -1 before it is there."""
    feature: int
    kind: ExampleKind
    """`top`: those of the highest peak, one for each image; `quantile`: drawn at random from all shots at which it fires, but
    for the top, in order of their peaks; `silent`: drawn at random from those at which it does not fire."""
    split: Split
    rank: int
    """From 0, among those of its feature, kind and split; top ones strongest first."""
    shot: int
    """The number of the shot in the book."""
    peak: float
    """Of the feature in this shot; 0 where it is silent."""
    quantile: float | None = None
    """For `quantile`: the share of the shots at which the feature fires (in this split) whose peak is lower."""
    map: TokenMap = TokenMap((), ())  # noqa: RUF009 (a constant)


class FeatureNeighbour(NamedTuple):
    """A feature that has to do with another one."""

    other: int
    kind: Literal["firing", "direction"]
    value: float
    """`firing`: at what share of the tokens looked at the other one fires too; `direction`: the cosine of what the two add."""


class AtomImage(NamedTuple):
    """The very patch of the data that an ITDA atom is."""

    feature: int
    token: int
    image: ImageFile | None
    shot: Shot


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What a feature is, in words."""

    id: int = -1
    """In the book; -1 before it is there."""
    feature: int
    backend: str
    """Who explained."""
    protocol: str
    text: str
    """What its images share."""
    descriptions: tuple[str, ...] = ()
    """What each of them shows."""
    state: Literal["done", "failed"] = "done"
    reason: str = ""
    """Why it failed."""


class Judgement(NamedTuple):
    """How well one example fits an explanation."""

    example: int
    wanted: bool
    """Whether the feature fires there."""
    score: float
    """Between 0 and 1."""


class ExplanationScore(NamedTuple):
    """How well an explanation tells the feature's examples from others."""

    measure: str
    """accuracy, auroc, intruder ..."""
    value: float
    low: float | None
    high: float | None
    judged: int
    """How many judgements are behind it."""


@dataclass(frozen=True, kw_only=True)
class RecordedUsage:
    """What an answer took."""

    backend: str
    role: Literal["explainer", "judge"]
    asked: int = 1
    """Calls."""
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float | None = None
    """In dollars; None where nobody says."""
    seconds: float = 0.0
    explanation: int | None = field(default=None)


def _bytes(numbers: array[int]) -> bytes:
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()
