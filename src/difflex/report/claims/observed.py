"""Two observations of arXiv 2505.24360 on what features look like."""

import math
from itertools import product
from typing import NamedTuple

from difflex.book import Book, Covering
from difflex.report.claims.claim import Claim, decided, listed
from difflex.report.facts import Facts, Judged
from difflex.report.kinds import AUTOENCODERS
from difflex.report.telling import percent
from difflex.study import Place

__all__ = ["covers_more", "matches_surfaces"]

SURFACES, OBJECTS = ("colour", "texture", "background", "row", "column"), ("shape",)
"""Groups of concepts: what is said of a surface or a region, and what says which object it is."""
LEAST, FEW = 0.5, 10
"""The average precision from which on a match counts, and so many such features are too few to speak of their share."""


class Covers(NamedTuple):
    """How much of their top pictures the features of a dictionary cover."""

    place: Place
    kind: str
    k: int
    data: str
    covering: Covering

    @property
    def block(self) -> tuple[object, ...]:
        """What must be alike to stand side by side; neurons are of another site of the block."""
        return self.place.site.path, self.place.site.stream, self.k, self.data

    @property
    def told(self) -> str:
        """The figures in words."""
        low, middle, high = self.covering.quartiles
        return f"{self.place} {percent(middle)} ({percent(low)} to {percent(high)})"


def covers_more(facts: Facts) -> Claim:
    """ITDA features cover more of their top pictures than those of autoencoders."""
    known = [each for place in facts.books if (each := _covers(facts, place)) is not None]
    itdas = [each for each in known if each.kind == "itda"]
    autoencoders = [each for each in known if each.kind in AUTOENCODERS]
    pairs = [
        (itda, other)
        for itda, other in product(itdas, autoencoders)
        if itda.block == other.block and itda.place.site == other.place.site
    ]
    more = sum(itda.covering.quartiles[1] > other.covering.quartiles[1] for itda, other in pairs)
    blocks = dict.fromkeys(itda.block for itda, _ in pairs)
    neurons = [each for each in known if each.kind == "neurons" and each.block in blocks]
    told = [f"{itda.told}, {other.told}" for itda, other in pairs] + [f"beside them {each.told}" for each in neurons]
    return Claim(
        name="covering",
        statement="ITDA features cover more of the pictures in which they are strongest than those of autoencoders do.",
        rule="At every site and k where both have a book of the same pictures, the median over features of the share of tokens "
        "covered in top pictures (at least a fifth of the feature's own peak) is higher for the ITDA. Features that fire in "
        "fewer than 8 shots do not count; in brackets the quartiles; neurons stand beside.",
        verdict=decided(pairs, more == len(pairs)),
        evidence=listed(told, "difflex collect STUDY, of an ITDA and an autoencoder of one site and k"),
    )


def _covers(facts: Facts, place: Place) -> Covers | None:
    with Book.open(facts.study.book(*place)) as book:
        covering, about = book.covering(), book.about
    return None if covering is None else Covers(place, about.kind, about.k, about.data, covering)


class Shares(NamedTuple):
    """What the concepts are about that features detect best."""

    features: int
    surfaces: float
    objects: float


def matches_surfaces(facts: Facts) -> Claim:
    """ITDA features match colours, textures and regions, those of autoencoders objects."""
    found, lacking = [], []
    for there in facts.blocks.values():
        own = [each for each in there if each.is_trained and each.normalisation != "none"]
        pairs = product([each for each in own if each.kind == "itda"], [each for each in own if each.kind in AUTOENCODERS])
        for itda, other in pairs:
            if itda.k != other.k or itda.matches.site != other.matches.site:
                continue
            ours, theirs = _shares(itda), _shares(other)
            if ours is not None and theirs is not None:
                found.append((itda, ours, other, theirs))
            lacking += [
                f"{each.path}, {each.name}: {len(_groups(each))} features detect a concept, {FEW} are needed"
                for each in (itda, other)
                if len(_groups(each)) < FEW
            ]
    holds = all(
        _above(ours.surfaces, ours.features, theirs.surfaces, theirs.features)
        and _above(theirs.objects, theirs.features, ours.objects, ours.features)
        for _, ours, _, theirs in found
    )
    told = [f"{itda.path}, {_said(itda, ours)}; {_said(other, theirs)}" for itda, ours, other, theirs in found]
    return Claim(
        name="surfaces",
        statement="ITDA features match colour, texture and region, those of autoencoders match objects.",
        rule="At every site and k, among features that detect some known concept with AP ≥ 0.5: the share whose best concept is "
        "a colour, a texture, a background or a place is higher for the ITDA, and the share whose best concept is a shape is "
        "higher for the autoencoder, each by more than chance (the 95 % interval of the difference, 1.96 standard errors, lies "
        "above 0). Only dictionaries that normalise their data and have 10 such features.",
        verdict=decided(found, holds),
        evidence=listed(
            told or [*dict.fromkeys(lacking)], "difflex concepts STUDY, of an ITDA and an autoencoder of one site and k"
        ),
    )


def _shares(judged: Judged) -> Shares | None:
    """What the concepts are about; None where too few features detect any, or no concept is of such groups."""
    groups, there = _groups(judged), {concept.group for concept in judged.matches.concepts}
    if len(groups) < FEW or not there.intersection(SURFACES) or not there.intersection(OBJECTS):
        return None
    surfaces, objects = (sum(group in among for group in groups) / len(groups) for among in (SURFACES, OBJECTS))
    return Shares(len(groups), surfaces, objects)


def _groups(judged: Judged) -> list[str]:
    """The group of the best concept of each feature that detects one."""
    matches = judged.matches
    return [
        matches.concepts[concept].group
        for concept, ap in zip(matches.features.concepts, matches.features.ap, strict=True)
        if ap >= LEAST
    ]


def _above(share: float, count: int, other: float, others: int) -> bool:
    """Whether a share is above another one by more than chance."""
    error = math.sqrt(share * (1 - share) / count + other * (1 - other) / others)
    return share - other > 1.96 * error


def _said(judged: Judged, shares: Shares) -> str:
    about = f"{percent(shares.surfaces)} colour, texture or region, {percent(shares.objects)} shape"
    return f"{judged.name}: {about}, of {shares.features:,} features"
