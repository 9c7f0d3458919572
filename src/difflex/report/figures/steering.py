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
from difflex.report.figures.gallery import image_url
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
    "automatic": Series("automatic", "sites and dose chosen", SeriesStyle(5, "ring"), line=False),
    "effect-aware": Series("effect-aware", "strengths by gradients", SeriesStyle(7, "diamond"), line=False),
}
"""The methods that a feature at one site is compared with; those without a line have a strength of their own for each concept."""
METHODS = {"feature": "features"} | {method: series.name for method, series in BASELINES.items()}
BAR = Series("bar", "the bar", SeriesStyle(8, "none", "2 4"))


class SteeringMeasure(NamedTuple):
    """A quantity that is drawn over strength."""

    name: str
    title: str
    value: Callable[[StrengthPoint], float]
    bar: float | None


MEASURES = (
    SteeringMeasure("success", "whether the concept appears", lambda point: point.success, None),
    SteeringMeasure("kept", "what else stays", lambda point: point.specificity, 0.9),
    SteeringMeasure("loss", "what it costs", lambda point: point.quality, 1.5),
)
HIGHEST = 3.0
"""Losses above it are drawn at the edge: those of random directions would stretch the axis."""
COUNTS = ("concepts", "shown too rarely to tell", "with a feature")
ALL = "all"
"""All groups of concepts together."""


class MethodCurves(NamedTuple):
    """A method on the concepts of a group, or of all, for which a dictionary has a feature."""

    steering: SteeringFacts
    group: str
    method: str

    @property
    def groups(self) -> list[str]:
        """The groups of its concepts."""
        return self.steering.groups if self.group == ALL else [self.group]

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
        curves = self.steering.curves(self.method, *self.groups)
        by_strength = group_by((point for curve in curves for point in curve.points), lambda point: point.strength)
        rows = []
        for strength, points in sorted(by_strength.items()):
            values = sorted(map(value, points))
            low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (*values,) * 3
            rows.append((strength, len(values), low, middle, high))
        return rows


def strip(facts: StudyFacts) -> ReportSection:
    """Return the section with the most convincing example of steering: that of the concept at which a feature gains most."""
    candidates = []
    for steering in facts.steering:
        for image, file in steering.strips:
            curves = [c for c in steering.curves("feature", image.group) if c.concept == image.concept]
            candidates += [(curve.gain(), steering, curve, image, file) for curve in curves if image.method == "feature"]
    missing = MissingFigure("An example of steering with a feature", "difflex steer-eval STUDY")
    gain, steering, curve, image, file = max(candidates, key=lambda c: c[0], default=(0.0, *(None,) * 4))
    if gain <= 0 or steering is None or curve is None or image is None or file is None:
        return ReportSection(name="strip", title="Steering", parts=[] if facts.steering else [missing])
    best = curve.best()
    assert best is not None, "without a best strength there is no gain"
    random = next((own for own in steering.curves("random", image.group) if own.concept == image.concept), None)
    others = f"; a random direction of equal length: {percent(random.gain())} more" if random else ""
    unit = UNITS[steering.results.config.unit]
    return ReportSection(
        name="strip",
        title=f"Steering towards {curve.concept}",
        lead=f"Feature {curve.description.rpartition(' ')[2]} of {steering.ref} is added where {curve.concept} is to appear, in "
        f"\N{LEFT DOUBLE QUOTATION MARK}{image.prompt}\N{RIGHT DOUBLE QUOTATION MARK}. At strength {best.strength:g}, "
        f"{percent(best.success)} of {count(curve.trials, 'image')} show it ({percent(curve.without)} without the edit{others}), "
        f"and {percent(best.specificity)} of all else stays.",
        body=_tiles(image, file, "large") + element("p", f"Strength 1 is {unit}.", class_="fine"),
    )


