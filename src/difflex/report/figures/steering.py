"""The effect of steering: whether the concept appears, what else stays, and what it costs, by method and strength."""

from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path
from statistics import quantiles
from typing import NamedTuple

from markupsafe import Markup

from difflex.effects import ImageStrip, StrengthPoint
from difflex.images import open_image
from difflex.report.drawing import Axis, Drawing, element
from difflex.report.drawing.charts import PlotCurve, PlotPoint, Series, SeriesStyle, plot
from difflex.report.facts import SteeringFacts, SteeringSummary, StudyFacts, group_by
from difflex.report.figures import MissingFigure, ReportFigure, ReportSection, html_table
from difflex.report.figures.explanations import image_url
from difflex.report.style import count, grouped, kind_series, number, percent

WORLD_JUDGE = "a judge of the miniature world"
DETECTED, FROM_FILE = "it detects it with AP ≥ 0.8", "the file of concepts names it"
"""Why a feature stands for a concept."""
UNITS = {"peak": "what its largest code adds", "mean": "what its mean code adds", "code": "what a code of 1 adds"}
UNITS |= {"norm": "as long as a mean activation"}
"""What a strength of 1 is for a feature."""
BASELINES = {
    "neuron": kind_series("neurons"),
    "contrast": Series("contrast", "contrast of captions", SeriesStyle(3, "triangle", "9 3 2 3")),
    "random": kind_series("random"),
    "prompt": Series("prompt", "edited caption", SeriesStyle(8, "wedge"), line=False),
}
"""The methods that features are compared with."""
METHODS = {"feature": "features"} | {method: series.name for method, series in BASELINES.items()}
BAR = Series("bar", "the bar", SeriesStyle(8, "none", "2 4"))
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

    @property
    def dictionary(self) -> str:
        """`SITE/LABEL`."""
        return str(self.steering.ref)

    @property
    def series(self) -> Series:
        """The series of the method; features look like their kind of dictionary."""
        return kind_series(self.steering.kind) if self.method == "feature" else BASELINES[self.method]

    def quartiles(self, value: Callable[[StrengthPoint], float]) -> list[tuple[float, int, float, float, float]]:
        """Return each strength with the number of concepts and the quartiles of a measure over them."""
        curves = self.steering.curves(self.method, self.group)
        by_strength = group_by((point for curve in curves for point in curve.points), lambda point: point.strength)
        rows = []
        for strength, points in sorted(by_strength.items()):
            values = sorted(map(value, points))
            low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (*values,) * 3
            rows.append((strength, len(values), low, middle, high))
        return rows


