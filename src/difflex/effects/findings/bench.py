"""What experiments with steering are made with: concepts, captions, directions, and a model that draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple, final

from jaxtyping import Float
from torch import Tensor

from difflex.effects import JudgedGenerator, JudgeVerdict, SteeringTask, SteeringTrial, StrengthCurve, judge
from difflex.effects.findings.captions import ANYWHERE, Kind, concepts_of, task_of
from difflex.effects.findings.record import Findings
from difflex.records import Edit, Site
from difflex.steering import EditFeatures, SteeringHook, steering_hooks

__all__ = ["ExperimentBench", "FindingsConfig", "SteeringDirection", "groups_of"]


class SteeringDirection(NamedTuple):
    """A direction that leads to a concept."""

    told: str
    features: EditFeatures


@final
@dataclass(frozen=True, kw_only=True)
class FindingsConfig:
    """How much is tried."""

    groups: tuple[str, ...]
    each: int
    """Concepts of each group."""
    trials: int
    """Images for each concept and condition."""
    counts: tuple[int, ...]
    """Of pairs, rising."""
    strengths: tuple[float, ...]
    """Rising; in lengths of a mean activation."""

    @property
    def inner(self) -> tuple[float, ...]:
        """The strengths but the first and the last, where there are three or more."""
        return self.strengths[1:-1] or self.strengths

    def concepts(self, among: Sequence[str] | None = None) -> list[str]:
        """The concepts of the groups, or of those groups that are `among` the given ones."""
        groups = [group for group in self.groups if among is None or group in among]
        return [concept for group in groups for concept in concepts_of(group, self.each)]


@final
class ExperimentBench:
    """Where experiments are made; what several of them need is judged once."""

    def __init__(
        self,
        *,
        site: Site,
        scope: FindingsConfig,
        parameters: int,
        drawn: Callable[[int | None], JudgedGenerator],
        contrasts: Callable[[str], Mapping[int, SteeringDirection]],
        feature: Callable[[str], SteeringDirection | None],
        other: Findings | None = None,
    ) -> None:
        """`drawn` by the number of steps of a run, `contrasts` and `feature` of a concept; `other` is what another model gave."""
        self.site, self.scope, self.parameters, self.other = site, scope, parameters, other
        self.drawn, self.contrasts, self.feature = cache(drawn), cache(contrasts), cache(feature)
        self.base = cache(self._base)
        self._unedited = dict[tuple[str, Kind, int | None], float]()

    def contrast(self, concept: str) -> SteeringDirection:
        """By all pairs that there are."""
        return self.contrasts(concept)[max(self.scope.counts)]

    def best_way(self, concept: str) -> SteeringDirection:
        """The feature that detects a concept, or else its contrast."""
        return self.feature(concept) or self.contrast(concept)

    def _base(self, concept: str) -> StrengthCurve:
        """The contrast at all strengths on captions like those of its pairs."""
        return self.curves(concept, "alike", {"alike": self.contrast(concept)}, self.scope.strengths)[0]

    def alike(self, concept: str) -> StrengthCurve:
        """The same at the inner strengths."""
        base = self.base(concept)
        return replace(base, points=tuple(point for point in base.points if point.strength in self.scope.inner))

    def conditions(self, concept: str, kinds: Sequence[Kind], way: SteeringDirection) -> list[StrengthCurve]:
        """A curve for each kind of captions, so that one can be held against another.

        Unedited images of captions that ask for less have less loss: by their own, images of one kind would be called broken
        at a loss that is not for another. So the losses of all are over the largest that unedited images of any kind have.
        """
        own = way is self.contrast(concept)
        curves = [
            self.alike(concept) if kind == "alike" and own else self.curves(concept, kind, {kind: way})[0] for kind in kinds
        ]
        unedited = [self._unedited[concept, kind, None] for kind in kinds]
        return [_times(curve, loss / max(unedited)) for curve, loss in zip(curves, unedited, strict=True)]

    def curves(
        self,
        concept: str,
        kind: Kind,
        ways: Mapping[str, SteeringDirection],
        strengths: Sequence[float] | None = None,
        run: int | None = None,
        steps: Mapping[str, tuple[int, int]] | None = None,
    ) -> list[StrengthCurve]:
        """A curve for each of `ways` by name, on captions of a kind; in a run of so many steps, at some of them alone."""
        own = steps or {}
        methods = {
            name: (way.told, self._adding(way.features, own.get(name)), tuple(strengths or self.scope.inner))
            for name, way in ways.items()
        }
        drawn, losses = self.drawn(run), list[float]()

        def noted(images: Float[Tensor, "image channel row column"]) -> Float[Tensor, " image"]:
            found = drawn.losses(images)
            losses.append(float(found.mean()))
            return found

        seeing = _anywhere(drawn) if kind in ANYWHERE else drawn
        curves = list(judge(task_of(concept, kind, self.scope.trials), methods, seeing._replace(losses=noted)))
        self._unedited[concept, kind, run] = losses[0]  # unedited images are looked at first
        return curves

    def _adding(
        self, features: EditFeatures, steps: tuple[int, int] | None
    ) -> Callable[[SteeringTrial, float], tuple[SteeringTrial, SteeringHook | None]]:
        plain = Edit(operation="add", site=self.site, unit="norm", steps=steps)

        def added(trial: SteeringTrial, strength: float) -> tuple[SteeringTrial, SteeringHook | None]:
            region = None if self.site.stream == "text" else trial.region
            edit = replace(plain, strength=strength, region=region)
            return trial, steering_hooks([edit], lambda _: features)[0]

        return added


def _anywhere(drawn: JudgedGenerator) -> JudgedGenerator:
    """The same, but that the concept counts wherever it is seen."""

    def verdicts(
        task: SteeringTask, trials: Sequence[SteeringTrial], images: Float[Tensor, "image channel row column"]
    ) -> Sequence[JudgeVerdict]:
        return drawn.verdicts(task, [trial._replace(region=None) for trial in trials], images)

    return drawn._replace(verdicts=verdicts)


def _times(curve: StrengthCurve, factor: float) -> StrengthCurve:
    """The curve with so many times the loss."""
    return replace(curve, points=tuple(replace(point, quality=factor * point.quality) for point in curve.points))


def groups_of(curves: Sequence[StrengthCurve]) -> dict[str, list[StrengthCurve]]:
    """Curves by the group of their concept."""
    return {group: [each for each in curves if each.group == group] for group in dict.fromkeys(each.group for each in curves)}
