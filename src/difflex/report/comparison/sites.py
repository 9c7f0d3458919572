"""What is compared site by site, whether or not both studies have a site: block roles, concepts, explanations, steering."""

from collections.abc import Iterable, Sequence

from markupsafe import Markup

from difflex.evaluation.concepts.results import DETECTED, FINDABLE, ConceptResult
from difflex.report.comparison.pairs import StudyComparison
from difflex.report.drawing import Axis, Drawing
from difflex.report.drawing.charts import ChartRow, PlotPoint, Series, SeriesStyle, row_chart
from difflex.report.drawing.heat import HeatCell, HeatColumn, HeatGroup, heat_groups
from difflex.report.facts import group_by
from difflex.report.figures import MissingFigure, ReportFigure, ReportSection, html_table
from difflex.report.figures.explanations import explained_methods
from difflex.report.figures.roles import ROLE_COLUMNS, BlockRoles, column_of, role_rows
from difflex.report.style import number, percent

STYLES = {"first": SeriesStyle(0, "circle"), "second": SeriesStyle(1, "ring")}
"""The ring is visible around the circle where both have the same value."""
ALL, ANY = "all", "any"
"""All groups of concepts together, and the blocks together."""


def roles_of(comparison: StudyComparison) -> list[tuple[str, BlockRoles]]:
    """Return the block roles of each study that has some, with its name."""
    studies = zip(comparison.names, (comparison.first, comparison.second), strict=True)
    return [(name, BlockRoles.of(facts)) for name, facts in studies if facts.matches]


def clearest(studies: Sequence[tuple[str, BlockRoles]], *probes: bool) -> list[tuple[str, ...]]:
    """Return for each group of concepts where it is clearest in each study: to single features, to a probe, or to both."""
    groups = dict.fromkeys(group for _, own in studies for group in own.groups)
    places = [(probe, own) for probe in probes for _, own in studies]
    return [(group, *(str(own.clearest(group, probe) or "") for probe, own in places)) for group in groups]


def roles_section(comparison: StudyComparison) -> ReportSection:
    """Return the section with the roles of the blocks of both studies."""
    studies = roles_of(comparison)
    heads = ["group", *(f"{name}, {what}" for what in ("one feature", "a probe") for name, _ in studies)]
    figure = ReportFigure(
        name="roles",
        title="Groups of concepts by block and noise level",
        caption="Within a group from the noisiest level on top to the clearest, and from the first block on the left to the "
        "last. Single features first, then a linear probe, which is the ceiling.",
        formula="mean over the concepts of a group of AP on held-out images",
        columns=("study", *ROLE_COLUMNS),
        rows=[(name, *row) for name, own in studies for row in role_rows(own)],
        drawings=[own.drawing(probe, f"{name}: ") for probe in (False, True) for name, own in studies],
        paired=True,
    )
    return ReportSection(
        name="roles",
        title="What each block represents",
        lead="Where each group of concepts is clearest: the block, the noise level, the mean average precision, and the concepts "
        "that reach 0.8 there.",
        body=html_table(heads, clearest(studies, False, True), "Where groups are clearest", words=len(heads))
        if studies
        else Markup(),
        parts=[figure if studies else MissingFigure("Block roles of both studies", "difflex concepts STUDY")],
    )


class _BlockConcepts:
    """The concepts of a study that features and a probe find, by block, each at its clearest noise level."""

    def __init__(self, own: BlockRoles) -> None:
        self.results = {block: match.matches.clearest_level.results for block, match in own.blocks.items()}
        self.blocks, self.groups = [*self.results, ANY], [*own.groups, ALL]

    def of(self, block: str, group: str) -> list[ConceptResult]:
        """Return the results of a group, or of all, at a block, or at all blocks."""
        blocks = self.results.values() if block == ANY else [self.results[block]]
        return [result for results in blocks for result in results if group in (ALL, result.concept.group)]

    def counts(self, block: str, group: str) -> tuple[int, int, int]:
        """Return the number of concepts, of those that one feature detects, and of those that a probe finds."""
        results = self.of(block, group)
        found = {result.concept for result in results if result.best.ap.value >= DETECTED}
        findable = {result.concept for result in results if result.probe.value >= FINDABLE}
        return len({result.concept for result in results}), len(found), len(findable)


def found_lines(own: BlockRoles) -> list[tuple[str, ...]]:
    """Return a line for each block: the concepts of each group that one feature detects, and those that a probe finds."""
    concepts, lines = _BlockConcepts(own), []
    for block in concepts.blocks:
        counts = [concepts.counts(block, group) for group in concepts.groups]
        lines.append((block, *(f"{found}/{total}" for total, found, _ in counts), str(counts[-1][2])))
    return lines


def found_figure(comparison: StudyComparison) -> list[ReportFigure]:
    """Return the concepts that one feature detects by group and block, in both studies."""
    studies = [(name, _BlockConcepts(own)) for name, own in roles_of(comparison)]
    places = [(name, own, block, group) for name, own in studies for block in own.blocks for group in own.groups]

    def drawing(name: str, own: _BlockConcepts) -> Drawing:
        def cell(block: str, group: str) -> HeatCell | None:
            total, found, findable = own.counts(block, group)
            tip = f"{group} at {block}\n{found} of {total} concepts detected\na probe finds {findable}"
            return HeatCell(found / total, f"{found}/{total}", tip) if total else None

        about = "Shares of concepts: a row for each group and all, a column for each block and any."
        cells = [[cell(block, group) for block in own.blocks] for group in own.groups]
        total, found, findable = own.counts(ANY, ALL)
        note = f"{found} of {total} in any block; a probe finds {findable}"
        columns = [HeatColumn("", ANY) if block == ANY else column_of(block) for block in own.blocks]
        return heat_groups(name, about, [HeatGroup("", note, cells)], own.groups, columns, ("", "share of the concepts"))

    figure = ReportFigure(
        name="found",
        title="Concepts that one feature detects, by group and block",
        caption="Of each block one dictionary, at the noise level at which a probe finds most concepts; on the right what one "
        "feature of any of the blocks detects, below all groups together.",
        formula="detected: AP ≥ 0.8 of one feature on held-out images; a probe finds a concept from AP 0.9 on",
        columns=("study", "block", "group", "concepts", "detected", "found by a probe"),
        rows=[(name, block, group, *own.counts(block, group)) for name, own, block, group in places],
        drawings=[drawing(name, own) for name, own in studies],
        paired=True,
    )
    return [figure] if studies else []