def steering(facts: StudyFacts) -> ReportSection:
    """Return the section about steering."""
    results = facts.steering
    lines = [
        MethodCurves(steering, group, method)
        for steering in results
        for group in (*steering.groups, *([ALL] if steering.groups else ()))
        for method in steering.methods
    ]
    table, file = _summary(results)
    missing = MissingFigure("The effect of steering towards known concepts", "difflex steer-eval STUDY")
    return ReportSection(
        name="steering",
        title="Steering",
        lead=_lead(results),
        body=table + _examples(results) if results else Markup(),
        parts=[file, *([_curves(lines)] if lines else []), _points(results)] if results else [missing],
    )


def _lead(results: Sequence[SteeringFacts]) -> str:
    """Return a description of the experiments from their records, or of the default one."""
    reason = grouped({str(s.ref): FROM_FILE if s.is_from_file else DETECTED for s in results}) or DETECTED
    judges = {str(s.ref): s.results.provenance.judge if s.is_from_file else WORLD_JUDGE for s in results}
    return (
        f"A feature that stands for a concept, as {reason}, is added where the concept is to appear, in images whose captions "
        f"name another one of its group; {grouped(judges) or WORLD_JUDGE} says whether it does, and what else of the captions is "
        "still right. It is compared with the neuron that detects the concept best, if that is known, a contrast of captions, a "
        "random direction of equal length, and an edited caption; and, if they were asked for, with features of all sites at a "
        "dose that was chosen on other captions, and with strengths that gradients of the judge chose."
    )


def _curves(lines: Sequence[MethodCurves]) -> ReportFigure:
    """Return a panel for each dictionary and measure; all methods in a panel are measured on the same concepts."""
    units = {line.dictionary: UNITS[line.steering.results.config.unit] for line in lines}
    panels = group_by((line for line in lines if line.group == ALL), lambda line: line.dictionary)
    several = len(panels) > 1
    drawings = [
        _panel(measure, f"{measure.title}, {name}" if several else measure.title, own)
        for name, own in panels.items()
        if _has_course(own)
        for measure in MEASURES
    ]
    drawn = list(dict.fromkeys(line.series for line in lines))
    return ReportFigure(
        name="strengths",
        title="Steering by strength" if drawings else "",
        caption="Success: the share of images that show the concept where it was put. Kept: of everything else that the captions "
        "state and that was right without the edit, the share that is still right; the bar is 90 %. Loss: the unedited model's "
        "on "
        "the finished images, with noise added again and without a caption, relative to that on unedited images; from 1.5 on, "
        "the "
        f"bar, images count as broken, and those above {HIGHEST:g} are drawn at the edge. Medians over the concepts that have a "
        f"feature. A strength of 1 is, for a feature, {grouped(units)}; random directions are equally long; a contrast has the "
        "length that was measured, and the caption is replaced as a whole. The file has each group of concepts as well.",
        columns=("measure", "dictionary", "group", "method", "strength", "concepts", "low quartile", "median", "high quartile"),
        rows=[
            (measure.name, line.dictionary, line.group, line.method, *row)
            for measure in MEASURES
            for line in lines
            for row in line.quartiles(measure.value)
        ],
        drawings=drawings,
        legend=(*drawn, BAR) if drawings else (),
    )


def _has_course(lines: Sequence[MethodCurves]) -> bool:
    """Return whether any method was tried at several strengths."""
    return any(len(line.quartiles(MEASURES[0].value)) > 1 for line in lines)


def _panel(measure: SteeringMeasure, title: str, lines: Sequence[MethodCurves]) -> Drawing:
    is_share = measure.name != "loss"
    write = percent if is_share else number
    curves = []
    for line in lines:
        points = []
        for strength, concepts, low, middle, high in line.quartiles(measure.value):
            value = f"{measure.name} {write(middle)} ({write(low)} to {write(high)})"
            tip = f"{METHODS[line.method]}\nstrength {strength:g}\n{value}\n{count(concepts, 'concept')}"
            points.append(PlotPoint(strength, middle, tip))
        curves.append(PlotCurve(line.series, points, line=line.series.line and len(points) > 1))
    strengths = [point.x for curve in curves for point in curve.points if point.x is not None]
    if measure.bar is not None and strengths:
        ends = (min(strengths), max(strengths))
        curves.append(PlotCurve(BAR, [PlotPoint(x, measure.bar, f"the bar: {write(measure.bar)}") for x in ends], dots=False))
    largest = max((point.y for curve in curves for point in curve.points if point.y is not None), default=0.0)
    high = 1.0 if is_share else HIGHEST if largest > HIGHEST else None
    y = Axis(label=measure.name, percent=is_share, low=0.0, high=high)
    about = f"{count(len(lines), 'method')} over strength, the median over all concepts that have a feature."
    return plot(title, about, Axis(label="strength"), y, curves)


