"""The bench of the experiments: concepts, directions and a model, whose results several experiments share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import final

from jaxtyping import Float
from torch import Tensor

from difflex.effects.drawn_world import CaptionKind, caption_region, drawn_generator, group_of, kind_task, scenery_pairs
from difflex.effects.finding_rules import Findings, FindingsConfig
from difflex.effects.inputs import ModelFunctions, concept_matches
from difflex.effects.judging import (
    Images,
    JudgedGenerator,
    JudgeVerdict,
    SteeringMethod,
    SteeringTask,
    SteeringTrial,
    StrengthCurve,
    judge_methods,
)
from difflex.errors import StaleWork
from difflex.records import Edit, Site
from difflex.steering import EditFeatures, StudyEditor
from difflex.steering.contrast import contrast_features
from difflex.study import DictionaryRef, Study

MIN_AP = 0.5
"""A feature of this average precision or more is used for a concept; else its contrast is."""
ANYWHERE = ("an object", "no object")
"""Kinds of captions whose images are judged as a whole: one of them names no object, so that it may appear anywhere."""


@final
class ExperimentBench:
    """The inputs of experiments; results that several experiments need are judged once."""

    def __init__(
        self,
        *,
        site: Site,
        config: FindingsConfig,
        parameters: int,
        generator: Callable[[int | None], JudgedGenerator],
        contrasts: Callable[[str], Mapping[int, EditFeatures]],
        feature: Callable[[str], EditFeatures | None],
        other: Findings | None = None,
    ) -> None:
        """Take a generator by the steps of a run, the directions of a concept, and the findings of another model."""
        self.site, self.config, self.parameters, self.other = site, config, parameters, other
        self.generator, self.contrasts, self.feature = cache(generator), cache(contrasts), cache(feature)
        self.base = cache(self._base)
        self._unedited = dict[tuple[str, CaptionKind, int | None], float]()

    def contrast(self, concept: str) -> EditFeatures:
        """Return the contrast on the largest number of pairs."""
        return self.contrasts(concept)[max(self.config.pairs)]

    def best_direction(self, concept: str) -> EditFeatures:
        """Return the feature that detects a concept, or else its contrast."""
        return self.feature(concept) or self.contrast(concept)

    def _base(self, concept: str) -> StrengthCurve:
        """Return the contrast at all strengths on captions like those of its pairs."""
        return self.curves(concept, "alike", {"alike": self.contrast(concept)}, self.config.strengths)[0]

    def alike(self, concept: str) -> StrengthCurve:
        """Return the same at the inner strengths."""
        base = self.base(concept)
        return replace(base, points=tuple(point for point in base.points if point.strength in self.config.inner))

    def compare_kinds(self, concept: str, kinds: Sequence[CaptionKind], direction: EditFeatures) -> list[StrengthCurve]:
        """Return a curve for each kind of captions, with comparable losses.

        Unedited images of captions that ask for less have less loss, so that images of one kind would count as broken at a
        loss that is fine for another. So all losses are over the largest that unedited images of any kind have.
        """
        is_contrast = direction is self.contrast(concept)
        curves = [
            self.alike(concept) if kind == "alike" and is_contrast else self.curves(concept, kind, {kind: direction})[0]
            for kind in kinds
        ]
        unedited = [self._unedited[concept, kind, None] for kind in kinds]
        return [_scale_losses(curve, loss / max(unedited)) for curve, loss in zip(curves, unedited, strict=True)]

    def curves(
        self,
        concept: str,
        kind: CaptionKind,
        directions: Mapping[str, EditFeatures],
        strengths: Sequence[float] | None = None,
        run: int | None = None,
        edit_steps: Mapping[str, tuple[int, int]] | None = None,
    ) -> list[StrengthCurve]:
        """Return a curve for each of `directions` by name, on captions of a kind.

        `run` is the number of steps of a run (None: the model's own); `edit_steps` are the steps to edit, by name (else all).
        """
        edit = Edit(operation="add", site=self.site, unit="norm")
        methods = {
            name: SteeringMethod.adding(
                replace(edit, steps=(edit_steps or {}).get(name)), direction, strengths or self.config.inner
            )
            for name, direction in directions.items()
        }
        generator, means = self.generator(run), list[float]()

        def losses(images: Images) -> Float[Tensor, " image"]:
            values = generator.losses(images)
            means.append(float(values.mean()))
            return values

        judged = _judge_anywhere(generator) if kind in ANYWHERE else generator
        task = kind_task(concept, kind, self.config.trials)
        curves = list(judge_methods(task, methods, judged._replace(losses=losses)))
        self._unedited[concept, kind, run] = means[0]  # unedited images come first
        return curves


def _judge_anywhere(generator: JudgedGenerator) -> JudgedGenerator:
    """Return the generator with a judge that looks for the concept in the whole image."""

    def verdicts(task: SteeringTask, trials: Sequence[SteeringTrial], images: Images) -> Sequence[JudgeVerdict]:
        return generator.verdicts(task, [trial._replace(region=None) for trial in trials], images)

    return generator._replace(verdicts=verdicts)


def _scale_losses(curve: StrengthCurve, factor: float) -> StrengthCurve:
    return replace(curve, points=tuple(replace(point, quality=factor * point.quality) for point in curve.points))


def detecting_features(
    study: Study, site: Site, concepts: Sequence[str], log: Callable[[str], None] = print
) -> dict[str, tuple[DictionaryRef, int]]:
    """Return for each of `concepts` the feature at a site that detects it best, if its average precision is high enough.

    Dictionaries that have changed since `difflex concepts` was run are reported and left out.
    """
    best: dict[str, tuple[float, tuple[DictionaryRef, int]]] = {}
    for place in [place for place in study.dictionaries() if place.site == site]:
        try:
            matches = concept_matches(study, place)
        except StaleWork as error:
            log(str(error))
            continue
        for result in matches.clearest_level.results if matches is not None else ():
            ap, name = result.best.ap.value, result.concept.name
            if name in concepts and ap >= (best[name][0] if name in best else MIN_AP):
                best[name] = ap, (place, result.best.features[0])
    return {concept: best[concept][1] for concept in concepts if concept in best}


def make_bench(
    study: Study,
    site: Site,
    config: FindingsConfig,
    model: ModelFunctions,
    features: Mapping[str, tuple[DictionaryRef, int]],
    other: Path | None,
) -> ExperimentBench:
    """Return the bench of a study with features by concept; `other` is the file of another model's findings."""
    editor = StudyEditor(study)

    def contrasts(concept: str) -> Mapping[int, EditFeatures]:
        region = lambda shot: caption_region(shot.prompt, group_of(concept))  # noqa: E731
        directions = model.contrasts(site, scenery_pairs(concept, max(config.pairs)), config.pairs, batch=32, region=region)
        return {item.pairs: contrast_features(item)._replace(description=f"{item.pairs} pairs") for item in directions}

    def feature(concept: str) -> EditFeatures | None:
        if concept not in features:
            return None
        place, number = features[concept]
        edit = Edit(operation="add", site=place.site, dictionary=place.label, features=(number,), unit="norm")
        return editor.features(edit)

    return ExperimentBench(
        site=site,
        config=config,
        parameters=model.parameters,
        generator=lambda steps: drawn_generator(model, steps),
        contrasts=contrasts,
        feature=feature,
        other=None if other is None else Findings.load(other),
    )
