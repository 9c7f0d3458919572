"""The claims of the report with their verdicts: those of arXiv 2505.24360, and what is expected of steering with features."""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from itertools import product
from typing import NamedTuple, TypeVar

from difflex.effects.removal import RemovalResults
from difflex.explanation.comparison import read_methods
from difflex.features import Book, BookInfo, CoverageSummary
from difflex.report.dictionary_claims import Claim, dictionary_claims, model_claims
from difflex.report.drawing import element
from difflex.report.facts import SteeringFacts, StudyFacts
from difflex.report.figures import ReportFigure, ReportSection
from difflex.report.figures.effects import REMOVED, dictionaries_of
from difflex.report.style import SAE_KINDS, count, number, percent
from difflex.study import DictionaryRef

SIGNS = {"holds here": "✓", "does not hold here": "✗", "not measured": "○"}
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
    books = [_itda_covers_more(facts), _itda_matches_surfaces(facts)]
    effects = [_steers_towards_concepts(facts), _removes_concepts(facts)]
    return [*dictionary_claims(facts), *books, *effects, *model_claims(facts)]


def claims(facts: StudyFacts) -> ReportSection:
    """Return the section of claims."""
    all_claims = judge_claims(facts)
    counts = Counter(claim.verdict for claim in all_claims)
    summary = ", ".join(f"{verdict}: {counts[verdict]}" for verdict in SIGNS if counts[verdict])
    return ReportSection(
        name="claims",
        title="Claims of the paper",
        lead=f"Claims of arXiv 2505.24360 about FLUX.1, tested on the numbers of this study by the rule below each ({summary}).",
        body=element("ul", *map(_item, all_claims), class_="claims"),
        parts=[
            ReportFigure(
                name="claims",
                caption="All claims with all their evidence.",
                columns=("name", "claim", "verdict", "evidence"),
                rows=[(claim.name, claim.statement, claim.verdict, line) for claim in all_claims for line in claim.evidence],
            )
        ],
    )


def _item(claim: Claim) -> str:
    sign = element("span", SIGNS[claim.verdict], aria_hidden="true")
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
    info: BookInfo
    summary: CoverageSummary

    @property
    def block(self) -> tuple[object, ...]:
        """What is equal for dictionaries and neurons that compare; neurons are another site of the block."""
        return self.ref.site.path, self.ref.site.stream, self.info.k, self.info.data

    def __str__(self) -> str:
        low, middle, high = map(percent, self.summary.quartiles)
        return f"{self.ref} {middle} ({low} to {high})"


class ExplainedGroups(NamedTuple):
    """The features of a dictionary that the name of a known concept explains."""

    ref: DictionaryRef
    info: BookInfo
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


BookRow = TypeVar("BookRow", ImageCoverage, ExplainedGroups)


def _itda_and_sae(rows: Sequence[BookRow]) -> list[tuple[BookRow, BookRow]]:
    """Return the pairs of an ITDA and an SAE of the same site and k whose books are of the same images."""
    return [
        (itda, sae)
        for itda, sae in product(rows, rows)
        if itda.info.kind == "itda"
        and sae.info.kind in SAE_KINDS
        and (itda.ref.site, itda.info.k, itda.info.data) == (sae.ref.site, sae.info.k, sae.info.data)
    ]


def _itda_covers_more(facts: StudyFacts) -> Claim:
    """Judge that ITDA features cover more of their top images than SAE features."""
    rows = []
    for ref in facts.books:
        with Book.open(facts.study.book(*ref)) as book:
            if (summary := book.coverage_summary()) is not None:
                rows.append(ImageCoverage(ref, book.about, summary))
    pairs = _itda_and_sae(rows)
    blocks = {itda.block for itda, _ in pairs}
    neurons = [f"for comparison {row}" for row in rows if row.info.kind == "neurons" and row.block in blocks]
    return Claim(
        "covering",
        "ITDA features cover more of the images in which they are strongest than SAE features do.",
        "At every site and k where both have a book of the same images, the median over features of the share of tokens "
        "covered in top images (at least a fifth of the feature's own peak) is higher for the ITDA. Features that fire in "
        "fewer than 8 shots do not count; quartiles are in brackets; neurons are shown for comparison.",
        holds=all(itda.summary.quartiles[1] > sae.summary.quartiles[1] for itda, sae in pairs) if pairs else None,
        numbers=[*(f"{itda}, {sae}" for itda, sae in pairs), *neurons],
        command="difflex collect STUDY, of an ITDA and an SAE of one site and k",
    )


