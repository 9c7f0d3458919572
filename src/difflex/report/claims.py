"""The claims of the report with their verdicts: those of arXiv 2505.24360, and what is expected of steering with features."""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from itertools import product
from typing import NamedTuple

from difflex.effects.removal import RemovedConcept
from difflex.explanation.comparison import read_methods
from difflex.features import Book, CoverageSummary
from difflex.report.dictionary_claims import (
    Claim,
    better_than_neurons,
    better_than_untrained_directions,
    better_than_untrained_model,
    dead_without_normalisation,
    itda_reconstructs_better,
    norms_differ,
    spectrum_is_concentrated,
)
from difflex.report.drawing import element
from difflex.report.facts import SteeringFacts, StudyFacts
from difflex.report.figures import ReportFigure, ReportSection
from difflex.report.figures.effects import REMOVED, dictionaries_of
from difflex.report.style import SAE_KINDS, count, number, percent
from difflex.study import DictionaryRef

__all__ = ["claims", "judge_claims"]

LINES = 7
"""Of the evidence on the page; the CSV file has all of it."""
SURFACES, OBJECTS = ("colour", "texture", "background", "row", "column"), ("shape",)
"""Groups of concepts: those of surfaces and regions, and those of objects."""
RIGHT, ENOUGH = 0.8, 10
"""The accuracy from which on an explanation counts, and how many such features their share takes."""
STEERED, REMOVAL_GROUPS = ("colour", "texture", "background"), ("colour", "background")
GAIN, SHARE, RANDOM = 0.7, 0.5, 0.1


def judge_claims(facts: StudyFacts) -> list[Claim]:
    """Return every claim with its verdict."""
    return [
        dead_without_normalisation(facts),
        itda_reconstructs_better(facts),
        better_than_neurons(facts, SAE_KINDS, "SAE"),
        better_than_neurons(facts, ("itda",), "ITDA"),
        better_than_untrained_directions(facts),
        better_than_untrained_model(facts),
        itda_covers_more(facts),
        itda_matches_surfaces(facts),
        steers_towards_concepts(facts),
        removes_concepts(facts),
        norms_differ(facts),
        spectrum_is_concentrated(facts),
    ]


def claims(facts: StudyFacts) -> ReportSection:
    """Return the section of claims."""
    all_claims = judge_claims(facts)
    counts = Counter(claim.verdict for claim in all_claims)
    verdicts = ("holds here", "does not hold here", "not measured")
    summary = ", ".join(f"{verdict}: {counts[verdict]}" for verdict in verdicts if counts[verdict])
    return ReportSection(
        name="claims",
        title="Claims of the paper",
        lead=f"Claims of arXiv 2505.24360 about FLUX.1, tested on the numbers of this study by the rule below each ({summary}).",
        body=element("ul", *map(_item, all_claims), class_="claims"),
        figures=(
            ReportFigure(
                name="claims",
                caption="All claims with all their evidence.",
                columns=("name", "claim", "verdict", "evidence"),
                rows=[(claim.name, claim.statement, claim.verdict, line) for claim in all_claims for line in claim.evidence],
            ),
        ),
    )


def _item(claim: Claim) -> str:
    sign = element("span", {"holds here": "✓", "does not hold here": "✗", "not measured": "○"}[claim.verdict], aria_hidden="true")
    more = len(claim.evidence) - LINES
    evidence = [*claim.evidence[:LINES], *([f"and {more} more in claims.csv"] if more > 0 else [])]
    return element(
        "li",
        element("p", sign, f" {claim.verdict}", class_="verdict"),
        element("h3", claim.statement),
        element("ul", *(element("li", line) for line in evidence), class_="evidence"),
        element("p", element("span", "Rule "), claim.rule, class_="rule"),
        class_=f"claim {claim.verdict.split()[0]}",
        id=f"claim-{claim.name}",
    )


class ImageCoverage(NamedTuple):
    """How much of their top images the features of a dictionary cover."""

    ref: DictionaryRef
    kind: str
    k: int
    data: str
    summary: CoverageSummary

    @property
    def block(self) -> tuple[object, ...]:
        """What is equal for dictionaries that compare; neurons are of another site of the block."""
        return self.ref.site.path, self.ref.site.stream, self.k, self.data

    def __str__(self) -> str:
        low, middle, high = self.summary.quartiles
        return f"{self.ref} {percent(middle)} ({percent(low)} to {percent(high)})"


