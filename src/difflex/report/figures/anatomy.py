"""The model itself: norms by layer and timestep, spectra (figures 3 and 4 of arXiv 2505.24360)."""

import math
from collections.abc import Callable

from difflex.evaluation.anatomy import Anatomy
from difflex.records import Site, Stream
from difflex.report.drawing import (
    Axis,
    Drawing,
    HeatCell,
    HeatMap,
    LegendEntry,
    Plot,
    PlotCurve,
    PlotPoint,
    SeriesStyle,
    heat_map,
    plot,
    ramp,
)
from difflex.report.facts import StudyFacts
from difflex.report.sections import FigureTable, MissingFigure, ReportFigure, ReportSection
from difflex.report.telling import number, percent

__all__ = ["anatomy"]

Rank = tuple[str, int, float, float]
"""A site, a rank, its share of the variance, and that of it and all larger ones."""
RANKS = 48
"""At how many ranks a spectrum is drawn; all of the first ones, then ever fewer."""
LOOKS = tuple(
    SeriesStyle(colour=colour, marker="circle", dash=dash)
    for colour, dash in ((0, ""), (1, "7 3"), (5, "2 4"), (3, "9 3 2 3"), (4, "12 4"), (6, "4 2"), (7, "1 3"), (2, "6 2 1 2"))
)


def anatomy(facts: StudyFacts) -> ReportSection:
    """The section about the model itself."""
    found, verb = facts.anatomy, f"difflex anatomy {facts.study.model} --prompts FILE --out STUDY"
    figures = [] if found is None else [figure for figure in (norms(found), spectra(found)) if figure is not None]
    names = {figure.name for figure in figures}
    wanted = {"norms": "Norms by layer and timestep", "spectra": "Spectra"}
    return ReportSection(
        name="anatomy",
        title="The model itself",
        lead="How long its activations are from layer to layer and step to step, and how many directions they fill.",
        figures=tuple(figures),
        missing=tuple(MissingFigure(what, verb) for name, what in wanted.items() if name not in names),
    )


def norms(found: Anatomy) -> ReportFigure | None:
    """Mean norms of the residual streams as heat maps, image and text on one scale."""
    streams: tuple[Stream, ...] = ("image", "text")
    by_stream: dict[Stream, dict[Site, dict[float, float]]] = {
        s: {site: by for site, by in found.norms.items() if site.stream == s and site.kind == "residual"} for s in streams
    }
    values = [norm for rows in by_stream.values() for by in rows.values() for norm in by.values() if _drawable(norm)]
    if not values:
        return None
    low, high = math.log10(min(values)), math.log10(max(values))
    rows = [
        (str(site), site.stream, t, norm) for rows in by_stream.values() for site, by in rows.items() for t, norm in by.items()
    ]
    return ReportFigure(
        name="norms",
        title="Norms by layer and timestep",
        caption="The mean length of a token's activation after each block, by the noise it is met at: timestep 1000 is pure "
        "noise. Compare with figure 3 of arXiv 2505.24360.",
        formula="mean over tokens of |x|; colour by log10",
        table=FigureTable(("site", "stream", "timestep", "norm"), tuple(rows)),
        drawings=tuple(_norms(stream, by, low, high) for stream, by in by_stream.items() if by),
        ramp=ramp(number(min(values)), number(max(values)), "mean norm, log scale"),
    )


def _norms(stream: Stream, by_site: dict[Site, dict[float, float]], low: float, high: float) -> Drawing:
    timesteps = sorted({timestep for by in by_site.values() for timestep in by}, reverse=True)

    def cell(site: Site, timestep: float) -> HeatCell | None:
        norm = by_site[site].get(timestep)
        if norm is None:
            return None
        share = (math.log10(norm) - low) / (high - low or 1.0) if _drawable(norm) else math.nan
        return HeatCell(share=share, label=number(norm), tip=f"{site}\ntimestep {timestep:g}\nmean norm {number(norm, 4)}")

    return heat_map(
        HeatMap(
            title=f"{stream} stream",
            description=f"Mean norm of {stream} tokens: a row for each of {len(by_site)} sites, a column for each timestep.",
            rows=tuple(map(str, by_site)),
            columns=tuple(f"{timestep:g}" for timestep in timesteps),
            cells=tuple(tuple(cell(site, timestep) for timestep in timesteps) for site in by_site),
            across="timestep",
        )
    )


def spectra(found: Anatomy) -> ReportFigure | None:
    """The share of the variance along each principal direction, and of the largest together."""
    shapes = {site: shape for site, shape in found.shapes.items() if sum(shape.variances) > 0}
    if not shapes:
        return None
    rows: list[Rank] = []
    for site, shape in shapes.items():
        whole, sums = sum(shape.variances), _sums(shape.variances)
        rows += [(str(site), rank, shape.variances[rank - 1] / whole, sums[rank - 1] / whole) for rank in _ranks(len(sums))]
    keys = [LegendEntry(str(site), str(site), LOOKS[i % len(LOOKS)]) for i, site in enumerate(shapes)]
    said = "; ".join(f"{site}: 90 % in {shape.components_for_90} of {len(shape.variances)}" for site, shape in shapes.items())
    return ReportFigure(
        name="spectra",
        title="Spectra",
        caption="How the variance is divided among the principal directions: along each, at the left, and in the largest of "
        f"them together, at the right. {said}. Compare with figure 4 of arXiv 2505.24360.",
        formula="eigenvalues of the covariance of x over their sum",
        table=FigureTable(("site", "rank", "share", "share of this and all larger"), tuple(rows)),
        drawings=(_spectra(rows, keys), _sums_of_spectra(rows, keys)),
        keys=tuple(keys),
    )


def _spectra(rows: list[Rank], keys: list[LegendEntry]) -> Drawing:
    """Each direction by itself; what rounding made of nothing is left out."""
    y = Axis(label="share of the variance", log=True)
    curves = tuple(_curve([row for row in rows if row[2] > 1e-12], key, lambda row: row[2]) for key in keys)
    return _plotted("along each direction", y, curves)


def _sums_of_spectra(rows: list[Rank], keys: list[LegendEntry]) -> Drawing:
    """Each direction together with all larger ones."""
    y = Axis(label="share of the variance", low=0.0, high=1.0, percent=True)
    return _plotted("in the largest together", y, tuple(_curve(rows, key, lambda row: row[3]) for key in keys))


def _curve(rows: list[Rank], key: LegendEntry, share: Callable[[Rank], float]) -> PlotCurve:
    marks = tuple(
        PlotPoint(x=row[1], y=share(row), tip=f"{row[0]}\ndirection {row[1]}: {percent(row[2])}\nup to it: {percent(row[3])}")
        for row in rows
        if row[0] == key.series
    )
    return PlotCurve(series=key.series, look=key.look, marks=marks, dots=False)


def _plotted(title: str, y: Axis, curves: tuple[PlotCurve, ...]) -> Drawing:
    x, about = Axis(label="rank of the direction", log=True), f"A curve for each of {len(curves)} sites."
    return plot(Plot(title=title, description=about, x=x, y=y, curves=curves))


def _ranks(count: int) -> list[int]:
    return sorted({min(count, round(count ** (i / (RANKS - 1)))) for i in range(RANKS)} | set(range(1, min(count, 10) + 1)))


def _sums(values: tuple[float, ...]) -> list[float]:
    made, whole = [], 0.0
    for value in values:
        whole += value
        made.append(whole)
    return made


def _drawable(norm: float) -> bool:
    return math.isfinite(norm) and norm > 0
