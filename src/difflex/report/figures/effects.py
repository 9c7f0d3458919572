"""What removing concepts takes away and leaves (the table of SAeUron, arXiv 2501.18052), and findings of papers on steering."""

from collections.abc import Sequence
from statistics import fmean

from markupsafe import Markup

from difflex.effects.addition_findings import AdditionFinding
from difflex.effects.findings import Finding, FindingLine
from difflex.effects.removal import RemovalResults, RemovedConcept
from difflex.report.drawing import Axis, Drawing
from difflex.report.drawing.charts import ChartRow, PlotCurve, PlotPoint, Series, SeriesStyle, plot, row_chart
from difflex.report.facts import StudyFacts, group_by
from difflex.report.figures import MissingFigure, ReportFigure, ReportSection, html_table
from difflex.report.style import count, grouped, number, numbered_style, percent

REMOVED = 0.9
"""The rates of removal and retention from which on a concept counts as removed."""
UA = Series("ua", "removed (UA)", SeriesStyle(0, "square"), line=False, bar=True)
IRA = Series("ira", "others of the group kept (IRA)", SeriesStyle(1, "diamond"), line=False)
CRA = Series("cra", "all else kept (CRA)", SeriesStyle(5, "ring"), line=False)
SIGNS = {"holds here": "✓", "does not hold here": "✗", "cannot be said": "○"}
LOG_RATIO = 30
"""The ratio of the largest to the smallest value from which on an axis is logarithmic."""


def removal(facts: StudyFacts) -> ReportSection:
    """Return the section about removing concepts."""
    results = facts.removals
    steps = grouped({dictionaries_of(result): _steps(result) for result in results}) or "at every step"
    missing = MissingFigure("The results of removing concepts", "difflex removal STUDY")
    return ReportSection(
        name="removal",
        title="Erasing concepts",
        lead=f"The features of a concept are chosen by SAeUron's score on one set of prompts and ablated {steps}; the rates are "
        "measured on other prompts. UA: images that no longer show the concept their prompts name. IRA: images that still show "
        "another concept of its group. CRA: everything else that prompts state and that is still right; CRA of its own: the same "
        "in images of the concept only.",
        body=_removal_table(results) if results else Markup(),
        parts=[_removal_figure(results) if results else missing],
    )


def _steps(result: RemovalResults) -> str:
    steps = result.config.edit_steps
    return "at every step" if steps is None else f"at steps {steps[0]} to {steps[1] - 1}"


def dictionaries_of(result: RemovalResults) -> str:
    """Return the names of the dictionaries that were edited together."""
    return " + ".join(result.dictionaries)


def _groups(results: Sequence[RemovalResults]) -> list[tuple[str, str, list[RemovedConcept]]]:
    """Return the dictionaries, group and concepts of each group of each of `results`."""
    return [
        (dictionaries_of(result), group, concepts)
        for result in results
        for group, concepts in group_by(result.concepts, lambda concept: concept.group).items()
    ]


def _removal_table(results: Sequence[RemovalResults]) -> Markup:
    heads = ("dictionaries", "group", "UA", "IRA", "CRA", "CRA of its own", "all three at least 90 %", "features", "strength")
    rows = []
    for dictionaries, group, concepts in _groups(results):
        rates = [percent(fmean(rate)) for rate in zip(*(concept.rates for concept in concepts), strict=True)]
        features = [concept.most_features for concept in concepts]
        strengths = [concept.strength for concept in concepts]
        removed = f"{sum(concept.rates.reach(REMOVED) for concept in concepts)} of {len(concepts)}"
        ranges = (f"{min(features)} to {max(features)}", f"{max(strengths):g} to {min(strengths):g}")
        rows.append((dictionaries, group, *rates, removed, *ranges))
    return html_table(heads, rows, "Concepts removed", words=2)


def _removal_figure(results: Sequence[RemovalResults]) -> ReportFigure:
    rates = ("UA", "IRA", "CRA", "CRA of its own")
    return ReportFigure(
        name="removal",
        title="What is removed and what stays, by concept",
        caption="The bar is the share of images from which the concept is gone; the points are the shares of the other concepts "
        "of its group and of everything else that stay. A concept counts as removed where all three are at least 90 %.",
        formula="UA = gone / shown before; IRA, CRA = still right / right before; on unseen prompts",
        columns=("dictionaries", "group", "concept", "images", "shown unedited", *rates, "features", "strength"),
        rows=[
            (dictionaries_of(result), c.group, c.concept, c.images, c.shown, *c.rates, c.most_features, c.strength)
            for result in results
            for c in result.concepts
        ],
        drawings=[
            row_chart(
                f"{group}: {dictionaries}",
                f"{count(len(concepts), 'concept')}: a bar for removal, and two points for what stays.",
                Axis(label="share", low=0.0, high=1.0, percent=True),
                [_removal_row(concept) for concept in concepts],
            )
            for dictionaries, group, concepts in _groups(results)
        ],
        legend=(UA, IRA, CRA),
    )


