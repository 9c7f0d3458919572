"""How well dictionaries rebuild activations: over k and size, sites and timesteps, and in the model (figures 6 and 8)."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from difflex.evaluation import Evaluation, ReconstructionQuality
from difflex.records import Site
from difflex.report.drawing import (
    Axis,
    AxisTick,
    ChartRow,
    Drawing,
    LegendEntry,
    Plot,
    PlotCurve,
    PlotPoint,
    RowChart,
    RowEntry,
    SeriesStyle,
    plot,
    rows,
)
from difflex.report.facts import DictionaryFacts, StudyFacts
from difflex.report.kinds import DASHES, alike, key, plain
from difflex.report.sections import FigureTable, MissingFigure, ReportFigure, ReportSection
from difflex.report.telling import number, percent

__all__ = ["quality"]

Both = tuple[DictionaryFacts, Evaluation]


class EvaluationMetric(NamedTuple):
    """A number of an evaluation."""

    name: str
    of: Callable[[Evaluation], float | None]
    axis: Axis


FVU = EvaluationMetric("FVU", lambda evaluation: evaluation.overall.model_space.fvu, Axis(label="FVU", low=0.0))
R2 = EvaluationMetric("r2", lambda evaluation: evaluation.overall.model_space.r2, Axis(label="r2"))
DEAD = EvaluationMetric(
    "dead share", lambda evaluation: evaluation.dead_share, Axis(label="dead features", low=0.0, percent=True)
)
FORMULAS = (
    "FVU = sum |x - y|² / sum |x - mean x|², the lower the better; r2 = squared correlation of x and y on each axis, mean over "
    "axes; both in model space, on held-out tokens"
)


def quality(facts: StudyFacts) -> ReportSection:
    """The section about reconstruction."""
    common = plain([measured for measured, _ in facts.evaluated])
    evaluated = [(measured, evaluation) for measured, evaluation in facts.evaluated if measured in common]
    found = (sweep(evaluated), *_elsewhere(evaluated), effect(facts.evaluated))
    missing: list[MissingFigure] = []
    if not evaluated:
        missing.append(MissingFigure("Reconstruction over k and size, sites and timesteps", "difflex evaluate STUDY"))
    elif found[-1] is None:
        missing.append(MissingFigure("The effect on the model", "difflex evaluate STUDY --effect-shots 32"))
    return ReportSection(
        name="reconstruction",
        title="How well activations are rebuilt",
        lead="y is what a dictionary makes of an activation x from its few active features. Nothing here was trained on.",
        figures=tuple(figure for figure in found if figure is not None),
        missing=tuple(missing),
    )


def sweep(evaluated: list[Both]) -> ReportFigure | None:
    """FVU, r2 and dead share over size and k, at the site with most dictionaries."""
    if not evaluated:
        return None
    sites = [measured.place.site for measured, _ in evaluated]
    site = max(dict.fromkeys(sites), key=sites.count)
    there = sorted((b for b in evaluated if b[0].place.site == site), key=lambda b: (b[0].kind, b[0].k, b[0].size))
    by_size = len({measured.size for measured, _ in there}) > 1 or len({measured.k for measured, _ in there}) == 1
    keys = _keys(there, by_size)
    other = "k" if by_size else "size"
    lines = f"a line for each kind and {other}" if len(there) > len(keys) else f"a point for each kind and {other}"
    return ReportFigure(
        name="sweep",
        title=f"Over k and size at {site}",
        caption=f"Autoencoders and ITDA on the same axes, {lines}, each with the normalisation that is usual for its kind in "
        "this study. Compare with figure 6 of arXiv 2505.24360.",
        formula=FORMULAS,
        table=FigureTable(
            ("dictionary", "kind", "k", "size", "FVU", "r2", "dead share"),
            tuple((m.name, m.kind, m.k, m.size, FVU.of(e), R2.of(e), DEAD.of(e)) for m, e in there),
        ),
        drawings=tuple(_sweep(there, metric, by_size, keys) for metric in (FVU, R2, DEAD)),
        keys=tuple(keys),
    )


def _keys(there: list[Both], by_size: bool) -> list[LegendEntry]:
    """An entry for each kind and each k (or size): the colour is the kind's, the pattern of the line that of the number."""
    numbers = sorted({_held(measured, by_size) for measured, _ in there})
    made = {}
    for measured, _ in there:
        held = _held(measured, by_size)
        own, dash = key(measured.kind), DASHES[numbers.index(held) % len(DASHES)]
        name = f"{own.name}, {'k' if by_size else 'size'} {held:,}"
        series = f"{measured.kind} {held}"
        made[series] = LegendEntry(series, name, SeriesStyle(colour=own.look.colour, marker=own.look.marker, dash=dash))
    return list(made.values())


