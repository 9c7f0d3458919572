"""What features have to do with known concepts: in the place of figure 7 of arXiv 2505.24360, which explains them in words."""

import math
from bisect import bisect_left
from collections.abc import Sequence

from difflex.evaluation.concepts import ConceptResult, NoiseLevelResult, covered
from difflex.report.drawing import (
    Axis,
    ChartRow,
    Drawing,
    HeatCell,
    HeatMap,
    LegendEntry,
    Plot,
    PlotCurve,
    PlotPoint,
    RowChart,
    RowEntry,
    SeriesStyle,
    heat_map,
    plot,
    ramp,
    rows,
)
from difflex.report.facts import MatchFacts, StudyFacts
from difflex.report.kinds import key_of
from difflex.report.sections import FigureTable, MissingFigure, ReportFigure, ReportSection
from difflex.report.telling import number, percent

__all__ = ["concepts", "mean_ap"]

GRID = tuple(i / 50 for i in range(51))
"""The average precisions at which a distribution is drawn."""
COVERAGE = LegendEntry("coverage", "concepts detected (AP ≥ 0.8)", SeriesStyle(colour=8, marker="circle"), line=False)
MEAN = LegendEntry("mean", "mean AP of the best features", SeriesStyle(colour=8, marker="ring"), line=False)
PROBE = LegendEntry("probe", "a linear probe", SeriesStyle(colour=8, marker="square"), line=False)


def concepts(facts: StudyFacts) -> ReportSection:
    """The section about known concepts."""
    blocks = facts.blocks
    figures = (features(blocks), coverage(blocks), knowledge(blocks)) if blocks else ()
    wanted = "Features against known concepts; what this layer knows, at which level of noise"
    return ReportSection(
        name="concepts",
        title="What features stand for",
        lead="Every feature is held against concepts whose place in images is known. It is chosen on training images and "
        "measured on held-out ones; AP is average precision over tokens, 1 for a feature that fires where the concept is and "
        "nowhere else.",
        figures=figures,
        missing=() if blocks else (MissingFigure(wanted, "difflex concepts STUDY"),),
    )


def mean_ap(findings: Sequence[ConceptResult], probe: bool = False) -> float | None:
    """The mean over concepts of the AP of their best features, or of a linear probe."""
    values = [(finding.probe if probe else finding.best.ap).value for finding in findings]
    return sum(values) / len(values) if values else None


def lineup(judged: Sequence[MatchFacts]) -> list[MatchFacts]:
    """One of each kind, all of one k: that at which most kinds can be compared; at the block's own site where there is one, of
    several sizes the largest."""

    def members(k: int) -> dict[str, MatchFacts]:
        same = [each for each in judged if each.k == k]
        same.sort(key=lambda each: (each.matches.site.kind != "neurons", each.matches.size))
        return {key_of(each).series: each for each in same}

    best = max((members(k) for k in dict.fromkeys(each.k for each in judged)), key=len)
    order = list(judged)
    return sorted(best.values(), key=order.index)


def features(blocks: dict[str, list[MatchFacts]]) -> ReportFigure:
    """The distribution over features of the AP for the concept that each detects best."""
    chosen = {path: lineup(judged) for path, judged in blocks.items()}
    table = tuple(
        (path, each.name, ap, share, int(count))
        for path, judged in chosen.items()
        for each in judged
        for ap, share, count in _distribution(each)
    )
    keys = {key_of(each).series: key_of(each) for judged in chosen.values() for each in judged}
    said = "; ".join(f"{path}: k {judged[0].k}" for path, judged in chosen.items())
    return ReportFigure(
        name="features",
        title="Features by the concept they detect best",
        caption="How many features reach an average precision: the further right a curve ends, the better its best features "
        f"are. One method of each kind, at the k where most can be compared ({said}). It stands in for the scores of figure 7 "
        "of arXiv 2505.24360, where a model judged explanations.",
        formula="features whose best AP over all concepts is at least so much / features that fire",
        table=FigureTable(("block", "method", "AP at least", "share of features", "features"), table),
        drawings=tuple(_features(path, judged) for path, judged in chosen.items()),
        keys=tuple(keys.values()),
    )


