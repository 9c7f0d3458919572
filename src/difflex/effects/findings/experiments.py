"""The experiments: five findings of arXiv 2505.03189 and two of arXiv 2505.24360, each held to a rule."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import NamedTuple

from difflex.effects import StrengthCurve, StrengthPoint
from difflex.effects.findings.bench import ExperimentBench, FindingsConfig, groups_of
from difflex.effects.findings.captions import Kind
from difflex.effects.findings.record import Finding, FindingLine
from difflex.effects.findings.rules import (
    KEPT,
    SURELY,
    RuleCondition,
    Ruling,
    are_above,
    gain,
    line,
    line_of,
    rises_above_one,
    ruled,
    under_half,
)
from difflex.miniature.world import OBJECT_GROUPS

__all__ = ["EXPERIMENTS", "finding", "workload"]

KNEE, BEFORE, FLAT = 80, 20, 0.05
"""Pairs at the knee and before it; a gain of less than this is none."""
RUN, FIRST = 7, 5
"""Steps of a run, and how many of them are steered, in arXiv 2505.24360."""
STRENGTH, ADDED = "strength, in lengths of a mean activation", "success above that without the edit"
LOSS = "loss over that of unedited images"


class ExperimentOutcome(NamedTuple):
    """What an experiment gave."""

    ruling: Ruling
    numbers: dict[str, float]
    x: str
    y: str
    lines: tuple[FindingLine, ...]
    curves: tuple[StrengthCurve, ...]


def pairs(bench: ExperimentBench) -> ExperimentOutcome:
    """A contrast from more and more pairs."""
    counts = bench.scope.counts
    by_concept: list[list[StrengthCurve]] = []
    for concept in bench.scope.concepts():
        fewer = {f"{count} pairs": way for count, way in bench.contrasts(concept).items() if count != max(counts)}
        at_most = replace(bench.alike(concept), method=f"{max(counts)} pairs")
        by_concept.append([*bench.curves(concept, "alike", fewer), at_most])
    curves = [curve for each in by_concept for curve in each]
    gains = {count: [gain(curve) for curve in curves if curve.method == f"{count} pairs"] for count in counts}
    lines = [line_of("all concepts", counts, [*gains.values()])]
    for group in groups_of(curves):
        own = [[gain(each) for each in curves if (each.group, each.method) == (group, f"{count} pairs")] for count in counts]
        lines.append(line_of(group, counts, own))
    numbers = {f"gain of {count} pairs": fmean(values) for count, values in gains.items()}
    return ExperimentOutcome(_knee(gains), numbers, "pairs", "gain", tuple(lines), tuple(curves))


def _knee(gains: Mapping[int, Sequence[float]]) -> Ruling:
    """Whether the gain still rises before the knee and no longer after it."""
    most = max(gains)
    if KNEE not in gains or BEFORE not in gains or most <= KNEE:
        return Ruling("cannot be said", f"A knee at {KNEE} takes contrasts of {BEFORE}, {KNEE} and more pairs: name them.")
    rises = RuleCondition([b - a for a, b in zip(gains[BEFORE], gains[KNEE], strict=True)], FLAT)
    flat = RuleCondition([a - b for a, b in zip(gains[KNEE], gains[most], strict=True)], -FLAT)
    means = {count: fmean(values) for count, values in gains.items()}
    enough = min(count for count, value in means.items() if value >= means[most] - FLAT)
    told = ", ".join(f"{value:.2f} by {count}" for count, value in means.items())
    return ruled(are_above([rises, flat]), f"gain {told} pairs; {enough} come within {FLAT} of {most}")


def distribution(bench: ExperimentBench) -> ExperimentOutcome:
    """Captions of other kinds than those of the pairs."""
    kinds: tuple[Kind, ...] = ("alike", "other scenery", "two objects")
    by_concept = [bench.conditions(concept, kinds, bench.contrast(concept)) for concept in bench.scope.concepts()]
    others = {"other scenery": "with other scenery", "two objects": "with two objects"}
    return _compared(kinds, by_concept, "gain on captions like the pairs", others)


def adversarial(bench: ExperimentBench) -> ExperimentOutcome:
    """Captions that name another concept again and again, beside captions that leave it open."""
    concepts = bench.scope.concepts([group for group in bench.scope.groups if group != "shape"])
    by_concept = [bench.conditions(concept, ("unsaid", "against"), bench.contrast(concept)) for concept in concepts]
    others = {"against": "where they argue against it"}
    return _compared(("unsaid", "against"), by_concept, "gain where captions leave it open", others)


def quality(bench: ExperimentBench) -> ExperimentOutcome:
    """What edits cost by their strength."""
    curves = [bench.base(concept) for concept in bench.scope.concepts()]
    lines = [line("all concepts", curves, _loss), *(line(group, each, _loss) for group, each in groups_of(curves).items())]
    numbers = {f"loss at {x:g}": y for x, y in zip(lines[0].x, lines[0].y, strict=True)}
    return ExperimentOutcome(rises_above_one(curves), numbers, STRENGTH, LOSS, tuple(lines), tuple(curves))


def size(bench: ExperimentBench) -> ExperimentOutcome:
    """What edits cost in a larger and in a smaller model."""
    mine = [bench.base(concept) for concept in bench.scope.concepts()]
    lines = [line(_millions(bench.parameters), mine, _loss)]
    there = bench.other.of("quality") if bench.other is not None else None
    theirs = {curve.concept: curve for curve in there.curves} if there is not None else {}
    shared = [
        (curve, theirs[curve.concept]) for curve in mine if curve.concept in theirs and _shared(curve, theirs[curve.concept])
    ]
    if bench.other is None or there is None or not shared or bench.other.parameters == bench.parameters:
        why = (
            "Only one size of the model is at hand"
            if bench.other is None
            else "The other study has no other size, or nothing alike"
        )
        ruling = Ruling("cannot be said", f"{why}. --other names a study of another size with findings of the same concepts.")
        return ExperimentOutcome(ruling, {}, STRENGTH, LOSS, tuple(lines), tuple(mine))
    excess = [(_mean_loss(a, b), _mean_loss(b, a)) for a, b in shared]
    smaller_first = [pair if bench.parameters < bench.other.parameters else pair[::-1] for pair in excess]
    names = _millions(bench.parameters), _millions(bench.other.parameters)
    numbers = {f"loss, {name}": fmean([pair[i] for pair in excess]) for i, name in enumerate(names)}
    told = "mean loss " + ", ".join(f"{value:.2f} of {name}" for name, value in zip(names, numbers.values(), strict=True))
    ruling = ruled(are_above([RuleCondition([small - large for small, large in smaller_first])]), told)
    lines.append(line(_millions(bench.other.parameters), list(there.curves), _loss))
    return ExperimentOutcome(ruling, numbers, STRENGTH, LOSS, tuple(lines), tuple(curve for pair in shared for curve in pair))


def related(bench: ExperimentBench) -> ExperimentOutcome:
    """Prompts with an object that could have the concept, and prompts with none."""
    kinds: tuple[Kind, ...] = ("an object", "no object")
    by_concept = [bench.conditions(concept, kinds, bench.best_way(concept)) for concept in bench.scope.concepts(OBJECT_GROUPS)]
    # What is kept is no test here: of an image without an object there is less that could be.
    return _compared(kinds, by_concept, "gain with an object in the prompt", {"no object": "with none"}, kept=0)


def steps(bench: ExperimentBench) -> ExperimentOutcome:
    """All steps of a run steered, and the first of them."""
    names = ("all steps", f"first {FIRST} of {RUN}")
    by_concept = []
    for concept in bench.scope.concepts():
        ways = dict.fromkeys(names, bench.best_way(concept))
        by_concept.append(bench.curves(concept, "alike", ways, run=RUN, steps={names[1]: (0, FIRST)}))
    curves = {name: [each[i] for each in by_concept] for i, name in enumerate(names)}
    excess = {name: [_mean_loss(curve) - 1 for curve in each] for name, each in curves.items()}
    told = "loss above that of unedited images with all steps"
    ruling = under_half(told, excess[names[0]], {f"with the {names[1]}": excess[names[1]]})
    lines = tuple(line(name, each, _loss) for name, each in curves.items())
    numbers = {f"excess loss, {name}": fmean(values) for name, values in excess.items()}
    numbers |= {f"gain, {name}": fmean([gain(curve) for curve in each]) for name, each in curves.items()}
    return ExperimentOutcome(ruling, numbers, STRENGTH, LOSS, lines, tuple(curve for each in curves.values() for curve in each))


def _compared(
    kinds: Sequence[str], by_concept: Sequence[Sequence[StrengthCurve]], first: str, others: Mapping[str, str], kept: float = KEPT
) -> ExperimentOutcome:
    """Whether the gain on captions of other kinds is under half of that on the first; `first` and `others` say them in words.

    Images that show the concept unedited leave less to be gained, all of them nothing: so gains are shares of that.
    """
    told = [each for each in by_concept if all(curve.without < 1 for curve in each)]
    curves = {kind: [each[i] for each in told] for i, kind in enumerate(kinds)}
    gains = {kind: [gain(curve, kept) / (1 - curve.without) for curve in each] for kind, each in curves.items()}
    ruling = under_half(first, gains[kinds[0]], {words: gains[kind] for kind, words in others.items()})
    lines = tuple(line(kind, each, _added) for kind, each in curves.items())
    numbers = {f"gain, {kind}": fmean(values) for kind, values in gains.items() if values}
    return ExperimentOutcome(ruling, numbers, STRENGTH, ADDED, lines, tuple(curve for each in curves.values() for curve in each))


def _added(curve: StrengthCurve, point: StrengthPoint) -> float:
    return point.success - curve.without


def _loss(curve: StrengthCurve, point: StrengthPoint) -> float:
    return point.quality


def _shared(curve: StrengthCurve, other: StrengthCurve) -> set[float]:
    """The strengths that both have."""
    return {point.strength for point in curve.points} & {point.strength for point in other.points}


def _mean_loss(curve: StrengthCurve, other: StrengthCurve | None = None) -> float:
    """Over the strengths that `other` has, too."""
    shared = _shared(curve, other or curve)
    return fmean(point.quality for point in curve.points if point.strength in shared)


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:.3g} million parameters"


class Experiment(NamedTuple):
    """A claim, when it holds, and how it is tried."""

    claim: str
    paper: str
    when: str
    run: Callable[[ExperimentBench], ExperimentOutcome]

    @property
    def rule(self) -> str:
        """When it holds, and how surely."""
        return f"{self.when} {SURELY}"


ALIKE = (
    "Gains are shares of what could be gained above unedited images. Images of all these captions count as broken from one "
    "loss on, 1.5 times the largest that unedited ones of a kind have."
)
CONTRASTS, FEATURES = "arXiv 2505.03189", "arXiv 2505.24360"
EXPERIMENTS = {
    "pairs": Experiment(
        f"The effect of a contrast rises with the number of its pairs, and flattens at about {KNEE}.",
        CONTRASTS,
        f"From {BEFORE} to {KNEE} pairs the gain rises by more than {FLAT}, and from {KNEE} to the most by less.",
        pairs,
    ),
    "distribution": Experiment(
        "A contrast works on prompts like those it was found on, and fails on others.",
        CONTRASTS,
        "Both with other grounds and styles and with two objects the gain is under half of that on captions like the pairs. "
        + ALIKE,
        distribution,
    ),
    "adversarial": Experiment(
        "Prompts that argue against the edit undo it.",
        CONTRASTS,
        "Where captions name another concept of the group three times, the gain is under half of that where they name none. "
        + ALIKE,
        adversarial,
    ),
    "quality": Experiment(
        "Steering costs quality at every strength, and more the stronger it is.",
        CONTRASTS,
        "At every strength the unedited model's loss on edited images is above that on unedited ones, and rises to the next.",
        quality,
    ),
    "size": Experiment(
        "A larger model loses less quality to steering.",
        CONTRASTS,
        "Over the strengths and concepts that both have, the mean loss of the larger model is below that of the smaller.",
        size,
    ),
    "related": Experiment(
        "A feature has an effect only where the prompt is related to it.",
        FEATURES,
        "On captions that name a ground and a style and no object the gain is under half of that on the same captions with an "
        "object; concepts of objects alone. Both are edited alike, where the one says that the object is; the concept "
        "counts wherever it is seen, and what else is kept does not count. " + ALIKE,
        related,
    ),
    "steps": Experiment(
        f"Steering all steps makes artefacts that steering the first {FIRST} of {RUN} does not.",
        FEATURES,
        f"What the loss is above that of unedited images, mean over strengths, is with the first {FIRST} of {RUN} steps under "
        "half of what it is with all.",
        steps,
    ),
}
"""By name, in the order in which they are made."""


BASED = ("pairs", "distribution", "quality", "size")
"""Those that share the contrast at all strengths."""


def workload(names: Collection[str], scope: FindingsConfig) -> dict[int | None, int]:
    """How many images the experiments called `names` draw and judge, by the steps of a run; None is the model's own number.

    What several of them share counts once.
    """
    everything, things = len(scope.concepts()), len(scope.concepts(OBJECT_GROUPS))
    sayable = len(scope.concepts([group for group in scope.groups if group != "shape"]))
    inner, fewer = len(scope.inner), len(scope.counts) - 1
    batches = {
        "pairs": everything * (1 + fewer * inner),
        "distribution": 2 * everything * (1 + inner),
        "adversarial": 2 * sayable * (1 + inner),
        "related": 2 * things * (1 + inner),
    }
    shared = everything * (1 + len(scope.strengths)) if set(BASED) & set(names) else 0
    own = shared + sum(batches.get(name, 0) for name in names)
    return {None: own * scope.trials, RUN: everything * (1 + 2 * inner) * scope.trials if "steps" in names else 0}


def finding(name: str, bench: ExperimentBench, made_from: Mapping[str, str | int | float]) -> Finding:
    """The finding of the experiment called `name`."""
    made = EXPERIMENTS[name]
    outcome = made.run(bench)
    verdict, because = outcome.ruling
    return Finding(
        name=name,
        claim=made.claim,
        paper=made.paper,
        rule=made.rule,
        verdict=verdict,
        because=because,
        numbers=outcome.numbers,
        x=outcome.x,
        y=outcome.y,
        lines=outcome.lines,
        curves=outcome.curves,
        made_from=made_from,
    )
