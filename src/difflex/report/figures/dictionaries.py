"""How often features fire (figure 5 of arXiv 2505.24360), and the table of all dictionaries with every metric."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from markupsafe import Markup

from difflex.evaluation import Evaluation
from difflex.report.drawing import Axis, Drawing, element
from difflex.report.drawing.charts import ChartRow, PlotPoint, row_chart
from difflex.report.drawing.heat import HeatCell, HeatStrip, heat_strips, ramp
from difflex.report.facts import DictionaryFacts, StudyFacts, group_by
from difflex.report.figures import MissingFigure, ReportFigure, SortableRow, sortable_table
from difflex.report.style import SAE_KINDS, kind_series, listed, number, percent


def firing(facts: StudyFacts) -> list[ReportFigure | MissingFigure]:
    """Return the figures about how often features fire."""
    evaluated, groups = facts.evaluated, normalisation_variants(facts.evaluated)
    dead = MissingFigure("Dead features by normalisation", without_normalisation(facts))
    density = MissingFigure("Density of features", "difflex evaluate STUDY")
    return [_density(evaluated) if evaluated else density, _dead(groups) if groups else dead]


def without_normalisation(facts: StudyFacts) -> str:
    """Return the command that trains and evaluates an SAE without normalisation, of the shape of the smallest with it."""
    saes = sorted((d for d in facts.dictionaries if d.kind in SAE_KINDS), key=lambda d: (d.size, d.k))
    shape = f"--site {saes[0].ref.site} --k {saes[0].k} --size {saes[0].size}" if saes else "--site SITE"
    return f"difflex train STUDY {shape} --normalisation none, then difflex evaluate STUDY"


def normalisation_variants(evaluated: Iterable[DictionaryFacts]) -> list[list[DictionaryFacts]]:
    """Return the groups of dictionaries that differ in nothing but their normalisation."""

    def rest(d: DictionaryFacts) -> tuple[object, ...]:
        words = tuple(word for word in d.variant.split("-") if word not in ("", d.normalisation))
        return d.ref.site, d.kind, d.size, d.k, words, d.data

    return [group for group in group_by(evaluated, rest).values() if len({d.normalisation for d in group}) > 1]


def _dead(groups: Iterable[Iterable[DictionaryFacts]]) -> ReportFigure:
    variants = [d for group in groups for d in sorted(group, key=lambda d: d.normalisation)]
    kinds = dict.fromkeys(d.kind for d in variants)
    axis = Axis(label="share of features that never fired", low=0.0, high=1.0, percent=True)
    about = f"{len(variants)} dictionaries, in groups that differ in nothing but normalisation; a bar for each one's dead share."
    return ReportFigure(
        name="dead",
        title="Dead features by normalisation",
        caption="A feature that never fires explains nothing. The same site, kind, k, size and data, trained on activations as "
        "they are (none), with mean 0 and deviation 1 on each axis (standardise), or rotated to their principal axes as well "
        "(whiten). Compare with figure 5 of arXiv 2505.24360.",
        formula="features that fired at none of the held-out tokens / all features",
        columns=("dictionary", "normalisation", "features", "dead", "dead share", "tokens"),
        rows=[
            (d.name, d.normalisation, d.metrics.size, d.metrics.dead, d.metrics.dead_share, d.metrics.tokens) for d in variants
        ],
        drawings=[row_chart("dead features", about, axis, [_dead_row(d) for d in variants])],
        legend=[kind_series(kind) for kind in kinds] if len(kinds) > 1 else (),
    )


def _dead_row(dictionary: DictionaryFacts) -> ChartRow:
    name, normalisation, metrics = dictionary.name, dictionary.normalisation, dictionary.metrics
    share = percent(metrics.dead_share)
    dead = f"{metrics.dead:,} of {metrics.size:,} never fired ({share})\nat {metrics.tokens:,} tokens"
    point = PlotPoint(metrics.dead_share, tip=f"{name}\nnormalisation: {normalisation}\n{dead}")
    return ChartRow(f"{normalisation}: {name}", [(kind_series(dictionary.kind)._replace(bar=True), point)], share)


def _density(evaluated: Sequence[DictionaryFacts]) -> ReportFigure:
    edges = Evaluation.edges
    used = [i for i in range(len(edges) - 1) if any(d.metrics.density[i] for d in evaluated)]
    bins = range(min(used), max(used) + 1) if used else range(len(edges) - 2, len(edges) - 1)
    most = max(_share(d, i) for d in evaluated for i in bins) or 1.0
    sites = group_by(evaluated, lambda d: str(d.ref.site))
    return ReportFigure(
        name="density",
        title="Density of features",
        caption="The share of the held-out tokens at which features fire: each strip is the histogram of one dictionary, rare "
        "features on the left. Dead features are in no cell; their share is at the end of the line.",
        formula="tokens at which a feature's code is positive / tokens; cells of a quarter of a power of ten",
        columns=("dictionary", "log10 density from", "log10 density to", "features", "share of features"),
        rows=[(d.name, edges[i], edges[i + 1], d.metrics.density[i], _share(d, i)) for d in evaluated for i in bins],
        drawings=[_strips(site, members, bins, most) for site, members in sites.items()],
        ramp=ramp("0 %", percent(most), "share of a dictionary's features"),
    )


def _strips(site: str, members: Sequence[DictionaryFacts], bins: range, most: float) -> Drawing:
    powers = {i: percent(10.0**edge) for i, edge in enumerate(Evaluation.edges)}

    def cell(dictionary: DictionaryFacts, i: int) -> HeatCell | None:
        features, share = dictionary.metrics.density[i], _share(dictionary, i)
        where = f"fire at {powers[i]} to {powers[i + 1]} of the tokens"
        tip = f"{dictionary.name}\n{where}:\n{features:,} features, {percent(share)}"
        return HeatCell(share / most, "", tip) if features else None

    return heat_strips(
        site,
        f"Histograms of how often the features of {len(members)} dictionaries fire.",
        [HeatStrip(d.ref.label, f"dead {percent(d.metrics.dead_share)}", [cell(d, i) for i in bins]) for d in members],
        ticks=[(i - bins[0], powers[i]) for i in range(bins[0], bins[-1] + 2) if Evaluation.edges[i] % 1 == 0],
        label="share of the tokens at which a feature fires",
    )


def _share(dictionary: DictionaryFacts, i: int) -> float:
    return dictionary.metrics.density[i] / dictionary.metrics.size


class TableColumn(NamedTuple):
    """A column of the table: its name, its meaning, and how its value is read and written."""

    name: str
    meaning: str
    value: Callable[[Evaluation], float | None]
    write: Callable[[float | None], str] = number


def _space_columns(name: str, entry: str, meaning: str) -> tuple[TableColumn, TableColumn]:
    """Return the columns of a metric in model space and in the space of normalised activations."""

    def normalised(evaluation: Evaluation) -> float | None:
        quality = evaluation.overall
        return getattr(quality.normalised_space or quality.model_space, entry)

    model_space = TableColumn(name, meaning, lambda evaluation: getattr(evaluation.overall.model_space, entry))
    return model_space, TableColumn(f"{name} in z", f"{name} in the space of normalised activations", normalised)


def _integer(value: float | None) -> str:
    return number(value) if value is None or value != value else f"{value:,.0f}"


def _similarity(evaluation: Evaluation, measure: str) -> float | None:
    replacement = evaluation.effect and evaluation.effect.similarity.get(measure)
    return replacement.reconstruction if replacement else None


SSIM = "ssim"
"""Its name in the record; it is always measured."""
METRICS = {
    "FVU": ("fvu", "sum |x - y|² / sum |x - mean x|², in model space"),
    "FVU raw": ("fvu_raw", "sum |x - y|² / sum |x|²: the mean counts as explained; in model space"),
    "r2": (
        "r2",
        'squared correlation of x and y on each axis, mean over axes, in model space: "variance explained" of arXiv 2505.24360, '
        "blind to scale and offset",
    ),
    "EV": (
        "ev",
        "1 - var(x - y) / var(x) on each axis, mean over axes, in model space: explained variance of arXiv 2410.22366, blind "
        "to offset",
    ),
    "cosine": ("cosine", "of x and y, mean over tokens, in model space"),
}
"""The metrics of both spaces: their entries in a record, and their meanings."""
SPACES = {name: _space_columns(name, *metric) for name, metric in METRICS.items()}
COLUMNS = (
    TableColumn("tokens", "held-out tokens that were measured", lambda e: e.tokens, _integer),
    *(SPACES[name][0] for name in ("FVU", "r2")),
    TableColumn("L0", "codes other than 0 per token", lambda e: e.overall.l0),
    TableColumn("dead", "share of features that fired at none of the tokens", lambda e: e.dead_share, percent),
    TableColumn(
        "v / mean",
        "squared error of the denoiser's prediction with y in place of x, as a share of that with the mean",
        lambda e: e.effect and e.effect.prediction.of_mean,
    ),
    TableColumn("v / zero", "the same as a share of that with zero", lambda e: e.effect and e.effect.prediction.of_zero),
    TableColumn(
        "PSNR",
        "of finished images generated with y in place of x at every step, compared with the model's own; decibels",
        lambda e: e.effect and e.effect.psnr and e.effect.psnr.reconstruction,
    ),
    TableColumn("SSIM", "the same by structural similarity", lambda e: _similarity(e, SSIM)),
)
"""The columns that a reader looks for first; measures of similarity follow, then `MORE_COLUMNS`."""
MORE_COLUMNS = (
    *(SPACES[name][0] for name in ("FVU raw", "EV", "cosine")),
    *(normalised for _, normalised in SPACES.values()),
    TableColumn(
        "negative",
        "share of the codes other than 0 that are negative; they do not count as firing",
        lambda e: e.overall.negative,
        percent,
    ),
)
MEASURES = {
    "clip": "the same by the cosine of their embeddings in this CLIP model; 1 for equal images",
    "lpips": "the same by the distance of LPIPS; 0 for equal images",
    "manhattan": "the same by the mean difference of pixels, in levels from 0 to 255",
}
"""The meaning of measures of similarity, by the first part of their names."""


def metric_columns(evaluations: Iterable[Evaluation]) -> tuple[TableColumn, ...]:
    """Return the columns of a table of these: all metrics, and each measure of similarity that one of them has."""
    effects = (evaluation.effect for evaluation in evaluations)
    names = {name for effect in effects if effect is not None for name in effect.similarity} - {SSIM}
    return (*COLUMNS, *map(_measure, sorted(names)), *MORE_COLUMNS)


def _measure(name: str) -> TableColumn:
    meaning = MEASURES.get(name.partition(":")[0], "the same by the measure of this name")
    return TableColumn(name, meaning, lambda evaluation: _similarity(evaluation, name))


def dictionary_table(facts: StudyFacts) -> tuple[Markup, list[ReportFigure | MissingFigure]]:
    """Return the table of all dictionaries, its file, and what it lacks."""
    evaluated = facts.evaluated
    columns = metric_columns(d.metrics for d in evaluated)
    parts: list[ReportFigure | MissingFigure] = []
    if evaluated:
        heads = ("dictionary", "kind", "normalisation", "k", "size", *(column.name for column in columns))
        rows = [(d.name, d.kind, d.normalisation, d.k, d.size, *(c.value(d.metrics) for c in columns)) for d in evaluated]
        caption = "All digits of the table above. Click a column to sort by it, again to reverse the order."
        parts.append(ReportFigure(name="dictionaries", caption=caption, columns=heads, rows=rows))
    if waiting := [d.name for d in facts.dictionaries if d.evaluation is None]:
        parts.append(MissingFigure(f"Metrics of {listed(waiting)}", "difflex evaluate STUDY"))
    if not facts.dictionaries:
        parts.append(MissingFigure("Activations", f"difflex harvest {facts.study.model} --site SITE --prompts FILE --out STUDY"))
        parts.append(MissingFigure("Dictionaries", "difflex train STUDY or difflex itda STUDY"))
    return _table(evaluated, columns) if evaluated else Markup(), parts


def _table(evaluated: Iterable[DictionaryFacts], columns: Sequence[TableColumn]) -> Markup:
    heads = {"dictionary": "SITE/LABEL", "normalisation": "of activations before training"}
    heads |= {column.name: column.meaning for column in columns}
    rows = []
    for d in evaluated:
        values = [column.value(d.metrics) for column in columns]
        numbers = [(value, column.write(value)) for column, value in zip(columns, values, strict=True)]
        rows.append(SortableRow(d.name, d.normalisation, numbers))
    meanings = [part for column in columns for part in (element("dt", column.name), element("dd", column.meaning))]
    legend = element("details", element("summary", "The meaning of the columns"), element("dl", *meanings, class_="meanings"))
    return sortable_table(heads, rows, "Metrics of all dictionaries") + legend
