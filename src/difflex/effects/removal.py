"""Concept removal: the features of a concept are removed, and unseen images show what is gone and what else is lost."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import ClassVar, NamedTuple, final

from PIL import Image

from difflex.effects.drawn_world import CAPTION_GROUPS
from difflex.effects.inputs import ModelFunctions, Provenance, check_images, check_steps, concept_matches
from difflex.effects.removal_features import (
    BAR,
    ENOUGH,
    FeatureCut,
    MatchedFeatures,
    RemovalImages,
    RemovalRates,
    RemovalTrial,
    best_trial,
    candidate_cuts,
)
from difflex.effects.removal_world import DRAWN_REMOVAL, RemovalWorld, image_sets
from difflex.effects.resuming import FinishedConcepts
from difflex.errors import BadInput, StaleWork, UnknownName
from difflex.files import folder_lock, write_file
from difflex.json_records import JsonRecord
from difflex.miniature.world import CONCEPTS
from difflex.steering import StudyEditor, check_origin
from difflex.study import DictionaryRef, Study
from difflex.tables import text_table
from difflex.values import check_fields

__all__ = ["RemovalConfig", "RemovalRates", "RemovalResults", "RemovedConcept", "removal_table", "remove_concepts"]

DETECTS, SHOWN = 0.5, 6
"""Average precision from which a feature that detects a concept is tried; images of each concept that are kept."""
FORBIDDEN = r"[^\w .-]"
"""What the name of a file has none of."""
Places = tuple[DictionaryRef, ...]
"""Dictionaries whose features are removed together."""
_ImageSets = Callable[[], Sequence[RemovalImages]]
"""Makes the images that features are chosen by, that settings are chosen by, and that results are measured on."""


@final
@dataclass(frozen=True, kw_only=True)
class RemovalConfig:
    """Which concepts are removed, and how."""

    groups: tuple[str, ...] = ("colour", "background")
    """Groups of concepts of the drawn world; empty for all of a concept file."""
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
        if min(counts) < 1 or not self.features or not self.strengths:
            raise BadInput(
                f"{self.images} images, {self.selection_images} to select features and {self.tuning_images} to tune them, with "
                f"{len(self.features)} numbers of features and {len(self.strengths)} strengths, leave nothing to remove. Ask for "
                "1 or more of each."
            )
        if max(self.strengths) >= 1:
            raise BadInput(f"A strength of {max(self.strengths):g} removes nothing: codes are multiplied by it. Stay below 1.")
        self.check_images(sum(len(CONCEPTS[group]) for group in self.groups))

    def check_images(self, concepts: int) -> None:
        """Refuse to generate too many images for a number of concepts."""
        settings = len(self.features) * len(self.strengths)
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


@final
@dataclass(frozen=True, kw_only=True)
class FinishedRemoval(JsonRecord):
    """One removed concept: what is kept of a run that is interrupted."""

    FORMAT: ClassVar[int] = 1
    COMMAND: ClassVar[str] = "removal"

    removed: RemovedConcept


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
    world: RemovalWorld = DRAWN_REMOVAL,
) -> list[RemovalOutcome]:
    """Remove concepts with dictionaries of `study`, write the results and return them.

    Each of `names` is a dictionary, or several joined by commas whose features are removed together; without names, the
    dictionaries of each label at all its sites. Results that are up to date are reused; the model is only loaded for others.
    """
    editor, current = StudyEditor(study), dict[Places, RemovalResults]()
    paths = {places: study.removal(places) for places in _dictionary_sets(editor, names)}
    if world.features and any(len(places) > 1 for places in paths):
        raise BadInput("The concept file names features, which are of one dictionary. Name one dictionary, without commas.")
    config.check_images(sum(len(world.groups[group]) for group in config.groups or world.groups))
    files = world.checksums()
    provenances = {
        places: Provenance.of(study, {place: world.features for place in places}, world.judge, files) for places in paths
    }
    for places, path in paths.items():
        results = RemovalResults.load(path) if path.is_file() else None
        if results is not None and (results.config, results.provenance) == (config, provenances[places]):
            current[places] = results
    stale = [places for places in paths if places not in current]
    with ExitStack() as stack:
        for folder in dict.fromkeys(paths[places].parent for places in stale):
            stack.enter_context(folder_lock(folder))
        finished = {places: FinishedConcepts(paths[places], FinishedRemoval, config, provenances[places]) for places in stale}
        for places, concepts in (_remove_with_sets(editor, finished, config, model(), world, log) if stale else {}).items():
            results = RemovalResults(
                model=study.model,
                dictionaries=tuple(map(str, places)),
                concepts=tuple(concepts),
                config=config,
                provenance=provenances[places],
            )
            results.save(paths[places])
            finished[places].delete()
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
    editor: StudyEditor,
    finished: Mapping[Places, FinishedConcepts[FinishedRemoval]],
    config: RemovalConfig,
    model: ModelFunctions,
    world: RemovalWorld,
    log: Callable[[str], None],
) -> dict[Places, list[RemovedConcept]]:
    """Remove the concepts of all groups with each set of dictionaries; those that are finished are read."""
    model.shots(config.steps)  # refuses steps that the run does not have
    dictionaries = {place: editor.dictionary(place) for places in finished for place in places}
    removed: dict[Places, list[RemovedConcept]] = {places: [] for places in finished}

    def remove(concept: str, group: str, places: Places, image_sets: _ImageSets) -> tuple[FinishedRemoval, Mapping[str, bytes]]:
        named = world.features.get(concept)
        own = None if named is None else MatchedFeatures((named,), 1.0)
        matched = {place: own or _matched(editor.study, place, concept) for place in places}
        folder = editor.study.removal(places).with_suffix("")
        return FinishedRemoval(removed=_remove_concept(concept, group, config, image_sets(), matched, folder)), {}

    for group in config.groups or world.groups:
        counts = (config.selection_images, config.tuning_images, config.images)
        made = cache(partial(image_sets, model, world, dictionaries, group, counts))
        for places, concepts in finished.items():
            log(f"{', '.join(map(str, places))}: {group}")
            for concept in world.removed[group]:
                part = concepts.get_or(concept, partial(remove, concept, group, places, made))
                removed[places].append(part.removed)
                log("  ".join(_table_row(part.removed)))
    return removed


def _remove_concept(
    concept: str,
    group: str,
    config: RemovalConfig,
    image_sets: Sequence[RemovalImages],
    matched: Mapping[DictionaryRef, MatchedFeatures],
    folder: Path,
) -> RemovedConcept:
    """Remove a concept with what is best on the first two sets of images, and judge it on the third."""
    selection, tuning, unseen = image_sets
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
    write_file(folder / f"{re.sub(FORBIDDEN, '-', concept)}.webp", buffer.getvalue())


def removal_table(results: RemovalResults) -> str:
    """Return a text table with a row for each concept, and how many reach the bar."""
    rows = [("concept", "features", "strength", "UA", "IRA", "CRA", "own"), *map(_table_row, results.concepts)]
    summary = f"{len(results.reaching())} of {len(results.concepts)} concepts reach 90/90"
    return f"{text_table(rows, right_align=range(1, 7))}\n{summary}"


def _table_row(removed: RemovedConcept) -> tuple[str, ...]:
    rates = (f"{100 * rate:.0f}" for rate in removed.rates)
    return removed.concept, str(removed.most_features), f"{removed.strength:g}", *rates