def _held(measured: DictionaryFacts, by_size: bool) -> int:
    return measured.k if by_size else measured.size


def _sweep(there: list[Both], metric: EvaluationMetric, by_size: bool, keys: list[LegendEntry]) -> Drawing:
    values = sorted({measured.size if by_size else measured.k for measured, _ in there})
    values = [value for value in values if not any(value < other and by_size and alike(value, other) for other in values)]
    curves = []
    for each in keys:
        own = [(m, e) for m, e in there if f"{m.kind} {_held(m, by_size)}" == each.series]
        marks = tuple(_mark(m, e, metric, m.size if by_size else m.k) for m, e in own)
        alone = len({mark.x for mark in marks}) == len(marks)  # several at one place, as of two seeds, make no line
        curves.append(PlotCurve(series=each.series, look=each.look, marks=marks, line=alone))
    axis = Axis(label="features" if by_size else "k", log=True, ticks=tuple(AxisTick(value, f"{value:,}") for value in values))
    about = f"{metric.name} of {len(there)} dictionaries by {axis.label}."
    return plot(Plot(title=metric.name, description=about, x=axis, y=metric.axis, curves=tuple(curves)))


def _mark(measured: DictionaryFacts, evaluation: Evaluation, metric: EvaluationMetric, x: float) -> PlotPoint:
    value = metric.of(evaluation)
    return PlotPoint(x=x, y=float("nan") if value is None else value, tip=f"{measured.name}\n{_said(evaluation)}")


def _said(evaluation: Evaluation) -> str:
    space = evaluation.overall.model_space
    beside = f"dead {percent(evaluation.dead_share)}\nL0 {number(evaluation.overall.l0)}"
    return f"FVU {number(space.fvu)}\nr2 {number(space.r2)}\n{beside}"


def _elsewhere(evaluated: list[Both]) -> tuple[ReportFigure | None, ReportFigure | None]:
    """The figures over sites and over timesteps, of dictionaries of one k and size."""
    chosen = one_size(evaluated)
    return sites(chosen), timesteps(chosen)


def one_size(evaluated: list[Both]) -> list[Both]:
    """One dictionary of each kind at each site, all of one k and (nearly) one size: those that the most sites have."""

    def members(k: int, size: int) -> dict[tuple[Site, str], Both]:
        same = [both for both in evaluated if both[0].k == k and alike(both[0].size, size)]
        same.sort(key=lambda both: (len(both[0].variant), abs(both[0].size - size)), reverse=True)
        return {(both[0].place.site, both[0].kind): both for both in same}

    candidates = {(measured.k, measured.size): None for measured, _ in evaluated}
    best = max((members(*each) for each in candidates), key=lambda each: (len({site for site, _ in each}), len(each)), default={})
    return sorted(best.values(), key=lambda both: [b[0].place for b in evaluated].index(both[0].place))


def sites(chosen: list[Both]) -> ReportFigure | None:
    """FVU and r2 at each site."""
    if not chosen:
        return None
    kinds = dict.fromkeys(measured.kind for measured, _ in chosen)
    return ReportFigure(
        name="sites",
        title=f"Over sites at {_size(chosen)}",
        caption="What one kind and another make of each site. Compare with figure 8 of arXiv 2505.24360.",
        formula=FORMULAS,
        table=FigureTable(
            ("dictionary", "site", "kind", "FVU", "r2"),
            tuple((m.name, str(m.place.site), m.kind, FVU.of(e), R2.of(e)) for m, e in chosen),
        ),
        drawings=tuple(_sites(chosen, metric) for metric in (FVU, R2)),
        keys=tuple(key(kind, line=False) for kind in kinds),
    )


def _sites(chosen: list[Both], metric: EvaluationMetric) -> Drawing:
    def entry(measured: DictionaryFacts, evaluation: Evaluation) -> RowEntry:
        value = metric.of(evaluation)
        x = float("nan") if value is None else value
        mark = PlotPoint(x=x, y=0, tip=f"{measured.name}\n{_said(evaluation)}")
        return RowEntry(series=measured.kind, look=key(measured.kind).look, mark=mark)

    by_site: dict[str, list[Both]] = {}
    for both in chosen:
        by_site.setdefault(str(both[0].place.site), []).append(both)
    drawn = tuple(
        ChartRow(
            name=site, note=" · ".join(number(metric.of(e)) for _, e in there), entries=tuple(entry(*both) for both in there)
        )
        for site, there in by_site.items()
    )
    about = f"{metric.name} of {len(chosen)} dictionaries, a row for each site."
    return rows(RowChart(title=metric.name, description=about, x=metric.axis, rows=drawn))