def itda_covers_more(facts: StudyFacts) -> Claim:
    """Judge that ITDA features cover more of their top images than SAE features."""
    rows = [row for ref in facts.books if (row := _image_coverage(facts, ref)) is not None]
    pairs = [
        (itda, sae)
        for itda, sae in product(rows, rows)
        if itda.kind == "itda" and sae.kind in SAE_KINDS and itda.block == sae.block and itda.ref.site == sae.ref.site
    ]
    more = sum(itda.summary.quartiles[1] > sae.summary.quartiles[1] for itda, sae in pairs)
    blocks = {itda.block for itda, _ in pairs}
    neurons = [f"for comparison {row}" for row in rows if row.kind == "neurons" and row.block in blocks]
    return Claim.judge(
        "covering",
        "ITDA features cover more of the images in which they are strongest than SAE features do.",
        "At every site and k where both have a book of the same images, the median over features of the share of tokens "
        "covered in top images (at least a fifth of the feature's own peak) is higher for the ITDA. Features that fire in "
        "fewer than 8 shots do not count; quartiles are in brackets; neurons are shown for comparison.",
        holds=more == len(pairs) if pairs else None,
        evidence=[*(f"{itda}, {sae}" for itda, sae in pairs), *neurons],
        command="difflex collect STUDY, of an ITDA and an SAE of one site and k",
    )


def _image_coverage(facts: StudyFacts, ref: DictionaryRef) -> ImageCoverage | None:
    with Book.open(facts.study.book(*ref)) as book:
        summary, info = book.coverage_summary(), book.about
    return None if summary is None else ImageCoverage(ref, info.kind, info.k, info.data, summary)


class ExplainedGroups(NamedTuple):
    """The features of a dictionary that the name of a known concept explains."""

    ref: DictionaryRef
    kind: str
    k: int
    data: str
    groups: tuple[str, ...]
    """The group of each feature's concept."""

    def share(self, among: Collection[str]) -> float:
        """Return the share of the features whose concept is of one of these groups."""
        return sum(group in among for group in self.groups) / len(self.groups)

    def exceeds(self, other: "ExplainedGroups", among: Collection[str]) -> bool:
        """Return whether the share of these groups is higher than in `other` by more than chance."""
        shares = [(own.share(among), len(own.groups)) for own in (self, other)]
        error = math.sqrt(sum(share * (1 - share) / size for share, size in shares))
        return shares[0][0] - shares[1][0] > 1.96 * error

    def __str__(self) -> str:
        shares = f"{percent(self.share(SURFACES))} colour, texture or region, {percent(self.share(OBJECTS))} shape"
        return f"{self.ref}: {shares}, of {len(self.groups):,} features"


def itda_matches_surfaces(facts: StudyFacts) -> Claim:
    """Judge that ITDA features match colours, textures and regions, and SAE features objects."""
    rows = [row for ref in facts.books if (row := _explained_groups(facts, ref)) is not None]
    candidates = [
        (itda, sae)
        for itda, sae in product(rows, rows)
        if itda.kind == "itda" and sae.kind in SAE_KINDS and (itda.ref.site, itda.k, itda.data) == (sae.ref.site, sae.k, sae.data)
    ]
    pairs = [pair for pair in candidates if all(len(row.groups) >= ENOUGH for row in pair)]
    lacking = [
        f"{row.ref}: a known concept explains {count(len(row.groups), 'feature')}, {ENOUGH} are needed"
        for row in dict.fromkeys(row for pair in candidates for row in pair)
        if len(row.groups) < ENOUGH
    ]
    return Claim.judge(
        "surfaces",
        "ITDA features match colour, texture and region, SAE features match objects.",
        "At every site and k where both have a book of the same images, among features that the name of one known concept "
        "explains (accuracy 0.8 or more on held-out images): the share explained by a colour, a texture, a background or a "
        "place is higher for the ITDA, and the share explained by a shape is higher for the SAE, each by more than chance (the "
        "95 % interval of the difference, 1.96 standard errors, lies above 0). Only dictionaries with 10 such features.",
        holds=all(itda.exceeds(sae, SURFACES) and sae.exceeds(itda, OBJECTS) for itda, sae in pairs) if pairs else None,
        evidence=[f"{itda}; {sae}" for itda, sae in pairs] or lacking,
        command="difflex concepts STUDY and difflex explain STUDY, of an ITDA and an SAE of one site and k",
    )


def _explained_groups(facts: StudyFacts, ref: DictionaryRef) -> ExplainedGroups | None:
    """Return the groups of the concepts that explain features; None where the study compares with no such concepts."""
    groups = {concept.name: concept.group for match in facts.matches for concept in match.matches.concepts}
    if not all({*groups.values()}.intersection(among) for among in (SURFACES, OBJECTS)):
        return None
    with Book.open(facts.study.book(*ref)) as book:
        info, explained = book.about, read_methods(book, facts.study.folder)
    heldout = [method for method in explained if method.protocol.startswith("heldout")]
    pairs = [pair for method in heldout for pair in zip(method.explanations, method.accuracies, strict=True)]
    right = tuple(groups[text] for text, accuracy in pairs if accuracy >= RIGHT and text in groups)
    return ExplainedGroups(ref, info.kind, info.k, info.data, right)


