"""The table of all dictionaries with every figure of their evaluations."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from markupsafe import Markup

from difflex.evaluation import Evaluation
from difflex.report.drawing import element
from difflex.report.facts import DictionaryFacts, StudyFacts
from difflex.report.sections import FigureTable, MissingFigure, ReportFigure, ReportSection
from difflex.report.telling import number, percent

__all__ = ["TableColumn", "columns", "dictionaries"]


class TableColumn(NamedTuple):
    """One column: its name, what it means, and how its value is found and told."""

    name: str
    meaning: str
    of: Callable[[Evaluation], float | None]
    tell: Callable[[float | None], str] = number


def _space(entry: str, normalised: bool) -> Callable[[Evaluation], float | None]:
    def of(evaluation: Evaluation) -> float | None:
        quality = evaluation.overall
        return getattr((quality.normalised_space if normalised else None) or quality.model_space, entry)

    return of


def _whole(value: float | None) -> str:
    return number(value) if value is None or value != value else f"{value:,.0f}"


SSIM = "ssim"
"""Its name in the record; it always is measured."""
COLUMNS = (
    TableColumn("tokens", "held-out tokens that were measured", lambda e: e.tokens, _whole),
    TableColumn("FVU", "sum |x - y|² / sum |x - mean x|², in model space", _space("fvu", False)),
    TableColumn("FVU in z", "the same in the space that the dictionary was trained in", _space("fvu", True)),
    TableColumn("FVU raw", "sum |x - y|² / sum |x|²: the mean counts as explained; in model space", _space("fvu_raw", False)),
    TableColumn("FVU raw in z", "the same in the space that the dictionary was trained in", _space("fvu_raw", True)),
    TableColumn(
        "r2",
        'squared correlation of x and y on each axis, mean over axes, in model space: "variance explained" of arXiv 2505.24360, '
        "blind to scale and offset",
        _space("r2", False),
    ),
    TableColumn("r2 in z", "the same in the space that the dictionary was trained in", _space("r2", True)),
    TableColumn(
        "EV",
        "1 - var(x - y) / var(x) on each axis, mean over axes, in model space: explained variance of arXiv 2410.22366, blind "
        "to offset",
        _space("ev", False),
    ),
    TableColumn("EV in z", "the same in the space that the dictionary was trained in", _space("ev", True)),
    TableColumn("cosine", "of x and y, mean over tokens, in model space", _space("cosine", False)),
    TableColumn("cosine in z", "the same in the space that the dictionary was trained in", _space("cosine", True)),
    TableColumn("L0", "codes other than 0 for a token", lambda e: e.overall.l0),
    TableColumn(
        "negative", "share of these that are below 0; they do not count as firing", lambda e: e.overall.negative, percent
    ),
    TableColumn("dead", "share of features that fired at none of the tokens", lambda e: e.dead_share, percent),
    TableColumn(
        "v / mean",
        "squared error of the denoiser's prediction with y in the place of x, as a share of that with the mean there",
        lambda e: e.effect and e.effect.prediction.of_mean,
    ),
    TableColumn("v / zero", "the same as a share of that with zero there", lambda e: e.effect and e.effect.prediction.of_zero),
    TableColumn(
        "PSNR",
        "of finished images drawn with y in the place of x at every step, against the model's own; decibels",
        lambda e: e.effect and e.effect.psnr and e.effect.psnr.reconstruction,
    ),
    TableColumn("SSIM", "the same by structural similarity", lambda e: _alike(e, SSIM)),
)
SEEN = {
    "clip": "the same by the cosine of what this CLIP makes of both; 1 where it sees no difference",
    "lpips": "the same by the distance of LPIPS; 0 where it sees no difference",
}
"""What measures mean, by what their names begin with."""


def columns(evaluations: Iterable[Evaluation]) -> tuple[TableColumn, ...]:
    """The columns of a table of these: all figures, and each measure of finished images that one of them has."""
    effects = (each.effect for each in evaluations)
    names = {name for effect in effects if effect is not None for name in effect.similarity} - {SSIM}
    return (*COLUMNS, *map(_measure, sorted(names)))


def _measure(name: str) -> TableColumn:
    meaning = SEEN.get(name.partition(":")[0], "the same by the measure of this name")
    return TableColumn(name, meaning, lambda evaluation: _alike(evaluation, name))


def _alike(evaluation: Evaluation, measure: str) -> float | None:
    found = evaluation.effect and evaluation.effect.similarity.get(measure)
    return found.reconstruction if found else None


def dictionaries(facts: StudyFacts) -> ReportSection:
    """The section with the table, its legend, and a line for each dictionary that has no figures."""
    evaluated = facts.evaluated
    wanted = columns(evaluation for _, evaluation in evaluated)
    waiting = [each.name for each in facts.dictionaries if each.evaluation is None]
    missing = [MissingFigure(f"Figures of {', '.join(waiting)}", "difflex evaluate STUDY")] if waiting else []
    if not facts.dictionaries:
        missing.append(MissingFigure("Dictionaries", "difflex train STUDY or difflex itda STUDY"))
    return ReportSection(
        name="dictionaries",
        title="Every dictionary, every figure",
        lead="A click on a column sorts by it, another one the other way round. x is an activation, y what the dictionary "
        "makes of it; model space is that of the activations, z that in which the dictionary was trained, the two the same "
        "where it does not normalise.",
        figures=(_figure(evaluated, wanted),) if evaluated else (),
        missing=tuple(missing),
        body=_table(evaluated, wanted) + _legend(wanted) if evaluated else Markup(""),
    )


def _figure(evaluated: list[tuple[DictionaryFacts, Evaluation]], wanted: Sequence[TableColumn]) -> ReportFigure:
    """The same as a file of numbers, with nothing drawn."""
    names = ("dictionary", "kind", "normalisation", "k", "size", *(column.name for column in wanted))
    rows = tuple((m.name, m.kind, m.normalisation, m.k, m.size, *(column.of(e) for column in wanted)) for m, e in evaluated)
    return ReportFigure(
        name="dictionaries",
        title="",
        caption="All digits of the table above.",
        formula="",
        table=FigureTable(names, rows),
        drawings=(),
    )


def _table(evaluated: list[tuple[DictionaryFacts, Evaluation]], wanted: Sequence[TableColumn]) -> Markup:
    heads = [_head("dictionary", "SITE/LABEL"), _head("normalisation", "what is done to activations first")]
    heads += [_head(column.name, column.meaning) for column in wanted]
    body = [_row(measured, evaluation, wanted) for measured, evaluation in evaluated]
    table = element("table", element("thead", element("tr", *heads)), element("tbody", *body), class_="sortable")
    return element("div", table, class_="box", tabindex="0", role="region", aria_label="Figures of all dictionaries")


def _head(name: str, meaning: str) -> Markup:
    return element("th", element("button", name, type="button", title=meaning), scope="col")


def _row(measured: DictionaryFacts, evaluation: Evaluation, wanted: Sequence[TableColumn]) -> Markup:
    cells = [element("th", measured.name, scope="row", data_value=measured.name)]
    cells.append(element("td", measured.normalisation, data_value=measured.normalisation, class_="word"))
    for column in wanted:
        value = column.of(evaluation)
        cells.append(element("td", column.tell(value), data_value="" if value is None else repr(float(value))))
    return element("tr", *cells)


def _legend(wanted: Sequence[TableColumn]) -> Markup:
    entries = [part for column in wanted for part in (element("dt", column.name), element("dd", column.meaning))]
    summary = element("summary", "What the columns mean")
    return element("details", summary, element("dl", *entries, class_="meanings"))