def _removal_row(concept: RemovedConcept) -> ChartRow:
    rates = concept.rates
    points = [
        (series, PlotPoint(share, tip=f"{concept.concept}\n{series.name}: {percent(share)}"))
        for series, share in ((UA, rates.ua), (IRA, rates.ira), (CRA, rates.cra))
    ]
    return ChartRow(concept.concept, points, "✓" if rates.reach(REMOVED) else percent(rates.ua))


SiteFinding = tuple[str, Finding | AdditionFinding]
"""A site, or a language model, and the finding of an experiment there."""


def findings(facts: StudyFacts) -> ReportSection:
    """Return the section about findings of papers: a figure for each with its verdict and its rule."""
    pairs: list[SiteFinding] = [(record.site, finding) for record in facts.findings for finding in record.findings]
    added: list[SiteFinding] = [(facts.additions.model, each) for each in facts.additions.findings] if facts.additions else []
    file = ReportFigure(
        name="findings",
        caption="The numbers that the rules compare.",
        columns=("site", "name", "finding", "paper", "verdict", "because", "number", "value"),
        rows=[
            (site, finding.name, finding.claim, finding.paper, finding.verdict, finding.reason, name, value)
            for site, finding in [*pairs, *added]
            for name, value in finding.numbers.items()
        ],
    )
    figures = [_finding_figure(name, own) for name, own in group_by(pairs, lambda pair: pair[1].name).items()]
    figures += [_finding_figure(f"cae_{pair[1].name}", [pair]) for pair in added]
    return ReportSection(
        name="findings",
        title="Findings of papers on steering",
        lead="Findings on contrasts (arXiv 2505.03189, of language models) and on features (arXiv 2505.24360), repeated as "
        "experiments: each with its rule, the numbers that decided, and a verdict.",
        parts=[*figures, file] if figures else [MissingFigure("Experiments on the findings of papers", "difflex findings STUDY")],
    )


def _finding_figure(name: str, pairs: Sequence[SiteFinding]) -> ReportFigure:
    first = pairs[0][1]
    names = dict.fromkeys(line.name for _, finding in pairs for line in finding.lines)
    series = {line: Series(line, line, numbered_style(i)) for i, line in enumerate(names)}
    return ReportFigure(
        name=f"finding_{name}".replace("-", "_").replace(" ", "_"),
        title=first.claim,
        caption=" ".join(f"{SIGNS[finding.verdict]} {site}: {finding.verdict}. {finding.reason}" for site, finding in pairs),
        formula=f"{first.paper}. Rule: {first.rule} Error bars are two standard errors over concepts or behaviours.",
        columns=("site", "line", first.x, first.y, "standard error", "concepts"),
        rows=[
            (site, line.name, x, y, error, line.concepts)
            for site, finding in pairs
            for line in finding.lines
            for x, y, error in zip(line.x, line.y, line.errors, strict=True)
        ],
        drawings=[_finding_plot(site, finding, series) for site, finding in pairs if _has_course(finding)],
        legend=list(series.values()),
    )


def _has_course(finding: Finding | AdditionFinding) -> bool:
    """Return whether a finding has values at several places; those at one are in its file and its reason."""
    return len({x for line in finding.lines for x in line.x}) > 1


def _finding_plot(site: str, finding: Finding | AdditionFinding, series: dict[str, Series]) -> Drawing:
    curves = [PlotCurve(series[line.name], _finding_points(line, finding.x)) for line in finding.lines]
    values = [x for line in finding.lines for x in line.x]
    x = Axis(label=finding.x, log=bool(values) and min(values) > 0 and max(values) >= LOG_RATIO * min(values))
    about = f"{count(len(curves), 'line')} over {finding.x}."
    return plot(f"{site}: {finding.verdict}", about, x, Axis(label=finding.y), curves)


def _finding_points(line: FindingLine, name: str) -> list[PlotPoint]:
    points = []
    for x, y, error in zip(line.x, line.y, line.errors, strict=True):
        tip = f"{line.name}\n{name} {number(x)}: {number(y)} ± {number(2 * error)}\n{count(line.concepts, 'concept')}"
        points.append(PlotPoint(x, y, tip, low=y - 2 * error, high=y + 2 * error))
    return points
