"""How much of an explanation is only colour or place: what a seeing model falls back on when it finds no meaning."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from difflex.explanation.scoring import MeanEstimate, estimate

__all__ = ["BiasGroup", "biases", "surface"]

COLOURS = (
    "black white grey gray red green blue yellow orange purple violet pink brown beige cyan turquoise magenta teal gold golden "
    "silver crimson maroon navy lime olive tan ivory cream dark light bright pale vivid dull deep saturated monochrome colourful "
    "colorful colour color colours colors coloured colored tone tones tint tints hue hues shade shades reddish greenish bluish "
    "yellowish"
)
PLACES = (
    "top bottom left right upper lower centre center central middle corner corners edge edges border borders side sides above "
    "below under over beside near next background foreground margin margins rim outer inner half quarter vertical horizontal "
    "row column"
)
EMPTY = (
    "a an the of in on at to with without and or by from for as is are was be being it its that this these those which their "
    "there area areas region regions part parts patch patches spot spots section sections place places highlighted highlight "
    "highlights picture pictures image images scene scenes mostly often usually some all any both each one two several various "
    "especially where along within across into"
)
SURFACE, NOTHING = frozenset(f"{COLOURS} {PLACES}".split()), frozenset(EMPTY.split())
Share = Literal["none", "some", "all"]


class BiasGroup(NamedTuple):
    """Explanations of which none, some or all words speak of colour or place."""

    surface: Share
    accuracy: MeanEstimate


def surface(explanation: str) -> float:
    """The share of the words that mean something which speak of colour or place; 0 where none means anything."""
    words = [word for word in re.findall(r"[a-z]+", explanation.lower()) if word not in NOTHING]
    return sum(word in SURFACE for word in words) / max(1, len(words))


def biases(explanations: Sequence[str], accuracies: Sequence[float]) -> list[BiasGroup]:
    """The accuracy of explanations by how much of them is only colour or place; kinds that do not occur are left out."""
    kinds: dict[Share, list[float]] = {"none": [], "some": [], "all": []}
    for text, accuracy in zip(explanations, accuracies, strict=True):
        share = surface(text)
        kinds["all" if share == 1 else "some" if share else "none"].append(accuracy)
    return [BiasGroup(kind, estimate(values)) for kind, values in kinds.items() if values]