def _itda_matches_surfaces(facts: StudyFacts) -> Claim:
    """Judge that ITDA features match colours, textures and regions, and SAE features objects."""
    groups = {concept.name: concept.group for match in facts.matches for concept in match.matches.concepts}
    has_both = all({*groups.values()}.intersection(among) for among in (SURFACES, OBJECTS))
    candidates = _itda_and_sae([_explained_groups(facts, ref, groups) for ref in facts.books] if has_both else [])
    pairs = [pair for pair in candidates if all(len(row.groups) >= ENOUGH for row in pair)]
    lacking = [
        f"{row.ref}: a known concept explains {count(len(row.groups), 'feature')}, {ENOUGH} are needed"
        for row in {str(row.ref): row for pair in candidates for row in pair}.values()
        if len(row.groups) < ENOUGH
    ]
    return Claim(
        "surfaces",
        "ITDA features match colour, texture and region, SAE features match objects.",
        "At every site and k where both have a book of the same images, among features that the name of one known concept "
        "explains (accuracy 0.8 or more on held-out images): the share explained by a colour, a texture, a background or a "
        "place is higher for the ITDA, and the share explained by a shape is higher for the SAE, each by more than chance (the "
        "95 % interval of the difference, 1.96 standard errors, lies above 0). Only dictionaries with 10 such features.",
        holds=all(itda.exceeds(sae, SURFACES) and sae.exceeds(itda, OBJECTS) for itda, sae in pairs) if pairs else None,
        numbers=[f"{itda}; {sae}" for itda, sae in pairs] or lacking,
        command="difflex concepts STUDY and difflex explain STUDY, of an ITDA and an SAE of one site and k",
    )


def _explained_groups(facts: StudyFacts, ref: DictionaryRef, groups: dict[str, str]) -> ExplainedGroups:
    """Return the features of a dictionary that the name of a concept explains; `groups` are by concept."""
    with Book.open(facts.study.book(*ref)) as book:
        info, explained = book.about, read_methods(book, facts.study.folder)
    heldout = [method for method in explained if method.protocol.startswith("heldout")]
    pairs = [pair for method in heldout for pair in zip(method.explanations, method.accuracies, strict=True)]
    return ExplainedGroups(ref, info, tuple(groups[text] for text, accuracy in pairs if accuracy >= RIGHT and text in groups))


def _steers_towards_concepts(facts: StudyFacts) -> Claim:
    """Judge that features of colours, textures and backgrounds put their concepts into images."""
    measured = [steering for steering in facts.steering if _has_all_groups(steering)]
    measured.sort(key=lambda steering: -_features(steering, STEERED))
    together = [_outcome(s, "colours, textures and backgrounds together", STEERED) for s in measured]
    lines = [_outcome(s, group, (group,)) for s in measured for group in STEERED]
    return Claim(
        "steering",
        "Features of colours, textures and backgrounds, added at a place, put them into the image there and leave the rest "
        "unchanged (not a claim of the paper, which shows single examples).",
        "In one dictionary at least, for the colours, for the textures and for the backgrounds alike: half of them or more "
        "have a feature of AP ≥ 0.8 (concepts that too few images show count as without one), and among these the median over "
        "concepts of the success less the rate without the edit is at least 70 %, at a strength at which at least 90 % of all "
        "else that was right stays so and no image breaks; random directions of equal length get less than 10 %.",
        holds=any(all(_steers(s, group) for group in STEERED) for s in measured) if measured else None,
        numbers=[*together, *lines],
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


def _removes_concepts(facts: StudyFacts) -> Claim:
    """Judge that colours and backgrounds can be removed by their features."""
    counts = [(dictionaries_of(results), [_removed(results, group) for group in REMOVAL_GROUPS]) for results in facts.removals]
    measured = [(dictionaries, groups) for dictionaries, groups in counts if all(total for _, total in groups)]
    return Claim(
        "removal",
        "Colours and backgrounds can be removed by their features without loss (not a claim of the paper; measured as in arXiv "
        "2501.18052).",
        "With one dictionary at least, or several together, half or more of the colours and half or more of the backgrounds "
        "are each removed from at least 90 % of unseen images, while at least 90 % of the others of the group and of all else "
        "stays.",
        holds=any(all(removed >= SHARE * total for removed, total in groups) for _, groups in measured) if measured else None,
        numbers=[
            f"{dictionaries}, {group}: {removed} of {total} concepts"
            for dictionaries, groups in measured
            for group, (removed, total) in zip(REMOVAL_GROUPS, groups, strict=True)
        ],
        command="difflex removal STUDY",
    )


def _removed(results: RemovalResults, group: str) -> tuple[int, int]:
    """Return how many concepts of a group are removed, and how many there are."""
    concepts = [concept for concept in results.concepts if concept.group == group]
    return sum(concept.rates.reach(REMOVED) for concept in concepts), len(concepts)
