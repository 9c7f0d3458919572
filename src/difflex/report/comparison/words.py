"""Two studies side by side as lines of text."""

from collections.abc import Iterable, Sequence

from difflex.report.comparison.pairs import StudyComparison
from difflex.report.telling import number, percent

__all__ = ["in_words"]

TOLD = ("FVU", "r2", "L0", "dead", "v / mean", "PSNR")
"""The figures that are printed; the page has all."""


def in_words(comparison: StudyComparison) -> str:
    """What differs between the two: what was asked, what there is, and the chief figures."""
    one, other = comparison.names
    parts = [f"{one} ({comparison.one.study.model}) and {other} ({comparison.other.study.model})"]
    asked = [(line.verb, line.what, line.one or "-", line.other or "-") for line in comparison.asked]
    parts.append(_lined("asked", [("", "", one, other), *asked]) if asked else "asked: the same of both")
    parts.append(f"dictionaries in both: {len(comparison.pairs)}")
    parts += [
        f"only in {name}: {', '.join(each.name for each in only)}"
        for name, only in zip(comparison.names, comparison.only, strict=True)
        if only
    ]
    told = [each for each in comparison.figured if each.column.name in TOLD and not (each.one is None and each.other is None)]
    figures = [
        (each.pair.name, each.column.name, number(each.one), number(each.other), number(each.difference))
        for each in told
        if each.difference != 0
    ]
    if figures:
        parts.append(_lined("figures", [("", "", one, other, "difference"), *figures]))
    if len(figures) < len(told):
        parts.append(f"figures that are equal: {len(told) - len(figures)}")
    coverage = [
        (each.name, *(percent(level.coverage.value) for level in each.levels), _interval(each.coverage))
        for each in comparison.detected
    ]
    if coverage:
        parts.append(_lined("concepts that one feature detects", [("", one, other, "difference"), *coverage]))
    groups = [
        (each.name, group, number(a), number(b), number(b - a))
        for each in comparison.detected
        if each.one.normalisation is not None
        for group, (a, b) in each.groups.items()
    ]
    if groups:
        parts.append(_lined("mean AP by group of concepts", [("", "", one, other, "difference"), *groups]))
    return "\n".join([*parts, *(f"note: {trouble}" for trouble in comparison.troubles)])


def _interval(interval: Iterable[float]) -> str:
    value, low, high = (100 * bound for bound in interval)
    return f"{value:+.0f} ({low:+.0f} to {high:+.0f}) points"


def _lined(name: str, lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join([f"{name}:", *("  " + "  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)])
