"""What steering does: does the concept appear, what else stays, and what does it cost, by method and strength."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import quantiles
from typing import NamedTuple

from markupsafe import Markup
from PIL import Image

from difflex.effects import ImageStrip, StrengthCurve, StrengthPoint
from difflex.report.drawing import Axis, Drawing, LegendEntry, Plot, PlotCurve, PlotPoint, SeriesStyle, element, plot
from difflex.report.facts import StudyFacts
from difflex.report.figures.embedding import address
from difflex.report.kinds import key
from difflex.report.sections import FigureTable, MissingFigure, ReportFigure, ReportSection
from difflex.report.steered import SteeringFacts, SteeringSummary, summary
from difflex.report.telling import NONE, apart, count, number, percent

__all__ = ["steering"]

JUDGE, DETECTED, TOLD = "a judge of the drawn world", "it detects it with AP ≥ 0.8", "a file of concepts has it"
"""Who says what is seen, and why a feature stands for a concept."""
UNITS = {
    "peak": "what its largest code writes",
    "mean": "what its mean code writes",
    "norm": "as long as a mean activation",
    "code": "what a code of 1 writes",
}
"""What a strength of 1 is, of a feature."""
BESIDE = {
    "neuron": key("neurons"),
    "contrast": LegendEntry("contrast", "contrast of captions", SeriesStyle(colour=3, marker="triangle", dash="9 3 2 3")),
    "random": key("random"),
    "prompt": LegendEntry("prompt", "the caption edited", SeriesStyle(colour=8, marker="wedge"), line=False),
}
"""What is judged beside a dictionary's own features."""
SAID = {
    "feature": "features",
    "neuron": "neurons",
    "contrast": "contrast",
    "random": "random directions",
    "prompt": "edited caption",
}
BAR = LegendEntry("bar", "the bar", SeriesStyle(colour=8, marker="none", dash="2 4"))
COLUMNS = 7
"""Images in a row of the grid, at most."""


class SteeringMeasure(NamedTuple):
    """What is drawn over strength."""

    name: str
    title: str
    axis: str
    caption: str
    formula: str
    of: Callable[[StrengthPoint], float]
    bar: float | None


MEASURES = (
    SteeringMeasure(
        "success",
        "Does the concept appear",
        "success",
        "The share of images that show the concept where it was put.",
        "images that show it / images, median over concepts",
        lambda point: point.success,
        None,
    ),
    SteeringMeasure(
        "kept",
        "What else stays",
        "kept",
        "Of all else that the captions state and the unedited images had right, the share that still is; the bar is 90 %.",
        "statements still right / statements right without the edit, median over concepts",
        lambda point: point.specificity,
        0.9,
    ),
    SteeringMeasure(
        "loss",
        "What it costs",
        "loss",
        "The unedited model's loss on the finished images, noised again and asked without a caption, over that on unedited "
        "ones: 1 is as good, and from 1.5 on, the bar, images count as broken.",
        "loss with the edit / loss without, at noise 0.3, 0.6 and 0.9, median over concepts",
        lambda point: point.quality,
        1.5,
    ),
)


class MethodLine(NamedTuple):
    """A method on the concepts of a group that a dictionary has a feature for."""

    of: SteeringFacts
    group: str
    method: str
    curves: list[StrengthCurve]

    @property
    def key(self) -> LegendEntry:
        """Features look like their kind of dictionary."""
        return key(self.of.kind) if self.method == "feature" else BESIDE[self.method]

    @property
    def strengths(self) -> list[float]:
        """All at which something was judged."""
        return sorted({point.strength for curve in self.curves for point in curve.points})

    def values(self, strength: float, of: Callable[[StrengthPoint], float]) -> list[float]:
        """A figure of each concept at one strength, in rising order."""
        return sorted(of(point) for curve in self.curves for point in curve.points if point.strength == strength)


def steering(facts: StudyFacts) -> ReportSection:
    """The section about steering."""
    drawn = [
        MethodLine(each, group, method, each.curves(method, group))
        for each in facts.steered
        for group in each.groups
        for method in each.methods
    ]
    figures = (_table(facts.steered), *(_over_strength(measure, drawn) for measure in MEASURES if drawn), _points(facts.steered))
    body = (_strips(each) for each in facts.steered)
    return ReportSection(
        name="steering",
        title="Steering",
        lead=_lead(facts.steered),
        body=Markup("").join(body) + _summaries(facts.steered) if facts.steered else Markup(""),
        figures=figures if facts.steered else (),
        missing=()
        if facts.steered
        else (MissingFigure("What comes of steering towards known concepts", "difflex steer-eval STUDY"),),
    )


