"""Evaluate the dictionaries of a study: what is up to date is kept, what is missing or out of date is measured."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from difflex.dictionaries import Dictionary, fingerprint
from difflex.errors import BadInput, UnknownName
from difflex.evaluation.effect import MANHATTAN, Edits, ModelEffect, measure_effects, sample_shots
from difflex.evaluation.image_similarity import ImageMeasure, check_measure, load_measure
from difflex.evaluation.reconstruction import TOKENS, Evaluation, evaluate
from difflex.files import folder_lock
from difflex.records import ActivationBatch, EditOutcomes, Shot, Site
from difflex.store import Store
from difflex.study import DictionaryRef, Study
from difflex.tables import text_table

BATCH, SEED = 1024, 0


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Which dictionaries of a study to evaluate, and how."""

    sites: tuple[str, ...] = ()
    """Evaluate all dictionaries of these sites; all of the study if `dictionaries` is empty too."""
    dictionaries: tuple[str, ...] = ()
    """Evaluate these dictionaries, written SITE/LABEL."""
    tokens: int = TOKENS
    """Number of held-out tokens; all if there are fewer."""
    shots: int = 32
    """Number of held-out shots at which to measure the effect on the model; 0 skips it."""
    measures: tuple[str, ...] = ()
    """Image measures in addition to PSNR and SSIM: `lpips`, or `clip:` and a folder or hub name."""
    offline: bool = False
    """Load the models of `measures` from the local cache only."""
    precision: str | None = None
    """Of the model's weights; None for that of the harvest."""
    replace: bool = True
    """Whether an evaluation on another number of tokens, at fewer shots or with another precision is measured again."""

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.shots < 0:
            raise BadInput(
                f"An evaluation on {self.tokens} tokens and {self.shots} shots is not possible: ask for 1 and 0 or more."
            )
        if self.measures and not self.shots:
            raise BadInput(f"{' '.join(self.measures)} compares generated images, and an effect at 0 shots generates none.")
        for name in self.measures:
            check_measure(name)


class EditedModel(NamedTuple):
    """Runs a model on fixed shots under edits of one site."""

    predictions: Callable[[Edits], Iterable[EditOutcomes]]
    images: Callable[[Edits], Iterable[EditOutcomes]] | None


class EvaluationResult(NamedTuple):
    """An evaluation, and whether it was up to date before."""

    evaluation: Evaluation
    up_to_date: bool
    has_other_settings: bool = False
    """Whether it was kept although it was measured with other settings."""


def evaluate_study(
    study: Study, config: EvaluationConfig, model: Callable[[Site, Sequence[Shot]], EditedModel], progress: bool = True
) -> dict[DictionaryRef, EvaluationResult]:
    """Evaluate dictionaries of `study` and save the evaluations there; keep what is up to date.

    `model` is called at most once for each site, with the shots at which all missing effects are measured. An effect measured
    before at as many shots or more is kept, unless one of the image measures is missing; these are loaded only then. Each
    evaluation is saved as soon as it is finished, so a killed run can be repeated.
    """
    measures = {name: cache(partial(load_measure, name, offline=config.offline)) for name in config.measures}
    results: dict[DictionaryRef, EvaluationResult] = {}
    stores = study.stores()
    for site, refs in groupby(study.select_dictionaries(config.sites, config.dictionaries), key=lambda ref: ref.site):
        if site not in stores:
            raise UnknownName.among(
                "The site", str(site), map(str, stores), "It has dictionaries but no activations: harvest it."
            )
        store = Store.open(stores[site])
        results |= _evaluate_site(study, list(refs), store, config, partial(model, site), measures, progress)
    return results


