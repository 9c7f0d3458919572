"""Evaluate the dictionaries of a study: what is up to date is kept, what is missing or out of date is measured."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from difflex.dictionaries import Dictionary, fingerprint
from difflex.errors import BadInput, UnknownName
from difflex.evaluation.effect import Edits, measure_effects, sample_shots
from difflex.evaluation.image_similarity import ImageMeasure, check_measure, load_measure
from difflex.evaluation.reconstruction import TOKENS, evaluate
from difflex.evaluation.record import Evaluation, ModelEffect
from difflex.records import ActivationBatch, EditOutcomes, Shot, Site
from difflex.store import Store
from difflex.study import DictionaryRef, Study
from difflex.tables import text_table

__all__ = [
    "EditedModel",
    "EvaluationConfig",
    "EvaluationResult",
    "HeldOutData",
    "evaluate_all",
    "evaluate_study",
    "evaluation_table",
]

BATCH, SEED = 1024, 0
SHOTS = 32


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Which dictionaries of a study to evaluate, and how."""

    sites: tuple[str, ...] = ()
    """Evaluate all dictionaries of these sites; all of the study if `dictionaries` is empty too."""
    dictionaries: tuple[str, ...] = ()
    """Evaluate these dictionaries, written SITE/LABEL."""
    tokens: int = TOKENS
    """Number of held-out tokens; all if there are fewer."""
    shots: int = SHOTS
    """Number of held-out shots at which to measure the effect on the model; 0 skips it."""
    measures: tuple[str, ...] = ()
    """Image measures in addition to PSNR and SSIM: `lpips`, or `clip:` and a folder or hub name."""
    offline: bool = False
    """Load the models of `measures` from the local cache only."""

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


@dataclass(frozen=True, kw_only=True)
class HeldOutData:
    """The held-out tokens of one site."""

    data: str
    """Description of the tokens; an evaluation with another description is out of date."""
    batches: Callable[[], Iterator[ActivationBatch]]
    """Yields all tokens, in the same order at each call."""
    shot: Callable[[int], Shot]
    """Returns the shot with a number in the batches."""
    tokens: int
    shots: int
    mean: Float[Tensor, " width"]
    """Mean of the training tokens."""

    @classmethod
    def of(cls, store: Store) -> HeldOutData:
        """Return the held-out rows of `store`."""
        rows = store.count("held-out")
        return cls(
            data=f"{rows} held-out tokens of {store.site} of {store.model}, seed {SEED}, {store.fingerprint}",
            batches=lambda: store.batches(BATCH, seed=SEED, split="held-out"),
            shot=store.shot,
            tokens=rows,
            shots=rows // store.tokens,
            mean=store.statistics.mean.float(),
        )


