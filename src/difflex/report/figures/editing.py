"""The editing benchmark: which representation at which site makes which edit, and what else it changes."""

from collections import Counter
from collections.abc import Sequence

from markupsafe import Markup

from difflex.effects.edit_bench import ALL, EditArm, EditBenchResults
from difflex.report.drawing import Axis
from difflex.report.drawing.charts import PlotCurve, PlotPoint, Series, plot
from difflex.report.drawing.heat import HeatCell, heat_map, ramp
from difflex.report.facts import StudyFacts
from difflex.report.figures import MissingFigure, ReportFigure, ReportSection, html_table
from difflex.report.style import count, kind_of, kind_series, number, numbered_style, percent

JUDGED, BY_CLIP, BY_PIXELS = ("success", "kept"), ("clip gain", "outside"), ("toward", "outside")
"""The measures of success and of change elsewhere: by a judge, by CLIP, and by pixels alone."""
MEANINGS = {
    "success": "the share of images that show what is asked",
    "kept": "of all else that was right, the share that still is",
    "clip gain": "the gain in CLIP similarity with the second prompt",
    "outside": "the mean change of a pixel outside the masks, of 1",
    "toward": "the share of the way to the image of the second prompt, inside the masks",
}
REFERENCES = {"none": "no edit", "prompt": "edited prompt"}
COLUMNS = ("items of", "type", "method", "at", "features", "strength", "items", "measure", "mean", "low", "high")


def editing(facts: StudyFacts) -> ReportSection:
    """Return the section about the editing benchmark: a table, a heat map by edit type, and success against change elsewhere."""
    benches = facts.edit_benches
    missing = MissingFigure("Edits by representations, of nine types", "difflex edit-bench STUDY")
    parts = [figure for results in benches for figure in (_heat_figure(results), _curve_figure(results))]
    return ReportSection(
        name="editing",
        title="Editing benchmark",
        lead="The protocol of RIEBench (arXiv 2410.22366): what the image of a second prompt has more of, inside masks, is added "
        "to the image of the first, and what it has less of is removed: features of a dictionary, neurons, whole activations, or "
        "one direction. The references are no edit, and the second prompt itself.",
        body=Markup().join(_table(results) for results in benches),
        parts=parts if benches else [missing],
    )


def _names(results: EditBenchResults) -> dict[tuple[str, str], str]:
    """Return how figures call each method at its place: by the kind of dictionary and the sites, or by its labels too."""
    places = dict.fromkeys((cell.arm.method, cell.arm.place) for cell in results.cells)
    short = {place: _short_name(*place) for place in places}
    repeated = {name for name, times in Counter(short.values()).items() if times > 1}
    return {place: f"{place[0]}, {place[1]}" if name in repeated else name for place, name in short.items()}


def _short_name(method: str, place: str) -> str:
    sites, _, labels = place.partition("/")
    kinds = dict.fromkeys(kind_series(kind_of(label)).name for label in labels.split(",")) if labels else (method,)
    number_of_sites = len(sites.split(","))
    return REFERENCES.get(method) or f"{' and '.join(kinds)}, {sites if number_of_sites == 1 else f'{number_of_sites} sites'}"


def _measures(results: EditBenchResults) -> tuple[str, str]:
    """Return the measures of success and of change elsewhere."""
    if results.is_judged:
        return JUDGED
    return BY_CLIP if results.config.clip else BY_PIXELS


def _table(results: EditBenchResults) -> Markup:
    success, other = _measures(results)
    rows = []
    for arm in results.best_arms():
        cell = results.cell(ALL, arm)
        estimates = cell.measures if cell else {}
        texts = []
        for name in dict.fromkeys((success, other, "outside")):
            own = estimates.get(name)
            write = percent if name in ("success", "kept", "toward") else number
            texts.append("\N{EN DASH}" if own is None else f"{write(own.value)} ({write(own.low)} to {write(own.high)})")
        settings = (str(arm.features or "\N{EN DASH}"), f"{arm.strength:g}") if arm.place else ("\N{EN DASH}",) * 2
        rows.append((REFERENCES.get(arm.method, arm.method), arm.place or "\N{EN DASH}", *settings, *texts))
    heads = ("method", "at", "features", "strength", *dict.fromkeys((success, other, "outside")))
    return html_table(heads, rows, f"Edits of {count(results.items, 'item')}, {results.world}", words=2)


