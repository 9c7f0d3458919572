"""Steering evaluation: features that detect concepts are steered with and judged, next to baselines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import ClassVar, NamedTuple, final

from PIL import Image

from difflex.effects.concept_specs import DRAWN_WORLD, JudgedWorld
from difflex.effects.drawn_world import drawn_generator, group_of
from difflex.effects.finding_rules import concepts_of
from difflex.effects.inputs import (
    ModelFunctions,
    NeuronBaseline,
    Provenance,
    concept_matches,
    neuron_baseline,
    to_images,
)
from difflex.effects.judging import (
    Images,
    SteeringMethod,
    SteeringTrial,
    StrengthCurve,
    judge_methods,
)
from difflex.effects.planned_steering import SteeringPlanner
from difflex.effects.resuming import FinishedConcepts
from difflex.effects.steering_config import SteeringConfig, TargetConcept
from difflex.effects.steering_strips import ImageStrip, delete_other_strips, draw_strips, has_strips, write_strips
from difflex.errors import BadInput
from difflex.files import folder_lock
from difflex.json_records import JsonRecord
from difflex.records import Edit
from difflex.steering import SteeringHook, StudyEditor, random_features
from difflex.steering.contrast import contrast_features
from difflex.study import DictionaryRef, Study
from difflex.tables import text_table


@final
@dataclass(frozen=True, kw_only=True)
class SteeringResults(JsonRecord):
    """The effects of several methods on several tasks."""

    FORMAT: ClassVar[int] = 4
    COMMAND: ClassVar[str] = "steer-eval"

    model: str
    site: str
    curves: tuple[StrengthCurve, ...]
    config: SteeringConfig
    provenance: Provenance
    strips: tuple[ImageStrip, ...] = ()

    def of(self, method: str) -> list[StrengthCurve]:
        """Return the curves of a method."""
        return [curve for curve in self.curves if curve.method == method]


@final
@dataclass(frozen=True, kw_only=True)
class SteeredConcept(JsonRecord):
    """The curves of all methods for one concept, and their strips: what is kept of a run that is interrupted."""

    FORMAT: ClassVar[int] = 1
    COMMAND: ClassVar[str] = "steer-eval"

    curves: tuple[StrengthCurve, ...]
    strips: tuple[ImageStrip, ...]


class SteeringEvaluation(NamedTuple):
    """The results of a dictionary, their file, the number of concepts, and whether the results were reused."""

    place: DictionaryRef
    path: Path
    results: SteeringResults
    concepts: int
    is_reused: bool


def run_steering_evaluation(
    study: Study,
    names: Sequence[str],
    config: SteeringConfig,
    model: Callable[[], ModelFunctions],
    world: JudgedWorld = DRAWN_WORLD,
    log: Callable[[str], None] = print,
) -> Iterator[SteeringEvaluation]:
    """Evaluate steering with dictionaries of `study` (all, without `names`), and write and yield the results of each.

    Results that are up to date are reused; the model is only loaded for others.
    """
    editor, specs = StudyEditor(study), world.concepts.specs
    if config.effect_updates and world.effect_judge is None:
        raise BadInput(
            "A VLM has no gradients that strengths could be optimised by. Leave out the updates, or judge with a CLIP."
        )
    places = [study.find_dictionary(name) for name in names] or [
        place for place in study.dictionaries() if place.site.kind != "neurons"
    ]
    if len(places) > 1 and any(spec.feature is not None for spec in specs.values()):
        raise BadInput(f"The concept file names features, which are of one dictionary, but there are {len(places)}. Name one.")
    targets = {place: _target_concepts(study, place, config, world) for place in places}
    config.check_images(sum(map(len, targets.values())))
    for place, concepts in targets.items():
        beyond = [target for target in concepts if target.feature >= editor.dictionary(place).size]
        if beyond:
            concept, feature, _ = beyond[0]
            raise BadInput(f"{place} has no feature {feature} for '{concept}': it has {editor.dictionary(place).size} features.")
        path, neurons = study.steering(*place), neuron_baseline(editor, place)
        provenance = _provenance(study, place, concepts, neurons, world)
        stored = SteeringResults.load(path) if path.is_file() else None
        if stored is not None and (stored.config, stored.provenance) == (config, provenance) and has_strips(stored.strips, path):
            yield SteeringEvaluation(place, path, stored, len(concepts), True)
            continue
        with folder_lock(path.parent):
            run = _SteeringRun(editor, place, config, model(), world, neurons)
            finished = FinishedConcepts(path, SteeredConcept, config, provenance)
            parts = run.judge(concepts, finished, log)
            strips = _best_strips(parts)
            results = SteeringResults(
                model=study.model,
                site=str(place.site),
                curves=tuple(curve for part in parts for curve in part.curves),
                config=config,
                provenance=provenance,
                strips=strips,
            )
            # The results count only with all of their strips.
            write_strips({strip: finished.file(_part_file(strip)).read_bytes() for strip in strips}, path)
            results.save(path)
            delete_other_strips(strips, path)
            finished.delete()
        yield SteeringEvaluation(place, path, results, len(concepts), False)


def _target_concepts(study: Study, place: DictionaryRef, config: SteeringConfig, world: JudgedWorld) -> list[TargetConcept]:
    """Return the concepts to steer towards, with the features that the concept file names or that detect them best."""
    specs = world.concepts.specs
    named = [TargetConcept(spec.concept, spec.feature, None) for spec in specs.values() if spec.feature is not None]
    if specs and len(named) == len(specs):
        return named
    matches = concept_matches(study, place)
    if matches is None:
        raise BadInput(
            f"What the features of {place} detect is unknown: there is no {study.concepts(*place)}. Run difflex concepts."
        )
    most = config.concepts_per_group
    spread = {name for group in config.groups for name in concepts_of(group, most)} if most else None
    unnamed = {name for name, spec in specs.items() if spec.feature is None}
    return named + [
        TargetConcept(concept.name, result.best.features[0], result.best.ap.value)
        for result in matches.clearest_level.results
        if (concept := result.concept).name in unnamed
        or (not specs and concept.group in config.groups and group_of(concept.name))
        if spread is None or concept.name in spread
        if result.best.ap.value >= config.min_ap
    ]


def _provenance(
    study: Study, place: DictionaryRef, concepts: Sequence[TargetConcept], neurons: NeuronBaseline | None, world: JudgedWorld
) -> Provenance:
    features = {place: {target.concept: target.feature for target in concepts}}
    if neurons is not None:
        names = [target.concept for target in concepts if target.concept in neurons.best]
        features[neurons.place] = {name: neurons.best[name] for name in names}
    checksums = {"concepts": world.concepts.checksum, "judge": world.judge_checksum()}
    files = {name: checksum for name, checksum in checksums.items() if checksum}
    return Provenance.of(study, features, world.judge, files)


@final
@dataclass(frozen=True)
class _SteeringRun:
    """The evaluation of one dictionary with a model."""

    editor: StudyEditor
    place: DictionaryRef
    config: SteeringConfig
    model: ModelFunctions
    world: JudgedWorld
    neurons: NeuronBaseline | None

    def judge(
        self, concepts: Sequence[TargetConcept], finished: FinishedConcepts[SteeredConcept], log: Callable[[str], None]
    ) -> list[SteeredConcept]:
        """Return the curves and strips of each concept; those that are finished are read."""
        generator, first = self.world.judged(drawn_generator(self.model)), list[Image.Image]()

        def record_first(trials: Sequence[SteeringTrial], hooks: Sequence[SteeringHook]) -> Images:
            images = generator.images(trials, hooks)
            first.extend(to_images(images[:1]))
            return images

        recorded = generator._replace(images=record_first)
        planner = SteeringPlanner(self.editor, self.place, self.config, self.model, self.world)

        def steer(target: TargetConcept) -> tuple[SteeredConcept, dict[str, bytes]]:
            task = self.world.task(target.concept, self.config.trials)
            first.clear()
            curves = tuple(judge_methods(task, self._methods(target) | dict(planner.methods(target, generator)), recorded))
            strips = dict(draw_strips(task, curves, first))
            return SteeredConcept(curves=curves, strips=tuple(strips)), {_part_file(strip): strips[strip] for strip in strips}

        parts = list[SteeredConcept]()
        for number, target in enumerate(concepts, 1):
            ap = "" if target.ap is None else f" (AP {target.ap:.2f})"
            log(f"{self.place}: {target.concept} by feature {target.feature}{ap}, {number} of {len(concepts)}")
            parts.append(finished.get_or(target.concept, partial(steer, target)))
        return parts

    def _methods(self, target: TargetConcept) -> dict[str, SteeringMethod]:
        """Return the methods by name: the feature, and the baselines."""
        site, label = self.place
        concept, strengths, steps = target.concept, self.config.strengths, self.config.edit_steps
        edit = Edit(operation="add", site=site, dictionary=label, features=(target.feature,), unit=self.config.unit, steps=steps)
        features, pairs = self.editor.features(edit), self.world.pairs(concept, self.config.pairs)
        [contrast] = self.model.contrasts(
            site, pairs, steps=steps and range(*steps), region=lambda shot: self.world.region(shot, concept)
        )
        direction = contrast_features(contrast)._replace(description=f"{len(pairs)} pairs")
        methods = {
            "feature": SteeringMethod.adding(edit, features, strengths),
            "contrast": SteeringMethod.adding(replace(edit, unit="code"), direction, strengths),
            "random": SteeringMethod.adding(edit, random_features(features, target.feature), strengths),
            "prompt": SteeringMethod(
                "the caption names it", lambda trial, strength: (self.world.with_concept(trial, concept), ()), (1.0,)
            ),
        }
        if self.neurons is not None and concept in self.neurons.best:
            site, label = self.neurons.place
            edit = replace(edit, site=site, dictionary=label, features=(self.neurons.best[concept],))
            methods["neuron"] = SteeringMethod.adding(edit, self.editor.features(edit), strengths)
        return methods


def _part_file(strip: ImageStrip) -> str:
    """Return the name of a strip's file next to those of other concepts."""
    return f"{strip.sha256[:32]}.webp"


def _best_strips(parts: Sequence[SteeredConcept]) -> tuple[ImageStrip, ...]:
    """Return for each group the strips of the concept with the largest gain, the first of several."""
    best = dict[str, SteeredConcept]()
    for part in parts:
        first = part.curves[0]
        if first.group not in best or first.gain() > best[first.group].curves[0].gain():
            best[first.group] = part
    return tuple(strip for part in best.values() for strip in part.strips)


def steering_table(results: SteeringResults) -> str:
    """Return a text table with a row for each method: medians over concepts, each at its best strength."""
    rows = [("method", "concepts", "gain", "success", "without", "kept", "loss", "strength")]
    middle = lambda values: f"{median(values):.2f}" if values else "-"  # noqa: E731
    for method in dict.fromkeys(curve.method for curve in results.curves):
        curves = results.of(method)
        best = [point for curve in curves if (point := curve.best()) is not None]
        medians = (
            middle([curve.gain() for curve in curves]),
            middle([point.success for point in best]),
            middle([curve.without for curve in curves]),
            middle([point.specificity for point in best]),
            middle([point.quality for point in best]),
            middle([point.strength for point in best]),
        )
        rows.append((method, str(len(curves)), *medians))
    return text_table(rows, right_align=range(1, 8))
