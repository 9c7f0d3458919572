"""Where, when and how strongly to steer towards a concept, chosen on prompts of their own: sites, operation, steps and dose."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import NamedTuple

from torch import Tensor

from difflex.choices import Operation
from difflex.effects.inputs import concept_matches
from difflex.effects.judging import JudgedTask, SteeringMethod, StrengthPoint
from difflex.records import Edit
from difflex.steering import EditFeatures, StudyEditor
from difflex.study import DictionaryRef

TARGET, KEPT, WHOLE = 0.95, 0.93, 1.4
"""The success at which a dose is enough, the share of all else that it must keep, and the loss over that of unedited images below
which it must stay: more than is asked of the judged images, as what is just enough for a few may be too little for others."""
MOST, HALVINGS = 3.0, 5
"""The largest dose, in peaks, and how often the range of doses is halved."""
COSINE = 0.3
"""The least cosine of decoder directions at which features of two sites count as the same."""


class SitedFeature(NamedTuple):
    """A feature of a concept at a site."""

    place: DictionaryRef
    feature: int
    presence: float
    """The average precision with which it detects the concept, or its cosine to the feature that does."""


class Placement(NamedTuple):
    """Where a plan edits."""

    name: str
    edits: tuple[Edit, ...]
    """That add, at a dose of 1."""
    can_set: bool
    """Whether they may set codes as well."""


class EditPlan(NamedTuple):
    """Edits that were found on prompts of their own."""

    name: str
    edits: tuple[Edit, ...]
    """At a dose of 1."""
    point: StrengthPoint
    """The chosen dose, and its effect on those prompts."""


def sited_features(editor: StudyEditor, concept: str, place: DictionaryRef, feature: int, min_ap: float) -> list[SitedFeature]:
    """Return the feature that stands for a concept at each site of a study: `feature` of `place`, then by falling presence.

    At other sites it is the one that detects the concept best, with an average precision of `min_ap` or more; where no feature is
    known to, the one whose decoder direction has the largest cosine with that of `feature`, from COSINE on.
    """
    direction = editor.dictionary(place).directions[feature].float()
    best: dict[str, SitedFeature] = {}
    for other in editor.study.dictionaries():
        is_alike = other.site.stream == place.site.stream and other.site.kind == place.site.kind
        if other.site.path == place.site.path or not is_alike:
            continue
        found = _matched(editor, concept, other, min_ap) or _similar(editor, other, direction)
        if found is not None and found.presence > (best[other.site.path].presence if other.site.path in best else 0.0):
            best[other.site.path] = found
    return [SitedFeature(place, feature, 1.0), *sorted(best.values(), key=lambda item: -item.presence)]


def _matched(editor: StudyEditor, concept: str, place: DictionaryRef, min_ap: float) -> SitedFeature | None:
    matches = concept_matches(editor.study, place)
    results = () if matches is None else matches.clearest_level.results
    best = [result.best for result in results if result.concept.name == concept and result.best.ap.value >= min_ap]
    return SitedFeature(place, best[0].features[0], best[0].ap.value) if best else None


def _similar(editor: StudyEditor, place: DictionaryRef, direction: Tensor) -> SitedFeature | None:
    dictionary = editor.dictionary(place)
    if dictionary.width != len(direction):
        return None
    cosine, feature = (dictionary.directions.float() @ direction.to(dictionary.device)).max(0)
    return SitedFeature(place, int(feature), float(cosine)) if float(cosine) >= COSINE else None


def plan_edits(
    tuning: JudgedTask, placements: Sequence[Placement], features: Callable[[Edit], EditFeatures], steps: int
) -> EditPlan:
    """Return the edits whose least sufficient dose has the largest effect on the images of `tuning`.

    Plans are tried in order until one suffices: one placement after another, each by adding, then by setting codes, so that
    tokens move only as far as the concept is missing; at all steps and, with several sites, at the first half of them.
    """
    best: EditPlan | None = None
    for name, edits in _plans(placements, steps):
        dosed = find_dose(partial(tuning.point, SteeringMethod.of_edits(name, edits, features, ())))
        plan = EditPlan(name, tuple(edits), dosed)
        best = plan if best is None or _effect(plan) > _effect(best) else best
        if _is_intact(dosed) and dosed.success >= TARGET:
            break
    assert best is not None
    return best


def _plans(placements: Sequence[Placement], steps: int) -> Iterator[tuple[str, list[Edit]]]:
    """Yield the edits of each plan, at a dose of 1, with its name."""
    for name, edits, can_set in placements:
        # One site at few steps has less effect than at all of them.
        ends = [steps // 2] if len(edits) > 1 and steps > 1 and edits[0].steps is None else []
        operations: tuple[Operation, ...] = ("add", "set") if can_set else ("add",)
        for end, operation in product([None, *ends], operations):
            early = {} if end is None else {"steps": (0, end)}
            when = "" if end is None else f", steps 0:{end}"
            yield f"{operation} at {name}{when}", [replace(edit, operation=operation, **early) for edit in edits]


def _effect(plan: EditPlan) -> tuple[bool, float, float]:
    return _is_intact(plan.point), round(plan.point.success, 6), plan.point.specificity


def find_dose(point: Callable[[float], StrengthPoint], most: float = MOST) -> StrengthPoint:
    """Return the least dose up to `most` that reaches the success TARGET without loss, by bisection: success rises with the dose.

    If none does, return the one with the highest success of those without loss; if none is without, the smallest that was tried.
    """
    low, high, tried = 0.0, most, list[StrengthPoint]()
    for _ in range(HALVINGS):
        tried.append(point((low + high) / 2))
        if _is_intact(tried[-1]) and tried[-1].success < TARGET:
            low = tried[-1].strength
        else:
            high = tried[-1].strength
    intact = [item for item in tried if _is_intact(item)]
    return max(intact, key=lambda item: (item.success, -item.strength)) if intact else min(tried, key=lambda item: item.strength)


def _is_intact(point: StrengthPoint) -> bool:
    return point.specificity >= KEPT and point.quality < WHOLE
