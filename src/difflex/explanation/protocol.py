"""Protocols of explanation: which images of a feature the explainer and the judge are shown, with which negatives."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from typing import Literal, NamedTuple, final, get_args

from difflex.choices import HighlightStyle, ProtocolName
from difflex.errors import BadInput, UnknownName
from difflex.features import Book
from difflex.features.entries import COVER_THRESHOLD, Example
from difflex.values import check_fields

NegativeChoice = Literal["uniform", "frequency"]
MAX_OVERLAP = 0.5
"""In a near miss at most this share of the other feature's highlights lies where this feature fires."""


@dataclass(frozen=True, kw_only=True)
class ExplanationProtocol:
    """How features are explained and judged."""

    name: ProtocolName = "heldout"
    """`paper`: as in arXiv 2505.24360, which judges the images that were explained. `heldout`: judges images that the explainer
    never saw, and hard negatives."""
    shown: int = 5
    """Images that the explainer sees."""
    judged: int = 10
    """Images that are judged, half of them of other features."""
    lineup: int = 5
    """Images in the intruder test, one of which does not belong; 0 for no test. `paper` has none."""
    negatives: NegativeChoice = "uniform"
    """How the other features of which images are judged are drawn: all alike, or, as in the code of arXiv 2505.24360, the more
    often the more images they fire in."""
    min_patches: int = 1
    """Highlighted patches that an image needs, of whichever feature; 6 in the code of arXiv 2505.24360."""
    style: HighlightStyle = "blue"
    """How images show where a feature fires: a blue overlay, as published, or an outline, which leaves colours visible."""
    seed: int = 0

    @property
    def label(self) -> str:
        """The name in books, which contains every setting that is not the default."""
        settings = [(field.name, getattr(self, field.name), field.default) for field in fields(self)[1:]]
        return " ".join([self.name, *(f"{name} {value}" for name, value, default in settings if value != default)])

    @property
    def needed_shots(self) -> int:
        """Number of shots in which a feature must fire."""
        half = self.judged // 2
        return max(self.shown, half) if self.name == "paper" else self.shown + half

    def __post_init__(self) -> None:
        check_fields(self)
        if self.negatives not in get_args(NegativeChoice):
            raise UnknownName.among("The choice of negatives", self.negatives, get_args(NegativeChoice))
        if self.min_patches < 1:
            raise BadInput(f"An image with {self.min_patches} highlighted patches shows nothing. Ask for 1 or more.")
        if self.shown < 1 or self.judged < 2 or self.judged % 2 or self.lineup in (1, 2) or self.lineup < 0:
            raise BadInput(
                f"A protocol cannot show {self.shown}, judge {self.judged} and line up {self.lineup} images. Show 1 or more, "
                "judge an even number, and line up 3 or more, or 0 for no such test."
            )


class FeaturePlan(NamedTuple):
    """The images to show for one feature."""

    feature: int
    shown: Sequence[Example]
    """To the explainer."""
    positives: Sequence[Example]
    """The feature's own examples to judge."""
    negatives: Sequence[Example]
    """Examples of other features to judge."""
    lineup: Sequence[Example] = ()
    """Examples of the feature and one of another; empty for no intruder test."""
    odd: int = 0
    """Index of the one in `lineup` that does not belong."""

    @property
    def examples(self) -> list[Example]:
        """All examples that are needed."""
        return [*self.shown, *self.positives, *self.negatives, *self.lineup]


class UnsuitableFeature(Exception):
    """A feature that a protocol cannot explain; its text is the reason."""


def has_enough_images(book: Book, feature: int, protocol: ExplanationProtocol) -> bool:
    """Return whether `feature` has as many images with enough highlighted patches as the protocol needs."""
    peak = book.feature(feature).peak
    shots = {row.shot for row in book.examples(feature) if row.kind != "silent" and _is_visible(row, peak, protocol)}
    return len(shots) >= protocol.needed_shots


def plan_feature(book: Book, feature: int, others: Mapping[int, int], protocol: ExplanationProtocol) -> FeaturePlan:
    """Choose the images to show for `feature`; random choices depend on the seed and the feature.

    Negatives are of `others`: the number of shots in which each other feature fires.
    """
    planner = _FeaturePlanner(book, feature, others, protocol)
    return planner.paper() if protocol.name == "paper" else planner.heldout()


