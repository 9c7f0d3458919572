"""How well dictionaries reconstruct activations: over k and size, sites, timesteps, and in the model (figures 6 and 8)."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from difflex.evaluation import Evaluation, ReconstructionQuality
from difflex.records import Site
from difflex.report.drawing import Axis, AxisTick, Drawing
from difflex.report.drawing.charts import ChartRow, PlotCurve, PlotPoint, Series, plot, row_chart
from difflex.report.facts import DictionaryFacts, StudyFacts, group_by, similar_size
from difflex.report.figures import MissingFigure, ReportFigure, ReportSection
from difflex.report.figures.dictionaries import dictionary_table, firing, normalisation_variants
from difflex.report.style import DASHES, kind_series, number, percent


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
OFF_SCALE = 1.5
"""Baselines beyond this many times the largest FVU of a dictionary are drawn at the edge."""
FORMULAS = (
    "FVU = sum |x - y|² / sum |x - mean x|², the lower the better; r2 = squared correlation of x and y on each axis, mean over "
    "axes; both in model space, on held-out tokens"
)


def quality(facts: StudyFacts) -> ReportSection:
    """Return the section about what dictionaries are worth: all metrics, reconstruction, the effect on the model, and firing."""
    table, files = dictionary_table(facts)
    figures: list[ReportFigure | MissingFigure] = []
    if evaluated := facts.evaluated:
        usual = usually_normalised(evaluated)
        comparable = one_size(usual)
        figures = [*_sweep(usual), *_sites(comparable), *_timesteps(comparable), _effect(evaluated), *_images(evaluated)]
    elif facts.dictionaries:
        figures = [MissingFigure("Reconstruction over k and size, sites and timesteps", "difflex evaluate STUDY")]
    return ReportSection(
        name="reconstruction",
        title="What the dictionaries are worth",
        lead="y is the reconstruction of an activation x from its few active features, measured on tokens held out from "
        "training. Model space is that of the activations, z the space of normalised activations, in which the dictionary was "
        "trained; without normalisation the two are the same.",
        body=table,
        parts=[*files, *figures, *firing(facts)],
    )


def usually_normalised(evaluated: Sequence[DictionaryFacts]) -> list[DictionaryFacts]:
    """Return the dictionaries with the most frequent normalisation of their kind; the others are variants.

    So is one that was trained for a comparison of normalisations, where another of its shape was not.
    """

    def shape(d: DictionaryFacts) -> tuple[object, ...]:
        return d.ref.site, d.kind, d.size, d.k

    kinds = group_by(evaluated, lambda d: d.kind).items()
    normalisations = {kind: Counter(d.normalisation for d in own).most_common(1)[0][0] for kind, own in kinds}
    usual = [d for d in evaluated if d.normalisation == normalisations[d.kind]]
    compared = {d.ref for group in normalisation_variants(evaluated) for d in group}
    others = {shape(d) for d in usual if d.ref not in compared}
    return [d for d in usual if d.ref not in compared or shape(d) not in others]


def _summary(dictionary: DictionaryFacts) -> str:
    overall = dictionary.metrics.overall
    metrics = f"FVU {number(dictionary.fvu)}\nr2 {number(overall.model_space.r2)}"
    return f"{dictionary.name}\n{metrics}\ndead {percent(dictionary.metrics.dead_share)}\nL0 {number(overall.l0)}"


def _axis(metric: EvaluationMetric, members: Sequence[DictionaryFacts]) -> Axis:
    """Return the axis of a metric; neurons, a baseline far off, do not stretch that of the FVU."""

    def largest(is_baseline: bool) -> float:
        values = [metric.value(d.metrics) for d in members if (d.kind == "neurons") is is_baseline]
        return max((value for value in values if value is not None and metric.axis.has(value)), default=0.0)

    high = OFF_SCALE * largest(False)
    return replace(metric.axis, high=high) if metric is FVU and 0 < high < largest(True) else metric.axis


def _edge_note(members: Sequence[DictionaryFacts]) -> str:
    """Return a sentence about values that are beyond the axis."""
    return " Neurons are far off the scale of FVU and drawn at its edge." if _axis(FVU, members) != FVU.axis else ""


def _sweep(evaluated: Sequence[DictionaryFacts]) -> list[ReportFigure | MissingFigure]:
    """Return FVU, r2 and dead share over size and k, at the site with most dictionaries; no figure of a single k and size.

    A series is a kind at one k (or size): the colour is the kind's, the dashes are those of the number.
    """
    site, members = max(group_by(evaluated, lambda d: d.ref.site).items(), key=lambda item: len(item[1]))
    members.sort(key=lambda d: (d.kind, d.k, d.size))
    if len({d.k for d in members}) == 1 and not _differ(d.size for d in members):
        return [MissingFigure(f"Reconstruction over k and size at {site}", f"difflex train STUDY --site {site} --k 16,32,64")]
    by_size = _differ(d.size for d in members)
    other = "k" if by_size else "size"
    groups = group_by(members, lambda d: (d.kind, d.k if by_size else d.size))
    numbers = sorted({constant for _, constant in groups})
    series = []
    for kind, constant in groups:
        own = kind_series(kind)
        style = own.style._replace(dash=DASHES[numbers.index(constant) % len(DASHES)])
        series.append(Series(f"{kind} {constant}", f"{own.name}, {other} {constant:,}", style))
    lines = list(zip(series, groups.values(), strict=True))
    shape = f"a line for each kind and {other}" if len(members) > len(series) else f"a point for each kind and {other}"
    figure = ReportFigure(
        name="sweep",
        title=f"Over k and size at {site}",
        caption=f"SAEs and ITDA on the same axes, {shape}, each with the normalisation that is usual for its kind in this study. "
        f"Compare with figure 6 of arXiv 2505.24360.{_edge_note(members)}",
        formula=FORMULAS,
        columns=("dictionary", "kind", "k", "size", "FVU", "r2", "dead share"),
        rows=[(d.name, d.kind, d.k, d.size, *(m.value(d.metrics) for m in (FVU, R2, DEAD))) for d in members],
        drawings=[_sweep_plot(lines, metric, by_size) for metric in (FVU, R2, DEAD)],
        legend=series,
    )
    return [figure]


def _differ(sizes: Iterable[int]) -> bool:
    """Return whether some sizes do not count as equal."""
    ordered = sorted({*sizes})
    return not similar_size(ordered[0], ordered[-1])


def _sweep_plot(lines: Sequence[tuple[Series, list[DictionaryFacts]]], metric: EvaluationMetric, by_size: bool) -> Drawing:
    curves = []
    for series, own in lines:
        points = [PlotPoint(d.size if by_size else d.k, metric.value(d.metrics), _summary(d)) for d in own]
        distinct = len({point.x for point in points}) == len(points)  # several seeds at one place make no line
        curves.append(PlotCurve(series, points, line=distinct))
    members = [d for _, own in lines for d in own]
    values = sorted({d.size if by_size else d.k for d in members})
    values = [value for value in values if not any(value < other and by_size and similar_size(value, other) for other in values)]
    axis = Axis(label="features" if by_size else "k", log=True, ticks=tuple(AxisTick(value, f"{value:,}") for value in values))
    about = f"{metric.name} of {len(members)} dictionaries by {axis.label}."
    return plot(metric.name, about, axis, _axis(metric, members), curves)


def one_size(evaluated: Sequence[DictionaryFacts]) -> list[DictionaryFacts]:
    """Return one dictionary per kind and site, all of the k and (nearly) the size that most sites have."""

    def members(k: int, size: int) -> dict[tuple[Site, str], DictionaryFacts]:
        same = [d for d in evaluated if d.k == k and similar_size(d.size, size)]
        same.sort(key=lambda d: (len(d.variant), abs(d.size - size)), reverse=True)
        return {(d.ref.site, d.kind): d for d in same}

    groups = [members(*shape) for shape in dict.fromkeys((d.k, d.size) for d in evaluated)]
    best = max(groups, key=lambda group: (len({site for site, _ in group}), len(group)))
    order = [d.ref for d in evaluated]
    return sorted(best.values(), key=lambda d: order.index(d.ref))


def _shape(members: Sequence[DictionaryFacts]) -> str:
    sizes = sorted({d.size for d in members})
    features = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    return f"k {members[0].k}, {features} features"


def _sites(members: Sequence[DictionaryFacts]) -> list[ReportFigure]:
    """Return the FVU and r2 by site; no figure of a single site."""
    if len({d.ref.site for d in members}) == 1:
        return []
    figure = ReportFigure(
        name="sites",
        title=f"Over sites at {_shape(members)}",
        caption="How well each kind of dictionary reconstructs each site. Compare with figure 8 of arXiv 2505.24360."
        f"{_edge_note(members)}",
        formula=FORMULAS,
        columns=("dictionary", "site", "kind", "FVU", "r2"),
        rows=[(d.name, str(d.ref.site), d.kind, FVU.value(d.metrics), R2.value(d.metrics)) for d in members],
        drawings=[_sites_chart(members, metric) for metric in (FVU, R2)],
        legend=[kind_series(kind, line=False) for kind in dict.fromkeys(d.kind for d in members)],
    )
    return [figure]


def _sites_chart(members: Sequence[DictionaryFacts], metric: EvaluationMetric) -> Drawing:
    rows = []
    for site, own in group_by(members, lambda d: str(d.ref.site)).items():
        points = [(kind_series(d.kind), PlotPoint(metric.value(d.metrics), tip=_summary(d))) for d in own]
        rows.append(ChartRow(site, points, " · ".join(number(point.x) for _, point in points)))
    return row_chart(
        metric.name, f"{metric.name} of {len(members)} dictionaries, a row for each site.", _axis(metric, members), rows
    )


def _timesteps(members: Sequence[DictionaryFacts]) -> list[ReportFigure]:
    """Return the FVU by timestep; no figure for evaluations of a single timestep."""
    members = [d for d in members if len(d.metrics.timesteps) > 1]
    if not members:
        return []
    rows = [(d.name, t, q.tokens, q.model_space.fvu, q.model_space.r2) for d in members for t, q in _by_timestep(d)]
    dictionaries = {d.name for d in members if d.kind != "neurons"} or {d.name for d in members}  # neurons are off the scale
    values = [fvu for name, *_, fvu, _ in rows if name in dictionaries and fvu is not None and FVU.axis.has(fvu)]
    axis = Axis(label="FVU", low=0.0, high=1.08 * max(values, default=1.0))
    figure = ReportFigure(
        name="timesteps",
        title=f"Over timesteps at {_shape(members)}",
        caption="How well the same dictionaries reconstruct the activations of each timestep, from pure noise (1000) towards the "
        f"image.{_edge_note(members)}",
        formula="FVU among the held-out tokens of the timestep, about their own mean",
        columns=("dictionary", "timestep", "tokens", "FVU", "r2"),
        rows=rows,
        drawings=[_timesteps_plot(own, site, axis) for site, own in group_by(members, lambda d: str(d.ref.site)).items()],
        legend=[kind_series(kind) for kind in dict.fromkeys(d.kind for d in members)],
    )
    return [figure]


def _timesteps_plot(members: Sequence[DictionaryFacts], site: str, y: Axis) -> Drawing:
    def point(dictionary: DictionaryFacts, timestep: float, quality: ReconstructionQuality) -> PlotPoint:
        metrics = quality.model_space
        tip = f"{dictionary.name}\ntimestep {timestep:g}\nFVU {number(metrics.fvu)}\nr2 {number(metrics.r2)}"
        return PlotPoint(timestep, metrics.fvu, tip)

    curves = [PlotCurve(kind_series(d.kind), [point(d, *pair) for pair in _by_timestep(d)]) for d in members]
    ticks = tuple(AxisTick(t, f"{t:g}") for t in sorted({t for d in members for t in d.metrics.timesteps}))
    x = Axis(label="timestep", reversed=True, ticks=ticks)
    return plot(site, f"FVU by timestep, a line for each of {len(members)} dictionaries.", x, y, curves)


def _by_timestep(dictionary: DictionaryFacts) -> list[tuple[float, ReconstructionQuality]]:
    return sorted(dictionary.metrics.timesteps.items(), reverse=True)


def _effect(evaluated: Iterable[DictionaryFacts]) -> ReportFigure | MissingFigure:
    """Return the change of the prediction against FVU; a single dictionary is in the table only."""
    effects = [(d, effect.prediction.of_mean, effect.shots) for d in evaluated if (effect := d.metrics.effect) is not None]
    if len({d.fvu for d, *_ in effects}) < 2:
        name = "The effect of two dictionaries or more on the model"
        return MissingFigure(name, "difflex evaluate STUDY --effect-shots 32")

    def point(dictionary: DictionaryFacts, share: float) -> PlotPoint:
        change = f"velocity error {percent(share)} of mean ablation"
        tip = f"{dictionary.name}\nFVU {number(dictionary.fvu)}\n{change}\nnormalisation: {dictionary.normalisation}"
        return PlotPoint(dictionary.fvu, share, tip)

    curves = [
        PlotCurve(kind_series(kind, line=False), [point(d, share) for d, share, _ in own], line=False)
        for kind, own in group_by(effects, lambda effect: effect[0].kind).items()
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
        rows=[(d.name, d.kind, d.normalisation, d.fvu, share, shots) for d, share, shots in effects],
        drawings=[plot("velocity error against FVU", about, x, y, curves)],
        legend=[curve.series for curve in curves],
    )


def _images(evaluated: Iterable[DictionaryFacts]) -> list[ReportFigure]:
    """Return how far images move under the reconstruction, against the explained variance; no figure without such images."""
    measured = [(d, effect) for d in evaluated if (effect := d.metrics.effect) and "manhattan" in effect.medians]
    names = list(dict.fromkeys(name for _, effect in measured for name in effect.similarity if name != "manhattan"))
    rows, curves = [], []
    for kind, own in group_by(measured, lambda item: item[0].kind).items():
        points = []
        for d, effect in own:
            ev, mean, median = (d.metrics.overall.model_space.ev, effect.similarity["manhattan"], effect.medians["manhattan"])
            others = [effect.similarity[name].reconstruction if name in effect.similarity else None for name in names]
            psnr = effect.psnr and effect.psnr.reconstruction
            rows.append((d.name, kind, effect.images, ev, mean.reconstruction, median.reconstruction, psnr, *others, mean.zero))
            tip = f"{d.name}\nEV {number(ev)}\nL1 {number(mean.reconstruction)}, median {number(median.reconstruction)}"
            points.append(PlotPoint(ev, mean.reconstruction, f"{tip}\nablated block {number(mean.zero)}"))
        curves.append(PlotCurve(kind_series(kind, line=False), points, line=False))
    if not rows:
        return []
    x, y = Axis(label="EV"), Axis(label="Manhattan distance", low=0.0)
    about = f"{len(rows)} dictionaries: the Manhattan distance of images against explained variance."
    figure = ReportFigure(
        name="replaced",
        title="Images with the reconstruction in its place",
        caption="The reconstruction replaces the activation, or the update, at every step. Compare with table 5 of arXiv "
        "2410.22366; the CSV has its columns and the distance with zero in place of the activation.",
        formula="mean over pixels and channels of |edited - unedited|, from 0 to 255; mean over images",
        columns=("dictionary", "kind", "images", "EV", "L1 mean", "L1 median", "PSNR", *names, "L1 mean, zero"),
        rows=rows,
        drawings=[plot("distance against EV", about, x, y, curves)] if len(rows) > 1 else [],
        legend=[curve.series for curve in curves] if len(rows) > 1 else [],
    )
    return [figure]