def explanations_section(comparison: StudyComparison) -> ReportSection:
    """Return the section about the explanations of both studies."""
    facts = (comparison.first, comparison.second)
    methods = [(i, method) for i, own in enumerate(facts) for method in explained_methods(own.study, own.books)]
    points = []
    for i, m in methods:
        value, low, high, size = m.accuracy
        tip = f"{number(value)} ({number(low)} to {number(high)}), {size} features"
        points.append((i, f"{m.dictionary}, {m.backend}, {m.protocol}", PlotPoint(value, tip=tip, low=low, high=high)))
    figure = ReportFigure(
        name="explained",
        title="Mean accuracy of explanations",
        caption="With 95 % intervals over features; 0.5 is chance.",
        columns=("study", "dictionary", "backend", "protocol", "accuracy", "low", "high", "features"),
        rows=[(comparison.names[i], m.dictionary, m.backend, m.protocol, *m.accuracy) for i, m in methods],
        drawings=[study_chart(comparison, "mean accuracy", Axis(label="mean accuracy", low=0.0, high=1.0), points)],
        legend=study_series(comparison),
    )
    missing = MissingFigure("Explanations and their scores", "difflex explain STUDY")
    return ReportSection(name="explanations", title="How accurate explanations are", parts=[figure if methods else missing])


def steering_section(comparison: StudyComparison) -> ReportSection:
    """Return the section about steering with the features of both studies."""
    facts = (comparison.first, comparison.second)
    results = [(i, s, group) for i, own in enumerate(facts) for s in own.steering for group in s.groups]
    summaries = [(i, s, group, summary) for i, s, group in results if (summary := s.summary("feature", group))]
    columns = ("gain", "without", "success", "kept", "loss", "strength")
    gains = [(i, f"{s.ref}: {group}", PlotPoint(own.gain, tip=f"gain {percent(own.gain)}")) for i, s, group, own in summaries]
    kept = [(i, f"{s.ref}: {group}", PlotPoint(own.kept, tip=f"kept {percent(own.kept)}")) for i, s, group, own in summaries]
    figure = ReportFigure(
        name="steering",
        title="Steering towards concepts with the features that detect them",
        caption="Medians over the concepts of a group that have a feature, each at its best strength: by how much more often "
        "images show the concept than without the edit, and how much of everything else stays right.",
        formula="gain: success - success without the edit, 0 where no strength is acceptable",
        columns=("study", "dictionary", "group", "concepts", *columns),
        rows=[(comparison.names[i], str(s.ref), g, len(s.curves("feature", g)), *own) for i, s, g, own in summaries],
        drawings=[
            study_chart(comparison, name, Axis(label=name, low=0.0, high=1.0, percent=True), points)
            for name, points in (("gain", gains), ("kept", kept))
        ],
        legend=study_series(comparison),
    )
    missing = MissingFigure("The effect of steering", "difflex steer-eval STUDY")
    return ReportSection(name="steering", title="Steering", parts=[figure if summaries else missing])


def study_series(comparison: StudyComparison) -> list[Series]:
    """Return the series of both studies."""
    return [Series(id, name, style, line=False) for (id, style), name in zip(STYLES.items(), comparison.names, strict=True)]


def study_chart(
    comparison: StudyComparison, title: str, axis: Axis, points: Sequence[tuple[int, str, PlotPoint]], most: int | None = None
) -> Drawing:
    """Draw a row for each name with the points of the first study, 0, and of the second, 1, and their difference.

    With `most` the largest differences come first, and no more rows are drawn.
    """
    series, rows = study_series(comparison), group_by(points, lambda point: point[1])
    order = sorted(rows, key=lambda name: -abs(_difference(rows[name]) or 0.0)) if most else [*rows]
    drawn = [
        ChartRow(
            name,
            [(series[i], p._replace(tip=f"{name}\n{series[i].name}: {p.tip}")) for i, _, p in rows[name]],
            signed(_difference(rows[name]), axis.percent) if len(rows[name]) == 2 else "",
        )
        for name in order[:most]
    ]
    about = f"{len(drawn)} rows with a value of one study or of both{', the largest difference first' if most else ''}."
    return row_chart(title, about, axis, drawn)


def _difference(points: Iterable[tuple[int, str, PlotPoint]]) -> float | None:
    """Return the second value less the first; None where either is missing."""
    values = {i: point.x for i, _, point in points if point.x is not None}
    return values[1] - values[0] if len(values) == 2 else None


def signed(value: float | None, share: bool = False) -> str:
    """Return a difference with its sign; that of two shares in percentage points."""
    if value is None or value != value:
        return number(value)
    sign = "+" if value > 0 else "\N{MINUS SIGN}" if value < 0 else "±"
    return f"{sign}{number(100 * abs(value))} points" if share else f"{sign}{number(abs(value))}"
