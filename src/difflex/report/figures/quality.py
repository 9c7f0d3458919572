"""How well dictionaries reconstruct activations: over k and size, sites, timesteps, and in the model (figures 6 and 8)."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from difflex.evaluation import Evaluation, ReconstructionQuality
from difflex.records import Site
from difflex.report.drawing import Axis, AxisTick, Drawing
from difflex.report.drawing.charts import ChartRow, PlotCurve, PlotPoint, RowEntry, Series, SeriesStyle, plot, row_chart
from difflex.report.facts import DictionaryFacts, StudyFacts, similar_size, usually_normalised
from difflex.report.figures import MissingFigure, ReportFigure, ReportSection
from difflex.report.style import DASHES, kind_series, number, percent

__all__ = ["quality"]


class EvaluationMetric(NamedTuple):
    """A number of an evaluation and its axis."""

    name: str
    value: Callable[[Evaluation], float | None]
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
    """Return the section about reconstruction."""
    usual = usually_normalised(facts.evaluated)
    comparable = _one_size(usual)
    effect = _effect(facts.evaluated)
    missing: list[MissingFigure] = []
    if not usual:
        missing.append(MissingFigure("Reconstruction over k and size, sites and timesteps", "difflex evaluate STUDY"))
    elif effect is None:
        missing.append(MissingFigure("The effect on the model", "difflex evaluate STUDY --effect-shots 32"))
    figures = (_sweep(usual), _sites(comparable), _timesteps(comparable), effect)
    return ReportSection(
        name="reconstruction",
        title="How well activations are reconstructed",
        lead="y is the reconstruction of an activation x from its few active features, measured on tokens held out from "
        "training.",
        figures=tuple(figure for figure in figures if figure is not None),
        missing=tuple(missing),
    )


def _summary(dictionary: DictionaryFacts) -> str:
    overall = dictionary.metrics.overall
    metrics = f"FVU {number(dictionary.fvu)}\nr2 {number(overall.model_space.r2)}"
    return f"{dictionary.name}\n{metrics}\ndead {percent(dictionary.metrics.dead_share)}\nL0 {number(overall.l0)}"


def _sweep(evaluated: Sequence[DictionaryFacts]) -> ReportFigure | None:
    """Return FVU, r2 and dead share over size and k, at the site with most dictionaries."""
    if not evaluated:
        return None
    sites = [d.ref.site for d in evaluated]
    site = max(dict.fromkeys(sites), key=sites.count)
    members = sorted((d for d in evaluated if d.ref.site == site), key=lambda d: (d.kind, d.k, d.size))
    by_size = len({d.size for d in members}) > 1 or len({d.k for d in members}) == 1
    series = _sweep_series(members, by_size)
    other = "k" if by_size else "size"
    shape = f"a line for each kind and {other}" if len(members) > len(series) else f"a point for each kind and {other}"
    return ReportFigure(
        name="sweep",
        title=f"Over k and size at {site}",
        caption=f"SAEs and ITDA on the same axes, {shape}, each with the normalisation that is usual for its kind in this study. "
        "Compare with figure 6 of arXiv 2505.24360.",
        formula=FORMULAS,
        columns=("dictionary", "kind", "k", "size", "FVU", "r2", "dead share"),
        rows=[(d.name, d.kind, d.k, d.size, *(m.value(d.metrics) for m in (FVU, R2, DEAD))) for d in members],
        drawings=tuple(_sweep_plot(members, metric, by_size, series) for metric in (FVU, R2, DEAD)),
        legend=series,
    )


def _sweep_series(members: Sequence[DictionaryFacts], by_size: bool) -> tuple[Series, ...]:
    """Return a series for each kind and each k (or size): the colour is the kind's, the dashes are those of the number."""
    numbers = sorted({_constant(d, by_size) for d in members})
    series = {}
    for d in members:
        constant, own = _constant(d, by_size), kind_series(d.kind)
        style = SeriesStyle(colour=own.style.colour, marker=own.style.marker, dash=DASHES[numbers.index(constant) % len(DASHES)])
        name = f"{own.name}, {'k' if by_size else 'size'} {constant:,}"
        series[_sweep_id(d, by_size)] = Series(_sweep_id(d, by_size), name, style)
    return tuple(series.values())