def _distribution(judged: MatchFacts) -> list[tuple[float, float, int]]:
    """From each AP of the grid: the share and number of features that reach it; ended by the first that none does."""
    aps = sorted(filter(math.isfinite, judged.matches.features.ap))
    made = []
    for ap in GRID:
        count = len(aps) - bisect_left(aps, ap)
        if not count:
            break
        made.append((ap, count / len(aps), count))
    return made


def _features(path: str, judged: Sequence[MatchFacts]) -> Drawing:
    curves = tuple(
        PlotCurve(
            series=key_of(each).series,
            look=key_of(each).look,
            marks=tuple(
                PlotPoint(x=ap, y=share, tip=f"{each.name}\nAP ≥ {ap:g}: {count:,} features, {percent(share)}")
                for ap, share, count in _distribution(each)
            ),
            dots=False,
        )
        for each in judged
    )
    x = Axis(label="average precision, at least", low=0.0, high=1.0)
    y = Axis(label="share of features", log=True, percent=True, high=1.0)
    about = f"Curves of {len(judged)} methods, falling from all features at AP 0 to the few best at the right."
    return plot(Plot(title=path, description=about, x=x, y=y, curves=curves))


def coverage(blocks: dict[str, list[MatchFacts]]) -> ReportFigure:
    """How many concepts one feature detects, for every method, with the mean AP of the best features and of a probe."""
    listed = {path: sorted(judged, key=lambda each: -(mean_ap(_whole(each).findings) or 0.0)) for path, judged in blocks.items()}
    table = []
    for path, judged in listed.items():
        for each in judged:
            level = _whole(each)
            found, of = covered(level.findings)
            share, probe = level.coverage, mean_ap(level.findings, probe=True)
            table.append((path, each.name, of, found, share.value, share.low, share.high, mean_ap(level.findings), probe))
    return ReportFigure(
        name="coverage",
        title="Concepts that one feature detects",
        caption="For every method the share of concepts that one of its features detects, with the 95 % interval from drawing "
        "the held-out images again, and the mean AP of the best features. The probe, a linear classifier for each concept on "
        "the whole activation, is what there is to be found.",
        formula="detected: AP ≥ 0.8 of one feature; all levels of noise together",
        table=FigureTable(
            ("block", "method", "concepts", "detected", "share", "low", "high", "mean AP", "mean AP of probe"), tuple(table)
        ),
        drawings=tuple(_coverage(path, judged) for path, judged in listed.items()),
        keys=(COVERAGE, MEAN, PROBE),
    )


def _coverage(path: str, judged: Sequence[MatchFacts]) -> Drawing:
    def row(each: MatchFacts) -> ChartRow:
        level = _whole(each)
        found, of = covered(level.findings)
        mean, colour = mean_ap(level.findings), key_of(each).look.colour
        interval = f"{percent(level.coverage.low)} to {percent(level.coverage.high)}"
        said = f"{each.name}\n{found} of {of} concepts: {percent(level.coverage.value)} ({interval})"
        share = PlotPoint(x=level.coverage.value, y=0, tip=said, low=level.coverage.low, high=level.coverage.high)
        ap = PlotPoint(
            x=float("nan") if mean is None else mean, y=0, tip=f"{each.name}\nmean AP of the best features {number(mean)}"
        )
        return ChartRow(
            name=each.name,
            note=f"{found} of {of}",
            entries=(
                RowEntry(series=MEAN.series, look=SeriesStyle(colour=colour, marker="ring"), mark=ap),
                RowEntry(series=COVERAGE.series, look=SeriesStyle(colour=colour, marker="circle"), mark=share),
            ),
        )

    ceiling = mean_ap(_whole(judged[0]).findings, probe=True)
    top = PlotPoint(
        x=float("nan") if ceiling is None else ceiling,
        y=0,
        tip=f"a linear probe on the whole activation\nmean AP {number(ceiling)}",
    )
    probe = ChartRow(name="a linear probe", note="", entries=(RowEntry(series=PROBE.series, look=PROBE.look, mark=top),))
    about = f"{len(judged)} methods, the one of the highest mean average precision first, and a linear probe above them."
    axis = Axis(label="share of concepts, and mean AP", low=0.0, high=1.0)
    return rows(RowChart(title=path, description=about, x=axis, rows=(probe, *map(row, judged))))


