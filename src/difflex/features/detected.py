"""The known concepts that the features of a dictionary detect, read from the results of `difflex concepts` without torch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from difflex.dictionary_config import CONFIG, TENSORS, fingerprint
from difflex.files import parsing, read_json
from difflex.records import Site
from difflex.study import DictionaryRef, Study

__all__ = ["BestConcept", "DetectedConcepts", "DetectingFeature"]

FORMAT, ADVICE = 2, "Move it away and run difflex concepts again."
FINDABLE = 0.9
"""Average precision of a linear probe from which a concept is findable."""


class BestConcept(NamedTuple):
    """The known concept that a feature detects best."""

    concept: str
    ap: float
    """Average precision on held-out images."""


class DetectingFeature(NamedTuple):
    """The feature that detects a concept best."""

    feature: int
    ap: float
    """Average precision on held-out images."""


class DetectedConcepts(NamedTuple):
    """Which concepts the features of a dictionary detect."""

    site: Site
    by_feature: Mapping[int, BestConcept]
    """The best concept of each feature, over all noise levels."""
    by_concept: Mapping[str, DetectingFeature]
    """The best feature of each concept, at the noise level at which a linear probe finds the most concepts."""
    rare: tuple[str, ...]
    """Concepts that were left out because too few images show them."""
    images: int
    """Number of labelled images."""
    settings: Mapping[str, Any]
    """How they were labelled and matched."""
    are_drawn: bool
    """Whether the images are of the drawn world."""
    is_current: bool
    """Whether the dictionary is the one that was matched."""

    @classmethod
    def read(cls, study: Study, ref: DictionaryRef) -> DetectedConcepts | None:
        """Read the concepts of a dictionary; None if `difflex concepts` was not run for it."""
        path, folder = study.concepts(*ref), study.dictionary(*ref)
        if not path.is_file():
            return None
        states = tuple(_state(file) for file in (path, folder / CONFIG, folder / TENSORS))
        return _read(path.resolve(), ref.site, folder.resolve(), states)


@lru_cache(16)
def _read(path: Path, site: Site, folder: Path, states: tuple[tuple[int, ...] | None, ...]) -> DetectedConcepts:
    """Read the concepts of the dictionary in `folder`; they are kept for as long as the states of the files are the same."""
    entries = read_json(path, FORMAT, ADVICE)
    with parsing(path, "results of difflex concepts", ADVICE):
        names, inputs = [name for name, _ in entries["concepts"]], entries["inputs"] or {}
        columns = zip(*(entries["features"][column] for column in ("features", "concepts", "ap")), strict=True)
        results = max((level["results"] for level in entries["levels"]), key=_count_findable, default=[])
        return DetectedConcepts(
            site=site,
            by_feature={int(feature): BestConcept(names[concept], float(ap)) for feature, concept, ap in columns},
            by_concept={result["concept"][0]: _detector(result["best"]) for result in results},
            rare=tuple(name for name, _ in entries["rare_concepts"]),
            images=int(inputs["config"]["images"]) if inputs else 0,
            settings=inputs["config"] if inputs else {},
            are_drawn=str(inputs.get("images", "")).startswith("drawn"),
            is_current=inputs.get("fingerprint") in (None, fingerprint(folder)),
        )


def _state(path: Path) -> tuple[int, ...] | None:
    """Return what changes when a file is replaced or written; None if there is none."""
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_ino, state.st_mtime_ns, state.st_size


def _count_findable(results: list[dict[str, Any]]) -> int:
    return sum(result["probe"][0] >= FINDABLE for result in results)


def _detector(best: Mapping[str, Any]) -> DetectingFeature:
    return DetectingFeature(int(best["features"][0]), float(best["ap"][0]))
