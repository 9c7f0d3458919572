"""Steering evaluation: features that detect concepts are steered with and judged, next to baselines."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import ClassVar, NamedTuple, final

from PIL import Image

from difflex.choices import Unit
from difflex.effects.automatic import plan_edits, sited_features
from difflex.effects.concept_specs import DRAWN_WORLD, JudgedWorld
from difflex.effects.drawn_world import drawn_generator, group_of
from difflex.effects.effect_aware import EffectConfig, optimise_edits
from difflex.effects.inputs import (
    ModelFunctions,
    NeuronBaseline,
    Provenance,
    check_images,
    check_steps,
    concept_matches,
    neuron_baseline,
    to_images,
)
from difflex.effects.judging import (
    Images,
    JudgedGenerator,
    JudgedTask,
    SteeringMethod,
    SteeringTrial,
    StrengthCurve,
    judge_methods,
)
from difflex.effects.resuming import FinishedConcepts
from difflex.effects.steering_strips import ImageStrip, delete_other_strips, draw_strips, has_strips, write_strips
from difflex.errors import BadInput, UnknownName
from difflex.files import folder_lock
from difflex.json_records import JsonRecord
from difflex.miniature.world import CONCEPTS
from difflex.records import Edit, Shot
from difflex.steering import EditRecord, SteeringHook, StudyEditor, random_features
from difflex.steering.contrast import contrast_features
from difflex.study import DictionaryRef, Study
from difflex.tables import text_table
from difflex.values import check_fields

PLANNED = 41
"""Images for each prompt that a plan is chosen on, at most: unedited, and at five doses of eight plans."""


@final
@dataclass(frozen=True, kw_only=True)
class SteeringConfig:
    """Which concepts are steered towards, and how."""

    groups: tuple[str, ...] = ("colour", "texture", "background", "shape", "style")
    """Groups of concepts of the drawn world."""
    min_ap: float = 0.8
    """Least average precision of a feature."""
    trials: int = 24
    """Images of each concept."""
    pairs: int = 20
    """Pairs of captions for each contrast."""
    strengths: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 3.0)
    """Of features in `unit`, of contrasts in lengths of their own."""
    unit: Unit = "peak"
    edit_steps: tuple[int, int] | None = None
    """First denoising step to edit and the one after the last; None for all."""
    automatic: bool = False
    """Also steer with the features of all sites, with sites, operation, steps and dose chosen on prompts of their own."""
    effect_updates: int = 0
    """Also optimise the strengths of each site and step through the model, in so many updates; 0 does not."""
    tuning: int = 8
    """Prompts of each concept for these two; they are never judged."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_steps(self.edit_steps)
        for group in self.groups:
            if group not in CONCEPTS:
                raise UnknownName.among("The group", group, CONCEPTS)
        if self.trials < 1 or self.pairs < 1 or self.tuning < 1 or self.effect_updates < 0 or not self.strengths:
            raise BadInput(
                f"{self.trials} trials, {self.pairs} pairs, {self.tuning} prompts to tune and {len(self.strengths)} strengths, "
                f"with {self.effect_updates} updates, leave nothing to judge. Ask for 1 or more of each; updates may be 0."
            )
        self.check_images(1)

    def check_images(self, concepts: int) -> None:
        """Refuse to generate too many images for a number of concepts."""
        planned = self.tuning * (PLANNED * self.automatic + self.effect_updates)
        check_images(concepts * (self.trials * (2 + 4 * len(self.strengths)) + 2 * self.pairs + planned))


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


class _TargetConcept(NamedTuple):
    """A concept and the feature to steer with."""

    concept: str
    feature: int
    ap: float | None
    """Average precision; None for a feature that the concept file names."""


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


def _target_concepts(study: Study, place: DictionaryRef, config: SteeringConfig, world: JudgedWorld) -> list[_TargetConcept]:
    """Return the concepts to steer towards, with the features that the concept file names or that detect them best."""
    specs = world.concepts.specs
    named = [_TargetConcept(spec.concept, spec.feature, None) for spec in specs.values() if spec.feature is not None]
    if specs and len(named) == len(specs):
        return named
    matches = concept_matches(study, place)
    if matches is None:
        raise BadInput(
            f"What the features of {place} detect is unknown: there is no {study.concepts(*place)}. Run difflex concepts."
        )
    unnamed = {name for name, spec in specs.items() if spec.feature is None}
    return named + [
        _TargetConcept(concept.name, result.best.features[0], result.best.ap.value)
        for result in matches.clearest_level.results
        if (concept := result.concept).name in unnamed
        or (not specs and concept.group in config.groups and group_of(concept.name))
        if result.best.ap.value >= config.min_ap
    ]


