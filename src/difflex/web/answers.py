"""What the pages and their JSON twins say: plain data, documented in the OpenAPI document at /api."""

from __future__ import annotations

import base64
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from difflex.features.entries import COVER_THRESHOLD, TokenMap


class Answer(BaseModel):
    """Part of an answer."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="null")


class ProblemAnswer(Answer):
    """Why there is no other answer."""

    error: str
    """A sentence that says what was wrong, and what to do."""


class DictionaryAnswer(Answer):
    """A dictionary of the study."""

    site: str
    label: str
    features: int
    has_book: bool
    """Whether `difflex collect` has found where its features fire."""


class TileAnswer(Answer):
    """A feature as a tile of the wall."""

    feature: int
    label: str
    """The concept that it detects, or its explanation; empty if neither is known."""
    ap: float | None
    """Average precision for that concept."""
    score: float | None
    """Best accuracy of its explanations."""
    density: float
    """Share of tokens at which it fires."""
    peak: float
    image: str | None
    """File of its strongest image, at /images/FILE."""
    covered: str
    """The tokens it covers there: a bit for each token of the grid, in row-major order, as base64."""


class WallAnswer(Answer):
    """Features of a dictionary in some order, from an offset on."""

    site: str
    label: str
    grid: tuple[int, int] | None
    """Rows and columns of tokens in an image."""
    total: int
    """Number of features that fulfil the conditions."""
    offset: int
    tiles: list[TileAnswer]


class ExampleAnswer(Answer):
    """An image in which the feature fires, or a random one in which it is silent."""

    kind: str
    """`top`, `quantile` or `silent`."""
    split: str
    shot: int
    """Number of the shot in the book."""
    image: str
    width: int
    height: int
    prompt: str
    seed: int
    timestep: float | None
    peak: float
    """Largest value in this image."""
    quantile: float | None
    """For `quantile`: the share of the images in which it fires that have a lower peak."""
    levels: str
    """The value at each token of the grid in 255ths of the feature's peak, in row-major order, as base64; empty for text."""


class JudgedImage(Answer):
    """An image that a judge compared with an explanation."""

    shot: int
    image: str
    prompt: str
    covered: str
    """The tokens that were marked, as in a tile."""
    fires: bool
    """Whether the feature fires in it."""
    score: float
    """How well it fits the explanation by the judge, between 0 and 1."""


class ShownExplanation(Answer):
    """What a VLM says of a feature, and how true that is."""

    text: str
    text_fingerprint: str
    """What a vote names the text by."""
    backend: str
    protocol: str
    scores: dict[str, float]
    """By measure, such as accuracy."""
    judged: list[JudgedImage]
    agree: int
    """Number of people who agree with it."""
    disagree: int


class Ballot(BaseModel):
    """A vote on an explanation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    voter: Annotated[str, Field(pattern="^[A-Za-z0-9-]{8,40}$")]
    """Random letters that a browser chose: the same ones replace its former vote."""
    backend: Annotated[str, Field(max_length=200)]
    protocol: Annotated[str, Field(max_length=200)]
    text_fingerprint: Annotated[str, Field(max_length=64)]
    """That of the explanation."""
    agrees: bool

    def is_on(self, entry: ShownExplanation) -> bool:
        """Return whether the vote is on this explanation."""
        return (self.backend, self.protocol, self.text_fingerprint) == (entry.backend, entry.protocol, entry.text_fingerprint)


class AverageMap(Answer):
    """Where a feature fires on average."""

    images: int
    """Number of random images in which it fires."""
    levels: str
    """The mean value at each token, as in an example, in 255ths of the largest mean."""


class NeighbourAnswer(Answer):
    """A related feature."""

    kind: str
    """`firing`: they fire together; `direction`: their directions are close."""
    value: float
    tile: TileAnswer


class FeatureAnswer(Answer):
    """All that is known of a feature."""

    site: str
    label: str
    feature: int
    name: str
    """The concept that it detects, or its explanation, or its number."""
    grid: tuple[int, int] | None
    figures: dict[str, float | None]
    """By column of the book, such as density and peak."""
    concept: str | None
    ap: float | None
    histogram: list[tuple[float, int]]
    """Lower edge of each bin of positive values, and how many are in it."""
    activity: list[tuple[float, float]]
    """Timestep, and the share of tokens at which the feature fires there."""
    explanations: list[ShownExplanation]
    examples: list[ExampleAnswer]
    """Of large maps only so many as fit into a quick answer."""
    average: AverageMap | None
    neighbours: list[NeighbourAnswer]
    patch: str | None
    """Image that an ITDA atom was taken from."""
    patch_token: int | None


class ColumnScale(Answer):
    """The scale of a column that a map can be coloured by."""

    column: str
    low: float
    high: float
    is_logarithmic: bool


class ConceptPlace(Answer):
    """Where the features of a concept are on a map."""

    concept: str
    x: int
    y: int
    features: int
    """Number of features that detect it best."""
    ap: float
    """The best average precision."""


class MapAnswer(Answer):
    """The map of a dictionary: features with similar directions, or that fire together, are close to each other."""

    site: str
    label: str
    features: int
    placed: int
    """Number of features that have neighbours, and so a place."""
    done: float
    """How much of it is computed, between 0 and 1; the places can be read when it is 1."""
    legend: list[str]
    """Concepts with colours of their own."""
    columns: list[ColumnScale]
    concepts: list[ConceptPlace]
    """Best detected first."""


class FoundAnswer(Answer):
    """A feature that a search found, and why."""

    site: str
    label: str
    reason: str
    found_score: float
    grid: tuple[int, int] | None
    tile: TileAnswer


def covered_bits(where: TokenMap, peak: float, grid: tuple[int, int] | None) -> str:
    """Return the tokens that a feature covers as bits in base64, the first token in the lowest bit of the first byte."""
    if grid is None:
        return ""
    covered = np.zeros(grid[0] * grid[1], dtype=bool)
    covered[list(where.tokens)] = np.array(where.values) >= COVER_THRESHOLD * peak
    return _text(np.packbits(covered, bitorder="little"))


def levels(where: TokenMap, peak: float, grid: tuple[int, int] | None) -> str:
    """Return the values of a map in 255ths of `peak` as bytes in base64; what fires has at least 1."""
    if grid is None:
        return ""
    values = np.zeros(grid[0] * grid[1], dtype=np.uint8)
    values[list(where.tokens)] = np.clip(np.rint(np.array(where.values) * (255 / peak)), 1, 255)
    return _text(values)


def _text(content: np.ndarray) -> str:
    return base64.b64encode(content.tobytes()).decode()
