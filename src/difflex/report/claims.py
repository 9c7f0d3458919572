"""The claims of the report with their verdicts: those of arXiv 2505.24360, and what is expected of steering with features."""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from itertools import product
from typing import NamedTuple, TypeVar

from markupsafe import Markup

from difflex.effects.removal import RemovalResults
from difflex.explanation.comparison import read_methods
from difflex.features import Book, BookInfo, CoverageSummary
from difflex.report.dictionary_claims import Claim, Verdict, dictionary_claims, interval_of, kinds_of, model_claims
from difflex.report.drawing import element
from difflex.report.facts import SteeringFacts, StudyFacts
from difflex.report.figures import MissingFigure, ReportFigure, ReportSection
from difflex.report.figures.effects import REMOVED, dictionaries_of
from difflex.report.style import SAE_KINDS, count, kind_of, number, percent
from difflex.study import DictionaryRef

SIGNS: dict[Verdict, str] = {"holds here": "✓", "does not hold here": "✗", "undecided": "?", "not measured": "○"}
LINES = 7
"""Of the evidence on the page; the CSV file has all of it."""
SURFACES, OBJECTS = ("colour", "texture", "background", "row", "column"), ("shape",)
"""Groups of concepts: those of surfaces and regions, and those of objects."""
RIGHT, ENOUGH = 0.8, 10
"""The accuracy from which on an explanation counts, and how many such features their share takes."""
STEERED, REMOVAL_GROUPS = ("colour", "texture", "background"), ("colour", "background")
GAIN, SHARE, RANDOM = 0.7, 0.5, 0.1
FEW_CONCEPTS = 3
"""Fewer concepts of a group cannot tell."""


def judge_claims(facts: StudyFacts) -> list[Claim]:
    """Return every claim with its verdict."""
    kinds = kinds_of(facts)
    books = [_itda_covers_more(facts), _itda_matches_surfaces(facts)]
    steering = [_steers_towards_concepts(facts, own, name) for name, own in kinds.items()]
    removal = [_removes_concepts(facts, own, name) for name, own in kinds.items()]
    return [*dictionary_claims(facts), *books, *steering, *removal, *model_claims(facts)]


def claims(facts: StudyFacts) -> ReportSection:
    """Return the section of claims; those that are not measured are listed with what the study lacks."""
    judged = judge_claims(facts)
    measured = [claim for claim in judged if claim.outcomes]
    counts = Counter(claim.verdict for claim in measured)
    summary = ", ".join(f"{verdict}: {counts[verdict]}" for verdict in SIGNS if counts[verdict])
    file = ReportFigure(
        name="claims",
        caption="All claims with all their evidence.",
        columns=("name", "claim", "verdict", "evidence"),
        rows=[(claim.name, claim.statement, claim.verdict, line) for claim in judged for line in claim.evidence],
    )
    return ReportSection(
        name="claims",
        title="Claims of the paper",
        lead="Claims of arXiv 2505.24360 about FLUX.1, each tested by its rule on the numbers of this study, for SAEs and for "
        "ITDA "
        "separately. Undecided: comparisons disagree, an interval has 0 in it, or there is one comparison only "
        f"({summary}).",
        body=element("ul", *map(_item, measured), class_="claims") if measured else Markup(),
        parts=[
            file,
            *(
                MissingFigure(f"Claim: {claim.statement.partition(' (')[0].rstrip('.')}", claim.command)
                for claim in judged
                if not claim.outcomes
            ),
        ],
    )


def _item(claim: Claim) -> str:
    sign = element("span", SIGNS[claim.verdict], aria_hidden="true", class_="sign")
    verdict = element("span", claim.verdict, class_="verdict")
    more = len(claim.evidence) - LINES
    first, *others = [*claim.evidence[:LINES], *([f"and {more} more in claims.csv"] if more > 0 else [])]
    return element(
        "li",
        element(
            "details",
            element("summary", sign, element("span", verdict, " ", claim.statement, element("small", first))),
            element("ul", *(element("li", line) for line in others), class_="evidence") if others else "",
            element("p", element("span", "Rule "), claim.rule, class_="rule"),
        ),
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
        "fewer than 8 shots do not count; quartiles are in brackets; neurons are shown for comparison. One pair decides nothing.",
        outcomes=[itda.summary.quartiles[1] > sae.summary.quartiles[1] for itda, sae in pairs],
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
        "95 % interval of the difference, 1.96 standard errors, lies above 0). It does not hold where both are the other way "
        "round. Only dictionaries with 10 such features, and two "
        "pairs or more.",
        outcomes=[_contrast(itda, sae) for itda, sae in pairs],
        numbers=[f"{itda}; {sae}" for itda, sae in pairs] or lacking,
        command="difflex concepts STUDY and difflex explain STUDY, of an ITDA and an SAE of one site and k",
    )


def _contrast(itda: ExplainedGroups, sae: ExplainedGroups) -> bool | None:
    """Return whether the ITDA matches surfaces and the SAE objects; None if it is neither so nor the other way round."""
    if itda.exceeds(sae, SURFACES) and sae.exceeds(itda, OBJECTS):
        return True
    return False if sae.exceeds(itda, SURFACES) and itda.exceeds(sae, OBJECTS) else None