def knowledge(blocks: dict[str, list[MatchFacts]]) -> ReportFigure:
    """Mean AP by group of concepts and level of noise: of a probe, and of the features of the best dictionary."""
    drawings, table = [], []
    for path, judged in blocks.items():
        trained = [each for each in judged if each.is_trained] or list(judged)
        best = max(trained, key=lambda each: mean_ap(_whole(each).findings) or 0.0)
        for name, probe in (("a linear probe", True), (best.name, False)):
            drawings.append(_knowledge(path, name, best, probe))
            table += _knowledge_rows(path, name, best, probe)
    return ReportFigure(
        name="knowledge",
        title="What each layer knows, at which level of noise",
        caption="Groups of concepts by how noisy the image was (0 is the image, 1 pure noise): what a linear probe finds "
        "in the whole activation, and what single features of the best dictionary there show of it.",
        formula="mean over the concepts of a group of AP; in the CSV also the number detected (AP ≥ 0.8)",
        table=FigureTable(("block", "method", "group", "noise", "concepts", "mean AP", "detected"), tuple(table)),
        drawings=tuple(drawings),
        ramp=ramp("0", "1", "mean AP"),
        paired=True,
    )


def _knowledge_rows(path: str, name: str, judged: MatchFacts, probe: bool) -> list[tuple[str | float | None, ...]]:
    return [
        (path, name, group, _noise(judged, level), len(of), mean_ap(of, probe), _detected(of, probe))
        for level in judged.matches.levels
        for group in _groups(judged)
        if (of := level.of(group))
    ]


def _knowledge(path: str, name: str, judged: MatchFacts, probe: bool) -> Drawing:
    groups, levels = _groups(judged), _levels(judged)

    def cell(group: str, level: NoiseLevelResult) -> HeatCell | None:
        of = level.of(group)
        mean = mean_ap(of, probe)
        if mean is None:
            return None
        found = f"{_detected(of, probe)} of {len(of)} concepts detected"
        tip = f"{group}, noise {_noise(judged, level)}\nmean AP {number(mean)}\n{found}\n{name}"
        return HeatCell(share=mean, label=f"{mean:.2f}", tip=tip)

    return heat_map(
        HeatMap(
            title=f"{path}: {name}",
            description="Mean average precision: a row for each group of concepts, a column for each level of noise.",
            rows=tuple(groups),
            columns=tuple(_noise(judged, level) for level in levels),
            cells=tuple(tuple(cell(group, level) for level in levels) for group in groups),
            across="level of noise",
        )
    )


def _detected(findings: Sequence[ConceptResult], probe: bool) -> int:
    return sum((finding.probe if probe else finding.best.ap).value >= 0.8 for finding in findings)


def _groups(judged: MatchFacts) -> list[str]:
    return list(dict.fromkeys(concept.group for concept in judged.matches.concepts))


def _levels(judged: MatchFacts) -> list[NoiseLevelResult]:
    """Each level of noise, then all together, which are first in the record."""
    first, *each = judged.matches.levels
    return [*each, first]


def _noise(judged: MatchFacts, level: NoiseLevelResult) -> str:
    alone = len(judged.matches.levels) == 1
    return (
        f"{level.noise:g}" if level.noise is not None else str(judged.matches.made_from.get("noise", "all")) if alone else "all"
    )


def _whole(judged: MatchFacts) -> NoiseLevelResult:
    return judged.matches.levels[0]
