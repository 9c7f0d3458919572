"""Steering evaluation: features that detect concepts are steered with and judged, next to baselines."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import ClassVar, NamedTuple, final

from PIL import Image

from difflex.choices import Unit
from difflex.effects.concept_specs import DRAWN_WORLD, JudgedWorld
from difflex.effects.drawn_world import drawn_generator, group_of
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
from difflex.effects.judging import Images, SteeringMethod, SteeringTask, SteeringTrial, StrengthCurve, judge_methods
from difflex.errors import BadInput, UnknownName
from difflex.files import file_sha256, folder_lock, write_file
from difflex.json_records import JsonRecord
from difflex.miniature.world import CONCEPTS
from difflex.records import Edit
from difflex.steering import SteeringHook, StudyEditor, random_features
from difflex.steering.contrast import contrast_features
from difflex.study import DictionaryRef, Study
from difflex.tables import text_table
from difflex.values import check_fields


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

    def __post_init__(self) -> None:
        check_fields(self)
        check_steps(self.edit_steps)
        for group in self.groups:
            if group not in CONCEPTS:
                raise UnknownName.among("The group", group, CONCEPTS)
        if self.trials < 1 or self.pairs < 1 or not self.strengths:
            raise BadInput(
                f"{self.trials} trials, {self.pairs} pairs and {len(self.strengths)} strengths leave nothing to judge. Ask for 1 "
                "or more of each."
            )
        self.check_images(1)

    def check_images(self, concepts: int) -> None:
        """Refuse to generate too many images for a number of concepts."""
        check_images(concepts * (self.trials * (2 + 4 * len(self.strengths)) + 2 * self.pairs))


@final
@dataclass(frozen=True, kw_only=True)
class ImageStrip:
    """The image of the first trial of a task under a method at rising strengths."""

    method: str
    concept: str
    group: str
    prompt: str
    """Of the unedited image."""
    strengths: tuple[float, ...]
    file: str
    """In the folder named like the record: the unedited image, then one for each strength, side by side."""
    sha256: str
    """Of the file."""


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
        if stored is not None and (stored.config, stored.provenance) == (config, provenance) and _has_strips(stored, path):
            yield SteeringEvaluation(place, path, stored, len(concepts), True)
            continue
        with folder_lock(path.parent):
            run = _SteeringRun(editor, place, config, model(), world, neurons)
            curves, strips = run.judge(concepts, log)
            results = SteeringResults(
                model=study.model,
                site=str(place.site),
                curves=tuple(curves),
                config=config,
                provenance=provenance,
                strips=tuple(strips),
            )
            _save_results(results, path, strips)
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
        self, concepts: Sequence[_TargetConcept], log: Callable[[str], None]
    ) -> tuple[list[StrengthCurve], dict[ImageStrip, bytes]]:
        """Return all curves, and for each group the strips of the concept with the largest gain."""
        generator, first = self.world.judged(drawn_generator(self.model)), list[Image.Image]()

        def record_first(trials: Sequence[SteeringTrial], hook: SteeringHook | None) -> Images:
            images = generator.images(trials, hook)
            first.extend(to_images(images[:1]))
            return images

        recorded = generator._replace(images=record_first)
        curves, best = list[StrengthCurve](), dict[str, tuple[float, dict[ImageStrip, bytes]]]()
        for number, target in enumerate(concepts, 1):
            ap = "" if target.ap is None else f" (AP {target.ap:.2f})"
            log(f"{self.place}: {target.concept} by feature {target.feature}{ap}, {number} of {len(concepts)}")
            task = self.world.task(target.concept, self.config.trials)
            first.clear()
            of_task = list(judge_methods(task, self._methods(target), recorded))
            if task.group not in best or of_task[0].gain() > best[task.group][0]:
                best[task.group] = of_task[0].gain(), dict(_strips(task, of_task, first))
            curves += of_task
        return curves, {strip: content for _, strips in best.values() for strip, content in strips.items()}

    def _methods(self, target: _TargetConcept) -> Mapping[str, SteeringMethod]:
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
                "the caption names it", lambda trial, strength: (self.world.with_concept(trial, concept), None), (1.0,)
            ),
        }
        if self.neurons is not None and concept in self.neurons.best:
            site, label = self.neurons.place
            edit = replace(edit, site=site, dictionary=label, features=(self.neurons.best[concept],))
            methods["neuron"] = SteeringMethod.adding(edit, self.editor.features(edit), strengths)
        return methods


def _strips(
    task: SteeringTask, curves: Sequence[StrengthCurve], images: Sequence[Image.Image]
) -> Iterator[tuple[ImageStrip, bytes]]:
    """Yield a strip for each of `curves` and its file; `images` are the unedited one, then those of the points in order."""
    unedited, edited = images[0], iter(images[1:])
    for curve in curves:
        content = _side_by_side([unedited, *(next(edited) for _ in curve.points)])
        strip = ImageStrip(
            method=curve.method,
            concept=curve.concept,
            group=curve.group,
            prompt=task.trials[0].prompt,
            strengths=tuple(point.strength for point in curve.points),
            file=f"{curve.group}-{curve.method}.webp",
            sha256=hashlib.sha256(content).hexdigest(),
        )
        yield strip, content


def _side_by_side(tiles: Sequence[Image.Image]) -> bytes:
    """Return a WebP file of `tiles` in a row."""
    width, height = tiles[0].size
    strip, buffer = Image.new("RGB", (width * len(tiles), height)), io.BytesIO()
    for column, tile in enumerate(tiles):
        strip.paste(tile, (column * width, 0))
    strip.save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def _has_strips(results: SteeringResults, path: Path) -> bool:
    files = [(path.with_suffix("") / strip.file, strip.sha256) for strip in results.strips]
    return all(file.is_file() and file_sha256(file) == checksum for file, checksum in files)


def _save_results(results: SteeringResults, path: Path, strips: Mapping[ImageStrip, bytes]) -> None:
    """Write `strips`, then `results`, which count only with all of their strips; then delete all other strips."""
    folder = path.with_suffix("")
    for strip, content in strips.items():
        write_file(folder / strip.file, content)
    results.save(path)
    for file in folder.glob("*.webp"):
        if file.name not in {strip.file for strip in strips}:
            file.unlink()


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
