"""What papers found of steering, tried here: a small figure for each finding, with its verdict and its rule."""

from collections.abc import Sequence

from difflex.effects.findings import Finding, FindingLine
from difflex.report.drawing import Axis, Drawing, LegendEntry, Plot, PlotCurve, PlotPoint, SeriesStyle, plot
from difflex.report.facts import StudyFacts
from difflex.report.kinds import DASHES
from difflex.report.sections import FigureTable, MissingFigure, ReportFigure, ReportSection
from difflex.report.telling import count, number

__all__ = ["findings"]

MARKS = {"holds here": "✓", "does not hold here": "✗", "cannot be said": "○"}
FORMS = ("circle", "diamond", "square", "triangle", "cross", "wedge", "ring")
FAR = 30
"""From this ratio of the last to the first on, an axis is logarithmic."""
At = tuple[str, Finding]
"""A site, and what an experiment found there."""


def findings(facts: StudyFacts) -> ReportSection:
    """The section about findings of papers."""
    by_name: dict[str, list[At]] = {}
    for each in facts.findings:
        for found in each.found:
            by_name.setdefault(found.name, []).append((each.site, found))
    figures = [_figure(name, found) for name, found in by_name.items()]
    return ReportSection(
        name="findings",
        title="What papers found of steering, and what is so here",
        lead="Findings on contrasts (arXiv 2505.03189, there of language models) and on features (arXiv 2505.24360), tried as "
        "experiments: each with its rule, the numbers that decided, and a verdict.",
        figures=(*figures, _numbers(facts)) if figures else (),
        missing=() if figures else (MissingFigure("Findings of papers, tried", "difflex findings STUDY"),),
    )


def _figure(name: str, found: Sequence[At]) -> ReportFigure:
    first = found[0][1]
    names = list(dict.fromkeys(line.name for _, each in found for line in each.lines))
    keys = tuple(LegendEntry(each, each, _look(i)) for i, each in enumerate(names))
    rows = tuple(
        (site, line.name, x, y, error, line.concepts)
        for site, each in found
        for line in each.lines
        for x, y, error in zip(line.x, line.y, line.errors, strict=True)
    )
    told = " ".join(f"{MARKS[each.verdict]} {site}: {each.verdict}. {each.because}" for site, each in found)
    return ReportFigure(
        name=f"finding_{name}".replace("-", "_").replace(" ", "_"),
        title=first.claim,
        caption=told,
        formula=f"{first.paper}. Rule: {first.rule} Bars are two standard errors over concepts, to either side.",
        table=FigureTable(("site", "line", first.x, first.y, "standard error", "concepts"), rows),
        drawings=tuple(_drawing(site, each, keys) for site, each in found if each.lines),
        keys=keys,
    )


def _look(i: int) -> SeriesStyle:
    return SeriesStyle(colour=i % 9, marker=FORMS[i % len(FORMS)], dash=DASHES[i % len(DASHES)])


def _drawing(site: str, found: Finding, keys: Sequence[LegendEntry]) -> Drawing:
    looks = {each.series: each.look for each in keys}
    curves = tuple(PlotCurve(series=line.name, look=looks[line.name], marks=_marks(line, found)) for line in found.lines)
    places = [x for line in found.lines for x in line.x]
    x = Axis(label=found.x, log=bool(places) and min(places) > 0 and max(places) >= FAR * min(places))
    about = f"{count(len(curves), 'line')} over {found.x}."
    return plot(Plot(title=f"{site}: {found.verdict}", description=about, x=x, y=Axis(label=found.y), curves=curves))


def _marks(line: FindingLine, found: Finding) -> tuple[PlotPoint, ...]:
    return tuple(
        PlotPoint(
            x=x,
            y=y,
            tip=f"{line.name}\n{found.x} {number(x)}: {number(y)} ± {number(2 * error)}\n{count(line.concepts, 'concept')}",
            low=y - 2 * error,
            high=y + 2 * error,
        )
        for x, y, error in zip(line.x, line.y, line.errors, strict=True)
    )


def _numbers(facts: StudyFacts) -> ReportFigure:
    """The numbers that the rules looked at, as a file."""
    rows = tuple(
        (each.site, found.name, found.claim, found.paper, found.verdict, found.because, name, value)
        for each in facts.findings
        for found in each.found
        for name, value in found.numbers.items()
    )
    columns = ("site", "name", "finding", "paper", "verdict", "because", "number", "value")
    caption = "The numbers that the rules looked at."
    return ReportFigure(name="findings", title="", caption=caption, formula="", table=FigureTable(columns, rows), drawings=())
