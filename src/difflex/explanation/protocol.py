"""Protocols: which images of a feature are shown to whom, and which others beside them."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

from difflex.choices import HighlightStyle
from difflex.errors import BadInput
from difflex.features import Book
from difflex.features.entries import COVER_THRESHOLD, Example
from difflex.records import Shot

__all__ = ["ExplanationProtocol", "FeaturePlan", "JudgementTrial", "Lineup", "UnsuitableFeature", "plan"]

Name = Literal["heldout", "paper"]
APART = 0.5
"""Up to this share of what another feature highlights may lie where this one fires; beyond, it is no miss but the same."""


@dataclass(frozen=True, kw_only=True)
class ExplanationProtocol:
    """How features are explained and judged."""

    name: Name = "heldout"
    """`paper`: that of arXiv 2505.24360, which judges the very images that were explained. `heldout`: judges images that the
    explainer never saw, and hard negatives."""
    shown: int = 5
    """Images that the explainer sees."""
    judged: int = 10
    """Images that are judged, half of them of other features."""
    lineup: int = 5
    """Images of which one does not belong; 0 leaves that test out. `paper` knows none."""
    style: HighlightStyle = "blue"
    """How what a feature marks is drawn over an image: as published, or outlined, which leaves its colours to be seen."""
    seed: int = 0

    @property
    def label(self) -> str:
        """What explanations are filed under: those of other settings are others."""
        changed = [f"{each.name} {value}" for each in fields(self) if (value := getattr(self, each.name)) != each.default]
        return " ".join([self.name, *changed[self.name != "heldout" :]])

    @property
    def needs(self) -> int:
        """Shots in which a feature must fire."""
        half = self.judged // 2
        return max(self.shown, half) if self.name == "paper" else self.shown + half

    def __post_init__(self) -> None:
        if self.shown < 1 or self.judged < 2 or self.judged % 2 or self.lineup in (1, 2) or self.lineup < 0:
            raise BadInput(
                f"A protocol cannot show {self.shown}, judge {self.judged} and line up {self.lineup} images. Show 1 or more, "
                "judge an even number, line up 3 or more, or 0 for no such test."
            )


class JudgementTrial(NamedTuple):
    """An example to be judged."""

    example: Example
    """Of the feature itself, or of the one whose highlights are to be told from its own."""
    wanted: bool
    """Whether it is the feature's own."""


class Lineup(NamedTuple):
    """Examples of which one does not belong."""

    examples: tuple[Example, ...]
    odd: int
    """Its place, from 0."""


class FeaturePlan(NamedTuple):
    """What is shown for one feature."""

    feature: int
    shown: tuple[Example, ...]
    trials: tuple[JudgementTrial, ...]
    lineup: Lineup | None

    @property
    def examples(self) -> list[Example]:
        """All examples that are needed."""
        return [*self.shown, *(trial.example for trial in self.trials), *(self.lineup.examples if self.lineup else ())]


class UnsuitableFeature(Exception):
    """A feature that cannot be explained by a protocol; its text says why."""


def plan(book: Book, feature: int, others: Sequence[int], protocol: ExplanationProtocol) -> FeaturePlan:
    """What is shown for `feature`, with negatives of `others`; by chance that the seed and the feature decide."""
    chance = random.Random(f"{protocol.seed} {feature}")
    own = [example for example in book.examples(feature) if _is_seen(book, example)]
    return (_paper if protocol.name == "paper" else _heldout)(book, feature, own, others, protocol, chance)


def _paper(
    book: Book, feature: int, own: Sequence[Example], others: Sequence[int], protocol: ExplanationProtocol, chance: random.Random
) -> FeaturePlan:
    half = protocol.judged // 2
    strongest = sorted((example for example in own if example.kind == "top"), key=lambda example: -example.peak)
    top = _distinct(book, strongest, max(protocol.shown, half))
    if len(top) < max(protocol.shown, half):
        raise UnsuitableFeature(f"it has {len(top)} top images, {max(protocol.shown, half)} are needed")
    negatives = _tops(book, {feature}, others, half, chance)
    trials = [
        *(JudgementTrial(example, True) for example in top[:half]),
        *(JudgementTrial(example, False) for example in negatives),
    ]
    return FeaturePlan(feature, tuple(top[: protocol.shown]), tuple(trials), None)


