"""The section of claims, and all of them with their verdicts."""

from collections import Counter
from collections.abc import Sequence

from difflex.report.claims.claim import Claim
from difflex.report.claims.edits import removes_concepts, steers_towards_concepts
from difflex.report.claims.observed import covers_more, matches_surfaces
from difflex.report.claims.paper import (
    better_than_neurons,
    better_than_untrained_directions,
    better_than_untrained_model,
    dead_without_normalisation,
    itda_rebuilds_better,
    norms_differ,
    spectrum_is_concentrated,
)
from difflex.report.drawing import element
from difflex.report.facts import StudyFacts
from difflex.report.kinds import AUTOENCODERS
from difflex.report.sections import FigureTable, ReportFigure, ReportSection

__all__ = ["claims", "judged"]

TELL = 7
"""So many comparisons are told one by one on the page; the CSV file has all."""


def claims(facts: StudyFacts) -> ReportSection:
    """The section of claims."""
    listed = judged(facts)
    marks = {"holds here": "✓", "does not hold here": "✗", "not measured": "○"}
    items = [
        element(
            "li",
            element("p", element("span", marks[each.verdict], aria_hidden="true"), f" {each.verdict}", class_="verdict"),
            element("h3", each.statement),
            element("ul", *(element("li", line) for line in _first(each.evidence)), class_="evidence"),
            element("p", element("span", "Rule "), each.rule, class_="rule"),
            class_=f"claim {each.verdict.split()[0]}",
            id=f"claim-{each.name}",
        )
        for each in listed
    ]
    return ReportSection(
        name="claims",
        title="What the paper claims, and what is so here",
        lead="Claims of arXiv 2505.24360 on FLUX.1, held to the numbers of this study by the rule beside each: "
        f"{_summary(listed)}.",
        body=element("ul", *items, class_="claims"),
        figures=(_file(listed),),
    )


def _first(evidence: Sequence[str]) -> list[str]:
    more = len(evidence) - TELL
    return [*evidence[:TELL], *([f"and {more} more in claims.csv"] if more > 0 else [])]


def _file(listed: Sequence[Claim]) -> ReportFigure:
    """The claims as a file, with all of their evidence and nothing drawn."""
    rows = tuple((each.name, each.statement, each.verdict, line) for each in listed for line in each.evidence)
    table = FigureTable(("name", "claim", "verdict", "evidence"), rows)
    return ReportFigure(
        name="claims", title="", caption="All claims with all their evidence.", formula="", table=table, drawings=()
    )


def _summary(listed: Sequence[Claim]) -> str:
    counted = Counter(each.verdict for each in listed)
    told = [
        (counted["holds here"], "so here"),
        (counted["does not hold here"], "not so"),
        (counted["not measured"], "not measured"),
    ]
    return ", ".join(f"{many} {said}" for many, said in told if many)


def judged(facts: StudyFacts) -> list[Claim]:
    """Every claim with its verdict."""
    return [
        dead_without_normalisation(facts),
        itda_rebuilds_better(facts),
        better_than_neurons(facts, AUTOENCODERS, "autoencoder"),
        better_than_neurons(facts, ("itda",), "ITDA"),
        better_than_untrained_directions(facts),
        better_than_untrained_model(facts),
        covers_more(facts),
        matches_surfaces(facts),
        steers_towards_concepts(facts),
        removes_concepts(facts),
        norms_differ(facts),
        spectrum_is_concentrated(facts),
    ]