def _constant(dictionary: DictionaryFacts, by_size: bool) -> int:
    return dictionary.k if by_size else dictionary.size


def _sweep_id(dictionary: DictionaryFacts, by_size: bool) -> str:
    return f"{dictionary.kind} {_constant(dictionary, by_size)}"


def _sweep_plot(members: Sequence[DictionaryFacts], metric: EvaluationMetric, by_size: bool, series: Iterable[Series]) -> Drawing:
    values = sorted({d.size if by_size else d.k for d in members})
    values = [value for value in values if not any(value < other and by_size and similar_size(value, other) for other in values)]
    curves = []
    for entry in series:
        own = [d for d in members if _sweep_id(d, by_size) == entry.id]
        points = tuple(PlotPoint(x=d.size if by_size else d.k, y=metric.value(d.metrics), tip=_summary(d)) for d in own)
        distinct = len({point.x for point in points}) == len(points)  # several seeds at one place make no line
        curves.append(PlotCurve(series=entry, points=points, line=distinct))
    axis = Axis(label="features" if by_size else "k", log=True, ticks=tuple(AxisTick(value, f"{value:,}") for value in values))
    return plot(metric.name, f"{metric.name} of {len(members)} dictionaries by {axis.label}.", axis, metric.axis, curves)


def _one_size(evaluated: Sequence[DictionaryFacts]) -> list[DictionaryFacts]:
    """Return one dictionary per kind and site, all of the k and (nearly) the size that most sites have."""

    def members(k: int, size: int) -> dict[tuple[Site, str], DictionaryFacts]:
        same = [d for d in evaluated if d.k == k and similar_size(d.size, size)]
        same.sort(key=lambda d: (len(d.variant), abs(d.size - size)), reverse=True)
        return {(d.ref.site, d.kind): d for d in same}

    candidates = [members(*shape) for shape in dict.fromkeys((d.k, d.size) for d in evaluated)]
    best = max(candidates, key=lambda group: (len({site for site, _ in group}), len(group)), default={})
    order = [d.ref for d in evaluated]
    return sorted(best.values(), key=lambda d: order.index(d.ref))


def _shape(members: Sequence[DictionaryFacts]) -> str:
    sizes = sorted({d.size for d in members})
    features = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    return f"k {members[0].k}, {features} features"


def _sites(members: Sequence[DictionaryFacts]) -> ReportFigure | None:
    if not members:
        return None
    kinds = dict.fromkeys(d.kind for d in members)
    return ReportFigure(
        name="sites",
        title=f"Over sites at {_shape(members)}",
        caption="How well each kind of dictionary reconstructs each site. Compare with figure 8 of arXiv 2505.24360.",
        formula=FORMULAS,
        columns=("dictionary", "site", "kind", "FVU", "r2"),
        rows=[(d.name, str(d.ref.site), d.kind, FVU.value(d.metrics), R2.value(d.metrics)) for d in members],
        drawings=tuple(_sites_chart(members, metric) for metric in (FVU, R2)),
        legend=tuple(kind_series(kind, line=False) for kind in kinds),
    )


def _sites_chart(members: Sequence[DictionaryFacts], metric: EvaluationMetric) -> Drawing:
    by_site: dict[str, list[DictionaryFacts]] = {}
    for d in members:
        by_site.setdefault(str(d.ref.site), []).append(d)
    rows = []
    for site, own in by_site.items():
        values = [metric.value(d.metrics) for d in own]
        entries = tuple(
            RowEntry(series=kind_series(d.kind), point=PlotPoint(x=value, tip=_summary(d)))
            for d, value in zip(own, values, strict=True)
        )
        rows.append(ChartRow(name=site, note=" · ".join(map(number, values)), entries=entries))
    return row_chart(metric.name, f"{metric.name} of {len(members)} dictionaries, a row for each site.", metric.axis, rows)