def timesteps(chosen: list[Both]) -> ReportFigure | None:
    """FVU at each timestep, a panel for each site."""
    there = [both for both in chosen if len(both[1].timesteps) > 1]
    if not there:
        return None
    kinds = dict.fromkeys(measured.kind for measured, _ in there)
    places = dict.fromkeys(str(measured.place.site) for measured, _ in there)
    table = FigureTable(
        ("dictionary", "timestep", "tokens", "FVU", "r2"),
        tuple((m.name, t, q.tokens, q.model_space.fvu, q.model_space.r2) for m, e in there for t, q in _ordered(e)),
    )
    values = [row[3] for row in table.rows if isinstance(row[3], float) and FVU.axis.has(row[3])]
    axis = Axis(label="FVU", low=0.0, high=1.08 * max(values, default=1.0))
    return ReportFigure(
        name="timesteps",
        title=f"Over timesteps at {_size(chosen)}",
        caption="How well the same dictionaries rebuild what passes at each timestep, from pure noise (1000) towards the image.",
        formula="FVU among the held-out tokens of the timestep, about their own mean",
        table=table,
        drawings=tuple(_timesteps([both for both in there if str(both[0].place.site) == site], site, axis) for site in places),
        keys=tuple(map(key, kinds)),
    )


def _timesteps(there: list[Both], site: str, y: Axis) -> Drawing:
    def mark(measured: DictionaryFacts, timestep: float, quality: ReconstructionQuality) -> PlotPoint:
        fvu = quality.model_space.fvu
        tip = f"{measured.name}\ntimestep {timestep:g}\nFVU {number(fvu)}\nr2 {number(quality.model_space.r2)}"
        return PlotPoint(x=timestep, y=float("nan") if fvu is None else fvu, tip=tip)

    curves = tuple(
        PlotCurve(series=m.kind, look=key(m.kind).look, marks=tuple(mark(m, t, q) for t, q in _ordered(e))) for m, e in there
    )
    ticks = tuple(AxisTick(t, f"{t:g}") for t in sorted({t for _, e in there for t in e.timesteps}))
    axis = Axis(label="timestep", reversed=True, ticks=ticks)
    about = f"FVU by timestep, a line for each of {len(there)} dictionaries."
    return plot(Plot(title=site, description=about, x=axis, y=y, curves=curves))


def _ordered(evaluation: Evaluation) -> Iterable[tuple[float, ReconstructionQuality]]:
    return sorted(evaluation.timesteps.items(), reverse=True)


def effect(evaluated: list[Both]) -> ReportFigure | None:
    """What the reconstruction costs the model, against what it costs in variance."""
    there = [(m, e, e.effect.prediction.of_mean) for m, e in evaluated if e.effect is not None]
    if not there:
        return None
    kinds = dict.fromkeys(measured.kind for measured, _, _ in there)
    table = FigureTable(
        ("dictionary", "kind", "normalisation", "FVU", "velocity error / mean ablation", "shots"),
        tuple((m.name, m.kind, m.normalisation, FVU.of(e), share, e.effect.shots if e.effect else None) for m, e, share in there),
    )

    def mark(measured: DictionaryFacts, evaluation: Evaluation, share: float) -> PlotPoint:
        fvu = FVU.of(evaluation)
        change = f"velocity error {percent(share)} of mean ablation"
        tip = f"{measured.name}\nFVU {number(fvu)}\n{change}\nnormalisation: {measured.normalisation}"
        return PlotPoint(x=float("nan") if fvu is None else fvu, y=share, tip=tip)

    curves = tuple(
        PlotCurve(
            series=kind, look=key(kind).look, marks=tuple(mark(*each) for each in there if each[0].kind == kind), line=False
        )
        for kind in kinds
    )
    x, y = Axis(label="FVU", log=True), Axis(label="share of the change by mean ablation", log=True, percent=True)
    about = f"{len(there)} dictionaries: the change of the denoiser's prediction against FVU, both axes logarithmic."
    return ReportFigure(
        name="effect",
        title="What it does to the model",
        caption="A dictionary can miss little of the variance and yet much of what the model uses. Each point is a dictionary "
        "whose reconstruction took the place of the activation; 100 % is what the mean activation does there.",
        formula="sum |v' - v|² / sum |v|² of the denoiser's prediction v, as a share of the same with the mean in the place of x",
        table=table,
        drawings=(plot(Plot(title="velocity error against FVU", description=about, x=x, y=y, curves=curves)),),
        keys=tuple(key(kind, line=False) for kind in kinds),
    )


def _size(chosen: list[Both]) -> str:
    sizes = sorted({measured.size for measured, _ in chosen})
    said = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    return f"k {chosen[0][0].k}, {said} features"
