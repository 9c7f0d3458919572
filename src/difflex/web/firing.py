"""What fires in an image: `Firing`, the ranking of its features, and `KeptReadings`, the codes of the latest images in memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, final

import numpy as np

from difflex.errors import UnknownName
from difflex.features.entries import COVER_THRESHOLD, LEVELS, TokenMap
from difflex.records import Shot
from difflex.study import DictionaryRef
from difflex.web.answers import Answer, TileAnswer, levels
from difflex.web.catalogue import Catalogue
from difflex.web.studio import TokenFeatures

KEPT_BYTES = 128 * 2**20
"""Of the readings in memory."""
FEATURES = 24
"""Features of an answer with maps."""
AT_TOKEN = 64
"""Features of an answer about a token."""
MOST_BYTES = 150_000
"""Of the maps of an answer."""
FEW_SHOTS = 10
"""A feature that fired in so few shots of its book counts half: its peak there says little."""

FeatureOrder = Literal["both", "peak", "area"]


class PlacedFeature(Answer):
    """A feature in an image, or at a token of it."""

    value: float
    """The largest value in the image, or the value at the token."""
    share: float
    """The value in shares of the feature's peak in the book, which makes features comparable; it may be above 1."""
    area: float
    """Share of the tokens that it covers: where it has a fifth of its peak or more."""
    levels: str
    """Its map in 255ths of its peak in the book, as in an example; empty for the features at a token."""
    tile: TileAnswer


class FiringAnswer(Answer):
    """Features of a dictionary that fire in an image, or at a token of it."""

    site: str
    label: str
    grid: tuple[int, int]
    total: int
    """Number of features that fire."""
    features: list[PlacedFeature]