def _timesteps(members: Sequence[DictionaryFacts]) -> ReportFigure | None:
    members = [d for d in members if len(d.metrics.timesteps) > 1]
    if not members:
        return None
    sites = dict.fromkeys(str(d.ref.site) for d in members)
    rows = tuple((d.name, t, q.tokens, q.model_space.fvu, q.model_space.r2) for d in members for t, q in _by_timestep(d))
    values = [fvu for *_, fvu, _ in rows if fvu is not None and FVU.axis.has(fvu)]
    axis = Axis(label="FVU", low=0.0, high=1.08 * max(values, default=1.0))
    return ReportFigure(
        name="timesteps",
        title=f"Over timesteps at {_shape(members)}",
        caption="How well the same dictionaries reconstruct the activations of each timestep, from pure noise (1000) towards the "
        "image.",
        formula="FVU among the held-out tokens of the timestep, about their own mean",
        columns=("dictionary", "timestep", "tokens", "FVU", "r2"),
        rows=rows,
        drawings=tuple(_timesteps_plot([d for d in members if str(d.ref.site) == site], site, axis) for site in sites),
        legend=tuple(map(kind_series, dict.fromkeys(d.kind for d in members))),
    )


def _timesteps_plot(members: Sequence[DictionaryFacts], site: str, y: Axis) -> Drawing:
    def point(dictionary: DictionaryFacts, timestep: float, quality: ReconstructionQuality) -> PlotPoint:
        metrics = quality.model_space
        tip = f"{dictionary.name}\ntimestep {timestep:g}\nFVU {number(metrics.fvu)}\nr2 {number(metrics.r2)}"
        return PlotPoint(x=timestep, y=metrics.fvu, tip=tip)

    curves = [
        PlotCurve(series=kind_series(d.kind), points=tuple(point(d, t, quality) for t, quality in _by_timestep(d)))
        for d in members
    ]
    ticks = tuple(AxisTick(t, f"{t:g}") for t in sorted({t for d in members for t in d.metrics.timesteps}))
    x = Axis(label="timestep", reversed=True, ticks=ticks)
    return plot(site, f"FVU by timestep, a line for each of {len(members)} dictionaries.", x, y, curves)


def _by_timestep(dictionary: DictionaryFacts) -> list[tuple[float, ReconstructionQuality]]:
    return sorted(dictionary.metrics.timesteps.items(), reverse=True)


def _effect(evaluated: Iterable[DictionaryFacts]) -> ReportFigure | None:
    effects = [(d, d.metrics.effect) for d in evaluated if d.metrics.effect is not None]
    if not effects:
        return None
    shares = [(d, effect.prediction.of_mean, effect.shots) for d, effect in effects]

    def point(dictionary: DictionaryFacts, share: float) -> PlotPoint:
        change = f"velocity error {percent(share)} of mean ablation"
        tip = f"{dictionary.name}\nFVU {number(dictionary.fvu)}\n{change}\nnormalisation: {dictionary.normalisation}"
        return PlotPoint(x=dictionary.fvu, y=share, tip=tip)

    series = tuple(kind_series(kind, line=False) for kind in dict.fromkeys(d.kind for d, _ in effects))
    curves = [
        PlotCurve(series=entry, points=tuple(point(d, share) for d, share, _ in shares if d.kind == entry.id), line=False)
        for entry in series
    ]
    x, y = Axis(label="FVU", log=True), Axis(label="share of the change by mean ablation", log=True, percent=True)
    about = f"{len(effects)} dictionaries: the change of the denoiser's prediction against FVU, both axes logarithmic."
    return ReportFigure(
        name="effect",
        title="The effect on the model",
        caption="A dictionary can miss little of the variance and yet much of what the model uses. Each point is a dictionary "
        "whose reconstruction replaced the activation; 100 % is the effect of the mean activation in its place.",
        formula="sum |v' - v|² / sum |v|² of the denoiser's prediction v, as a share of the same with the mean in place of x",
        columns=("dictionary", "kind", "normalisation", "FVU", "velocity error / mean ablation", "shots"),
        rows=[(d.name, d.kind, d.normalisation, d.fvu, share, shots) for d, share, shots in shares],
        drawings=(plot("velocity error against FVU", about, x, y, curves),),
        legend=series,
    )