def _lead(steered: Sequence[SteeringFacts]) -> str:
    """What was done, by the records; where there is none, what the verb does when nothing is told."""
    why = apart({str(each.place): TOLD if each.is_told else DETECTED for each in steered}) or DETECTED
    judge = (
        apart(
            {str(each.place): str(each.judged.made_from.get("judge", "a judge")) if each.is_told else JUDGE for each in steered}
        )
        or JUDGE
    )
    return (
        f"A feature that stands for a concept, as {why}, is added where the concept is to appear, in images whose captions "
        f"name another one of its group; {judge} says whether it does, and what else of the captions is still so. Beside it: the "
        "neuron that detects it best, where that is known, a contrast of captions, a random direction of equal length, and the "
        "caption edited instead."
    )


def _over_strength(measure: SteeringMeasure, drawn: Sequence[MethodLine]) -> ReportFigure:
    """Small multiples, one for each dictionary and group: what stands beside features is of the same concepts."""
    rows, panels, units = [], dict[tuple[str, str], list[MethodLine]](), {}
    for line in drawn:
        place = str(line.of.place)
        panels.setdefault((place, line.group), []).append(line)
        units[place] = UNITS.get(str(line.of.judged.made_from.get("unit")), "what its record does not say")
        for strength in line.strengths:
            low, middle, high = _quartiles(line.values(strength, measure.of))
            said = (place, line.group, line.method, strength, len(line.values(strength, measure.of)))
            rows.append((*said, low, middle, high))
    return ReportFigure(
        name=measure.name,
        title=f"{measure.title}, by strength",
        caption=f"{measure.caption} A strength of 1 is, of a feature, {apart(units)}; random directions are as long; of the "
        "contrast it is the length that was found, of the caption the whole of it. Only concepts that the dictionary has a "
        "feature for.",
        formula=measure.formula,
        table=FigureTable(
            ("dictionary", "group", "method", "strength", "concepts", "low quartile", "median", "high quartile"), tuple(rows)
        ),
        drawings=tuple(_panel(measure, place, group, lines) for (place, group), lines in panels.items()),
        keys=(*dict.fromkeys(line.key for line in drawn), *((BAR,) if measure.bar is not None else ())),
    )


def _panel(measure: SteeringMeasure, place: str, group: str, there: Sequence[MethodLine]) -> Drawing:
    tell = number if measure.name == "loss" else percent
    curves = []
    for line in there:
        marks = []
        for strength in line.strengths:
            values = line.values(strength, measure.of)
            low, middle, high = _quartiles(values)
            told = f"{measure.axis} {tell(middle)} ({tell(low)} to {tell(high)})"
            tip = f"{SAID.get(line.method, line.method)}\nstrength {strength:g}\n{told}\n{count(len(values), 'concept')}"
            marks.append(PlotPoint(x=strength, y=middle, tip=tip))
        curves.append(PlotCurve(series=line.key.series, look=line.key.look, marks=tuple(marks), line=len(marks) > 1))
    ends = [strength for line in there for strength in line.strengths]
    if measure.bar is not None and ends:
        marks = [PlotPoint(x=x, y=measure.bar, tip=f"the bar: {tell(measure.bar)}") for x in (min(ends), max(ends))]
        curves.append(PlotCurve(series=BAR.series, look=BAR.look, marks=tuple(marks), dots=False))
    is_share = measure.name != "loss"
    y = Axis(label=measure.axis, percent=is_share, low=0.0, high=1.0 if is_share else None)
    about = f"{count(len(there), 'method')} over strength, the median over concepts of the group {group}."
    return plot(Plot(title=f"{group}, {place}", description=about, x=Axis(label="strength"), y=y, curves=tuple(curves)))


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (*values,) * 3
    return low, middle, high


def _summarised(steered: Sequence[SteeringFacts]) -> Iterator[tuple[SteeringFacts, str, str, str, SteeringSummary | None]]:
    """Each dictionary, method and group with the features it has, out of how many where that is known; what has none is told
    once."""
    for each in steered:
        for method in each.methods or ["feature"]:
            for group, known in each.known.items():
                share = f"{known.concepts} told" if each.is_told else f"{len(known.detected)} of {known.concepts}"
                if known.detected or method == "feature":
                    yield each, method, group, share, summary(each.curves(method, group))