def _heldout(
    book: Book, feature: int, own: Sequence[Example], others: Sequence[int], protocol: ExplanationProtocol, chance: random.Random
) -> FeaturePlan:
    top = [example for example in own if example.kind == "top" and example.split == "train"]
    shown = _distinct(book, sorted(top, key=lambda example: -example.peak), protocol.shown)
    if len(shown) < protocol.shown:
        raise UnsuitableFeature(f"it has {len(shown)} top images of the split 'train', {protocol.shown} are needed")
    half = protocol.judged // 2
    unseen = _unseen(book, own, shown, half)
    if len(unseen) < half:
        raise UnsuitableFeature(f"it has {len(unseen)} images that the explainer does not see, {half} are needed to judge")
    positives = _spread(unseen, half)
    negatives = _negatives(book, feature, positives, others, half, chance)
    trials = [
        *(JudgementTrial(example, True) for example in positives),
        *(JudgementTrial(example, False) for example in negatives),
    ]
    return FeaturePlan(feature, tuple(shown), tuple(trials), _lineup(book, feature, unseen, others, protocol.lineup, chance))


def _distinct(book: Book, examples: Iterable[Example], count: int, but: Collection[str] = ()) -> list[Example]:
    """The first `count` of `examples` that are of different prompts and images, and none of `but`."""
    listed = list(examples)
    shots = book.shots(example.shot for example in listed)
    taken: dict[str, Example] = {}
    for example in listed:
        content = _content_of(shots[example.shot].shot)
        if content not in but:
            taken.setdefault(content, example)
    return [*taken.values()][:count]


def _is_seen(book: Book, example: Example) -> bool:
    """Whether what the feature marks there is clear enough to be looked at: by one threshold, in units of its own peak."""
    return example.kind != "silent" and example.peak >= COVER_THRESHOLD * book.feature(example.feature).peak


def _content_of(shot: Shot) -> str:
    """What makes shots alike: an image, or a prompt, whose seeds resemble one another."""
    return shot.image or shot.prompt


def _unseen(book: Book, own: Sequence[Example], shown: Sequence[Example], least: int) -> list[Example]:
    """The feature's examples that the explainer did not see, weakest first: held-out ones, and others where these are too few."""
    seen = {_content_of(row.shot) for row in book.shots(example.shot for example in shown).values()}
    chosen = _distinct(book, (example for example in own if example.split == "held-out"), len(own), seen)
    if len(chosen) < least:
        chosen = _distinct(book, sorted(own, key=lambda example: example.split == "train"), least, seen)
    return sorted(chosen, key=lambda example: (example.peak, example.id))


def _spread(examples: Sequence[Example], count: int) -> list[Example]:
    """`count` of `examples`, at equal distances from the first to the last."""
    return [examples[round(i * (len(examples) - 1) / max(1, count - 1))] for i in range(count)]


def _tops(book: Book, taken: Collection[int], others: Sequence[int], count: int, chance: random.Random) -> list[Example]:
    """The strongest examples of `count` features by chance, none of them `taken`."""
    found: list[Example] = []
    for other in chance.sample(others, len(others)):
        if len(found) == count:
            return found
        if other not in taken and (best := book.examples(other, "top")):
            found.append(max(best, key=lambda example: example.peak))
    if len(found) < count:
        raise UnsuitableFeature(f"{len(found)} other features have images, {count} are needed to tell it from")
    return found


def _negatives(
    book: Book, feature: int, positives: Sequence[Example], others: Sequence[int], count: int, chance: random.Random
) -> list[Example]:
    """Half other features' strongest examples, half near misses: as far as there are some."""
    near = [each for each in (_nearest(book, feature), _beside(book, positives, chance)) if each is not None][: count // 2]
    taken = {feature, *(each.feature for each in near)}
    return [*_tops(book, taken, others, count - len(near), chance), *near]


def _nearest(book: Book, feature: int) -> Example | None:
    """The strongest example of the feature whose decoder is nearest."""
    for neighbour in book.neighbours(feature):
        best = book.examples(neighbour.feature, "top") if neighbour.kind == "direction" else []
        if best:
            return max(best, key=lambda example: example.peak)
    return None


def _beside(book: Book, positives: Sequence[Example], chance: random.Random) -> Example | None:
    """Another feature's example in one of the very shots of `positives`, which highlights something else there."""
    for own in chance.sample(positives, len(positives)):
        there = book.examples_at(own.shot)
        for other in chance.sample(there, len(there)):
            if other.feature != own.feature and _overlap(own, other) <= APART and _is_seen(book, other):
                return other
    return None


def _overlap(own: Example, other: Example) -> float:
    """The share of what `other` highlights that lies where `own` fires."""
    fires = set(own.map.tokens)
    shared = sum(value for token, value in zip(*other.map, strict=True) if token in fires)
    return shared / (sum(other.map.values) or 1.0)


def _lineup(
    book: Book, feature: int, unseen: Sequence[Example], others: Sequence[int], count: int, chance: random.Random
) -> Lineup | None:
    """Images of the feature and one of another; None where there are too few."""
    if not count or len(unseen) < count - 1:
        return None
    odd = chance.randrange(count)
    examples = chance.sample(unseen, count - 1)
    return Lineup((*examples[:odd], *_tops(book, {feature}, others, 1, chance), *examples[odd:]), odd)