def _explained_groups(facts: StudyFacts, ref: DictionaryRef, groups: dict[str, str]) -> ExplainedGroups:
    """Return the features of a dictionary that the name of a concept explains; `groups` are by concept."""
    with Book.open(facts.study.book(*ref)) as book:
        info, explained = book.about, read_methods(book, facts.study.folder)
    heldout = [method for method in explained if method.protocol.startswith("heldout")]
    pairs = [pair for method in heldout for pair in zip(method.explanations, method.accuracies, strict=True)]
    return ExplainedGroups(ref, info, tuple(groups[text] for text, accuracy in pairs if accuracy >= RIGHT and text in groups))


def _steers_towards_concepts(facts: StudyFacts, kinds: Sequence[str], name: str) -> Claim:
    """Judge that features of colours, textures and backgrounds put their concepts into images."""
    measured = [steering for steering in facts.steering if steering.kind in kinds and _has_all_groups(steering)]
    measured.sort(key=lambda steering: -_features(steering, STEERED))
    together = [_outcome(s, "colours, textures and backgrounds together", STEERED) for s in measured]
    lines = [_outcome(s, group, (group,)) for s in measured for group in STEERED]
    return Claim(
        f"steering-{name.lower()}",
        f"{name} features of colours, textures and backgrounds, added at a place, put them into the image there and leave the "
        "rest unchanged (not a claim of the paper, which shows single examples).",
        "In one dictionary at least, for the colours, for the textures and for the backgrounds alike: half of them or more "
        "have a feature of AP ≥ 0.8, and among these the median over concepts of the success less the rate without the edit is "
        "at least 70 %, at a strength at which at least 90 % of all else that was right stays so and no image breaks; random "
        "directions of equal length get less than 10 %. Undecided where too few images show the concepts, or the "
        f"gain is above 0 and fewer than {FEW_CONCEPTS} of a group have a feature or its 95 % interval reaches 70 %.",
        outcomes=_any([_steers(s) for s in measured]),
        numbers=[*together, *lines],
        command="difflex steer-eval STUDY, towards colours, textures and backgrounds",
        least=1,
    )


def _any(outcomes: Sequence[bool | None]) -> list[bool | None]:
    """Return the one outcome of a claim that one dictionary is enough for."""
    return [True if True in outcomes else None if None in outcomes else False] if outcomes else []


def _has_all_groups(steering: SteeringFacts) -> bool:
    """Return whether steering was measured in all three groups of the miniature world's concepts."""
    coverage = [steering.coverage[group] for group in STEERED if group in steering.coverage and not steering.is_from_file]
    return len(coverage) == len(STEERED) and all(group.concepts > group.rare for group in coverage)


def _features(steering: SteeringFacts, groups: Iterable[str]) -> int:
    return sum(len(steering.coverage[group].detected) for group in groups)


def _steers(steering: SteeringFacts) -> bool | None:
    """Return whether a dictionary steers towards all groups of concepts; None if too little was measured to tell."""
    outcomes = [_steers_towards(steering, group) for group in STEERED]
    return False if False in outcomes else None if None in outcomes else True


def _steers_towards(steering: SteeringFacts, group: str) -> bool | None:
    """Return whether enough concepts of a group have a feature that succeeds where a random direction does not."""
    coverage, own, random = steering.coverage[group], steering.summary("feature", group), steering.summary("random", group)
    enough = SHARE * coverage.concepts
    if len(coverage.detected) < enough:
        return None if len(coverage.detected) + coverage.rare >= enough else False
    if own is None or random is None:
        return None
    if own.gain >= GAIN and random.gain < RANDOM:
        return True
    gains = [curve.gain() for curve in steering.curves("feature", group)]
    is_unclear = len(gains) < FEW_CONCEPTS or own.gain < GAIN <= interval_of(gains)[2]
    return None if own.gain > 0 and is_unclear else False


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


def _removes_concepts(facts: StudyFacts, kinds: Sequence[str], name: str) -> Claim:
    """Judge that colours and backgrounds can be removed by their features."""
    own = [r for r in facts.removals if any(kind_of(name) in kinds for name in r.dictionaries)]
    counts = [(dictionaries_of(results), [_removed(results, group) for group in REMOVAL_GROUPS]) for results in own]
    measured = [(dictionaries, groups) for dictionaries, groups in counts if all(total for _, total in groups)]
    outcomes = [all(removed >= SHARE * total for removed, total in groups) for _, groups in measured]
    few = [any(total < FEW_CONCEPTS for _, total in groups) for _, groups in measured]
    return Claim(
        f"removal-{name.lower()}",
        f"Colours and backgrounds can be removed by their {name} features without loss (not a claim of the paper; measured as in "
        "arXiv 2501.18052).",
        "With one dictionary at least, or several together, half or more of the colours and half or more of the backgrounds "
        "are each removed from at least 90 % of unseen images, while at least 90 % of the others of the group and of all else "
        f"stays. Undecided where fewer than {FEW_CONCEPTS} of a group were tried.",
        outcomes=_any([None if too_few else outcome for outcome, too_few in zip(outcomes, few, strict=True)]),
        numbers=[
            f"{dictionaries}, {group}: {removed} of {total} concepts"
            for dictionaries, groups in measured
            for group, (removed, total) in zip(REMOVAL_GROUPS, groups, strict=True)
        ],
        command="difflex removal STUDY",
        least=1,
    )


def _removed(results: RemovalResults, group: str) -> tuple[int, int]:
    """Return how many concepts of a group are removed, and how many there are."""
    concepts = [concept for concept in results.concepts if concept.group == group]
    return sum(concept.rates.reach(REMOVED) for concept in concepts), len(concepts)