def _evaluate_site(
    study: Study,
    refs: Sequence[DictionaryRef],
    store: Store,
    config: EvaluationConfig,
    model: Callable[[Sequence[Shot]], EditedModel],
    measures: Mapping[str, Callable[[], ImageMeasure]],
    progress: bool,
) -> dict[DictionaryRef, EvaluationResult]:
    """Evaluate dictionaries on the held-out tokens of their site."""
    rows = store.count("held-out")
    tokens, shots = min(config.tokens, rows), min(config.shots, rows // store.tokens)
    data = f"{tokens} of {rows} held-out tokens of {store.site} of {store.model}, seed {SEED}, {store.fingerprint}"
    wanted = _WantedEffect(shots, tuple(measures), config.precision, config.replace)
    before = {ref: _load_current(study, ref, data, config.replace) for ref in refs}
    if all(saved is not None and not wanted.is_missing(saved.effect) for saved in before.values()):
        return {
            ref: EvaluationResult(saved, True, saved.data != data or wanted.differs(saved.effect))
            for ref, saved in before.items()
            if saved is not None
        }
    with folder_lock(study.evaluation(*refs[0]).parent):
        before = {ref: _load_current(study, ref, data, config.replace) for ref in refs}  # another process may have written some
        evaluations = {ref: before[ref] or _evaluate(study, ref, store, tokens, data, progress) for ref in refs}
        missing = [ref for ref, evaluation in evaluations.items() if wanted.is_missing(evaluation.effect)]
        if missing:
            earlier = [effect.shots for ref in missing if (effect := evaluations[ref].effect)]
            count = max(earlier) if earlier and not config.replace else max([*earlier, shots])
            effects = _measure_effects([study.dictionary(*ref) for ref in missing], store, model, count, measures)
            for ref, effect in zip(missing, effects, strict=False):  # no effects if no shot can be generated again
                effect = _combine(evaluations[ref].effect, replace(effect, precision=config.precision))
                evaluations[ref] = replace(evaluations[ref], effect=effect)
                evaluations[ref].save(study.evaluation(*ref))
    return {
        ref: EvaluationResult(evaluation, evaluation == before[ref], evaluation.data != data or wanted.differs(evaluation.effect))
        for ref, evaluation in evaluations.items()
    }


def _load_current(study: Study, ref: DictionaryRef, data: str, exactly: bool) -> Evaluation | None:
    """Return the evaluation of a dictionary if it is of the dictionary as it is now and on `data`, else None.

    Unless `exactly` is true, it may be on another number of the same tokens.
    """
    path = study.evaluation(*ref)
    evaluation = Evaluation.load(path) if path.exists() else None
    if evaluation is None or not evaluation.is_of(study.dictionary(*ref)):
        return None
    is_same = evaluation.data == data if exactly else evaluation.data.partition(" ")[2] == data.partition(" ")[2]
    return evaluation if is_same else None


def _evaluate(study: Study, ref: DictionaryRef, store: Store, tokens: int, data: str, progress: bool) -> Evaluation:
    """Evaluate a dictionary and save the evaluation."""
    folder = study.dictionary(*ref)
    digest = fingerprint(folder)  # before loading: if the files change meanwhile, the evaluation is out of date
    dictionary, batches = _load(folder, store), _held_out(store)
    evaluation = evaluate(dictionary, batches, store.shot, tokens=tokens, fingerprint=digest, data=data, progress=progress)
    evaluation.save(study.evaluation(*ref))
    return evaluation


def _held_out(store: Store) -> Iterator[ActivationBatch]:
    return store.batches(BATCH, seed=SEED, split="held-out")


def _load(folder: Path, store: Store) -> Dictionary:
    dictionary = Dictionary.load(folder)
    if dictionary.width != store.width:
        raise BadInput(
            f"{folder} is of width {dictionary.width}, the held-out activations are of width {store.width}. Train it again, or "
            "harvest the activations that it was trained on."
        )
    return dictionary


class _WantedEffect(NamedTuple):
    """The settings that the effect on the model is measured with."""

    shots: int
    measures: tuple[str, ...]
    precision: str | None
    replaces: bool
    """Whether an effect with other settings is measured again."""

    def differs(self, effect: ModelEffect | None) -> bool:
        """Return whether an effect is at fewer shots, with another precision, or of a version without all its measures."""
        if effect is None or not self.shots:
            return False
        lacks = effect.images > 0 and MANHATTAN not in effect.medians
        return effect.shots < self.shots or effect.precision != self.precision or lacks

    def is_missing(self, effect: ModelEffect | None) -> bool:
        """Return whether an effect must be measured."""
        if effect is None or not self.shots:
            return self.shots > 0
        return any(name not in effect.similarity for name in self.measures) or (self.replaces and self.differs(effect))


def _measure_effects(
    folders: Sequence[Path],
    store: Store,
    model: Callable[[Sequence[Shot]], EditedModel],
    count: int,
    measures: Mapping[str, Callable[[], ImageMeasure]],
) -> list[ModelEffect]:
    """Measure the effect of each dictionary; warn and return none if no shot can be generated again."""
    shots = sample_shots(_held_out(store), store.shot, count)
    if not shots:
        warnings.warn("The effect on the model is skipped: the shots are of given images, not of prompts.", stacklevel=4)
        return []
    loaded = {name: load() for name, load in measures.items()}  # before the model runs, so that missing weights fail early
    dictionaries = [_load(folder, store) for folder in folders]
    return measure_effects(dictionaries, store.statistics.mean.float(), *model(shots), measures=loaded)


def _combine(before: ModelEffect | None, effect: ModelEffect) -> ModelEffect:
    """Add to `effect` the image measures taken before on the same images."""
    if before is None or (before.shots, before.precision) != (effect.shots, effect.precision):
        return effect
    similarity, medians = {**before.similarity, **effect.similarity}, {**before.medians, **effect.medians}
    return replace(effect, similarity=similarity, medians=medians)


def evaluation_table(results: Mapping[DictionaryRef, EvaluationResult], measures: Sequence[str] = ()) -> str:
    """Return a text table with one line per dictionary; `measures` names the image measures to show."""
    lines = {str(dictionary): _cells(result.evaluation, measures) for dictionary, result in results.items()}
    rows = [["", *next(iter(lines.values()))], *([name, *cells.values()] for name, cells in lines.items())]
    return text_table(rows, right_align=range(1, len(rows[0])))


def _cells(evaluation: Evaluation, measures: Sequence[str]) -> dict[str, str]:
    quality, effect = evaluation.overall, evaluation.effect
    model, normalised = quality.model_space, quality.normalised_space or quality.model_space
    psnr, similarity = (effect.psnr, effect.similarity) if effect else (None, {})
    ssim, others = similarity.get("ssim"), {name: similarity.get(name) for name in measures}
    distance, median = (measured.get(MANHATTAN) for measured in (similarity, effect.medians if effect else {}))
    return {
        "tokens": f"{quality.tokens:,}",
        "FVU": _number(model.fvu),
        "FVU in z": _number(normalised.fvu),
        "r2": _number(model.r2),
        "EV": _number(model.ev),
        "cosine": _number(model.cosine),
        "L0": f"{quality.l0:.1f}",
        "dead": f"{evaluation.dead_share:.1%}",
        "v / mean": _number(effect and effect.prediction.of_mean),
        "v / zero": _number(effect and effect.prediction.of_zero),
        "PSNR": _number(psnr and psnr.reconstruction, 1),
        "SSIM": _number(ssim and ssim.reconstruction, 3),
        "L1": _number(distance and distance.reconstruction, 2),
        "median L1": _number(median and median.reconstruction, 2),
        **{name: _number(measure and measure.reconstruction) for name, measure in others.items()},
    }


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
