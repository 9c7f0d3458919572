"""`DictionaryMaps`: the maps of dictionaries, computed in the background and kept in memory."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple, final

import numpy as np

from difflex.errors import DifflexError, StaleWork
from difflex.features import BestConcept, Book, BookInfo
from difflex.study import DictionaryRef
from difflex.web.answers import ColumnScale, ConceptPlace, MapAnswer
from difflex.web.layout import NeighbourGraph, lay_out

NOWHERE = 0xFFFF
"""Both numbers of a feature that has no neighbours, and so no place."""
WAIT = 20.0
"""Seconds that a wall waits for the map that its features are selected on."""
COLOURS = ("concept", "ap", "score", "density", "peak", "area")
"""What a map can be coloured by."""
SPREAD = ("density", "peak")
"""Those of the columns that are shown by their logarithm."""
NONE = 255
"""The level of a feature without a value."""
LEGEND, MOST_LABELS = 10, 80
"""Concepts with colours of their own, and concepts that are written on a map."""
COLOURED = 0.25
"""Average precision from which a feature has the colour of its concept."""


class MapBox(NamedTuple):
    """A rectangle on a map, between 0 and 1 from left to right and from top to bottom."""

    left: float
    top: float
    right: float
    bottom: float


@final
class _MapJob:
    """The computation of a map in a thread of its own."""

    def __init__(self, about: BookInfo) -> None:
        self.about, self.done, self.error = about, 0.0, ""
        self.places: np.ndarray | None = None
        """`uint16`, two numbers for each feature."""
        self.finished = threading.Event()

    def report(self, share: float) -> None:
        """Note how much of the work is done; 1 only when the places can be read."""
        self.done = min(share, 0.99)


@final
class DictionaryMaps:
    """The maps of dictionaries, computed from what `open_book` opens. Its methods may be called from several threads."""

    def __init__(self, open_book: Callable[[DictionaryRef], AbstractContextManager[Book]]) -> None:
        self._open_book, self._lock, self._turn = open_book, threading.Lock(), threading.Lock()
        self._jobs: dict[DictionaryRef, _MapJob] = {}

    def done(self, ref: DictionaryRef) -> float:
        """Return how much of the map of a dictionary is computed, between 0 and 1; the first call begins it."""
        job = self._job(ref)
        if job.error:
            raise StaleWork(job.error)
        return job.done

    def places(self, ref: DictionaryRef, wait: float = 0.0) -> np.ndarray:
        """Return the places of the features: two `uint16` for each, `NOWHERE` for one without neighbours."""
        job = self._job(ref)
        job.finished.wait(wait)
        if job.error or job.places is None:
            problem = f"The map of {ref} is being computed, {job.done:.0%} is done. Ask again in a few seconds."
            raise StaleWork(job.error or problem)
        return job.places

    def inside(self, ref: DictionaryRef, box: MapBox) -> np.ndarray:
        """Return for each feature of a dictionary whether it lies in a rectangle of its map."""
        places = self.places(ref, WAIT)
        low, high = np.array([box.left, box.top]) * (NOWHERE - 1), np.array([box.right, box.bottom]) * (NOWHERE - 1)
        return (places >= low).all(1) & (places <= high).all(1) & (places[:, 0] != NOWHERE)

    def _job(self, ref: DictionaryRef) -> _MapJob:
        """Return the job of the present book, and begin it if there is none."""
        with self._open_book(ref) as book:
            about = book.about
        with self._lock:
            job = self._jobs.get(ref)
            if job is None or job.about != about:
                job = self._jobs[ref] = _MapJob(about)
                threading.Thread(target=self._compute, args=(ref, job), name="difflex map", daemon=True).start()
        return job

    def _compute(self, ref: DictionaryRef, job: _MapJob) -> None:
        """Compute a map; one at a time, so that the pages stay quick."""
        try:
            with self._turn:
                with self._open_book(ref) as book:
                    columns = [("source", "i4"), ("target", "i4"), ("value", "f4"), ("kind", "?")]
                    pairs = np.fromiter(book.neighbour_pairs(), dtype=columns)
                graph = NeighbourGraph.of(job.about.size, *(pairs[name] for name, _ in columns))
                places = np.rint(lay_out(graph, job.report) * (NOWHERE - 1))
                job.places = np.where(np.isnan(places), NOWHERE, places).astype("<u2")
                job.done = 1.0
        except DifflexError as error:
            job.error = str(error)
        finally:
            if job.places is None:
                job.error = job.error or f"The map of {ref} could not be computed. Start difflex serve again."
            job.finished.set()


def map_answer(
    ref: DictionaryRef, places: np.ndarray, columns: Mapping[str, np.ndarray], concepts: Mapping[int, BestConcept], detects: float
) -> MapAnswer:
    """Return what a map is drawn with, besides the places; a concept is written where the features are that detect it."""
    placed = places[:, 0] != NOWHERE
    scales = [_scale(name, columns[name]) for name in COLOURS[1:]]
    return MapAnswer(
        site=str(ref.site),
        label=ref.label,
        features=len(places),
        placed=int(placed.sum()),
        done=1.0,
        legend=_legend(concepts),
        columns=[scale for scale in scales if scale is not None],
        concepts=_concept_places(places, placed, concepts, detects),
    )


def colour_levels(column: str, values: np.ndarray | None, concepts: Mapping[int, BestConcept], size: int) -> bytes:
    """Return a byte for each feature: from 0 to 254 on the scale of a column, or the number of its concept in the legend.

    `NONE` says that there is no value, the number after the last of the legend that it is another concept.
    """
    levels = np.full(size, NONE, dtype=np.uint8)
    if values is None:
        numbers = {concept: number for number, concept in enumerate(_legend(concepts))}
        for feature, best in concepts.items():
            if best.ap >= COLOURED:
                levels[feature] = numbers.get(best.concept, LEGEND)
    elif (scale := _scale(column, values)) is not None:
        known = np.isfinite(values) & ((values > 0) | (not scale.is_logarithmic))
        low, high, shown = scale.low, scale.high, values[known]
        if scale.is_logarithmic:
            low, high, shown = np.log(low), np.log(high), np.log(shown)
        levels[known] = np.clip(254 * (shown - low) / max(high - low, 1e-9), 0, 254).astype(np.uint8)
    return levels.tobytes()


def _legend(concepts: Mapping[int, BestConcept]) -> list[str]:
    """Return the concepts with colours of their own: those of most features."""
    counts = Counter(best.concept for best in concepts.values() if best.ap >= COLOURED)
    return [concept for concept, _ in counts.most_common(LEGEND)]


def _scale(column: str, values: np.ndarray) -> ColumnScale | None:
    """Return the scale of a column; None for one without values."""
    known = values[np.isfinite(values) & ((values > 0) | (column not in SPREAD))]
    if not len(known):
        return None
    return ColumnScale(column=column, low=float(known.min()), high=float(known.max()), is_logarithmic=column in SPREAD)


def _concept_places(
    places: np.ndarray, placed: np.ndarray, concepts: Mapping[int, BestConcept], detects: float
) -> list[ConceptPlace]:
    """Return for each concept the place of the one of its features that is nearest to the middle of them."""
    features: dict[str, list[int]] = {}
    for feature, best in concepts.items():
        if placed[feature]:
            features.setdefault(best.concept, []).append(feature)
    answers = []
    for concept, owners in features.items():
        owners.sort(key=lambda feature: -concepts[feature].ap)
        clear = np.array([feature for feature in owners if concepts[feature].ap >= detects] or owners[:1])
        points = places[clear].astype(float)
        middle = np.abs(points - np.median(points, axis=0)).sum(1).argmin()
        x, y = map(int, places[clear[middle]])
        answers.append(ConceptPlace(concept=concept, x=x, y=y, features=len(owners), ap=concepts[owners[0]].ap))
    return sorted(answers, key=lambda answer: -answer.ap)[:MOST_LABELS]
