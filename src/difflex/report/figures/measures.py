"""Measures of features next to those of random features, and the roles of blocks (arXiv 2410.22366)."""

from collections.abc import Sequence

from markupsafe import Markup

from difflex.measures import MEASURES, BlockRoleResults, FeatureMeasures
from difflex.measures.block_roles import ROLES, BlockChange, role_shares
from difflex.report.drawing import Axis, Drawing
from difflex.report.drawing.charts import ChartRow, PlotPoint, Series, SeriesStyle, row_chart
from difflex.report.drawing.heat import HeatCell, heat_map, ramp
from difflex.report.facts import StudyFacts
from difflex.report.figures import MissingFigure, ReportFigure, ReportSection, html_table
from difflex.report.style import count, number

FEATURES = Series("features", "features", SeriesStyle(0, "circle"), line=False)
RANDOM = Series("random", "random features", SeriesStyle(4, "cross"), line=False)
SIGNS = {"holds here": "✓", "does not hold here": "✗", "cannot be said": "○"}
CLAIM_HEADS = ("block", "role by the paper", "measured by", "share above the others", "95 % interval", "verdict")


def measures(facts: StudyFacts) -> ReportSection:
    """Return the section about measures of features."""
    records = [record for record in facts.measures if record.estimates]
    return ReportSection(
        name="measures",
        title="Measures of features",
        lead="How alike the images are in which a feature is strongest, whether it fires where its explanation says, what it "
        "generates alone, and what adding it changes: means over features with 95 % intervals, beside random features.",
        parts=[_measures_figure(records) if records else MissingFigure("Measures of features", "difflex measure STUDY")],
    )


def _measures_figure(records: Sequence[FeatureMeasures]) -> ReportFigure:
    rows = [
        (record.dictionary, name, estimate.value.size, *estimate.value[:3], *estimate.baseline[:3], *estimate.gain[:3])
        for record in records
        for name, estimate in record.estimates.items()
    ]
    parts = ("value", "random feature", "above it")
    return ReportFigure(
        name="measures",
        title="Measures of features, and of random ones",
        caption="A point for the mean over features, a line for its 95 % interval. The image similarity is "
        f"{', '.join(sorted({record.config.similarity for record in records}))}. docs/measures.md defines each measure.",
        formula="mean over features; bootstrap intervals over features",
        columns=("dictionary", "measure", "features", *(f"{part}{end}" for part in parts for end in ("", ", low", ", high"))),
        rows=rows,
        drawings=[
            _measure_chart(name, text, [record for record in records if name in record.estimates])
            for name, text in MEASURES.items()
            if any(name in record.estimates for record in records)
        ],
        legend=(FEATURES, RANDOM),
    )


def _measure_chart(name: str, text: str, records: Sequence[FeatureMeasures]) -> Drawing:
    def point(record: FeatureMeasures, series: Series) -> tuple[Series, PlotPoint]:
        estimate = record.estimates[name]
        own = estimate.value if series is FEATURES else estimate.baseline
        tip = f"{record.dictionary}\n{series.name}: {number(own.value)}\n{number(own.low)} to {number(own.high)}"
        return series, PlotPoint(own.value, tip=tip, low=own.low, high=own.high)

    rows = []
    for record in records:
        points = [point(record, series) for series in (RANDOM, FEATURES)]
        rows.append(ChartRow(record.dictionary, points, number(record.estimates[name].value.value)))
    about = f"{count(len(rows), 'dictionary', 'dictionaries')}: features and random features."
    return row_chart(name, about, Axis(label=text), rows)


def block_roles(facts: StudyFacts) -> ReportSection:
    """Return the section about the roles of blocks."""
    roles = facts.block_roles
    has_roles = roles is not None and bool(roles.blocks)
    return ReportSection(
        name="block-roles",
        title="Roles of the blocks",
        lead="What changes in images when the update of one block is left out.",
        body=_claims_table(roles) if roles is not None and roles.claims else Markup(),
        parts=[
            _roles_figure(roles)
            if roles is not None and has_roles
            else MissingFigure("The roles of the blocks", "difflex block-roles STUDY")
        ],
    )


def _claims_table(roles: BlockRoleResults) -> Markup:
    rows = [
        (
            str(claim.site),
            claim.role,
            claim.by,
            number(claim.difference.value),
            f"{number(claim.difference.low)} to {number(claim.difference.high)}",
            f"{SIGNS[claim.verdict]} {claim.verdict}",
        )
        for claim in roles.claims
    ]
    return html_table(CLAIM_HEADS, rows, "Roles that arXiv 2410.22366 gives to blocks", words=3)


def _roles_figure(roles: BlockRoleResults) -> ReportFigure:
    kinds = (False, True) if roles.config.is_judged else (False,)
    return ReportFigure(
        name="block_roles",
        title="What each block changes",
        caption="The change without the update of a block, as a multiple of that between two unrelated images; the colour is the "
        "role's share of the block's change. With a random update of the same norm in the tooltips.",
        formula="distance from the unedited image / mean distance of unrelated images; docs/measures.md",
        columns=("block", "by", "role", "change", "low", "high", "share", "change with a random update"),
        rows=[row for judged in kinds for block in roles.blocks for row in _role_rows(block, judged)],
        drawings=[_roles_map(roles.blocks, judged) for judged in kinds],
        ramp=ramp("0", "1", "share of the block's change"),
    )


def _role_rows(block: BlockChange, judged: bool) -> list[tuple[str | float, ...]]:
    changes, noise = (block.judged, block.judged_random) if judged else (block.without, block.random)
    shares = role_shares(changes)
    rows = []
    for role in ROLES:
        estimate, values = block.estimate(role, judged=judged), noise[role]
        share = sum(shares[role]) / len(shares[role])
        by = "judge" if judged else "pixels"
        rows.append((str(block.site), by, role, *estimate[:3], share, sum(values) / len(values)))
    return rows


def _roles_map(blocks: Sequence[BlockChange], judged: bool) -> Drawing:
    cells = []
    for block in blocks:
        rows = _role_rows(block, judged)
        cells.append(
            [
                HeatCell(
                    float(share),
                    number(float(value), 2),
                    f"{site}\n{role}: {number(float(value))} ({number(float(low))} to {number(float(high))})\n"
                    f"share {number(float(share))}\nrandom update: {number(float(noise))}",
                )
                for site, _, role, value, low, high, share, noise in rows
            ]
        )
    return heat_map(
        "by the judge" if judged else "by pixels",
        f"A row for each of {len(blocks)} blocks, a column for each role.",
        rows=[str(block.site) for block in blocks],
        columns=list(ROLES),
        cells=cells,
        label="role",
    )
