"""Two observations of arXiv 2505.24360 on what features look like."""

import math
from collections.abc import Collection
from itertools import product
from typing import NamedTuple

from difflex.explanation import methods
from difflex.features import Book, CoverageSummary
from difflex.report.claims.claim import Claim, decided, listed
from difflex.report.facts import StudyFacts
from difflex.report.kinds import AUTOENCODERS
from difflex.report.telling import percent
from difflex.study import DictionaryRef

__all__ = ["covers_more", "matches_surfaces"]

SURFACES, OBJECTS = ("colour", "texture", "background", "row", "column"), ("shape",)
"""Groups of concepts: what is said of a surface or a region, and what says which object it is."""
RIGHT, FEW = 0.8, 10
"""The accuracy from which on an explanation counts, and fewer such features are too few to speak of their share."""


class CoverageRow(NamedTuple):
    """How much of their top images the features of a dictionary cover."""

    place: DictionaryRef
    kind: str
    k: int
    data: str
    covering: CoverageSummary

    @property
    def block(self) -> tuple[object, ...]:
        """What must be alike to stand side by side; neurons are of another site of the block."""
        return self.place.site.path, self.place.site.stream, self.k, self.data

    @property
    def told(self) -> str:
        """The figures in words."""
        low, middle, high = self.covering.quartiles
        return f"{self.place} {percent(middle)} ({percent(low)} to {percent(high)})"


def covers_more(facts: StudyFacts) -> Claim:
    """ITDA features cover more of their top images than those of autoencoders."""
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
        statement="ITDA features cover more of the images in which they are strongest than those of autoencoders do.",
        rule="At every site and k where both have a book of the same images, the median over features of the share of tokens "
        "covered in top images (at least a fifth of the feature's own peak) is higher for the ITDA. Features that fire in "
        "fewer than 8 shots do not count; in brackets the quartiles; neurons stand beside.",
        verdict=decided(pairs, more == len(pairs)),
        evidence=listed(told, "difflex collect STUDY, of an ITDA and an autoencoder of one site and k"),
    )


def _covers(facts: StudyFacts, place: DictionaryRef) -> CoverageRow | None:
    with Book.open(facts.study.book(*place)) as book:
        covering, about = book.coverage_summary(), book.about
    return None if covering is None else CoverageRow(place, about.kind, about.k, about.data, covering)


class ConceptGroups(NamedTuple):
    """What the features of a dictionary are about that a known concept explains."""

    place: DictionaryRef
    kind: str
    k: int
    data: str
    groups: tuple[str, ...]
    """Of the concept of each."""

    def share(self, among: Collection[str]) -> float:
        """That of the features whose concept is of one of these groups."""
        return sum(group in among for group in self.groups) / len(self.groups)

    @property
    def told(self) -> str:
        """The figures in words."""
        about = f"{percent(self.share(SURFACES))} colour, texture or region, {percent(self.share(OBJECTS))} shape"
        return f"{self.place}: {about}, of {len(self.groups):,} features"


def matches_surfaces(facts: StudyFacts) -> Claim:
    """ITDA features match colours, textures and regions, those of autoencoders objects."""
    known = [each for place in facts.books if (each := _named(facts, place)) is not None]
    itdas = [each for each in known if each.kind == "itda"]
    pairs = [
        (itda, other)
        for itda, other in product(itdas, [each for each in known if each.kind in AUTOENCODERS])
        if (itda.place.site, itda.k, itda.data) == (other.place.site, other.k, other.data)
    ]
    found = [pair for pair in pairs if all(len(each.groups) >= FEW for each in pair)]
    lacking = [
        f"{each.place}: a known concept explains {len(each.groups)} features, {FEW} are needed"
        for each in dict.fromkeys(each for pair in pairs for each in pair)
        if len(each.groups) < FEW
    ]
    holds = all(_above(itda, other, SURFACES) and _above(other, itda, OBJECTS) for itda, other in found)
    return Claim(
        name="surfaces",
        statement="ITDA features match colour, texture and region, those of autoencoders match objects.",
        rule="At every site and k where both have a book of the same images, among features that the name of one known concept "
        "explains (accuracy 0.8 or more on held-out images): the share explained by a colour, a texture, a background or a "
        "place is higher for the ITDA, and the share explained by a shape is higher for the autoencoder, each by more than "
        "chance (the 95 % interval of the difference, 1.96 standard errors, lies above 0). Only dictionaries with 10 such "
        "features.",
        verdict=decided(found, holds),
        evidence=listed(
            [f"{itda.told}; {other.told}" for itda, other in found] or lacking,
            "difflex concepts STUDY and difflex explain STUDY, of an ITDA and an autoencoder of one site and k",
        ),
    )


def _named(facts: StudyFacts, place: DictionaryRef) -> ConceptGroups | None:
    """What its features are about; None where nothing known was asked of them."""
    concepts = (concept for there in facts.blocks.values() for each in there for concept in each.matches.concepts)
    groups = {concept.name: concept.group for concept in concepts}
    if not all({*groups.values()}.intersection(among) for among in (SURFACES, OBJECTS)):
        return None
    with Book.open(facts.study.book(*place)) as book:
        about, found = book.about, methods(book, facts.study.folder)
    heldout = [method for method in found if method.protocol.startswith("heldout")]
    explained = [each for method in heldout for each in zip(method.explanations, method.accuracies, strict=True)]
    right = tuple(groups[text] for text, accuracy in explained if accuracy >= RIGHT and text in groups)
    return ConceptGroups(place, about.kind, about.k, about.data, right)


def _above(one: ConceptGroups, other: ConceptGroups, among: Collection[str]) -> bool:
    """Whether the share of these groups is higher in one than in the other by more than chance."""
    shares = [(each.share(among), len(each.groups)) for each in (one, other)]
    error = math.sqrt(sum(share * (1 - share) / count for share, count in shares))
    return shares[0][0] - shares[1][0] > 1.96 * error