class Firing(NamedTuple):
    """The values of features at the tokens of an image. Each entry is a feature at a token."""

    grid: tuple[int, int]
    tokens: np.ndarray
    features: np.ndarray
    values: np.ndarray

    @classmethod
    def of_tokens(cls, fired: TokenFeatures) -> Firing:
        """Return what fires by the codes of all tokens."""
        assert fired.grid is not None
        tokens, slots = np.nonzero(fired.values > 0)
        features, values = fired.features[tokens, slots], fired.values[tokens, slots]
        return cls(fired.grid, tokens.astype(np.int32), features.astype(np.int32), values.astype(np.float32))

    @classmethod
    def of_maps(cls, maps: Iterable[tuple[int, float, bytes]], grid: tuple[int, int]) -> Firing:
        """Return what fires by the maps of examples of one image (`Book.packed_maps`): of each feature the strongest one."""
        best: dict[int, tuple[float, np.ndarray]] = {}
        for feature, peak, packed in maps:
            if feature not in best or peak > best[feature][0]:
                best[feature] = (peak, np.frombuffer(packed, "<u2").reshape(2, -1))
        parts = [part for _, part in best.values()]
        tokens, shares = np.concatenate([np.zeros((2, 0), np.uint16), *parts], axis=1)
        sizes = [part.shape[1] for part in parts]
        peaks = np.repeat(np.array([peak for peak, _ in best.values()], np.float32), sizes)
        features = np.repeat(np.array([*best], np.int32), sizes)
        return cls(grid, tokens.astype(np.int32), features, shares * (peaks / LEVELS))

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        return self.tokens.nbytes + self.features.nbytes + self.values.nbytes

    def strongest(self, catalogue: Catalogue, ref: DictionaryRef, order: FeatureOrder, also: int | None) -> FiringAnswer:
        """Return the features that are strongest in the image, and the feature `also` as the last one.

        `peak` sorts by the largest value in shares of the feature's peak, `area` by the area that it covers, `both` by the
        product of the former and the root of the latter. All are multiplied by the share of tokens at which the feature is silent
        in its book, so that what fires everywhere comes late; features that its publisher excludes do not come.
        """
        figures = catalogue.columns(ref)
        rank = self._ranks(figures, order)
        rank[[*catalogue.excluded(ref)]] = 0.0
        count = max(1, min(FEATURES, MOST_BYTES // (self.grid[0] * self.grid[1])))
        chosen = [int(feature) for feature in np.argsort(-rank, kind="stable")[:count] if rank[feature] > 0]
        if also is not None and also not in chosen:
            chosen.append(also)
        return self._answer(catalogue, ref, chosen, int(np.count_nonzero(rank)))

    def at(self, catalogue: Catalogue, ref: DictionaryRef, token: int) -> FiringAnswer:
        """Return features that fire at a token, those of the largest shares of their peaks, without maps."""
        here = self.tokens == token
        part = Firing(self.grid, self.tokens[here], self.features[here], self.values[here])
        share = part.values / _scale(catalogue.columns(ref)["peak"][part.features])
        chosen = part.features[np.argsort(-share, kind="stable")].tolist()
        answer = part._answer(catalogue, ref, chosen[:AT_TOKEN], len(chosen))
        return answer.model_copy(update={"features": [entry.model_copy(update={"levels": ""}) for entry in answer.features]})

    def _ranks(self, figures: Mapping[str, np.ndarray], order: FeatureOrder) -> np.ndarray:
        """Return a number for each feature of the dictionary: 0 where it does not fire, larger for what comes first."""
        size, scale = len(figures["peak"]), _scale(figures["peak"])
        highest = np.zeros(size)
        np.maximum.at(highest, self.features, self.values)
        share = np.minimum(highest / scale, 1.0)
        covered = self.features[self.values >= COVER_THRESHOLD * scale[self.features]]
        area = np.bincount(covered, minlength=size) / (self.grid[0] * self.grid[1])
        # The small terms put what fires before what does not, and of equal areas the higher peak first.
        rank = {"peak": share, "area": area + 1e-6 * share, "both": share * np.sqrt(area + 1e-6)}[order]
        return rank * (1.0 - figures["density"] + 1e-9) * (figures["shots"] + 1) / (figures["shots"] + FEW_SHOTS)

    def _answer(self, catalogue: Catalogue, ref: DictionaryRef, chosen: Sequence[int], total: int) -> FiringAnswer:
        features = []
        for tile in catalogue.tiles(ref, chosen):
            own = np.flatnonzero(self.features == tile.feature)
            where = own[np.argsort(self.tokens[own], kind="stable")]
            values, peak = self.values[where], tile.peak or 1.0
            highest = float(values.max(initial=0.0))
            features.append(
                PlacedFeature(
                    value=highest,
                    share=highest / peak,
                    area=float((values >= COVER_THRESHOLD * peak).sum()) / (self.grid[0] * self.grid[1]),
                    levels=levels(TokenMap(tuple(self.tokens[where].tolist()), tuple(values.tolist())), peak, self.grid),
                    tile=tile,
                )
            )
        return FiringAnswer(site=str(ref.site), label=ref.label, grid=self.grid, total=total, features=features)


@final
@dataclass(frozen=True)
class Reading:
    """What fires in a generated image."""

    shot: Shot
    image: str
    """The name of the image on the shelf."""
    size: tuple[int, int]
    """Width and height of the image."""
    timesteps: tuple[float, ...]
    """Of the denoising steps."""
    fired: Mapping[tuple[DictionaryRef, int], Firing]
    """By dictionary and step."""

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        return sum(firing.size for firing in self.fired.values())


@final
class KeptReadings:
    """The latest readings in memory by key, up to a number of bytes; the latest one always."""

    def __init__(self, most_bytes: int = KEPT_BYTES) -> None:
        self._most_bytes, self._lock = most_bytes, threading.Lock()
        self._readings: OrderedDict[str, Reading] = OrderedDict()

    def add(self, key: str, reading: Reading) -> None:
        """Keep a reading."""
        with self._lock:
            self._readings[key] = reading
            self._readings.move_to_end(key)
            while len(self._readings) > 1 and sum(entry.bytes for entry in self._readings.values()) > self._most_bytes:
                self._readings.popitem(last=False)

    def find(self, key: str) -> Reading | None:
        """Return a reading; None if it is not kept."""
        with self._lock:
            reading = self._readings.get(key)
            if reading is not None:
                self._readings.move_to_end(key)
            return reading

    def get(self, key: str) -> Reading:
        """Return a reading; one that is not kept any more is an error."""
        reading = self.find(key)
        if reading is None:
            raise UnknownName("This image is not kept in memory any more. Read it again.")
        return reading


def _scale(peaks: np.ndarray) -> np.ndarray:
    """Return the peaks of features; 1 for those that never fire in their book."""
    return np.where(peaks > 0, peaks, 1.0)
