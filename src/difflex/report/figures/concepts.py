"""Which known concepts features detect: in place of figure 7 of arXiv 2505.24360, which explains features in words."""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence

from difflex.evaluation.concepts.results import ConceptResult, count_detected
from difflex.report.drawing import Axis, Drawing
from difflex.report.drawing.charts import ChartRow, PlotCurve, PlotPoint, Series, SeriesStyle, plot, row_chart
from difflex.report.facts import MatchFacts, StudyFacts
from difflex.report.figures import MissingFigure, ReportFigure, ReportSection
from difflex.report.figures.roles import PROBE_NAME, BlockRoles, role_table, roles
from difflex.report.style import kind_series, number, percent

Blocks = Mapping[str, Sequence[MatchFacts]]
GRID = tuple(i / 50 for i in range(51))
"""The average precisions at which a distribution is drawn."""
COVERAGE = Series("coverage", "concepts detected (AP ≥ 0.8)", SeriesStyle(8, "circle"), line=False)
MEAN = Series("mean", "mean AP of the best features", SeriesStyle(8, "ring"), line=False)
PROBE = Series("probe", PROBE_NAME, SeriesStyle(8, "square"), line=False)


def concepts(facts: StudyFacts) -> ReportSection:
    """Return the section about known concepts."""
    blocks = facts.blocks
    missing = MissingFigure("Features compared with known concepts, by layer and noise level", "difflex concepts STUDY")
    return ReportSection(
        name="concepts",
        title="What each layer knows",
        lead="Every feature is compared with concepts whose place in images is known. The best feature of a concept is chosen on "
        "training images and measured on held-out ones; AP is average precision over tokens, 1 for a feature that fires where "
        "the concept is and nowhere else.",
        body=role_table(BlockRoles.of(facts)),
        parts=[*roles(facts), _features(blocks), _coverage(blocks)] if blocks else [missing],
    )


def mean_ap(results: Sequence[ConceptResult], probe: bool = False) -> float | None:
    """Return the mean over concepts of the AP of their best features, or of a linear probe."""
    values = [(result.probe if probe else result.best.ap).value for result in results]
    return sum(values) / len(values) if values else None


def _series(match: MatchFacts) -> Series:
    return kind_series(match.kind, match.untrained)


def _one_k(matches: Sequence[MatchFacts]) -> list[MatchFacts]:
    """Return one method of each kind, all of the k at which most kinds compare; preferably of the largest size."""

    def members(k: int) -> dict[str, MatchFacts]:
        same = [match for match in matches if match.k == k]
        # The last of a kind is used, so the site of neurons comes first, then the smallest size.
        same.sort(key=lambda match: (match.matches.site.kind != "neurons", match.matches.size))
        return {_series(match).id: match for match in same}

    best = max((members(k) for k in dict.fromkeys(match.k for match in matches)), key=len)
    return [match for match in matches if any(match is member for member in best.values())]


def _features(blocks: Blocks) -> ReportFigure:
    methods = {path: _one_k(matches) for path, matches in blocks.items()}
    ks = "; ".join(f"{path}: k {matches[0].k}" for path, matches in methods.items())
    return ReportFigure(
        name="features",
        title="Features by the concept they detect best",
        caption="How many features reach an average precision: the further right a curve ends, the better its best features "
        f"are. One method of each kind, at the k where most can be compared ({ks}). It takes the place of the scores of figure 7 "
        "of arXiv 2505.24360, where a model judged explanations.",
        formula="features whose best AP over all concepts is at least this / features that fire",
        columns=("block", "method", "AP at least", "share of features", "features"),
        rows=[(path, m.name, *reached) for path, matches in methods.items() for m in matches for reached in _distribution(m)],
        drawings=[_features_plot(path, matches) for path, matches in methods.items()],
        legend=list({_series(match).id: _series(match) for matches in methods.values() for match in matches}.values()),
    )


def _distribution(match: MatchFacts) -> list[tuple[float, float, int]]:
    """Return each AP of the grid with the share and number of features that reach it, as long as one does."""
    aps = sorted(filter(math.isfinite, match.matches.features.ap))
    counts = [(ap, len(aps) - bisect_left(aps, ap)) for ap in GRID]
    return [(ap, features / len(aps), features) for ap, features in counts if features]


def _features_plot(path: str, matches: Sequence[MatchFacts]) -> Drawing:
    curves = []
    for match in matches:
        points = [
            PlotPoint(ap, share, f"{match.name}\nAP ≥ {ap:g}: {features:,} features, {percent(share)}")
            for ap, share, features in _distribution(match)
        ]
        curves.append(PlotCurve(_series(match), points, dots=False))
    x = Axis(label="average precision, at least", low=0.0, high=1.0)
    y = Axis(label="share of features", log=True, percent=True, high=1.0)
    about = f"Curves of {len(matches)} methods, falling from all features at AP 0 to the few best on the right."
    return plot(path, about, x, y, curves)


def _coverage(blocks: Blocks) -> ReportFigure:
    ordered = {path: sorted(own, key=lambda match: -(mean_ap(match.overall.results) or 0.0)) for path, own in blocks.items()}
    rows = []
    for path, matches in ordered.items():
        for match in matches:
            results, share = match.overall.results, match.overall.coverage
            detected, total = count_detected(results)
            rows.append((path, match.name, total, detected, *share, mean_ap(results), mean_ap(results, probe=True)))
    return ReportFigure(
        name="coverage",
        title="Concepts that one feature detects",
        caption="The share of concepts that one feature of a method detects, with the 95 % interval from resampling the held-out "
        "images, and the mean AP of the best features. The probe, a linear classifier for each concept on the whole activation, "
        "shows how much there is to detect.",
        formula="detected: AP ≥ 0.8 of one feature; all noise levels together",
        columns=("block", "method", "concepts", "detected", "share", "low", "high", "mean AP", "mean AP of probe"),
        rows=rows,
        drawings=[_coverage_chart(path, matches) for path, matches in ordered.items()],
        legend=(COVERAGE, MEAN, PROBE),
    )


def _coverage_chart(path: str, matches: Sequence[MatchFacts]) -> Drawing:
    ceiling = mean_ap(matches[0].overall.results, probe=True)
    point = PlotPoint(ceiling, tip=f"{PROBE_NAME} on the whole activation\nmean AP {number(ceiling)}")
    about = f"{len(matches)} methods by mean average precision, the highest first, and a linear probe above them."
    axis = Axis(label="share of concepts, and mean AP", low=0.0, high=1.0)
    return row_chart(path, about, axis, [ChartRow(PROBE_NAME, [(PROBE, point)]), *map(_coverage_row, matches)])


def _coverage_row(match: MatchFacts) -> ChartRow:
    level, colour = match.overall, _series(match).style.colour
    detected, total = count_detected(level.results)
    mean, (value, low, high) = mean_ap(level.results), level.coverage
    tip = f"{match.name}\n{detected} of {total} concepts: {percent(value)} ({percent(low)} to {percent(high)})"
    share = PlotPoint(value, tip=tip, low=low, high=high)
    ap = PlotPoint(mean, tip=f"{match.name}\nmean AP of the best features {number(mean)}")
    own = [
        (series._replace(style=series.style._replace(colour=colour)), point) for series, point in ((MEAN, ap), (COVERAGE, share))
    ]
    return ChartRow(match.name, own, f"{detected} of {total}")