def evaluate_study(
    study: Study, config: EvaluationConfig, model: Callable[[Site, Sequence[Shot]], EditedModel], progress: bool = True
) -> dict[DictionaryRef, EvaluationResult]:
    """Evaluate dictionaries of `study` and save the evaluations there; see `evaluate_all`."""
    measures = {name: cache(partial(load_measure, name, offline=config.offline)) for name in config.measures}
    results: dict[DictionaryRef, EvaluationResult] = {}
    stores = study.stores()
    for site, group in groupby(study.select_dictionaries(config.sites, config.dictionaries), key=lambda place: place.site):
        if site not in stores:
            raise UnknownName.among(
                "The site", str(site), map(str, stores), "It has dictionaries but no activations: harvest it."
            )
        by_folder = {study.dictionary(*place): place for place in group}
        evaluations = evaluate_all(
            {folder: study.evaluation(*place) for folder, place in by_folder.items()},
            HeldOutData.of(Store.open(stores[site])),
            partial(model, site),
            tokens=config.tokens,
            shots=config.shots,
            measures=measures,
            progress=progress,
        )
        results |= {by_folder[folder]: result for folder, result in evaluations.items()}
    return results


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
        **{name: _number(measure and measure.reconstruction) for name, measure in others.items()},
    }


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def evaluate_all(
    dictionaries: Mapping[Path, Path],
    held_out: HeldOutData,
    model: Callable[[Sequence[Shot]], EditedModel] | None = None,
    *,
    tokens: int = TOKENS,
    shots: int = SHOTS,
    measures: Mapping[str, Callable[[], ImageMeasure]] | None = None,
    progress: bool = True,
) -> dict[Path, EvaluationResult]:
    """Evaluate the dictionary in each folder and save it to the file that the folder maps to; keep what is up to date.

    `model` is called at most once, with the shots at which all missing effects are measured; without it, or with 0 `shots`,
    effects are skipped. An effect measured before at as many shots or more is kept, unless one of the image `measures` is
    missing; these are loaded only then. Each evaluation is saved as soon as it is finished, so a killed run can be repeated.
    """
    tokens = min(tokens, held_out.tokens)
    data = f"{tokens} of {held_out.data}"
    before = {folder: Evaluation.load_current(path, folder, data) for folder, path in dictionaries.items()}
    evaluations: dict[Path, Evaluation] = {}
    for folder, path in dictionaries.items():
        evaluations[folder] = before[folder] or _evaluate(folder, held_out, tokens, data, progress)
        if not before[folder]:
            evaluations[folder].save(path)
    shots = min(shots, held_out.shots) if model else 0
    missing = [folder for folder, each in evaluations.items() if _lacks_effect(each.effect, shots, measures or {})]
    count = max([shots, *(effect.shots for folder in missing if (effect := evaluations[folder].effect))])
    effects = _measure_effects(missing, held_out, model, count, measures or {}) if model and missing else []
    for folder, effect in zip(missing, effects, strict=False):  # no effects if no shot can be generated again
        evaluations[folder] = replace(evaluations[folder], effect=_combine(evaluations[folder].effect, effect))
        evaluations[folder].save(dictionaries[folder])
    return {folder: EvaluationResult(each, each == before[folder]) for folder, each in evaluations.items()}


def _lacks_effect(effect: ModelEffect | None, shots: int, measures: Iterable[str]) -> bool:
    if effect is None or not shots:
        return shots > 0
    return effect.shots < shots or any(name not in effect.similarity for name in measures)


def _combine(before: ModelEffect | None, effect: ModelEffect) -> ModelEffect:
    """Add to `effect` the image measures taken before on the same images."""
    if before is None or before.shots != effect.shots:
        return effect
    return replace(effect, similarity={**before.similarity, **effect.similarity})


def _evaluate(folder: Path, held_out: HeldOutData, tokens: int, data: str, progress: bool) -> Evaluation:
    digest = fingerprint(folder)  # before loading: if the files change meanwhile, the evaluation is out of date
    dictionary, batches = _load(folder, held_out), held_out.batches()
    return evaluate(dictionary, batches, held_out.shot, tokens=tokens, fingerprint=digest, data=data, progress=progress)


def _load(folder: Path, held_out: HeldOutData) -> Dictionary:
    dictionary, width = Dictionary.load(folder), len(held_out.mean)
    if dictionary.width != width:
        raise BadInput(
            f"{folder} is of width {dictionary.width}, the held-out activations are of width {width}. Train it again, or harvest "
            "the activations that it was trained on."
        )
    return dictionary


def _measure_effects(
    folders: Sequence[Path],
    held_out: HeldOutData,
    model: Callable[[Sequence[Shot]], EditedModel],
    count: int,
    measures: Mapping[str, Callable[[], ImageMeasure]],
) -> list[ModelEffect]:
    """Measure the effect of each dictionary; warn and return none if no shot can be generated again."""
    shots = sample_shots(held_out.batches(), held_out.shot, count)
    if not shots:
        warnings.warn("The effect on the model is skipped: the shots are of given images, not of prompts.", stacklevel=3)
        return []
    loaded = {name: load() for name, load in measures.items()}  # before the model runs, so that missing weights fail early
    dictionaries = [_load(folder, held_out) for folder in folders]
    return measure_effects(dictionaries, held_out.mean, *model(shots), measures=loaded)
