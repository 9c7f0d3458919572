"""The effect of steering: whether the concept appears, what else stays, and what it costs, by method and strength."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple
from pathlib import Path
from statistics import quantiles
from typing import NamedTuple

from markupsafe import Markup
from PIL import Image

from difflex.effects import ImageStrip, StrengthCurve, StrengthPoint
from difflex.report.drawing import Axis, Drawing, element
from difflex.report.drawing.charts import PlotCurve, PlotPoint, Series, SeriesStyle, plot
from difflex.report.facts import SteeringFacts, SteeringSummary, StudyFacts
from difflex.report.figures import MissingFigure, ReportFigure, ReportSection, html_table
from difflex.report.figures.explanations import image_url
from difflex.report.style import count, grouped, kind_series, number, percent

__all__ = ["steering"]

WORLD_JUDGE = "a judge of the miniature world"
DETECTED, FROM_FILE = "it detects it with AP ≥ 0.8", "the file of concepts names it"
"""Why a feature stands for a concept."""
UNITS = {"peak": "what its largest code adds", "mean": "what its mean code adds", "code": "what a code of 1 adds"}
UNITS |= {"norm": "as long as a mean activation"}
"""What a strength of 1 is for a feature."""
BASELINES = {
    "neuron": kind_series("neurons"),
    "contrast": Series("contrast", "contrast of captions", SeriesStyle(colour=3, marker="triangle", dash="9 3 2 3")),
    "random": kind_series("random"),
    "prompt": Series("prompt", "edited caption", SeriesStyle(colour=8, marker="wedge"), line=False),
}
"""The methods that features are compared with."""
METHODS = {"feature": "features"} | {method: series.name for method, series in BASELINES.items()}
BAR = Series("bar", "the bar", SeriesStyle(colour=8, marker="none", dash="2 4"))
TILES = 7
"""Images in a row, at most."""


class SteeringMeasure(NamedTuple):
    """A quantity that is drawn over strength."""

    name: str
    title: str
    caption: str
    formula: str
    value: Callable[[StrengthPoint], float]
    bar: float | None


MEASURES = (
    SteeringMeasure(
        "success",
        "Whether the concept appears",
        "The share of images that show the concept where it was put.",
        "images that show it / images, median over concepts",
        lambda point: point.success,
        None,
    ),
    SteeringMeasure(
        "kept",
        "What else stays",
        "Of everything else that the captions state and that was right without the edit, the share that is still right; the "
        "bar is 90 %.",
        "statements still right / statements right without the edit, median over concepts",
        lambda point: point.specificity,
        0.9,
    ),
    SteeringMeasure(
        "loss",
        "What it costs",
        "The unedited model's loss on the finished images, with noise added again and without a caption, relative to that on "
        "unedited images: 1 is as good, and from 1.5 on, the bar, images count as broken.",
        "loss with the edit / loss without, at noise 0.3, 0.6 and 0.9, median over concepts",
        lambda point: point.quality,
        1.5,
    ),
)


class MethodCurves(NamedTuple):
    """A method on the concepts of a group for which a dictionary has a feature."""

    steering: SteeringFacts
    group: str
    method: str
    curves: list[StrengthCurve]

    @property
    def series(self) -> Series:
        """The series of the method; features look like their kind of dictionary."""
        return kind_series(self.steering.kind) if self.method == "feature" else BASELINES[self.method]

    @property
    def strengths(self) -> list[float]:
        """All strengths that were measured."""
        return sorted({point.strength for curve in self.curves for point in curve.points})

    def quartiles(self, strength: float, value: Callable[[StrengthPoint], float]) -> tuple[int, float, float, float]:
        """Return the number of concepts at a strength, and the quartiles of a measure over them."""
        values = sorted(value(point) for curve in self.curves for point in curve.points if point.strength == strength)
        low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (*values,) * 3
        return len(values), low, middle, high


def steering(facts: StudyFacts) -> ReportSection:
    """Return the section about steering."""
    lines = [
        MethodCurves(steering, group, method, steering.curves(method, group))
        for steering in facts.steering
        for group in steering.groups
        for method in steering.methods
    ]
    results = facts.steering
    figures = (_summary_file(results), *(_figure(measure, lines) for measure in MEASURES if lines), _points(results))
    missing = MissingFigure("The effect of steering towards known concepts", "difflex steer-eval STUDY")
    return ReportSection(
        name="steering",
        title="Steering",
        lead=_lead(results),
        body=Markup("").join(map(_examples, results)) + _summary_table(results) if results else Markup(""),
        figures=figures if results else (),
        missing=() if results else (missing,),
    )


def _lead(results: Sequence[SteeringFacts]) -> str:
    """Return a description of the experiments from their records, or of the default one."""
    reason = grouped({str(s.ref): FROM_FILE if s.is_from_file else DETECTED for s in results}) or DETECTED
    judges = {str(s.ref): s.results.provenance.judge if s.is_from_file else WORLD_JUDGE for s in results}
    return (
        f"A feature that stands for a concept, as {reason}, is added where the concept is to appear, in images whose captions "
        f"name another one of its group; {grouped(judges) or WORLD_JUDGE} says whether it does, and what else of the captions is "
        "still right. It is compared with the neuron that detects the concept best, if that is known, a contrast of captions, a "
        "random direction of equal length, and an edited caption."
    )


def _figure(measure: SteeringMeasure, lines: Sequence[MethodCurves]) -> ReportFigure:
    """Return a panel for each dictionary and group; all methods in a panel are measured on the same concepts."""
    rows, panels, units = [], dict[tuple[str, str], list[MethodCurves]](), {}
    for line in lines:
        name = str(line.steering.ref)
        panels.setdefault((name, line.group), []).append(line)
        units[name] = UNITS[line.steering.results.config.unit]
        for strength in line.strengths:
            rows.append((name, line.group, line.method, strength, *line.quartiles(strength, measure.value)))
    return ReportFigure(
        name=measure.name,
        title=f"{measure.title}, by strength",
        caption=f"{measure.caption} A strength of 1 is, for a feature, {grouped(units)}; random directions are equally long; a "
        "contrast has the length that was measured, and the caption is replaced as a whole. Only concepts for which it "
        "has a feature.",
        formula=measure.formula,
        columns=("dictionary", "group", "method", "strength", "concepts", "low quartile", "median", "high quartile"),
        rows=rows,
        drawings=tuple(_panel(measure, name, group, own) for (name, group), own in panels.items()),
        legend=(*dict.fromkeys(line.series for line in lines), *((BAR,) if measure.bar is not None else ())),
    )


def _panel(measure: SteeringMeasure, dictionary: str, group: str, lines: Sequence[MethodCurves]) -> Drawing:
    is_share = measure.name != "loss"
    write = percent if is_share else number
    curves = []
    for line in lines:
        points = []
        for strength in line.strengths:
            concepts, low, middle, high = line.quartiles(strength, measure.value)
            value = f"{measure.name} {write(middle)} ({write(low)} to {write(high)})"
            tip = f"{METHODS[line.method]}\nstrength {strength:g}\n{value}\n{count(concepts, 'concept')}"
            points.append(PlotPoint(x=strength, y=middle, tip=tip))
        curves.append(PlotCurve(series=line.series, points=tuple(points), line=len(points) > 1))
    strengths = [strength for line in lines for strength in line.strengths]
    if measure.bar is not None and strengths:
        ends = (min(strengths), max(strengths))
        points = tuple(PlotPoint(x=x, y=measure.bar, tip=f"the bar: {write(measure.bar)}") for x in ends)
        curves.append(PlotCurve(series=BAR, points=points, dots=False))
    y = Axis(label=measure.name, percent=is_share, low=0.0, high=1.0 if is_share else None)
    about = f"{count(len(lines), 'method')} over strength, the median over concepts of the group {group}."
    return plot(f"{group}, {dictionary}", about, Axis(label="strength"), y, curves)


def _summaries(results: Sequence[SteeringFacts]) -> Iterator[tuple[SteeringFacts, str, str, SteeringSummary | None]]:
    """Yield each dictionary, method and group with its summary; a group without any feature once only."""
    for steering in results:
        for method in steering.methods or ["feature"]:
            for group, coverage in steering.coverage.items():
                if coverage.detected or method == "feature":
                    yield steering, method, group, steering.summary(method, group)


def _summary_file(results: Sequence[SteeringFacts]) -> ReportFigure:
    rows = []
    for steering, method, group, summary in _summaries(results):
        concepts, rare, detected = steering.coverage[group]
        values = (None,) * 6 if summary is None else summary[1:]
        rows.append((str(steering.ref), method, group, concepts, rare, len(detected), *values))
    concepts = ("concepts", "shown too rarely to tell", "with a feature")
    return ReportFigure(
        name="steered",
        caption="All digits of the table above. Medians over the concepts for which there is a feature, each at its best "
        "strength: that of the highest success at which 90 % of everything else stays and no image breaks. Concepts that too few "
        "images show count as without a feature. Gain is the success there less the share of unedited images that show the "
        "concept, and 0 where no strength is acceptable.",
        columns=("dictionary", "method", "group", *concepts, "gain", "without", "success", "kept", "loss", "strength"),
        rows=rows,
    )


def _summary_table(results: Sequence[SteeringFacts]) -> Markup:
    heads = ("dictionary", "method", "group", "concepts with a feature", "gain", "without", "success", "kept", "loss", "strength")
    writers = (percent, percent, percent, percent, number, number)
    rows = []
    for steering, method, group, summary in _summaries(results):
        concepts, _, detected = steering.coverage[group]
        share = f"{concepts} from a file" if steering.is_from_file else f"{len(detected)} of {concepts}"
        values = [number(None)] * 6 if summary is None else [write(x) for write, x in zip(writers, summary[1:], strict=True)]
        rows.append((str(steering.ref), METHODS[method], group, share, *values))
    return html_table(heads, rows, "The effect of steering", words=3)


def _points(results: Sequence[SteeringFacts]) -> ReportFigure:
    rows = []
    for steering in results:
        for curve in steering.results.curves:
            detected = "yes" if curve.concept in steering.coverage[curve.group].detected else "no"
            detected = "from a file" if steering.is_from_file else detected
            values = (str(steering.ref), curve.method, curve.description, curve.group, curve.concept, detected)
            rows += [(*values, curve.trials, curve.without, *astuple(point)) for point in curve.points]
    concept = ("group", "concept", "detected", "images", "without")
    measures = ("strength", "success", "kept", "loss", "confidence")
    columns = ("dictionary", "method", "what is added", *concept, *measures)
    return ReportFigure(name="points", caption="Every concept at every strength.", columns=columns, rows=rows)


def _examples(steering: SteeringFacts) -> Markup:
    """Return example images: of each group the concept with the best results, by every method."""
    cards = []
    for group in dict.fromkeys(strip.group for strip, _ in steering.strips):
        own = [(strip, file) for strip, file in steering.strips if strip.group == group]
        head = Markup("<p><b>{}</b> in “{}”</p>").format(own[0][0].concept, own[0][0].prompt)
        rows = Markup("").join(_tiles(strip, file) for strip, file in own)
        cards.append(Markup("<li>{}{}</li>").format(head, rows))
    if not cards:
        return Markup("")
    title = Markup("<h3>{} <small>{}</small></h3>").format(str(steering.ref), kind_series(steering.kind).name)
    lead = Markup(
        '<p class="lead">The concept of each group at which features succeed best, in the first image of its trials.</p>'
    )
    return title + lead + Markup('<ul class="cards wide">{}</ul>').format(Markup("").join(cards))


def _tiles(strip: ImageStrip, path: Path) -> Markup:
    """Return the images of a strip, each above its strength, under the name of the method."""
    with Image.open(path) as file:
        whole = file.convert("RGB")
    labels = ["unedited", *(f"{strength:g}" for strength in strip.strengths)]
    width, method = whole.width // len(labels), METHODS[strip.method]
    tiles = []
    for i, label in enumerate(labels):
        url = image_url(whole.crop((i * width, 0, (i + 1) * width, whole.height)))
        description = f"{strip.concept} by {method}, {label}"
        tiles.append(Markup('<li><img src="{}" alt="{}"><p>{}</p></li>').format(url, description, label))
    columns = f"--columns: {min(len(labels), TILES)}"
    return element("p", method, class_="fine") + element("ul", *tiles, class_="tiles", style=columns)
