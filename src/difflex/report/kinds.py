"""What the kinds of dictionaries, and what is held beside them, are called and how they look in every figure."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from difflex.report.drawing import LegendEntry, SeriesStyle
from difflex.report.facts import DictionaryFacts, MatchFacts

__all__ = ["AUTOENCODERS", "DASHES", "alike", "key", "key_of", "look", "looks", "plain", "usual"]

NAMES = {
    "topk": "TopK autoencoder",
    "batchtopk": "BatchTopK autoencoder",
    "jumprelu": "JumpReLU autoencoder",
    "matryoshka": "Matryoshka autoencoder",
    "itda": "ITDA",
    "neurons": "neurons",
    "pca": "principal axes",
    "random": "random directions",
}
AUTOENCODERS = ("topk", "batchtopk", "jumprelu", "matryoshka")
LOOKS = {
    "topk": SeriesStyle(colour=0, marker="circle"),
    "itda": SeriesStyle(colour=1, marker="diamond", dash="7 3"),
    "neurons": SeriesStyle(colour=2, marker="square", dash="1 4"),
    "pca": SeriesStyle(colour=3, marker="triangle", dash="9 3 2 3"),
    "random": SeriesStyle(colour=4, marker="cross", dash="3 3"),
    "batchtopk": SeriesStyle(colour=6, marker="ring", dash="12 3"),
    "jumprelu": SeriesStyle(colour=7, marker="square", dash="5 2"),
    "matryoshka": SeriesStyle(colour=8, marker="triangle", dash="2 2"),
    "untrained": SeriesStyle(colour=5, marker="wedge", dash="12 3 2 3"),
}
UNTRAINED = LOOKS["untrained"]
DASHES = ("", "7 3", "2 4", "9 3 2 3", "12 4", "4 2")
NEAR = 0.1
"""Sizes that differ by no more than this share count as equal: an ITDA ends where its data ends."""
T = TypeVar("T", bound=DictionaryFacts | MatchFacts)


def key(kind: str, untrained: bool = False, line: bool = True) -> LegendEntry:
    """The entry of a kind in a legend; `line` where the figure has lines."""
    name = NAMES.get(kind, kind)
    return (
        LegendEntry(f"{kind} untrained", f"{name} of an untrained model", UNTRAINED, line)
        if untrained
        else LegendEntry(kind, name, look(kind), line)
    )


def key_of(judged: MatchFacts) -> LegendEntry:
    """The entry of what was held against concepts."""
    return key(judged.kind, judged.untrained)


def look(kind: str) -> SeriesStyle:
    """How a kind looks."""
    return LOOKS.get(kind, SeriesStyle(colour=8, marker="ring"))


def looks(kinds: Mapping[str, str]) -> dict[str, SeriesStyle]:
    """By name, from names to kinds: dictionaries of one kind differ in their dashes."""
    made = {}
    for name, kind in kinds.items():
        same, own = [each for each in kinds if kinds[each] == kind], look(kind)
        dash = own.dash if len(same) == 1 else DASHES[same.index(name) % len(DASHES)]
        made[name] = SeriesStyle(colour=own.colour, marker=own.marker, dash=dash)
    return made


def alike(size: int, other: int) -> bool:
    """Whether two sizes count as equal."""
    return abs(size - other) <= NEAR * max(size, other)


def usual(measured: Iterable[T]) -> dict[str, str | None]:
    """By kind: the normalisation that most have."""
    kinds: dict[str, Counter[str | None]] = {}
    for each in measured:
        kinds.setdefault(each.kind, Counter())[each.normalisation] += 1
    return {kind: counted.most_common(1)[0][0] for kind, counted in kinds.items()}


def plain(measured: Sequence[T]) -> list[T]:
    """Those with the usual normalisation of their kind: the others are variants."""
    common = usual(measured)
    return [each for each in measured if each.normalisation == common[each.kind]]