def steers_towards_concepts(facts: StudyFacts) -> Claim:
    """Judge that features of colours, textures and backgrounds put their concepts into images."""
    measured = [steering for steering in facts.steering if _has_all_groups(steering)]
    measured.sort(key=lambda steering: -_features(steering, STEERED))
    together = [_outcome(s, "colours, textures and backgrounds together", STEERED) for s in measured]
    lines = [_outcome(s, group, (group,)) for s in measured for group in STEERED]
    return Claim.judge(
        "steering",
        "Features of colours, textures and backgrounds, added at a place, put them into the image there and leave the rest "
        "unchanged (not a claim of the paper, which shows single examples).",
        "In one dictionary at least, for the colours, for the textures and for the backgrounds alike: half of them or more "
        "have a feature of AP ≥ 0.8 (concepts that too few images show count as without one), and among these the median over "
        "concepts of the success less the rate without the edit is at least 70 %, at a strength at which at least 90 % of all "
        "else that was right stays so and no image breaks; random directions of equal length get less than 10 %.",
        holds=any(all(_steers(s, group) for group in STEERED) for s in measured) if measured else None,
        evidence=[*together, *lines],
        command="difflex steer-eval STUDY, towards colours, textures and backgrounds",
    )


def _has_all_groups(steering: SteeringFacts) -> bool:
    """Return whether steering was measured in all three groups of the miniature world's concepts."""
    coverage = [steering.coverage[group] for group in STEERED if group in steering.coverage and not steering.is_from_file]
    return len(coverage) == len(STEERED) and all(group.concepts > group.rare for group in coverage)


def _features(steering: SteeringFacts, groups: Iterable[str]) -> int:
    return sum(len(steering.coverage[group].detected) for group in groups)


def _steers(steering: SteeringFacts, group: str) -> bool:
    """Return whether enough concepts of a group have a feature that succeeds where a random direction does not."""
    coverage, own, random = steering.coverage[group], steering.summary("feature", group), steering.summary("random", group)
    enough = coverage.concepts > 0 and len(coverage.detected) >= SHARE * coverage.concepts
    return enough and own is not None and own.gain >= GAIN and random is not None and random.gain < RANDOM


def _outcome(steering: SteeringFacts, name: str, groups: Sequence[str]) -> str:
    coverage = [steering.coverage[group] for group in groups]
    concepts, rare = sum(group.concepts for group in coverage), sum(group.rare for group in coverage)
    text = f"{steering.ref}, {name}: {_features(steering, groups)} of {concepts} have a feature"
    if rare:
        text += f" ({rare} of the {concepts} {'is' if rare == 1 else 'are'} shown too rarely to tell)"
    own, random = steering.summary("feature", *groups), steering.summary("random", *groups)
    if own is None or random is None:
        return text
    best = f"keeping {percent(own.kept)}, at strength {number(own.strength)}"
    at = "no strength is acceptable" if own.strength is None else best
    return f"{text}; {percent(own.gain)} above the rate without ({at}); random directions {percent(random.gain)}"


def removes_concepts(facts: StudyFacts) -> Claim:
    """Judge that colours and backgrounds can be removed by their features."""
    outcomes: list[tuple[str, dict[str, list[RemovedConcept]]]] = []
    for results in facts.removals:
        by_group = {group: [c for c in results.concepts if c.group == group] for group in REMOVAL_GROUPS}
        if all(by_group.values()):
            outcomes.append((dictionaries_of(results), by_group))
    return Claim.judge(
        "removal",
        "Colours and backgrounds can be removed by their features without loss (not a claim of the paper; measured as in arXiv "
        "2501.18052).",
        "With one dictionary at least, or several together, half or more of the colours and half or more of the backgrounds "
        "are each removed from at least 90 % of unseen images, while at least 90 % of the others of the group and of all else "
        "stays.",
        holds=any(all(_removed(of) >= SHARE * len(of) for of in by_group.values()) for _, by_group in outcomes)
        if outcomes
        else None,
        evidence=[
            f"{dictionaries}, {group}: {_removed(of)} of {len(of)} concepts"
            for dictionaries, by_group in outcomes
            for group, of in by_group.items()
        ],
        command="difflex removal STUDY",
    )


def _removed(concepts: Iterable[RemovedConcept]) -> int:
    return sum(concept.rates.reach(REMOVED) for concept in concepts)
