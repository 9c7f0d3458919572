"""Concept removal: the features of a concept are removed, and unseen images show what is gone and what else is lost."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import fmean
from typing import ClassVar, NamedTuple, final

from PIL import Image

from difflex.dictionaries import Dictionary
from difflex.effects.drawn_world import CAPTION_GROUPS, ConceptCaption, DrawnJudge, captions_by_concept
from difflex.effects.inputs import ModelFunctions, Provenance, check_images, check_steps, concept_matches, to_tensor
from difflex.effects.judging import JudgeVerdict
from difflex.effects.removal_features import (
    BAR,
    ENOUGH,
    FeatureCut,
    GenerationCodes,
    MatchedFeatures,
    RemovalImages,
    RemovalRates,
    RemovalTrial,
    best_trial,
    candidate_cuts,
)
from difflex.errors import BadInput, StaleWork, UnknownName
from difflex.files import folder_lock, write_file
from difflex.json_records import JsonRecord
from difflex.miniature import load_judge
from difflex.miniature.world import CONCEPTS
from difflex.records import Site
from difflex.steering import SteeringHook, StudyEditor, check_origin
from difflex.study import DictionaryRef, Study
from difflex.tables import text_table
from difflex.values import check_fields

__all__ = ["RemovalConfig", "RemovalRates", "RemovalResults", "RemovedConcept", "removal_table", "remove_concepts"]

SEED_DISTANCE = 10**6
"""Between the first seeds of two sets of images."""
DETECTS, SHOWN = 0.5, 6
"""Average precision from which a feature that detects a concept is tried; images of each concept that are kept."""
Places = tuple[DictionaryRef, ...]
"""Dictionaries whose features are removed together."""


@final
@dataclass(frozen=True, kw_only=True)
class RemovalConfig:
    """Which concepts are removed, and how."""

    groups: tuple[str, ...] = ("colour", "background")
    """Groups of concepts of the drawn world."""
    images: int = 24
    """Prompts for each concept that results are measured on."""
    selection_images: int = 12
    """Prompts for each concept that features are chosen by."""
    tuning_images: int = 12
    """Prompts for each concept that the number of features and the strength are chosen by."""
    features: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of features at each step and site."""
    strengths: tuple[float, ...] = (0.5, 0.0, -1.0, -2.0, -4.0)
    """What their codes are multiplied by: 0 removes them, a negative number writes the opposite."""
    edit_steps: tuple[int, int] | None = None
    """First denoising step to edit and the one after the last; None for all."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_steps(self.edit_steps)
        for group in self.groups:
            if group not in CAPTION_GROUPS:
                raise UnknownName.among("The group", group, CAPTION_GROUPS)
        counts = (self.images, self.selection_images, self.tuning_images, *self.features)
        if min(counts) < 1 or not all((self.features, self.groups, self.strengths)):
            raise BadInput(
                f"{self.images} images, {self.selection_images} to select features and {self.tuning_images} to tune them, with "
                f"{len(self.features)} numbers of features and {len(self.groups)} groups, leave nothing to remove. Ask for 1 or "
                "more of each."
            )
        if max(self.strengths) >= 1:
            raise BadInput(f"A strength of {max(self.strengths):g} removes nothing: codes are multiplied by it. Stay below 1.")
        settings = len(self.features) * len(self.strengths)
        concepts = sum(len(CONCEPTS[group]) for group in self.groups)
        check_images(concepts * (self.selection_images + (1 + settings) * self.tuning_images + 2 * self.images))

    @property
    def steps(self) -> range | None:
        """The denoising steps to edit; None for all."""
        return None if self.edit_steps is None else range(*self.edit_steps)


@final
@dataclass(frozen=True, kw_only=True)
class RemovedConcept:
    """A concept, its features, and the rates of their removal on unseen prompts."""

    concept: str
    group: str
    features: dict[str, tuple[tuple[int, ...], ...]]
    """By dictionary: the features of each step."""
    strength: float
    """What their codes are multiplied by."""
    trials: tuple[RemovalTrial, ...]
    """The settings that were tried, in order; empty where there was one setting."""
    images: int
    """Number of prompts that name the concept."""
    shown: float
    """The share of their unedited images that show it."""
    rates: RemovalRates

    @property
    def most_features(self) -> int:
        """The largest number of features that are removed at a step and site."""
        return max((len(step) for steps in self.features.values() for step in steps), default=0)


@final
@dataclass(frozen=True, kw_only=True)
class RemovalResults(JsonRecord):
    """The removal of concepts with the same dictionaries."""

    FORMAT: ClassVar[int] = 2
    COMMAND: ClassVar[str] = "removal"

    model: str
    dictionaries: tuple[str, ...]
    """SITE/LABEL of each; the features of all were edited together."""
    concepts: tuple[RemovedConcept, ...]
    config: RemovalConfig
    provenance: Provenance

    def reaching(self, bar: float = BAR) -> list[RemovedConcept]:
        """Return the concepts whose removal and retentions reach `bar`."""
        return [concept for concept in self.concepts if concept.rates.reach(bar)]


class RemovalOutcome(NamedTuple):
    """The file of removal results, the results, and whether they were reused."""

    path: Path
    results: RemovalResults
    is_reused: bool


def remove_concepts(
    study: Study,
    names: Sequence[str],
    config: RemovalConfig,
    model: Callable[[], ModelFunctions],
    log: Callable[[str], None] = print,
) -> list[RemovalOutcome]:
    """Remove concepts with dictionaries of `study`, write the results and return them.

    Each of `names` is a dictionary, or several joined by commas whose features are removed together; without names, the
    dictionaries of each label at all its sites. Results that are up to date are reused; the model is only loaded for others.
    """
    editor, current = StudyEditor(study), dict[Places, RemovalResults]()
    paths = {places: study.removal(places) for places in _dictionary_sets(editor, names)}
    provenances = {places: Provenance.of(study, {place: {} for place in places}) for places in paths}
    for places, path in paths.items():
        results = RemovalResults.load(path) if path.is_file() else None
        if results is not None and (results.config, results.provenance) == (config, provenances[places]):
            current[places] = results
    stale = [places for places in paths if places not in current]
    with ExitStack() as stack:
        for folder in dict.fromkeys(paths[places].parent for places in stale):
            stack.enter_context(folder_lock(folder))
        for places, concepts in (_remove_with_sets(editor, stale, config, model(), log) if stale else {}).items():
            results = RemovalResults(
                model=study.model,
                dictionaries=tuple(map(str, places)),
                concepts=tuple(concepts),
                config=config,
                provenance=provenances[places],
            )
            results.save(paths[places])
            current[places] = results
    return [RemovalOutcome(paths[places], current[places], places not in stale) for places in paths]


def _dictionary_sets(editor: StudyEditor, names: Sequence[str]) -> list[Places]:
    study = editor.study
    if names:
        sets = [tuple(study.find_dictionary(part) for part in name.split(",")) for name in names]
    else:
        places = [place for place in study.dictionaries() if place.site.kind != "neurons"]
        labels = dict.fromkeys(place.label for place in places)
        sets = [tuple(place for place in places if place.label == label) for label in labels]
    if not sets:
        raise BadInput(f"{study.folder} holds no dictionary. difflex train and difflex itda make them.")
    for place in dict.fromkeys(place for places in sets for place in places):
        dictionary = editor.dictionary(place)
        check_origin(dictionary.name, dictionary.origin, place.site, study.model, study.revision)
    return list(dict.fromkeys(sets))


def _remove_with_sets(
    editor: StudyEditor, sets: Sequence[Places], config: RemovalConfig, model: ModelFunctions, log: Callable[[str], None]
) -> dict[Places, list[RemovedConcept]]:
    """Remove the concepts of all groups with each set of dictionaries."""
    model.shots(config.steps)  # refuses steps that the run does not have
    dictionaries = {place: editor.dictionary(place) for places in sets for place in places}
    removed: dict[Places, list[RemovedConcept]] = {places: [] for places in sets}
    for group in config.groups:
        counts = (config.selection_images, config.tuning_images, config.images)
        selection, tuning, unseen = _image_sets(model, dictionaries, group, counts)
        for places in sets:
            log(f"{', '.join(map(str, places))}: {group}")
            for concept in dict.fromkeys(selection.concepts):
                matched = {place: _matched(editor.study, place, concept) for place in places}
                folder = editor.study.removal(places).with_suffix("")
                removed[places].append(_remove_concept(concept, group, config, selection, tuning, unseen, matched, folder))
                log("  ".join(_table_row(removed[places][-1])))
    return removed


def _remove_concept(
    concept: str,
    group: str,
    config: RemovalConfig,
    selection: RemovalImages,
    tuning: RemovalImages,
    unseen: RemovalImages,
    matched: Mapping[DictionaryRef, MatchedFeatures],
    folder: Path,
) -> RemovedConcept:
    """Remove a concept with what is best on the first two sets of images, and judge it on the third."""
    settings = [(count, strength) for count in config.features for strength in config.strengths]
    candidates = candidate_cuts(selection, concept, max(config.features), matched, config.steps)
    (count, strength), chosen, tried = settings[0], candidates[0], list[RemovalTrial]()
    best = RemovalRates(ua=-1.0, ira=-1.0, cra=-1.0, own=-1.0)
    for cuts in candidates if len(settings) * len(candidates) > 1 else ():
        trials = tuple(tuning.trials(concept, cuts, settings))
        tried += trials
        trial = best_trial(trials)
        if (trial.rates.least, trial.rates.own) > (best.least, best.own):
            (count, strength, best), chosen = trial, cuts
        if best.reach(ENOUGH):
            break
    cuts = {place: cut.first(count) for place, cut in chosen.items()}
    _write_images(unseen, concept, cuts, strength, folder)
    shows = [verdict.shows for name, verdict in zip(unseen.concepts, unseen.before, strict=True) if name == concept]
    return RemovedConcept(
        concept=concept,
        group=group,
        features={str(place): cut.features for place, cut in cuts.items()},
        strength=strength,
        trials=tuple(tried),
        images=len(shows),
        shown=fmean(shows),
        rates=unseen.rates(concept, cuts, strength),
    )


def _matched(study: Study, place: DictionaryRef, concept: str) -> MatchedFeatures:
    """Return the features of a dictionary that detect a concept; none if that is unknown."""
    try:
        matches = concept_matches(study, place)
    except StaleWork:
        return MatchedFeatures()
    best = [] if matches is None else [result.best for result in matches.clearest_level.results if result.concept.name == concept]
    if matches is None or not best or best[0].ap.value < DETECTS:
        return MatchedFeatures()
    columns = zip(matches.features.features, matches.features.concepts, matches.features.ap, strict=True)
    others = sorted(
        ((ap, feature) for feature, number, ap in columns if matches.concepts[number].name == concept and ap >= DETECTS),
        reverse=True,
    )
    features = dict.fromkeys([best[0].features[0], *(feature for _, feature in others)])
    return MatchedFeatures(tuple(features), best[0].ap.value)


def _write_images(
    unseen: RemovalImages, concept: str, cuts: Mapping[DictionaryRef, FeatureCut], strength: float, folder: Path
) -> None:
    """Write some images of prompts that name a concept, above the same images after its removal, as FOLDER/CONCEPT.webp."""
    if unseen.generated is None:
        return
    numbers = [number for number, name in enumerate(unseen.concepts) if name == concept][:SHOWN]
    hooks = [hook for cut in cuts.values() for hook in cut.steering_hooks(strength)]
    rows = [list(unseen.generated(numbers, hooks)) for hooks in ((), hooks)]
    width, height = rows[0][0].size
    sheet = Image.new("RGB", (width * len(numbers), 2 * height))
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            sheet.paste(image, (column * width, row * height))
    buffer = io.BytesIO()
    sheet.save(buffer, "WEBP", lossless=True)
    write_file(folder / f"{concept}.webp", buffer.getvalue())


def _image_sets(
    model: ModelFunctions, dictionaries: Mapping[DictionaryRef, Dictionary], group: str, counts: Sequence[int]
) -> Iterator[RemovalImages]:
    """Yield sets of images of captions, with so many for each concept; they share no caption and no seed."""
    by_concept, ends, judge = captions_by_concept(group, sum(counts)), [0, *accumulate(counts)], DrawnJudge(load_judge())
    for number, (start, end) in enumerate(pairwise(ends)):
        captions = [caption for captions_of_concept in by_concept for caption in captions_of_concept[start:end]]
        yield _judged_images(model, dictionaries, judge, group, captions, number * SEED_DISTANCE)


def _judged_images(
    model: ModelFunctions,
    dictionaries: Mapping[DictionaryRef, Dictionary],
    judge: DrawnJudge,
    group: str,
    captions: Sequence[ConceptCaption],
    first_seed: int,
) -> RemovalImages:
    """Generate and judge the images of captions, and collect the codes of dictionaries."""
    shot = replace(model.shots(range(1))[0], timestep=None)
    shots = [replace(shot, prompt=item.caption, seed=seed) for seed, item in enumerate(captions, first_seed)]
    codes = {place: GenerationCodes(dictionary) for place, dictionary in dictionaries.items()}

    def generated(numbers: Sequence[int], hooks: Sequence[SteeringHook]) -> list[Image.Image]:
        sites = list(dict.fromkeys(place.site for place in codes))[:1]
        images: list[Image.Image] = []
        for batch, activations in model.finish([shots[i] for i in numbers], sites, hooks):
            images += batch
            for _ in activations:  # the run goes on as they are read
                pass
        return images

    def verdicts(numbers: Sequence[int], sites: Iterable[Site], hooks: Sequence[SteeringHook] = ()) -> list[JudgeVerdict]:
        """Return the verdicts on the images of these numbers; without hooks their codes are collected."""
        generated: list[Image.Image] = []
        for images, activations in model.finish([shots[i] for i in numbers], list(dict.fromkeys(sites)), hooks):
            generated += images
            for batch in activations if not hooks else ():
                for place in [place for place in codes if place.site == batch.site]:
                    codes[place].add(batch)
        return judge.of_captions(group, [captions[i] for i in numbers], to_tensor(generated))

    return RemovalImages(
        concepts=tuple(caption.concept for caption in captions),
        before=tuple(verdicts(range(len(shots)), (place.site for place in codes))),
        codes=codes,
        edited=lambda numbers, hooks: verdicts(numbers, [hooks[0].site], hooks),
        generated=generated,
    )


def removal_table(results: RemovalResults) -> str:
    """Return a text table with a row for each concept, and how many reach the bar."""
    rows = [("concept", "features", "strength", "UA", "IRA", "CRA", "own"), *map(_table_row, results.concepts)]
    summary = f"{len(results.reaching())} of {len(results.concepts)} concepts reach 90/90"
    return f"{text_table(rows, right_align=range(1, 7))}\n{summary}"


def _table_row(removed: RemovedConcept) -> tuple[str, ...]:
    rates = (f"{100 * rate:.0f}" for rate in removed.rates)
    return removed.concept, str(removed.most_features), f"{removed.strength:g}", *rates
