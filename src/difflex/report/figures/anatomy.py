"""The model itself: norms by layer and timestep, and spectra (figures 3 and 4 of arXiv 2505.24360)."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

from difflex.evaluation.anatomy import Anatomy
from difflex.records import Site
from difflex.report.drawing import Axis, Drawing
from difflex.report.drawing.charts import PlotCurve, PlotPoint, Series, plot
from difflex.report.drawing.heat import HeatCell, heat_map, ramp
from difflex.report.facts import StudyFacts
from difflex.report.figures import MissingFigure, ReportFigure, ReportSection
from difflex.report.style import number, numbered_style, percent

Norms = Mapping[Site, Mapping[float, float]]
"""By site and timestep."""
SpectrumRow = tuple[str, int, float, float]
"""A site, a rank, its share of the variance, and that of it and all larger ones."""
RANKS = 48
"""At how many ranks a spectrum is drawn: at all of the first, then ever fewer."""


def anatomy(facts: StudyFacts) -> ReportSection:
    """Return the section about the model itself."""
    command = f"difflex anatomy {facts.study.model} --prompts FILE --out STUDY"
    norms, spectra = (_norms_figure(facts.anatomy), _spectra_figure(facts.anatomy)) if facts.anatomy else (None, None)
    return ReportSection(
        name="anatomy",
        title="The model",
        lead="The norms of its activations from layer to layer and timestep to timestep, and how many directions they fill.",
        parts=[
            norms or MissingFigure("Norms of several layers at several timesteps", f"{command} --steps 4"),
            spectra or MissingFigure("Spectra", command),
        ],
    )


def _norms_figure(anatomy: Anatomy) -> ReportFigure | None:
    residuals = {site: norms for site, norms in anatomy.norms.items() if site.kind == "residual"}
    streams = {s: {site: by for site, by in residuals.items() if site.stream == s} for s in ("image", "text")}
    rows = [
        (str(site), site.stream, t, norm) for sites in streams.values() for site, by in sites.items() for t, norm in by.items()
    ]
    values = [norm for *_, norm in rows if _is_drawable(norm)]
    if not values or len({t for _, _, t, _ in rows}) < 2 or len(residuals) < 2:
        return None
    low, high = min(values), max(values)
    return ReportFigure(
        name="norms",
        title="Norms by layer and timestep",
        caption="The mean norm of a token's activation after each block, by timestep: timestep 1000 is pure noise. Compare with "
        "figure 3 of arXiv 2505.24360.",
        formula="mean over tokens of |x|; colour by log10",
        columns=("site", "stream", "timestep", "norm"),
        rows=rows,
        drawings=[_norms(stream, norms, low, high) for stream, norms in streams.items() if norms],
        ramp=ramp(number(low), number(high), "mean norm, log scale"),
    )


def _norms(stream: str, norms: Norms, low: float, high: float) -> Drawing:
    timesteps = sorted({timestep for by in norms.values() for timestep in by}, reverse=True)
    decades = math.log10(high) - math.log10(low) or 1.0

    def cell(site: Site, timestep: float) -> HeatCell | None:
        norm = norms[site].get(timestep)
        if norm is None:
            return None
        share = (math.log10(norm) - math.log10(low)) / decades if _is_drawable(norm) else math.nan
        return HeatCell(share, number(norm), f"{site}\ntimestep {timestep:g}\nmean norm {number(norm, 4)}")

    return heat_map(
        f"{stream} stream",
        f"Mean norm of {stream} tokens: a row for each of {len(norms)} sites, a column for each timestep.",
        rows=[str(site) for site in norms],
        columns=[f"{timestep:g}" for timestep in timesteps],
        cells=[[cell(site, timestep) for timestep in timesteps] for site in norms],
        label="timestep",
    )


def _spectra_figure(anatomy: Anatomy) -> ReportFigure | None:
    shapes = {site: shape for site, shape in anatomy.shapes.items() if sum(shape.variances) > 0}
    if not shapes:
        return None
    rows: list[SpectrumRow] = []
    for site, shape in shapes.items():
        total, sums = sum(shape.variances), list(accumulate(shape.variances))
        rows += [(str(site), rank, shape.variances[rank - 1] / total, sums[rank - 1] / total) for rank in _ranks(len(sums))]
    series = [Series(str(site), str(site), numbered_style(i)) for i, site in enumerate(shapes)]
    sizes = "; ".join(f"{site}: 90 % in {shape.components_for_90} of {len(shape.variances)}" for site, shape in shapes.items())
    # Shares that are rounding errors of 0 are left out on the log axis.
    curves = [_curve([row for row in rows if row[2] > 1e-12], entry, lambda row: row[2]) for entry in series]
    sums_of_curves = [_curve(rows, entry, lambda row: row[3]) for entry in series]
    label = "share of the variance"
    return ReportFigure(
        name="spectra",
        title="Spectra",
        caption="How the variance is divided among the principal directions: along each, on the left, and in the largest of "
        f"them together, on the right. {sizes}. Compare with figure 4 of arXiv 2505.24360.",
        formula="eigenvalues of the covariance of x over their sum",
        columns=("site", "rank", "share", "share of this and all larger"),
        rows=rows,
        drawings=[
            _spectrum("along each direction", Axis(label=label, log=True), curves),
            _spectrum("in the largest together", Axis(label=label, low=0.0, high=1.0, percent=True), sums_of_curves),
        ],
        legend=series,
    )


def _curve(rows: Sequence[SpectrumRow], series: Series, share: Callable[[SpectrumRow], float]) -> PlotCurve:
    points = [
        PlotPoint(row[1], share(row), f"{row[0]}\ndirection {row[1]}: {percent(row[2])}\nup to it: {percent(row[3])}")
        for row in rows
        if row[0] == series.id
    ]
    return PlotCurve(series, points, dots=False)


def _spectrum(title: str, y: Axis, curves: Sequence[PlotCurve]) -> Drawing:
    return plot(title, f"A curve for each of {len(curves)} sites.", Axis(label="rank of the direction", log=True), y, curves)


def _ranks(count: int) -> list[int]:
    return sorted({min(count, round(count ** (i / (RANKS - 1)))) for i in range(RANKS)} | set(range(1, min(count, 10) + 1)))


def _is_drawable(norm: float) -> bool:
    return math.isfinite(norm) and norm > 0
