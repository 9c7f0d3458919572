"""Dictionaries at each step of the runs of a model, also of another than their own."""

from collections.abc import Callable, Sequence

from difflex.evaluation.transfer import TransferResults, TransferStep
from difflex.report.drawing import Axis, AxisTick, Drawing
from difflex.report.drawing.charts import PlotCurve, PlotPoint, Series, plot
from difflex.report.facts import StudyFacts, group_by
from difflex.report.figures import MissingFigure, ReportFigure, ReportSection
from difflex.report.style import listed, number, numbered_style

SHOWN = 6
"""Dictionaries that are drawn; the CSV has all."""
Interval = tuple[float, float, float]
NONE: tuple[None, None, None] = (None, None, None)


def transfer(facts: StudyFacts) -> ReportSection:
    """Return the section about dictionaries at other steps, and on other models."""
    figure = _figure(facts.transfers) if facts.transfers else None
    name = "Dictionaries at each step of a run, and on another model"
    return ReportSection(
        name="transfer",
        title="Other steps, other models",
        lead="Whether a dictionary still reconstructs the activations, step by step, in runs of other lengths and of other "
        "models, and how much the codes of a token change from one step to the next.",
        parts=[figure or MissingFigure(name, "difflex transfer STUDY --steps 4")],
    )


def _row(record: TransferResults, step: TransferStep) -> tuple[str | float | None, ...]:
    run = record.inputs.run
    values = (step.timestep, step.tokens, *(step.ev or NONE), step.fvu, step.l0, *(step.overlap or NONE), step.chance)
    return record.inputs.name, run.model, run.steps, *values


def _figure(records: Sequence[TransferResults]) -> ReportFigure:
    runs = {
        run: Series(f"run-{i}", run, numbered_style(i))
        for i, run in enumerate(dict.fromkeys(record.inputs.name for record in records))
    }
    rows = [(record.dictionary, *_row(record, step)) for record in records for step in record.steps]
    groups = list(group_by(records, lambda record: record.dictionary).items())[:SHOWN]
    drawings = [
        _drawing(name, own, runs, measure, value)
        for name, own in groups
        for measure, value in (("EV", lambda step: step.ev), ("overlap", lambda step: step.overlap))
    ]
    images = listed(sorted({str(record.inputs.images) for record in records}))
    return ReportFigure(
        name="transfer",
        title="By denoising step",
        caption=f"Runs of {images} images each, from noise (timestep 1000) to image, with 95 % intervals. Compare with figure 3 "
        "of arXiv 2410.22366 (NeurIPS version). The CSV has the overlap with another image beside the overlap.",
        formula="EV = 1 - var(x - y) / var(x) on each axis among the tokens of a step, mean over axes; overlap = cosine of the "
        "codes of a token and of its codes at the step before, mean over tokens",
        columns=(
            *("dictionary", "runs", "model", "steps", "timestep", "tokens", "EV", "EV low", "EV high", "FVU", "L0"),
            *("overlap", "overlap low", "overlap high", "overlap by chance"),
        ),
        rows=rows,
        drawings=drawings,
        legend=list(runs.values()),
        paired=True,
    )


def _drawing(
    name: str,
    records: Sequence[TransferResults],
    runs: dict[str, Series],
    measure: str,
    value: Callable[[TransferStep], Interval | None],
) -> Drawing:
    def point(record: TransferResults, step: TransferStep) -> PlotPoint:
        middle, low, high = value(step) or NONE
        tip = f"{record.inputs.name}\ntimestep {step.timestep:g}\n{measure} {number(middle)} ({number(low)} to {number(high)})"
        chance = f"\nby chance {number(step.chance)}" if measure == "overlap" else ""
        return PlotPoint(step.timestep, middle, tip + chance, low, high)

    curves = [
        PlotCurve(runs[record.inputs.name], [point(record, step) for step in record.steps if value(step) is not None])
        for record in records
    ]
    ticks = tuple(AxisTick(timestep, f"{timestep:g}") for timestep in (1000.0, 750.0, 500.0, 250.0, 0.0))
    about = f"{measure} by timestep, a line for each of {len(records)} runs."
    return plot(f"{name}, {measure}", about, Axis(label="timestep", reversed=True, ticks=ticks), Axis(label=measure), curves)