def _heat_figure(results: EditBenchResults) -> ReportFigure:
    """Return the heat map of the score of each method and place by edit type."""
    arms, types, names = results.best_arms(), results.types, _names(results)
    values = [[results.value(kind, arm, "score") for kind in types] for arm in arms]
    known = [value for row in values for value in row if value is not None]
    low, high = min(0.0, *known), max(1.0 if results.is_judged else 1e-9, *known)
    cells = [
        [
            None
            if value is None
            else HeatCell((value - low) / (high - low), f"{value:.2f}", _tip(results, kind, arm, names[arm[:2]]))
            for kind, value in zip(types, row, strict=True)
        ]
        for arm, row in zip(arms, values, strict=True)
    ]
    score = "success x kept, item by item" if results.is_judged else MEANINGS[_measures(results)[0]]
    drawing = heat_map(
        f"score by edit type: {results.world}",
        f"A row for each of {count(len(arms), 'method')} at its place, a column for each of {count(len(types), 'edit type')}.",
        [names[arm[:2]] for arm in arms],
        types,
        cells,
        "edit type",
    )
    return ReportFigure(
        name=_name("edits", results),
        title="Which representation makes which edit",
        caption="Each method at the number of features and the strength of its highest score over all types, chosen on the same "
        f"items. {count(results.items, 'item')}; the tooltip has the interval. The file has every setting and measure.",
        formula=f"score = {score}; intervals are 95 % bootstrap over items",
        columns=COLUMNS,
        rows=[
            (results.world, cell.type, *cell.arm[:2], cell.arm.features, cell.arm.strength, own.size, name, *own[:3])
            for cell in results.cells
            for name, own in cell.measures.items()
        ],
        drawings=[drawing],
        files={_name("edits", results): drawing},
        ramp=ramp(number(low, 2), number(high, 2), "score"),
    )


def _tip(results: EditBenchResults, kind: str, arm: EditArm, title: str) -> str:
    cell = results.cell(kind, arm)
    lines = [f"{name} {own.value:.2f} ({own.low:.2f} to {own.high:.2f})" for name, own in (cell.measures if cell else {}).items()]
    return "\n".join([f"{kind}: {title}", *([arm.place] if arm.place else []), *lines])


def _curve_figure(results: EditBenchResults) -> ReportFigure:
    """Return success against change elsewhere over the settings of each method and place."""
    success, other = _measures(results)
    drawn, rows = list[PlotCurve](), list[tuple[str | float | None, ...]]()
    for number_of_place, (place, name) in enumerate(_names(results).items()):
        series = Series(name, name, numbered_style(number_of_place), line=bool(place[1]))
        points = _points(results, results.arms(*place), success, other, name)
        drawn.append(PlotCurve(series, points, line=len(points) > 1))
        rows += [(results.world, *place, point.x, point.y, point.low, point.high) for point in points]
    change = "all else that is lost" if other == "kept" else "change outside the masks"
    x = Axis(label=change, percent=other == "kept", low=0.0)
    y = Axis(label=success, percent=success != "clip gain", low=None if success == "clip gain" else 0.0)
    about = f"A line for each of {count(len(drawn), 'method')} at its place, over its settings."
    return ReportFigure(
        name=_name("edit_curves", results),
        title="Success against change elsewhere",
        caption=f"Upwards: {MEANINGS[success]}. To the right: {change}. Lines join the settings of a method, in the order of the "
        "change; upper left is best. Bars are 95 % intervals over items.",
        columns=("items of", "method", "at", "change elsewhere", success, "low", "high"),
        rows=rows,
        drawings=[plot(f"{success}: {results.world}", about, x, y, drawn)] if drawn else [],
        legend=[curve.series for curve in drawn],
    )


def _points(results: EditBenchResults, arms: Sequence[EditArm], success: str, other: str, name: str) -> list[PlotPoint]:
    points = []
    for arm in arms:
        cell = results.cell(ALL, arm)
        if cell is None or success not in cell.measures or other not in cell.measures:
            continue
        own, rest = cell.measures[success], cell.measures[other].value
        change = 1 - rest if other == "kept" else rest
        features = f"{arm.features} features, " if arm.features else ""
        tip = f"{name}\n{arm.place}\n{features}strength {arm.strength:g}\n{success} {own}\n{other} {rest:.3f}"
        points.append(PlotPoint(change, own.value, tip, low=own.low, high=own.high))
    return sorted(points, key=lambda point: point.x or 0.0)


def _name(name: str, results: EditBenchResults) -> str:
    """Return the name of a figure and its file; items of a file are named like it."""
    world = "".join(letter if letter.isalnum() else "_" for letter in results.world)
    return name if results.world == "drawn" else f"{name}_{world}"