def steering(facts: StudyFacts) -> ReportSection:
    """Return the section about steering."""
    results = facts.steering
    lines = [
        MethodCurves(steering, group, method) for steering in results for group in steering.groups for method in steering.methods
    ]
    table, file = _summary(results)
    figures = [file, *(_figure(measure, lines) for measure in MEASURES if lines), _points(results)]
    missing = MissingFigure("The effect of steering towards known concepts", "difflex steer-eval STUDY")
    return ReportSection(
        name="steering",
        title="Steering",
        lead=_lead(results),
        body=Markup().join(map(_examples, results)) + table if results else Markup(),
        parts=figures if results else [missing],
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
    units = {line.dictionary: UNITS[line.steering.results.config.unit] for line in lines}
    panels = group_by(lines, lambda line: (line.dictionary, line.group))
    return ReportFigure(
        name=measure.name,
        title=f"{measure.title}, by strength",
        caption=f"{measure.caption} A strength of 1 is, for a feature, {grouped(units)}; random directions are equally long; a "
        "contrast has the length that was measured, and the caption is replaced as a whole. Only concepts for which it "
        "has a feature.",
        formula=measure.formula,
        columns=("dictionary", "group", "method", "strength", "concepts", "low quartile", "median", "high quartile"),
        rows=[(line.dictionary, line.group, line.method, *row) for line in lines for row in line.quartiles(measure.value)],
        drawings=[_panel(measure, name, group, own) for (name, group), own in panels.items()],
        legend=(*dict.fromkeys(line.series for line in lines), *((BAR,) if measure.bar is not None else ())),
    )


def _panel(measure: SteeringMeasure, dictionary: str, group: str, lines: Sequence[MethodCurves]) -> Drawing:
    is_share = measure.name != "loss"
    write = percent if is_share else number
    curves = []
    for line in lines:
        points = []
        for strength, concepts, low, middle, high in line.quartiles(measure.value):
            value = f"{measure.name} {write(middle)} ({write(low)} to {write(high)})"
            tip = f"{METHODS[line.method]}\nstrength {strength:g}\n{value}\n{count(concepts, 'concept')}"
            points.append(PlotPoint(strength, middle, tip))
        curves.append(PlotCurve(line.series, points, line=len(points) > 1))
    strengths = [point.x for curve in curves for point in curve.points if point.x is not None]
    if measure.bar is not None and strengths:
        ends = (min(strengths), max(strengths))
        curves.append(PlotCurve(BAR, [PlotPoint(x, measure.bar, f"the bar: {write(measure.bar)}") for x in ends], dots=False))
    y = Axis(label=measure.name, percent=is_share, low=0.0, high=1.0 if is_share else None)
    about = f"{count(len(lines), 'method')} over strength, the median over concepts of the group {group}."
    return plot(f"{group}, {dictionary}", about, Axis(label="strength"), y, curves)


def _summary(results: Sequence[SteeringFacts]) -> tuple[Markup, ReportFigure]:
    """Return the summary of each dictionary, method and group as a table and as a file; a group without any feature once only."""
    rows, table = [], []
    writers = (percent, percent, percent, percent, number, number)
    for steering, method in ((own, method) for own in results for method in own.methods or ["feature"]):
        for group, (concepts, rare, detected) in steering.coverage.items():
            if detected or method == "feature":
                name, values = str(steering.ref), steering.summary(method, group) or (None,) * 6
                rows.append((name, method, group, concepts, rare, len(detected), *values))
                share = f"{concepts} from a file" if steering.is_from_file else f"{len(detected)} of {concepts}"
                texts = [write(value) for write, value in zip(writers, values, strict=True)]
                table.append((name, METHODS[method], group, share, *texts))
    measures, counts = SteeringSummary._fields, ("concepts", "shown too rarely to tell", "with a feature")
    file = ReportFigure(
        name="steered",
        caption="All digits of the table above. Medians over the concepts for which there is a feature, each at its best "
        "strength: that of the highest success at which 90 % of everything else stays and no image breaks. Concepts that too few "
        "images show count as without a feature. Gain is the success there less the share of unedited images that show the "
        "concept, and 0 where no strength is acceptable.",
        columns=("dictionary", "method", "group", *counts, *measures),
        rows=rows,
    )
    heads = ("dictionary", "method", "group", "concepts with a feature", *measures)
    return html_table(heads, table, "The effect of steering", words=3), file


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
    cards = Markup()
    for strips in group_by(steering.strips, lambda pair: pair[0].group).values():
        first, _ = strips[0]
        head = Markup("<p><b>{}</b> in “{}”</p>").format(first.concept, first.prompt)
        cards += Markup("<li>{}{}</li>").format(head, Markup().join(_tiles(strip, file) for strip, file in strips))
    if not cards:
        return Markup()
    title = Markup("<h3>{} <small>{}</small></h3>").format(str(steering.ref), kind_series(steering.kind).name)
    lead = "The concept of each group at which features succeed best, in the first image of its trials."
    return title + element("p", lead, class_="lead") + element("ul", cards, class_="cards wide")


def _tiles(strip: ImageStrip, path: Path) -> Markup:
    """Return the images of a strip, each above its strength, under the name of the method."""
    image = open_image(path, "RGB")
    labels = ["unedited", *(f"{strength:g}" for strength in strip.strengths)]
    width, method = image.width // len(labels), METHODS[strip.method]
    tiles = []
    for i, label in enumerate(labels):
        url = image_url(image.crop((i * width, 0, (i + 1) * width, image.height)))
        description = f"{strip.concept} by {method}, {label}"
        tiles.append(Markup('<li><img src="{}" alt="{}"><p>{}</p></li>').format(url, description, label))
    columns = f"--columns: {min(len(labels), TILES)}"
    return element("p", method, class_="fine") + element("ul", *tiles, class_="tiles", style=columns)
