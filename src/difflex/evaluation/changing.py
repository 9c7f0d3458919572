"""`effects`: what becomes of a model's predictions and images where a dictionary's reconstruction takes the place of a site."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from difflex.dictionaries import Dictionary
from difflex.errors import BadInput, NonFinite
from difflex.evaluation.record import ModelEffect, ReplacementEffect
from difflex.evaluation.similarity import ssim
from difflex.records import ActivationBatch, EditOutcomes, Shot

__all__ = ["Edits", "Measure", "effects", "some_shots"]

Edits = Mapping[str, Callable[[Float[Tensor, "batch token width"], object], Float[Tensor, "batch token width"]]]
"""What takes the place of a site's activations, by name; the second argument, a moment of the run, is not looked at."""
Measure = Callable[
    [Float[Tensor, "image channel row column"], Float[Tensor, "image channel row column"]], Float[Tensor, " image"]
]
"""How near, or how far, images are to those they were made from; pixels between 0 and 1."""

ERROR = "squared error"


def effects(
    dictionaries: Sequence[Dictionary],
    mean: Float[Tensor, " width"],
    predictions: Callable[[Edits], Iterable[EditOutcomes]],
    images: Callable[[Edits], Iterable[EditOutcomes]] | None = None,
    *,
    measures: Mapping[str, Measure] | None = None,
    device: torch.device | str | None = None,
) -> list[ModelEffect]:
    """What each of `dictionaries` of one site does to the model, beside what the `mean` activation, or zero, does in their place.

    `predictions` and `images` say what the model makes of some shots under edits of that site, as the methods of a pipeline do;
    without `images` only predictions are compared. `measures` are taken of the images besides SSIM: LPIPS, say. The model
    runs unedited, and with the mean and zero, once for all dictionaries. These work on a card, where there is one and no other
    `device` is named.
    """
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    edits = _edits([dictionary.to(place) for dictionary in dictionaries], mean)
    changes, timesteps = _predicted(predictions(edits), list(edits))
    if not timesteps:
        raise BadInput(f"There are no shots at which the effect of {dictionaries[0].name} could be seen. Harvest more prompts.")
    drawn = _drawn([] if images is None else images(edits), list(edits), {"ssim": ssim, **(measures or {})})
    for does, values in (("predicts", changes[:, 1:]), ("draws", drawn[ERROR])):
        for name, column in zip(edits, values.T, strict=True):
            if not bool(torch.isfinite(column).all()):
                raise NonFinite(f"With {name} in the place of {dictionaries[0].site} the model {does} NaN or infinity.")
    at = torch.tensor(timesteps, dtype=torch.float64)
    return [_effect(changes, at, drawn, number) for number in range(len(dictionaries))]


def _edits(dictionaries: Sequence[Dictionary], mean: Float[Tensor, " width"]) -> Edits:
    """The ablations by mean and zero, in this order, after the reconstructions by each dictionary."""

    def reconstruction(dictionary: Dictionary):
        return lambda x, _: dictionary.decode(dictionary.encode(x.flatten(0, 1))).view(x.shape)

    rebuilt = {f"reconstruction {number} by {each.name}": reconstruction(each) for number, each in enumerate(dictionaries)}
    return {**rebuilt, "mean": lambda x, _: mean.to(x).expand_as(x), "zero": lambda x, _: torch.zeros_like(x)}


def _predicted(outcomes: Iterable[EditOutcomes], edits: Sequence[str]) -> tuple[Float64[Tensor, "shot column"], list[float]]:
    """For each shot the squared length of what is predicted plainly, then of the change by each edit; and its timestep."""
    rows, timesteps = [torch.empty(0, 1 + len(edits), dtype=torch.float64)], []
    for outcome in outcomes:
        plain = outcome.plain.double().flatten(1)
        changes = (outcome.edited[name].double().flatten(1) - plain for name in edits)
        rows.append(torch.stack([each.square().sum(1) for each in (plain, *changes)], dim=1).cpu())
        timesteps += [shot.timestep or 0.0 for shot in outcome.shots]
    return torch.cat(rows), timesteps


def _drawn(
    outcomes: Iterable[EditOutcomes], edits: Sequence[str], measures: Mapping[str, Measure]
) -> dict[str, Float64[Tensor, "image edit"]]:
    """The squared error and each of `measures` of each image under each edit."""
    every = {ERROR: lambda edited, plain: (edited - plain).square().mean((1, 2, 3)), **measures}
    rows = {name: [torch.empty(0, len(edits), dtype=torch.float64)] for name in every}
    for outcome in outcomes:
        plain = outcome.plain.float()
        for name, measure in every.items():
            values = [measure(outcome.edited[edit].float(), plain) for edit in edits]
            rows[name].append(torch.stack(values, dim=1).double().cpu())
    return {name: torch.cat(parts) for name, parts in rows.items()}


def _effect(
    changes: Float64[Tensor, "shot column"],
    timesteps: Float64[Tensor, " shot"],
    drawn: Mapping[str, Float64[Tensor, "image edit"]],
    number: int,
) -> ModelEffect:
    """Of the dictionary of that number."""
    errors = drawn[ERROR]

    def shares(of: Float64[Tensor, "shot column"]) -> ReplacementEffect:
        sums = of.sum(0)
        return _replaced(sums[1:] / sums[0], number)

    return ModelEffect(
        shots=len(timesteps),
        prediction=shares(changes),
        timesteps={at: shares(changes[timesteps == at]) for at in sorted(set(timesteps.tolist()), reverse=True)},
        images=len(errors),
        image_error=_replaced(errors.mean(0), number) if len(errors) else None,
        similarity={name: _replaced(each.mean(0), number) for name, each in drawn.items() if name != ERROR and len(each)},
    )


def _replaced(by_edit: Float64[Tensor, " edit"], number: int) -> ReplacementEffect:
    return ReplacementEffect(reconstruction=float(by_edit[number]), mean=float(by_edit[-2]), zero=float(by_edit[-1]))


def some_shots(batches: Iterable[ActivationBatch], shot: Callable[[int], Shot], count: int, seed: int = 0) -> list[Shot]:
    """At most `count` of the shots that `batches` begin with, chosen at random, those of one timestep together.

    Shots that cannot be walked again from a prompt, as they are of given images, are left out.
    """
    numbers: set[int] = set()
    for rows in batches:
        numbers |= set(rows.shots.tolist())
        if len(numbers) >= count:
            break
    chosen = random.Random(seed).sample(sorted(numbers), min(count, len(numbers)))
    shots = [each for each in map(shot, sorted(chosen)) if each.image is None]
    return sorted(shots, key=lambda each: -(each.timestep or 0.0))