def _table(steered: Sequence[SteeringFacts]) -> ReportFigure:
    rows = []
    for each, method, group, _, found in _summarised(steered):
        known = each.known[group]
        figures = (None,) * 6 if found is None else found[1:]
        rows.append((str(each.place), method, group, known.concepts, known.rare, len(known.detected), *figures))
    concepts = ("concepts", "shown too rarely to tell", "with a feature")
    columns = ("dictionary", "method", "group", *concepts, "gain", "without", "success", "kept", "loss")
    return ReportFigure(
        name="steered",
        title="",
        caption="All digits of the table above. Medians over the concepts that the dictionary has a feature for, each at the "
        "strength that is best for it: the highest success that keeps 90 % of all else and breaks no image. Concepts that too "
        "few images show to tell count as without a feature. Gain is the success there less the share of unedited images "
        "that show the concept, and 0 where no strength will do.",
        formula="",
        table=FigureTable((*columns, "strength"), tuple(rows)),
        drawings=(),
    )


def _summaries(steered: Sequence[SteeringFacts]) -> Markup:
    """The same to be read."""
    names = ("dictionary", "method", "group", "concepts with a feature", "gain", "without", "success", "kept", "loss", "strength")
    head = element("tr", *(element("th", name, scope="col", class_="word" if i < 3 else None) for i, name in enumerate(names)))
    body = []
    for each, method, group, share, found in _summarised(steered):
        tells = (percent, percent, percent, percent, number, number)
        told = [NONE] * 6 if found is None else [tell(value) for tell, value in zip(tells, found[1:], strict=True)]
        words = [element("td", word, class_="word") for word in (SAID.get(method, method), group)]
        cells = [element("td", value) for value in (share, *told)]
        body.append(element("tr", element("th", str(each.place), scope="row"), *words, *cells))
    table = element("table", element("thead", head), element("tbody", *body))
    return element("div", table, class_="box", tabindex="0", role="region", aria_label="What comes of steering")


def _points(steered: Sequence[SteeringFacts]) -> ReportFigure:
    """Everything that was judged, as a file."""
    columns = ("dictionary", "method", "what is added", "group", "concept", "detected", "images", "without", "strength")
    return ReportFigure(
        name="points",
        title="",
        caption="Every concept at every strength.",
        formula="",
        table=FigureTable((*columns, "success", "kept", "loss", "confidence"), tuple(_all(steered))),
        drawings=(),
    )


def _all(steered: Sequence[SteeringFacts]) -> Iterator[tuple[str | float, ...]]:
    for each in steered:
        for curve in each.judged.curves:
            known = "told" if each.is_told else "yes" if curve.concept in each.known[curve.group].detected else "no"
            told = (str(each.place), curve.method, curve.told, curve.group, curve.concept, known, curve.trials, curve.without)
            for point in curve.points:
                yield *told, point.strength, point.success, point.specificity, point.quality, point.confidence


def _strips(each: SteeringFacts) -> Markup:
    """Images to look at: of each group the concept that steering is best at, by every method."""
    cards = []
    for group in dict.fromkeys(strip.group for strip, _ in each.strips):
        own = [(strip, file) for strip, file in each.strips if strip.group == group]
        head = Markup("<p><b>{}</b> in “{}”</p>").format(own[0][0].concept, own[0][0].prompt)
        rows = Markup("").join(_tiles(*strip) for strip in own)
        cards.append(Markup("<li>{}{}</li>").format(head, rows))
    if not cards:
        return Markup("")
    title = Markup("<h3>{} <small>{}</small></h3>").format(str(each.place), key(each.kind).name)
    told = Markup('<p class="lead">Of each group the concept that features are best at, in the first image of its trials.</p>')
    return title + told + Markup('<ul class="cards wide">{}</ul>').format(Markup("").join(cards))


def _tiles(strip: ImageStrip, path: Path) -> Markup:
    """The images of a strip, each above its strength, under the name of the method."""
    with Image.open(path) as file:
        whole = file.convert("RGB")
    labels = ["unedited", *(f"{strength:g}" for strength in strip.strengths)]
    width = whole.width // len(labels)
    made = []
    for place, label in enumerate(labels):
        tile = whole.crop((place * width, 0, (place + 1) * width, whole.height))
        said = f"{strip.concept} by {SAID.get(strip.method, strip.method)}, {label}"
        made.append(Markup('<li><img src="{}" alt="{}"><p>{}</p></li>').format(address(tile), said, label))
    columns = f"--columns: {min(len(labels), COLUMNS)}"
    name = element("p", SAID.get(strip.method, strip.method), class_="fine")
    return name + element("ul", *made, class_="tiles", style=columns)
