"""Concept removal: the features of a concept are removed, and unseen images show what is gone and what else is lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import fmean
from typing import ClassVar, NamedTuple, final

from PIL import Image

from difflex.dictionaries import Dictionary
from difflex.effects.drawn_world import CAPTION_GROUPS, ConceptCaption, DrawnJudge, captions_by_concept
from difflex.effects.inputs import ModelFunctions, Provenance, to_tensor
from difflex.effects.judging import JudgeVerdict
from difflex.effects.removal_features import (
    BAR,
    GenerationCodes,
    RemovalImages,
    RemovalRates,
    RemovalTrial,
    Setting,
    best_trial,
    choose_features,
)
from difflex.errors import BadInput, UnknownName
from difflex.miniature import load_judge
from difflex.records import JsonRecord, Shot, Site
from difflex.steering import SteeringHook, StudyEditor, check_origin
from difflex.study import DictionaryRef, Study

__all__ = [
    "RemovalConfig",
    "RemovalOutcome",
    "RemovalRates",
    "RemovalResults",
    "RemovalTrial",
    "RemovedConcept",
    "removal_table",
    "remove_concepts",
]

SEED_DISTANCE = 10**6
"""Between the first seeds of two sets of images."""
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
        for group in self.groups:
            if group not in CAPTION_GROUPS:
                raise UnknownName.among("The group", group, CAPTION_GROUPS)
        if min(self.images, self.selection_images, self.tuning_images) < 1 or not self.features or not self.groups:
            raise BadInput(
                f"{self.images} images, {self.selection_images} to select features and {self.tuning_images} to tune them, with "
                f"{len(self.features)} numbers of features and {len(self.groups)} groups, leave nothing to remove. Ask for 1 or "
                "more of each."
            )
        if max(self.strengths) >= 1:
            raise BadInput(f"A strength of {max(self.strengths):g} removes nothing: codes are multiplied by it. Stay below 1.")

    @property
    def steps(self) -> range | None:
        """The denoising steps to edit; None for all."""
        return None if self.edit_steps is None else range(*self.edit_steps)

    @property
    def settings(self) -> list[Setting]:
        """All combinations of a number of features and a strength."""
        return [(count, strength) for count in self.features for strength in self.strengths]


@final
@dataclass(frozen=True, kw_only=True)
class RemovedConcept:
    """A concept, its features, and the rates of their removal on prompts that nothing was chosen by."""

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
    """The file of removal results, and whether they were there already."""

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
    editor = StudyEditor(study)
    sets = _dictionary_sets(editor, names)
    paths = {places: study.removal(places) for places in sets}
    provenances = {places: Provenance.of(study, {place: {} for place in places}) for places in sets}
    stored = {places: RemovalResults.load(path) for places, path in paths.items() if path.is_file()}
    current = {
        places: results
        for places, results in stored.items()
        if (results.config, results.provenance) == (config, provenances[places])
    }
    stale = [places for places in sets if places not in current]
    for places, concepts in (_removed_sets(editor, stale, config, model(), log) if stale else {}).items():
        results = RemovalResults(
            model=study.model,
            dictionaries=tuple(map(str, places)),
            concepts=tuple(concepts),
            config=config,
            provenance=provenances[places],
        )
        results.save(paths[places])
        current[places] = results
    return [RemovalOutcome(paths[places], current[places], places not in stale) for places in sets]


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
        check_origin(editor.dictionary(place), place.site, study.model, study.revision)
    return list(dict.fromkeys(sets))


def _removed_sets(
    editor: StudyEditor, sets: Sequence[Places], config: RemovalConfig, model: ModelFunctions, log: Callable[[str], None]
) -> dict[Places, list[RemovedConcept]]:
    """Remove the concepts of all groups with each set of dictionaries."""
    model.shots(config.steps)  # refuses steps that the run does not have
    dictionaries = {place: editor.dictionary(place) for places in sets for place in places}
    generator = _RemovalGenerator(model, dictionaries)
    removed: dict[Places, list[RemovedConcept]] = {places: [] for places in sets}
    for group in config.groups:
        counts = (config.selection_images, config.tuning_images, config.images)
        parts = generator.image_sets(group, counts)
        for places in sets:
            log(f"{', '.join(map(str, places))}: {group}")
            selection, tuning, unseen = (part(places) for part in parts)
            for concept in dict.fromkeys(selection.named):
                removed[places].append(_removed(concept, group, places, config, selection, tuning, unseen))
                log(_table_row(removed[places][-1]))
    return removed


def _removed(
    concept: str,
    group: str,
    places: Places,
    config: RemovalConfig,
    selection: RemovalImages,
    tuning: RemovalImages,
    unseen: RemovalImages,
) -> RemovedConcept:
    """Remove a concept with what is best on the first two sets of images, and judge it on the third."""
    cuts = [choose_features(codes, selection.named, concept, max(config.features), config.steps) for codes in selection.codes]
    settings = config.settings
    trials = tuple(tuning.trials(concept, cuts, settings)) if len(settings) > 1 else ()
    count, strength = best_trial(trials)[:2] if trials else settings[0]
    cuts = [cut.first(count) for cut in cuts]
    shown = [verdict.shows for name, verdict in zip(unseen.named, unseen.before, strict=True) if name == concept]
    return RemovedConcept(
        concept=concept,
        group=group,
        features={str(place): cut.features for place, cut in zip(places, cuts, strict=True)},
        strength=strength,
        trials=trials,
        images=len(shown),
        shown=fmean(shown),
        rates=unseen.rates(concept, cuts, strength),
    )


@final
class _RemovalGenerator:
    """Generates and judges images of captions, and collects the codes of dictionaries."""

    def __init__(self, model: ModelFunctions, dictionaries: Mapping[DictionaryRef, Dictionary]) -> None:
        self._model, self._dictionaries, self._judge = model, dictionaries, DrawnJudge(load_judge())
        self._shot = replace(model.shots(range(1))[0], timestep=None)

    def image_sets(self, group: str, counts: Sequence[int]) -> list[Callable[[Places], RemovalImages]]:
        """Return sets of images, for any dictionaries, with so many for each concept; they share no caption and no seed."""
        captions, ends = captions_by_concept(group, sum(counts)), [0, *accumulate(counts)]
        parts = [[caption for several in captions for caption in several[start:end]] for start, end in pairwise(ends)]
        return [self._unedited(group, part, number * SEED_DISTANCE) for number, part in enumerate(parts)]

    def _unedited(self, group: str, captions: Sequence[ConceptCaption], first_seed: int) -> Callable[[Places], RemovalImages]:
        codes = {place: GenerationCodes(dictionary) for place, dictionary in self._dictionaries.items()}
        shots = [replace(self._shot, prompt=item.caption, seed=seed) for seed, item in enumerate(captions, first_seed)]
        before = self._verdicts(group, captions, shots, [place.site for place in codes], [], codes)

        def edited(numbers: Sequence[int], hooks: Sequence[SteeringHook]) -> list[JudgeVerdict]:
            chosen = [captions[i] for i in numbers]
            return self._verdicts(group, chosen, [shots[i] for i in numbers], [hooks[0].site], hooks, {})

        named = tuple(caption.concept for caption in captions)
        return lambda places: RemovalImages(
            named=named, before=tuple(before), codes=tuple(codes[place] for place in places), edited=edited
        )

    def _verdicts(
        self,
        group: str,
        captions: Sequence[ConceptCaption],
        shots: Sequence[Shot],
        sites: Sequence[Site],
        hooks: Sequence[SteeringHook],
        codes: Mapping[DictionaryRef, GenerationCodes],
    ) -> list[JudgeVerdict]:
        """Return the verdicts on the images of `shots`; codes on the way are added to `codes`."""
        generated: list[Image.Image] = []
        for images, activations in self._model.finish(shots, list(dict.fromkeys(sites)), hooks):
            generated += images
            for batch in activations:
                for place in [place for place in codes if place.site == batch.site]:
                    codes[place].add(batch)
        return self._judge.of_captions(group, captions, to_tensor(generated))


def removal_table(results: RemovalResults) -> str:
    """Return a text table with a row for each concept, and how many reach the bar."""
    head = f"{'concept':<12}{'features':>8}{'strength':>10}{'UA':>7}{'IRA':>7}{'CRA':>7}{'own':>7}"
    summary = f"{len(results.reaching())} of {len(results.concepts)} concepts reach 90/90"
    return "\n".join([head, *map(_table_row, results.concepts), summary])


def _table_row(removed: RemovedConcept) -> str:
    rates = "".join(f"{100 * rate:>7.0f}" for rate in removed.rates)
    return f"{removed.concept:<12}{removed.most_features:>8}{removed.strength:>10g}{rates}"