def _provenance(
    study: Study, place: DictionaryRef, concepts: Sequence[_TargetConcept], neurons: NeuronBaseline | None, world: JudgedWorld
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
        self, concepts: Sequence[_TargetConcept], finished: FinishedConcepts[SteeredConcept], log: Callable[[str], None]
    ) -> list[SteeredConcept]:
        """Return the curves and strips of each concept; those that are finished are read."""
        generator, first = self.world.judged(drawn_generator(self.model)), list[Image.Image]()

        def record_first(trials: Sequence[SteeringTrial], hooks: Sequence[SteeringHook]) -> Images:
            images = generator.images(trials, hooks)
            first.extend(to_images(images[:1]))
            return images

        recorded = generator._replace(images=record_first)

        def steer(target: _TargetConcept) -> tuple[SteeredConcept, dict[str, bytes]]:
            task = self.world.task(target.concept, self.config.trials)
            first.clear()
            curves = tuple(judge_methods(task, self._methods(target) | dict(self._planned(target, generator)), recorded))
            strips = dict(draw_strips(task, curves, first))
            return SteeredConcept(curves=curves, strips=tuple(strips)), {_part_file(strip): strips[strip] for strip in strips}

        parts = list[SteeredConcept]()
        for number, target in enumerate(concepts, 1):
            ap = "" if target.ap is None else f" (AP {target.ap:.2f})"
            log(f"{self.place}: {target.concept} by feature {target.feature}{ap}, {number} of {len(concepts)}")
            parts.append(finished.get_or(target.concept, partial(steer, target)))
        return parts

    def _methods(self, target: _TargetConcept) -> dict[str, SteeringMethod]:
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

    def _planned(self, target: _TargetConcept, generator: JudgedGenerator) -> Iterator[tuple[str, SteeringMethod]]:
        """Yield the methods that are found on prompts of their own, which are never judged, and write their edits."""
        config, features = self.config, cache(self.editor.features)
        if not config.automatic and not config.effect_updates:
            return
        task = self.world.task(target.concept, config.trials + config.tuning)
        task = replace(task, trials=task.trials[config.trials :])
        sited = sited_features(self.editor, target.concept, self.place, target.feature, config.min_ap)
        settings = replace(self.model.shots(range(1))[0], timestep=None)
        edits = [
            Edit(
                operation="add",
                site=place.site,
                dictionary=place.label,
                features=(feature,),
                unit=config.unit,
                steps=config.edit_steps,
            )
            for place, feature, _ in sited
        ]
        if config.automatic:
            plan = plan_edits(JudgedTask(task, generator), sited, features, settings.steps, edits[0])
            dose = plan.point.strength
            self._write_edits(
                target, "automatic", [replace(edit, strength=dose * edit.strength) for edit in plan.edits], settings
            )
            yield "automatic", SteeringMethod.of_edits(plan.name, plan.edits, features, (dose,))
        if config.effect_updates:
            assert self.world.effect_judge is not None
            judge, effect = self.world.effect_judge(), EffectConfig(updates=config.effect_updates, batch=min(8, config.tuning))
            found = optimise_edits(task, edits, features, settings, self.model.differentiable, judge, effect)
            self._write_edits(target, "effect-aware", found.edits, settings)
            name = f"{len(found.edits)} strengths of {len(sited)} sites"
            yield "effect-aware", SteeringMethod.of_edits(name, found.edits, features, (1.0,))

    def _write_edits(self, target: _TargetConcept, method: str, edits: Sequence[Edit], settings: Shot) -> None:
        """Write edits as a record of the first trial, for `difflex steer --replay` and `--also`."""
        if not edits:
            return
        trial = self.world.task(target.concept, 1).trials[0]
        placed = tuple(replace(edit, region=None if edit.site.stream == "text" else trial.region) for edit in edits)
        shot = replace(settings, prompt=trial.prompt, seed=trial.seed)
        record = EditRecord(shot=shot, edits=placed, checksums=self.editor.checksums(placed))
        name = re.sub(r"\W+", "-", target.concept)
        record.save(self.editor.study.steering(*self.place).with_suffix("") / f"{name}-{method}.json")


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
