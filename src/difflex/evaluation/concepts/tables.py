"""Matches as a table for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from difflex.evaluation.concepts.matches import ConceptMatches, ConceptResult, ConfidenceInterval, covered

__all__ = ["table"]

PROBE = "a linear probe"


def table(matches: Sequence[ConceptMatches]) -> str:
    """What each method detects: in all, by group of concepts, and by level of noise; sites one after another."""
    sites = dict.fromkeys((each.site, each.made_from.get("revision", "")) for each in matches)
    return "\n\n".join(
        _of_site([each for each in matches if (each.site, each.made_from.get("revision", "")) == key]) for key in sites
    )


def _of_site(matches: Sequence[ConceptMatches]) -> str:
    first = matches[0]
    whole = first.levels[0]
    found, of = covered(whole.findings, findable=True)[1], len(whole.findings)
    revision = f" {first.made_from['revision']}" if first.made_from.get("revision") else ""
    rare = f"; too rare: {', '.join(concept.name for concept in first.left_out)}" if first.left_out else ""
    title = f"{first.site}{revision}: {PROBE} finds {found} of {of} concepts (AP >= 0.9){rare}"
    parts = [_summary(matches), _by_group(matches), _by_level(matches)]
    return "\n".join([title, *(part for part in parts if part)])


def _summary(matches: Sequence[ConceptMatches]) -> str:
    head = ["", "detected (AP >= 0.8)", "of those the probe finds", "mean AP", "few together", "meaning", "split", "absorbed"]
    rows = [head]
    for each in matches:
        level = each.levels[0]
        findings = level.findings
        rows.append(
            [
                each.label,
                _shares(level.coverage, covered(findings)),
                _shares(level.coverage_of_findable, covered(findings, findable=True)),
                f"{_mean(finding.best.ap.value for finding in findings):.2f}",
                f"{_mean(finding.few.ap.value for finding in findings):.2f}",
                f"{level.monosemanticity:.2f}",
                str(sum(bool(finding.pieces) for finding in findings)),
                str(sum(bool(finding.absorbers) for finding in findings)),
            ]
        )
    return _aligned(rows)


def _shares(share: ConfidenceInterval | None, counts: tuple[int, int]) -> str:
    found, of = counts
    return f"{found}/{of} [{share.low:.0%}, {share.high:.0%}]" if share else "-"


def _by_group(matches: Sequence[ConceptMatches]) -> str:
    """Mean average precision of the best features, and of the probe."""
    groups = list(dict.fromkeys(finding.concept.group for finding in matches[0].levels[0].findings))
    rows = [["AP by group", *groups]]
    rows.append([PROBE, *(_ap(matches[0].levels[0].of(group), probe=True) for group in groups)])
    rows += [[each.label, *(_ap(each.levels[0].of(group)) for group in groups)] for each in matches]
    return _aligned(rows)


def _by_level(matches: Sequence[ConceptMatches]) -> str:
    """Mean average precision at each level of noise."""
    levels = matches[0].levels[1:]
    if not levels:
        return ""
    rows = [["AP by noise", *(f"{level.noise:g}" for level in levels)]]
    rows.append([PROBE, *(_ap(level.findings, probe=True) for level in levels)])
    rows += [[each.label, *(_ap(level.findings) for level in each.levels[1:])] for each in matches]
    return _aligned(rows)


def _ap(findings: Iterable[ConceptResult], probe: bool = False) -> str:
    return f"{_mean((finding.probe if probe else finding.best.ap).value for finding in findings):.2f}"


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / max(1, len(listed))


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n" + "\n".join(lines)
