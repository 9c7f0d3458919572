"""Search the features of a study by words: in concept matches, explanations, and the captions of top images."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np

from difflex.dictionary_config import fingerprint
from difflex.errors import BadInput, BrokenFile, DifflexError, UnknownName
from difflex.features import Book
from difflex.features.detected import DetectedConcepts
from difflex.study import DictionaryRef, Study

__all__ = ["FoundFeature", "nothing_found", "rarity", "resolve_features", "search", "vocabulary"]

DETECTS = 0.5
"""Average precision from which the best feature of a concept ranks before all other results."""
MEASURE, CHANCE = "accuracy", 0.5
"""The score of explanations that results are ranked by, and its value for a guess."""
MIN_IMAGES = 4
"""Top images that a feature must have for its captions to count."""
SPECIFIC, CAPTIONS = 0.25, 0.5
"""How specific captions must be for a word, between 0 (as in all images) and 1; and what that counts, for a caption does not say
where in the image the feature fires."""
CLEAR = 0.25
"""Score from which a result without a concept of that name stands for a word."""
USUAL = {
    "held_out": 0.1,
    "noise": [0.25, 0.5, 0.75],
    "pixels": None,
    "empty_prompts": False,
    "present_above": 0.5,
    "absent_below": 0.0,
}
"""The settings that `difflex concepts` has without flags."""
MORE = 3
"""How many times as many images to match a concept again that was too rare, before they are rounded to thousands."""


class FoundFeature(NamedTuple):
    """A feature that a search found."""

    place: DictionaryRef
    feature: int
    score: float
    """Between 0 and 1. Average precision for a concept; for an explanation its accuracy, and for captions half of their share,
    above what a guess or any image would have."""
    reason: str
    """Such as "detects red, AP 0.93"."""
    is_named: bool = False
    """Whether the feature is the one that detects the concept of exactly this name best."""

    def __str__(self) -> str:
        return f"feature {self.feature} of {self.place} ({self.reason})"


def search(study: Study, words: str | Sequence[str], place: DictionaryRef | None = None, limit: int = 10) -> list[FoundFeature]:
    """Return the features of a study, or of one dictionary, that fit `words`, best first; each feature once.

    The features that detect a concept of exactly this name come first, with their average precision; then all others by score.
    """
    text = words if isinstance(words, str) else " ".join(words)
    wanted = _stems(text)
    if not wanted:
        raise BadInput("There is nothing to search for. Give one or more words: red, or striped stars.")
    best: dict[tuple[DictionaryRef, int], FoundFeature] = {}
    for ref in _searchable(study, place):
        for found in _in_dictionary(study, ref, text, wanted):
            key = (ref, found.feature)
            if key not in best or _rank(found) < _rank(best[key]):
                best[key] = found
    return sorted(best.values(), key=_rank)[:limit]


def resolve_features(study: Study, words: Sequence[str], place: DictionaryRef | None = None) -> list[FoundFeature]:
    """Return the best feature for each of `words`, all of one dictionary: `place`, or the one that fits all words best."""
    rows = [[next(iter(search(study, word, ref, 1)), None) for word in words] for ref in _searchable(study, place)]
    complete = [[found for found in row if found is not None and (found.is_named or found.score >= CLEAR)] for row in rows]
    complete = [row for row in complete if len(row) == len(words)]
    if not complete:
        raise nothing_found(study, words, place)
    return max(complete, key=lambda row: (sum(found.is_named for found in row), sum(found.score for found in row)))


def nothing_found(study: Study, words: Sequence[str], place: DictionaryRef | None = None) -> UnknownName:
    """Return the error for words that no feature of a single dictionary fits, with what to do."""
    for word in words:
        if note := rarity(study, word, place):
            return UnknownName(f"No feature is known for '{word}'. {note}")
    places = _searchable(study, place)
    missing = [word for word in words if not any(search(study, word, ref, 1) for ref in places)]
    if not missing and len(words) > 1:
        return UnknownName(f"No single dictionary has a feature for each of {', '.join(words)}. Name fewer at once.")
    known = [matches for ref in places if (matches := _current_concepts(study, ref)) is not None]
    names = dict.fromkeys(name for matches in known for name in (*matches.by_concept, *matches.rare))
    unknown = (missing or list(words))[0].lower()
    if not get_close_matches(unknown, names):
        names |= dict.fromkeys(word for ref in places if _has_book(study, ref) for word in _caption_words(study, ref))
    advice = f"difflex features {study.folder} lists features by number."
    return UnknownName.among("The feature", unknown, names, advice)


def vocabulary(study: Study, place: DictionaryRef, most: int) -> dict[str, str]:
    """Return what can be searched for in a dictionary: concepts, then the most frequent words of explanations and captions.

    The keys are their words without plural endings, sorted.
    """
    matches, texts = _current_concepts(study, place), []
    if matches is not None:
        texts += [*matches.by_concept, *(best.concept for best in matches.by_feature.values())]
    words = Counter(word for text in dict.fromkeys(texts) for word in re.findall(r"\w+", text.lower()))
    if _has_book(study, place):
        with Book.open(study.book(*place)) as book:
            explained = [entry.text for entry in book.explanations() if entry.state == "done"]
            words.update(word for text in explained for word in re.findall(r"\w+", text.lower()))
        words.update(dict.fromkeys(_caption_words(study, place), 0))
    texts += [word for word, _ in words.most_common()]
    found = {" ".join(sorted(_stems(text))): text for text in reversed(texts) if _stems(text)}
    return dict(list(reversed(found.items()))[:most])


def rarity(study: Study, word: str, place: DictionaryRef | None = None) -> str:
    """Return what to do if `word` is a concept that was matched in no dictionary because too few images show it; else nothing."""
    known = [matches for ref in _searchable(study, place) if (matches := _current_concepts(study, ref)) is not None]
    if any(_stems(name) == _stems(word) for matches in known for name in matches.by_concept):
        return ""
    for matches in known:
        if any(_stems(name) == _stems(word) for name in matches.rare):
            return f"Left out because too rare in {matches.images:,} images; {_more_images(study, matches)}."
    return ""


def _more_images(study: Study, matches: DetectedConcepts) -> str:
    """Return the command that matches concepts as before on more images."""
    command = ["difflex", "concepts", str(study.folder), "--site", str(matches.site)]
    if not matches.are_drawn:
        return f"add images that show it to the folder, then run {shlex.join(command)} --folder FOLDER"
    command += ["--images", str(-(-MORE * matches.images // 1000) * 1000)]
    for name, usual in USUAL.items():
        if (value := matches.settings.get(name, usual)) != usual:
            words = "x" if name == "pixels" else ","
            text = [words.join(map(str, value))] if isinstance(value, list) else [] if value is True else [str(value)]
            command += [f"--{name.replace('_', '-')}", *text]
    return f"run {shlex.join(command)}"


def _searchable(study: Study, place: DictionaryRef | None) -> list[DictionaryRef]:
    """Return `place`, or all dictionaries of a study, as far as something is known about their features."""
    places = [ref for ref in study.dictionaries() if place in (None, ref) and _is_searchable(study, ref)]
    if not places:
        raise BadInput(
            f"{place or study.folder} has no books and no concept matches of its present dictionaries to search. Run difflex "
            "collect, difflex concepts or both."
        )
    return places


def _is_searchable(study: Study, ref: DictionaryRef) -> bool:
    return _has_book(study, ref) or _current_concepts(study, ref) is not None


def _has_book(study: Study, ref: DictionaryRef) -> bool:
    """Return whether a dictionary has a book, made when it was as it is now."""
    if not study.book(*ref).is_file():
        return False
    with Book.open(study.book(*ref)) as book:
        return book.about.fingerprint == fingerprint(study.dictionary(*ref))


def _in_dictionary(study: Study, ref: DictionaryRef, words: str, wanted: frozenset[str]) -> Iterator[FoundFeature]:
    matches = _current_concepts(study, ref)
    if matches is not None:
        yield from _by_concept(ref, matches, wanted)
    if _has_book(study, ref):
        with Book.open(study.book(*ref)) as book:
            yield from _by_explanation(ref, book, wanted)
            yield from _by_captions(ref, book, words)


def _current_concepts(study: Study, ref: DictionaryRef) -> DetectedConcepts | None:
    matches = DetectedConcepts.read(study, ref)
    return matches if matches is not None and matches.is_current else None


def _rank(found: FoundFeature) -> tuple[bool, float, str, int]:
    return (not found.is_named, -found.score, str(found.place), found.feature)


def _by_concept(ref: DictionaryRef, matches: DetectedConcepts, wanted: frozenset[str]) -> Iterator[FoundFeature]:
    """Yield features whose concept has some of the words; a concept of exactly these words counts in full."""
    for concept, best in matches.by_concept.items():
        share = _overlap(wanted, _stems(concept))
        if share:
            reason = f"detects {concept}, AP {best.ap:.2f}"
            yield FoundFeature(ref, best.feature, share * best.ap, reason, share == 1 and best.ap >= DETECTS)
    shares = {concept: _overlap(wanted, _stems(concept)) for concept in {best.concept for best in matches.by_feature.values()}}
    for feature, (concept, ap) in matches.by_feature.items():
        if shares[concept]:
            yield FoundFeature(ref, feature, shares[concept] * ap, f"detects {concept}, AP {ap:.2f}")


def _by_explanation(ref: DictionaryRef, book: Book, wanted: frozenset[str]) -> Iterator[FoundFeature]:
    """Yield features whose explanation has all the words, by its score."""
    scores = book.best_scores(MEASURE)
    for explanation in book.explanations(containing=max(wanted, key=len)):
        if explanation.state == "done" and wanted <= _stems(explanation.text):
            score = scores.get(explanation.feature)
            text = explanation.text if len(explanation.text) <= 60 else explanation.text[:59] + "…"
            measured = "" if score is None else f", {MEASURE} {score:.2f}"
            value = 0.0 if score is None else max(0.0, (score - CHANCE) / (1 - CHANCE))
            yield FoundFeature(ref, explanation.feature, value, f"explained as '{text}'{measured}")


def _by_captions(ref: DictionaryRef, book: Book, words: str) -> Iterator[FoundFeature]:
    """Yield features whose top images have the words in their captions more often than all images of the book."""
    wanted = _stems(words)
    captions = book.captions(containing=max(wanted, key=len))
    hits = [row for row in captions if wanted <= _stems(row.caption)]
    share = len({row.image for row in hits}) / max(1, book.about.images)
    if not hits or share >= 1:
        return
    features, shots = _top_images(book)
    images, having = np.bincount(features), np.bincount(features, np.isin(shots, [row.shot for row in hits]))
    specific = (having / np.maximum(images, 1) - share) / (1 - share)
    for feature in np.flatnonzero((images >= MIN_IMAGES) & (having > 0) & (specific >= SPECIFIC)).tolist():
        reason = f"fires in images whose captions say {words.strip()}, {having[feature]:.0f} of {images[feature]}"
        yield FoundFeature(ref, feature, CAPTIONS * float(specific[feature]), reason)


def _top_images(book: Book) -> tuple[np.ndarray, np.ndarray]:
    """Return the features and the shots of all top examples of a book; with 65,536 features they take seconds to read, once."""
    with _reading:
        return _read_top_images(book.path.resolve(), book.path.stat().st_ino, book.about.fingerprint, book.about.data)


@lru_cache(4)
def _read_top_images(path: Path, *_identity: object) -> tuple[np.ndarray, np.ndarray]:
    """Read the top examples of the book at `path`, which stay the same while explanations are added to it."""
    try:
        with Book.open(path) as book:
            rows = np.fromiter(book.top_images(), dtype=[("feature", np.uint32), ("shot", np.uint32)])
            if len(rows) and rows["feature"].max() >= book.about.size:
                raise ValueError("an example of no feature")
    except DifflexError:
        raise
    except (ValueError, TypeError, OverflowError) as error:
        raise BrokenFile(f"{path} is damaged ({error}). Run difflex collect: it makes the book again.") from error
    return rows["feature"].copy(), rows["shot"].copy()


_reading = Lock()
"""Only one thread reads top examples at a time: the others wait for what it reads."""


def _caption_words(study: Study, ref: DictionaryRef) -> list[str]:
    """Return the words of the captions in the book of a dictionary, the most frequent first, without the shortest."""
    with Book.open(study.book(*ref)) as book:
        counts = Counter(word for row in book.captions() for word in re.findall(r"\w{3,}", row.caption.lower()))
    return [word for word, _ in counts.most_common()]


def _overlap(wanted: frozenset[str], others: frozenset[str]) -> float:
    """Return the share of common words among all words of both."""
    return len(wanted & others) / max(1, len(wanted | others))


def _stems(text: str) -> frozenset[str]:
    return frozenset(_stem(word) for word in re.findall(r"\w+", text.lower()))


def _stem(word: str) -> str:
    """Return a word without the ending of a plural."""
    if len(word) > 4 and re.search(r"(?:s|x|ch|sh)es$", word):
        return word[:-2]
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word
