"""How often features fire: dead ones by normalisation, and the densities of the others (figure 5 of arXiv 2505.24360)."""

from difflex.evaluation import Evaluation
from difflex.report.drawing import (
    Axis,
    ChartRow,
    Drawing,
    HeatCell,
    HeatStrips,
    PlotPoint,
    RowChart,
    RowEntry,
    ramp,
    rows,
    strips,
)
from difflex.report.facts import DictionaryFacts, StudyFacts
from difflex.report.kinds import key
from difflex.report.sections import FigureTable, MissingFigure, ReportFigure, ReportSection
from difflex.report.telling import percent

__all__ = ["firing", "variants"]

Both = tuple[DictionaryFacts, Evaluation]


def firing(facts: StudyFacts) -> ReportSection:
    """The section about how often features fire."""
    evaluated = facts.evaluated
    groups, missing = variants(evaluated), []
    figures = [density(evaluated)] if evaluated else []
    if groups:
        figures.insert(0, dead(groups))
    else:
        missing.append(MissingFigure("Dead features by normalisation", "difflex train STUDY --normalisation none"))
    if not evaluated:
        missing.append(MissingFigure("Density of features", "difflex evaluate STUDY"))
    return ReportSection(
        name="firing",
        title="How often features fire",
        lead="A feature that never fires explains nothing. What is done to activations before training decides how many there "
        "are.",
        figures=tuple(figures),
        missing=tuple(missing),
    )


def variants(evaluated: list[Both]) -> list[list[Both]]:
    """Dictionaries that differ in their normalisation, and in nothing else: not in site, kind, k, size, data, preset, seed."""
    groups: dict[tuple[object, ...], list[Both]] = {}
    for measured, evaluation in evaluated:
        also = tuple(word for word in measured.variant.split("-") if word not in ("", measured.normalisation))
        same = (measured.place.site, measured.kind, measured.size, measured.k, also, measured.data)
        groups.setdefault(same, []).append((measured, evaluation))
    return [group for group in groups.values() if len({measured.normalisation for measured, _ in group}) > 1]


def dead(groups: list[list[Both]]) -> ReportFigure:
    """The dead share by normalisation."""
    listed = [
        (measured, evaluation)
        for group in groups
        for measured, evaluation in sorted(group, key=lambda both: both[0].normalisation)
    ]
    kinds = dict.fromkeys(measured.kind for measured, _ in listed)
    drawn = tuple(
        ChartRow(
            name=f"{measured.normalisation}: {measured.name}",
            note=percent(evaluation.dead_share),
            entries=(
                RowEntry(
                    series=measured.kind,
                    look=key(measured.kind).look,
                    mark=PlotPoint(
                        x=evaluation.dead_share,
                        y=0,
                        tip=f"{measured.name}\nnormalisation: {measured.normalisation}\n{_said(evaluation)}",
                    ),
                    bar=True,
                ),
            ),
        )
        for measured, evaluation in listed
    )
    axis = Axis(label="share of features that never fired", low=0.0, high=1.0, percent=True)
    about = f"{len(drawn)} dictionaries, grouped where they differ in nothing but normalisation; a bar for each one's dead share."
    return ReportFigure(
        name="dead",
        title="Dead features by normalisation",
        caption="The same site, kind, k, size and data, trained on activations as they are (none), with mean 0 and deviation 1 "
        "on each axis (standardise), or also turned to their principal axes (whiten). Compare with figure 5 of arXiv "
        "2505.24360.",
        formula="features that fired at none of the held-out tokens / all features",
        table=FigureTable(
            ("dictionary", "normalisation", "features", "dead", "dead share", "tokens"),
            tuple((m.name, m.normalisation, e.size, e.dead, e.dead_share, e.tokens) for m, e in listed),
        ),
        drawings=(rows(RowChart(title="dead features", description=about, x=axis, rows=drawn)),),
        keys=tuple(map(key, kinds)) if len(kinds) > 1 else (),
    )


def density(evaluated: list[Both]) -> ReportFigure:
    """A histogram for each dictionary, drawn as a strip of colours."""
    edges = Evaluation.edges
    used = [i for i in range(len(edges) - 1) if any(i < len(e.density) and e.density[i] for _, e in evaluated)] or [
        len(edges) - 2
    ]
    bins = range(min(used), max(used) + 1)
    most = max((_share(e, i) for _, e in evaluated for i in bins), default=0.0) or 1.0
    sites = dict.fromkeys(str(measured.place.site) for measured, _ in evaluated)
    table = FigureTable(
        ("dictionary", "log10 density from", "log10 density to", "features", "share of features"),
        tuple((m.name, edges[i], edges[i + 1], e.density[i], _share(e, i)) for m, e in evaluated for i in bins),
    )
    return ReportFigure(
        name="density",
        title="Density of features",
        caption="At what share of the held-out tokens features fire: each strip is the histogram of one dictionary, rare "
        "features at the left. Dead ones are in no cell; their share stands at the end of the line.",
        formula="tokens at which a feature's code is positive / tokens; cells of a quarter of a power of ten",
        table=table,
        drawings=tuple(
            _strips(site, [both for both in evaluated if str(both[0].place.site) == site], bins, most) for site in sites
        ),
        ramp=ramp("0 %", percent(most), "share of a dictionary's features"),
    )


def _strips(site: str, there: list[Both], bins: range, most: float) -> Drawing:
    edges = Evaluation.edges

    def cell(evaluation: Evaluation, i: int, name: str) -> HeatCell | None:
        if not evaluation.density[i]:
            return None
        many = f"{evaluation.density[i]:,} features, {percent(_share(evaluation, i))}"
        tip = f"{name}\nfire at {_power(edges[i])} to {_power(edges[i + 1])} of the tokens:\n{many}"
        return HeatCell(share=_share(evaluation, i) / most, label="", tip=tip)

    return strips(
        HeatStrips(
            title=site,
            description=f"Histograms of how often the features of {len(there)} dictionaries fire.",
            names=tuple(measured.place.label for measured, _ in there),
            notes=tuple(f"dead {percent(evaluation.dead_share)}" for _, evaluation in there),
            cells=tuple(tuple(cell(e, i, m.name) for i in bins) for m, e in there),
            ticks=tuple((i - bins[0], _power(edges[i])) for i in range(bins[0], bins[-1] + 2) if edges[i] == int(edges[i])),
            across="share of the tokens at which a feature fires",
        )
    )


def _share(evaluation: Evaluation, i: int) -> float:
    return evaluation.density[i] / evaluation.size


def _power(edge: float) -> str:
    return percent(10.0**edge)


def _said(evaluation: Evaluation) -> str:
    dead = f"{evaluation.dead:,} of {evaluation.size:,} never fired ({percent(evaluation.dead_share)})"
    return f"{dead}\nat {evaluation.tokens:,} tokens"