@final
class _FeaturePlanner:
    """The choice of images for one feature."""

    def __init__(self, book: Book, feature: int, others: Mapping[int, int], protocol: ExplanationProtocol) -> None:
        self._book, self._feature, self._others, self._protocol = book, feature, others, protocol
        self._random = random.Random(f"{protocol.seed} {feature}")
        self._own = [example for example in book.examples(feature) if self._is_visible(example)]
        self._half = protocol.judged // 2

    def paper(self) -> FeaturePlan:
        """Judge the images that were explained, and other features' top images."""
        top = self._distinct(_strongest_first(self._own), self._protocol.needed_shots)
        _check_count(top, self._protocol.needed_shots, "top images", self._protocol)
        negatives = self._top_examples({self._feature}, self._half)
        return FeaturePlan(self._feature, top[: self._protocol.shown], top[: self._half], negatives)

    def heldout(self) -> FeaturePlan:
        """Judge images that the explainer does not see, other features' top images and near misses."""
        top = _strongest_first(example for example in self._own if example.split == "train")
        shown = self._distinct(top, self._protocol.shown)
        _check_count(shown, self._protocol.shown, "top images of the split 'train'", self._protocol)
        unseen = self._unseen(shown)
        _check_count(unseen, self._half, "images to judge that the explainer does not see", self._protocol)
        last = len(unseen) - 1
        positives = [unseen[round(i * last / max(1, self._half - 1))] for i in range(self._half)]
        return FeaturePlan(self._feature, shown, positives, self._negatives(positives), *self._lineup(unseen))

    def _is_visible(self, example: Example) -> bool:
        """Return whether the highlights of an example are visible."""
        return example.kind != "silent" and _is_visible(example, self._book.feature(example.feature).peak, self._protocol)

    def _contents(self, examples: Iterable[Example]) -> list[str]:
        """Return what makes examples alike: the image, or the prompt, because seeds of a prompt resemble one another."""
        numbers = [example.shot for example in examples]
        shots = self._book.shots(numbers)
        return [shots[number].shot.image or shots[number].shot.prompt for number in numbers]

    def _distinct(self, examples: Iterable[Example], count: int, excluded: Collection[str] = ()) -> list[Example]:
        """Return the first `count` examples of different prompts and images, without those `excluded`."""
        candidates, distinct = [*examples], dict[str, Example]()
        for example, content in zip(candidates, self._contents(candidates), strict=True):
            if content not in excluded:
                distinct.setdefault(content, example)
        return [*distinct.values()][:count]

    def _unseen(self, shown: Sequence[Example]) -> list[Example]:
        """Return examples that the explainer does not see, weakest first: held-out ones, and others if those are too few."""
        seen = self._contents(shown)
        examples = self._distinct((example for example in self._own if example.split == "held-out"), len(self._own), seen)
        if len(examples) < self._half:
            examples = self._distinct(sorted(self._own, key=lambda example: example.split == "train"), self._half, seen)
        return sorted(examples, key=lambda example: (example.peak, example.id))

    def _top_examples(self, excluded: Collection[int], count: int) -> list[Example]:
        """Return the strongest examples of `count` random other features."""
        others = (other for other in self._shuffled_others() if other not in excluded)
        examples = [*islice(filter(None, map(self._strongest, others)), count)]
        if len(examples) < count:
            raise UnsuitableFeature(f"{len(examples)} other features have images, {count} are needed as negatives")
        return examples

    def _shuffled_others(self) -> Sequence[int]:
        """Return the other features in random order, those that fire more often earlier if the protocol says so."""
        if self._protocol.negatives == "uniform":
            return self._random.sample([*self._others], len(self._others))
        # Random waits, whose order is that of draws without replacement in proportion to the rates.
        waits = {other: self._random.expovariate(shots) for other, shots in self._others.items()}
        return sorted(waits, key=waits.__getitem__)

    def _strongest(self, feature: int) -> Example | None:
        examples = self._book.examples(feature, "top")
        if self._protocol.min_patches > 1:
            examples = [*filter(self._is_visible, examples)]
        return max(examples, key=lambda example: example.peak, default=None)

    def _negatives(self, positives: Sequence[Example]) -> list[Example]:
        """Return the strongest examples of other features and up to two near misses."""
        candidates = (self._of_nearest_decoder(), self._in_same_shot(positives))
        near = [example for example in candidates if example is not None][: self._half // 2]
        excluded = {self._feature, *(example.feature for example in near)}
        return [*self._top_examples(excluded, self._half - len(near)), *near]

    def _of_nearest_decoder(self) -> Example | None:
        """Return the strongest example of the feature with the nearest decoder direction."""
        neighbours = (row.feature for row in self._book.neighbours(self._feature) if row.kind == "direction")
        return next(filter(None, map(self._strongest, neighbours)), None)

    def _in_same_shot(self, positives: Sequence[Example]) -> Example | None:
        """Return another feature's example in a shot of `positives` that highlights something else there."""
        for own in self._random.sample(positives, len(positives)):
            candidates = self._book.examples_at(own.shot)
            for other in self._random.sample(candidates, len(candidates)):
                if other.feature != own.feature and _overlap(own, other) <= MAX_OVERLAP and self._is_visible(other):
                    return other
        return None

    def _lineup(self, unseen: Sequence[Example]) -> tuple[list[Example], int]:
        """Return images of the feature and one of another, and the index of the latter; nothing if there are too few."""
        count = self._protocol.lineup
        if not count or len(unseen) < count - 1:
            return [], 0
        odd = self._random.randrange(count)
        examples = self._random.sample(unseen, count - 1)
        return [*examples[:odd], *self._top_examples({self._feature}, 1), *examples[odd:]], odd


def _is_visible(example: Example, peak: float, protocol: ExplanationProtocol) -> bool:
    """Return whether an example has enough highlights: the same threshold for all features, in units of the feature's `peak`."""
    if protocol.min_patches == 1:
        return example.peak >= COVER_THRESHOLD * peak
    return sum(value >= COVER_THRESHOLD * peak for value in example.map.values) >= protocol.min_patches


def _check_count(examples: Sequence[Example], needed: int, kind: str, protocol: ExplanationProtocol) -> None:
    if len(examples) < needed:
        patches = "" if protocol.min_patches == 1 else f" with {protocol.min_patches} highlighted patches"
        raise UnsuitableFeature(f"it has {len(examples)} {kind}{patches}, {needed} are needed")


def _strongest_first(examples: Iterable[Example]) -> list[Example]:
    return sorted((example for example in examples if example.kind == "top"), key=lambda example: -example.peak)


def _overlap(own: Example, other: Example) -> float:
    """Return the share of the highlights of `other` that lies where `own` fires."""
    tokens = set(own.map.tokens)
    shared = sum(value for token, value in zip(*other.map, strict=True) if token in tokens)
    return shared / (sum(other.map.values) or 1.0)
