"""Two dictionaries of one study compared, as text: metrics, detected concepts, gains by steering."""

from collections.abc import Sequence
from statistics import median

from difflex.evaluation.concepts.results import ConceptResult, count_detected
from difflex.report.facts import StudyFacts
from difflex.report.figures.dictionaries import metric_columns
from difflex.report.style import number
from difflex.study import DictionaryRef
from difflex.tables import text_table

ComparedValue = tuple[str, float | None, float | None]
"""A name, and the value of each dictionary."""
FEATURE = "feature"
"""The method of steering whose gains are compared."""


def describe_dictionaries(facts: StudyFacts, first: DictionaryRef, second: DictionaryRef) -> str:
    """Return a table of all that was measured of both, with the differences, and what was measured of one alone or of neither."""
    places = (first, second)
    by_ref = {dictionary.ref: dictionary for dictionary in facts.dictionaries}
    matches = {(match.matches.site, match.matches.label): match.overall.results for match in facts.matches if not match.untrained}
    steering = {each.ref: each.results for each in facts.steering}
    evaluations = [by_ref[place].evaluation if place in by_ref else None for place in places]
    rows = [
        _row(column.name, [None if own is None else column.value(own) for own in evaluations])
        for column in metric_columns(own for own in evaluations if own is not None)
    ]
    results = [matches.get((place.site, place.label)) for place in places]
    rows.append(_row("concepts detected (AP >= 0.8)", [_count(own) for own in results]))
    if all(results):
        rows += _concept_rows(*(own or () for own in results))
    gains = [
        None if place not in steering else median([curve.gain() for curve in steering[place].of(FEATURE)] or [0.0])
        for place in places
    ]
    rows.append(_row("median gain by steering", gains))
    lines = [
        (name, number(a), number(b), "-" if a is None or b is None else number(b - a))
        for name, a, b in rows
        if not (a is None and b is None)
    ]
    table = text_table([("", str(first), str(second), "difference"), *lines], right_align=(1, 2, 3))
    commands = {"evaluate": evaluations, "concepts": results, "steer-eval": gains}
    missing = [f"difflex {verb} measures more of them." for verb, own in commands.items() if None in own]
    return "\n".join([table, *missing, *(f"note: {problem}" for problem in facts.problems)])


def _row(name: str, values: Sequence[float | None]) -> ComparedValue:
    first, second = values
    return name, first, second


def _count(results: Sequence[ConceptResult] | None) -> float | None:
    return None if results is None else count_detected(results).detected


def _concept_rows(first: Sequence[ConceptResult], second: Sequence[ConceptResult]) -> list[ComparedValue]:
    """Return the average precision of each concept that both were matched to."""
    others = {result.concept: result.best.ap.value for result in second}
    return [
        (f"AP of {result.concept.name}", result.best.ap.value, others[result.concept])
        for result in first
        if result.concept in others
    ]