def _summary(results: Sequence[SteeringFacts]) -> tuple[Markup, ReportFigure]:
    """Return what each dictionary gains by group, in a table beside other methods, and all medians as a file."""
    rows, table = [], []
    methods = [method for method in METHODS if any(method in steering.methods for steering in results)]
    for steering in results:
        name = str(steering.ref)
        for group, (concepts, rare, detected) in steering.coverage.items():
            summaries = {method: steering.summary(method, group) for method in steering.methods or ["feature"]}
            rows += [
                (name, method, group, concepts, rare, len(detected), *(own or (None,) * len(SteeringSummary._fields)))
                for method, own in summaries.items()
                if detected or method == "feature"
            ]
            feature, share = summaries.get("feature"), f"{len(detected)} of {concepts}"
            gains = [percent(own.gain) if (own := summaries.get(method)) else number(None) for method in methods]
            costs = (percent(feature.kept), number(feature.loss), number(feature.strength)) if feature else (number(None),) * 3
            table.append((name, group, f"{concepts} from a file" if steering.is_from_file else share, *gains, *costs))
    file = ReportFigure(
        name="steered",
        caption="The columns of methods show gains: success less the share of unedited images that show the concept, the "
        "median over the concepts with a feature, each at its best strength: that of the highest success at which 90 % of "
        "everything else stays and no image breaks; 0 where no strength is acceptable. Kept, loss and strength are those of "
        "features. Concepts that too few images show count as without a feature. The file has all digits.",
        columns=("dictionary", "method", "group", *COUNTS, *SteeringSummary._fields),
        rows=rows,
    )
    heads = (
        "dictionary",
        "group",
        "with a feature",
        *(METHODS[method] for method in methods),
        "kept",
        "loss",
        "strength",
    )
    return html_table(heads, table, "The effect of steering", words=2), file


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


def _examples(results: Sequence[SteeringFacts]) -> Markup:
    """Return example images of each dictionary, folded: of each group the concept with the best results, by every method."""
    parts = Markup()
    for steering in results:
        cards = []
        for strips in group_by(steering.strips, lambda pair: pair[0].group).values():
            first, _ = strips[0]
            head = Markup("<p><b>{}</b> in \N{LEFT DOUBLE QUOTATION MARK}{}\N{RIGHT DOUBLE QUOTATION MARK}</p>")
            rows = [element("p", METHODS[image.method], class_="fine") + _tiles(image, file) for image, file in strips]
            cards.append(element("li", head.format(first.concept, first.prompt), *rows))
        head = element("summary", f"Images of steering with features of {steering.ref}, and by other methods")
        lead = "The concept of each group at which features succeed best, in the first image of its trials."
        grid = element("ul", *cards, class_="cards wide")
        parts += element("details", head, element("p", lead, class_="fine"), grid) if cards else Markup()
    return parts


def _tiles(strip: ImageStrip, path: Path, kind: str = "") -> Markup:
    """Return the images of a strip, each above its strength."""
    image, method = open_image(path, "RGB"), METHODS[strip.method]
    labels = ["unedited", *(f"strength {strength:g}" for strength in strip.strengths)]
    width, tiles = image.width // len(labels), []
    for i, label in enumerate(labels):
        url = image_url(image.crop((i * width, 0, (i + 1) * width, image.height)))
        tile = Markup('<img src="{}" alt="{}">').format(url, f"{strip.concept} by {method}, {label}")
        tiles.append(element("span", tile, element("span", label, class_="label")))
    title = f"{strip.concept} by {method}"
    style = f"--columns: {len(tiles)}"
    return element("button", *tiles, type="button", class_=f"zoom tiles {kind}".strip(), style=style, data_title=title)
