"""The findings of arXiv 2505.03189 by the measurements of language models, each with a rule over behaviours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import ClassVar, final

from difflex.effects import finding_rules as rules
from difflex.effects.activation_addition import AdditionResults, BehaviourResult
from difflex.effects.finding_rules import FindingLine, RuleCondition, Ruling, Verdict
from difflex.effects.findings import rule_knee
from difflex.json_records import JsonRecord

__all__ = ["AdditionFinding", "AdditionFindings", "find_findings"]

CERTAINTY = (
    "Decided by means over behaviours whose 95 % intervals (Student's t; wider where a rule has several conditions: Bonferroni) "
    "leave the threshold out."
)


@final
@dataclass(frozen=True, kw_only=True)
class AdditionFinding:
    """A claim of the paper, the rule by which it holds, and the result."""

    paper: ClassVar[str] = "arXiv 2505.03189"
    name: str
    claim: str
    rule: str
    verdict: Verdict
    reason: str
    x: str
    y: str
    lines: tuple[FindingLine, ...]

    @property
    def numbers(self) -> dict[str, float]:
        """The points of the lines by what they are of."""
        points = ((line.name, x, y) for line in self.lines for x, y in zip(line.x, line.y, strict=True))
        return {f"{line}: {self.y} at {self.x} {x:g}": y for line, x, y in points}


@final
@dataclass(frozen=True, kw_only=True)
class AdditionFindings(JsonRecord):
    """The findings of a model."""

    FORMAT: ClassVar[int] = 1
    COMMAND: ClassVar[str] = "cae"

    model: str
    findings: tuple[AdditionFinding, ...]


def find_findings(results: AdditionResults, others: Sequence[AdditionResults] = ()) -> AdditionFindings:
    """Return the findings of a model; those on sizes compare it with `others`."""
    makers = (_distribution, _samples, _adversarial, _quality)
    return AdditionFindings(model=results.model, findings=(*(make(results) for make in makers), _size(results, others)))


def _finding(
    name: str, claim: str, condition: str, ruling: Ruling, axes: tuple[str, str], *lines: FindingLine
) -> AdditionFinding:
    rule = f"{condition} {CERTAINTY}"
    ruling = ruling._replace(reason=ruling.reason.replace("concepts", "behaviours"))
    return AdditionFinding(name=name, claim=claim, rule=rule, **ruling._asdict(), x=axes[0], y=axes[1], lines=lines)


def _line(name: str, x: Sequence[float], rows: Sequence[Sequence[float]]) -> FindingLine:
    """Return the line of the means of `rows`, one for each behaviour."""
    return rules.line_of_columns(name, x, list(zip(*rows, strict=True)))


def _inside(results: AdditionResults) -> list[float]:
    """Return the shift of answers at the chosen strength by behaviour."""
    strengths = results.config.strengths
    return [each.by_strength[strengths.index(each.strength)] for each in results.behaviours]


def _distribution(results: AdditionResults) -> AdditionFinding:
    kinds = [kind for kind in results.behaviours[0].free]
    free = {kind: [each.free[kind] for each in results.behaviours] for kind in kinds}
    if not free:
        ruling = Ruling("cannot be said", "no parser judges free text of these questions; `drawn` has one.")
    else:
        ruling = rules.rule_half(
            "shift on questions like those of the contrast", _inside(results), {f"in {k}": v for k, v in free.items()}
        )
    lines = [_line("questions", results.config.strengths, [each.by_strength for each in results.behaviours])]
    return _finding(
        "distribution",
        "Adding a contrast works on inputs like those it was found on, and fails on others.",
        "In free text of every kind, the shift is under half of that on questions like those of the contrast.",
        ruling,
        ("strength", "shift of answers"),
        *lines,
    )


def _samples(results: AdditionResults) -> AdditionFinding:
    counts = results.config.counts
    shifts = {count: [each.by_count[i] for each in results.behaviours] for i, count in enumerate(counts)}
    return _finding(
        "samples",
        "The effect rises with the number of pairs, and flattens at about 80.",
        "From 20 to 80 pairs the shift rises by more than 0.05, and from 80 to the most by less.",
        rule_knee(shifts),
        ("pairs", "shift of answers"),
        _line("all behaviours", counts, [each.by_count for each in results.behaviours]),
    )


def _adversarial(results: AdditionResults) -> AdditionFinding:
    attacks = [each.adversarial for each in results.behaviours]
    works = [each.steered - each.plain for each in attacks]
    inverted = [each.plain - each.adversarial for each in attacks]
    names = ("plain", "steered", "adversarial", "unsteered", "random")
    means = {name: fmean(getattr(each, name) for each in attacks) for name in names}
    fluency = fmean(each.cross_entropy for each in attacks), fmean(each.random_cross_entropy for each in attacks)
    numbers = (
        f"probability of matching answers {means['plain']:.2f}, steered {means['steered']:.2f}, steered with the words "
        f"{means['adversarial']:.2f} ({means['random']:.2f} with random words; {means['unsteered']:.2f} with the words alone); "
        f"cross-entropy of the words {fluency[0]:.2f} nats, of random ones {fluency[1]:.2f}; {len(attacks)} behaviours"
    )
    return _finding(
        "adversarial",
        "Inputs can be found that invert the behaviour that is steered for.",
        "Steering raises the probability of matching answers, and with the words that were found it is below that without edit.",
        rules.rule([RuleCondition(works), RuleCondition(inverted)], numbers),
        ("condition", "probability of matching answers"),
        _line(", ".join(names), range(len(names)), [[getattr(each, name) for name in names] for each in attacks]),
    )


def _excess(result: BehaviourResult) -> list[float]:
    """Return the rise of the cross-entropy of neutral text by strength, in nats."""
    return [loss - result.losses[0] for loss in result.losses[1:]]


def _quality(results: AdditionResults) -> AdditionFinding:
    columns = list(zip(*map(_excess, results.behaviours), strict=True))
    above = [RuleCondition(column) for column in columns]
    rising = [RuleCondition([b - a for a, b in zip(*pair, strict=True)]) for pair in pairwise(columns)]
    strengths = results.config.strengths
    numbers = ", ".join(f"{fmean(column):.3f} at {strength:g}" for strength, column in zip(strengths, columns, strict=True))
    plain = fmean(each.losses[0] for each in results.behaviours)
    return _finding(
        "quality",
        "Adding a contrast always raises the perplexity of neutral text, and the more the stronger it is.",
        "At every strength the cross-entropy of neutral text is above that without edit, and rises to the next.",
        rules.rule(above + rising, f"cross-entropy {plain:.3f} nats without edit, rise {numbers}"),
        ("strength", "rise of the cross-entropy, in nats"),
        _line(results.model, strengths, [_excess(each) for each in results.behaviours]),
    )


def _size(results: AdditionResults, others: Sequence[AdditionResults]) -> AdditionFinding:
    claim = "A larger model loses less to adding a contrast."
    condition = "The mean rise of the cross-entropy over the strengths is smaller in the largest model than in the smallest."
    axes = ("strength", "rise of the cross-entropy, in nats")
    models = sorted([results, *others], key=lambda each: each.parameters)
    lines = [_line(each.model, each.config.strengths, [_excess(b) for b in each.behaviours]) for each in models]
    small, large = models[0], models[-1]
    shared = {each.name for each in small.behaviours} & {each.name for each in large.behaviours}
    if small.parameters == large.parameters or not shared or small.config.strengths != large.config.strengths:
        reason = "there are no models of two sizes with the same behaviours and strengths. --other-model names another one."
        return _finding("size", claim, condition, Ruling("cannot be said", reason), axes, *lines)
    rise = [{each.name: fmean(_excess(each)) for each in model.behaviours if each.name in shared} for model in (small, large)]
    numbers = ", ".join(
        f"{fmean(values.values()):.3f} nats with {model.parameters / 1e6:.3g} million parameters"
        for model, values in zip((small, large), rise, strict=True)
    )
    ruling = rules.rule([RuleCondition([rise[0][name] - rise[1][name] for name in sorted(shared)])], f"mean rise {numbers}")
    return _finding("size", claim, condition, ruling, axes, *lines)
