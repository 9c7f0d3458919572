"""`renew`: the evaluations of a site's dictionaries on disk, brought up to date: what holds is kept, what lacks is measured."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from difflex.dictionaries import Dictionary, fingerprint
from difflex.errors import BadInput
from difflex.evaluation.changing import Edits, Measure, effects, some_shots
from difflex.evaluation.measuring import TOKENS, evaluate
from difflex.evaluation.record import Evaluation, ModelEffect
from difflex.records import ActivationBatch, EditOutcomes, Shot

__all__ = ["EditedModel", "EvaluationResult", "HeldOutData", "renew"]

SHOTS = 32
"""At how many the effect on a model is measured, if nobody says otherwise."""


@dataclass(frozen=True, kw_only=True)
class HeldOutData:
    """The held-out tokens of one site, and what else is known of its activations."""

    data: str
    """What they are, in words that differ wherever they do: an evaluation on other ones does not hold."""
    batches: Callable[[], Iterator[ActivationBatch]]
    """All of them, in the same order at each call."""
    shot: Callable[[int], Shot]
    """By the numbers in the batches."""
    tokens: int
    shots: int
    mean: Float[Tensor, " width"]
    """Of the training tokens."""


class EditedModel(NamedTuple):
    """What a model makes of some shots, under edits of one site."""

    predictions: Callable[[Edits], Iterable[EditOutcomes]]
    images: Callable[[Edits], Iterable[EditOutcomes]] | None


class EvaluationResult(NamedTuple):
    """An evaluation that holds."""

    evaluation: Evaluation
    kept: bool
    """Whether it held already."""


def renew(
    dictionaries: Mapping[Path, Path],
    held_out: HeldOutData,
    model: Callable[[Sequence[Shot]], EditedModel] | None = None,
    *,
    tokens: int = TOKENS,
    shots: int = SHOTS,
    measures: Mapping[str, Callable[[], Measure]] | None = None,
    progress: bool = True,
) -> dict[Path, EvaluationResult]:
    """The evaluation of each dictionary in a folder, also in the file that it is mapped to.

    `model` is asked once, and only if an effect lacks, with the shots at which all effects are measured; without it, or with
    `shots` 0, effects are left out. Those measured before at as many shots or more are kept, unless one of `measures` of images
    lacks; these are loaded only then. Killed and called again, what is done is not done again.
    """
    tokens = min(tokens, held_out.tokens)
    data = f"{tokens} of {held_out.data}"
    kept = {folder: Evaluation.kept(path, folder, data) for folder, path in dictionaries.items()}
    done: dict[Path, Evaluation] = {}
    for folder, path in dictionaries.items():
        done[folder] = kept[folder] or _measured(folder, held_out, tokens, data, progress)
        if not kept[folder]:
            done[folder].save(path)
    wanted = min(shots, held_out.shots) if model else 0
    lacking = [folder for folder, each in done.items() if _lacks(each.effect, wanted, measures or {})]
    count = max([wanted, *(effect.shots for folder in lacking if (effect := done[folder].effect))])
    found = _effects(lacking, held_out, model, count, measures or {}) if model and lacking else []
    for folder, effect in zip(lacking, found, strict=False):
        done[folder] = replace(done[folder], effect=_both(done[folder].effect, effect))
        done[folder].save(dictionaries[folder])
    return {folder: EvaluationResult(each, each == kept[folder]) for folder, each in done.items()}


def _lacks(effect: ModelEffect | None, wanted: int, measures: Iterable[str]) -> bool:
    """Whether an effect is to be measured, again or at all."""
    if effect is None or not wanted:
        return wanted > 0
    return effect.shots < wanted or any(name not in effect.similarity for name in measures)


def _both(before: ModelEffect | None, now: ModelEffect) -> ModelEffect:
    """What was measured now, with what was measured before of the same images."""
    if before is None or before.shots != now.shots:
        return now
    return replace(now, similarity={**before.similarity, **now.similarity})


def _measured(folder: Path, held_out: HeldOutData, tokens: int, data: str, progress: bool) -> Evaluation:
    taken = fingerprint(folder)  # before the dictionary is read: one that changes meanwhile is then known to be another
    dictionary, batches = _read(folder, held_out), held_out.batches()
    return evaluate(dictionary, batches, held_out.shot, tokens=tokens, checksum=taken, data=data, progress=progress)


def _read(folder: Path, held_out: HeldOutData) -> Dictionary:
    dictionary, width = Dictionary.load(folder), len(held_out.mean)
    if dictionary.width != width:
        raise BadInput(
            f"{folder} is of width {dictionary.width}, the held-out activations are of width {width}: it was made from others. "
            "Train it again, or harvest the activations that it is of."
        )
    return dictionary


def _effects(
    folders: Sequence[Path],
    held_out: HeldOutData,
    model: Callable[[Sequence[Shot]], EditedModel],
    count: int,
    measures: Mapping[str, Callable[[], Measure]],
) -> list[ModelEffect]:
    """What each dictionary does to the model; none, and a warning, where no shot can be walked again."""
    shots = some_shots(held_out.batches(), held_out.shot, count)
    if not shots:
        warnings.warn("The effect on the model is left out: the shots are of given images, not of prompts.", stacklevel=3)
        return []
    # Before the model works: weights that cannot be had are told at once.
    loaded = {name: load() for name, load in measures.items()}
    dictionaries = [_read(folder, held_out) for folder in folders]
    return effects(dictionaries, held_out.mean, *model(shots), measures=loaded)
