"""`effect`: what becomes of a model's predictions and pictures where a dictionary's reconstruction takes the place of a site."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from difflex.dictionary import Dictionary
from difflex.errors import BadInput, NonFinite
from difflex.evaluation.record import Effect, Replaced
from difflex.evaluation.similarity import ssim
from difflex.records import Outcomes, Rows, Shot

__all__ = ["Edits", "Measure", "effect", "some_shots"]

Edits = Mapping[str, Callable[[Float[Tensor, "batch token width"], object], Float[Tensor, "batch token width"]]]
"""What takes the place of a site's activations, by name; the second argument, a moment of the run, is not looked at."""
Measure = Callable[
    [Float[Tensor, "picture channel row column"], Float[Tensor, "picture channel row column"]], Float[Tensor, " picture"]
]
"""How near, or how far, pictures are to those they were made from; pixels between 0 and 1."""

NAMES = tuple(field.name for field in fields(Replaced))
ERROR = "squared error"


def effect(
    dictionary: Dictionary,
    mean: Float[Tensor, " width"],
    predictions: Callable[[Edits], Iterable[Outcomes]],
    pictures: Callable[[Edits], Iterable[Outcomes]] | None = None,
    *,
    measures: Mapping[str, Measure] | None = None,
    device: torch.device | str | None = None,
) -> Effect:
    """The effect of `dictionary` on the model, beside that of putting the `mean` activation, or zero, in the same place.

    `predictions` and `pictures` say what the model makes of some shots under edits of the dictionary's site, as the methods of a
    pipeline do; without `pictures` only predictions are compared. `measures` are taken of the pictures besides SSIM: LPIPS, say.
    The dictionary works on a card, where there is one and no other `device` is named.
    """
    edits = _edits(dictionary.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), mean)
    changes, timesteps = _predicted(predictions(edits))
    if not timesteps:
        raise BadInput(f"There are no shots at which the effect of {dictionary.name} could be seen. Harvest more prompts.")
    if not bool(torch.isfinite(changes).all()):
        raise NonFinite(f"With {dictionary.name} in its place the model predicts NaN or infinity. Try another precision.")
    at = torch.tensor(timesteps, dtype=torch.float64)
    drawn = _drawn([] if pictures is None else pictures(edits), {"ssim": ssim, **(measures or {})})
    return Effect(
        shots=len(timesteps),
        prediction=_shares(changes),
        timesteps={timestep: _shares(changes[at == timestep]) for timestep in sorted(set(timesteps), reverse=True)},
        pictures=len(drawn[ERROR]),
        picture_error=_means(drawn[ERROR]) if len(drawn[ERROR]) else None,
        similarity={name: _means(values) for name, values in drawn.items() if name != ERROR and len(values)},
    )


def some_shots(batches: Iterable[Rows], shot: Callable[[int], Shot], count: int, seed: int = 0) -> list[Shot]:
    """At most `count` of the shots that `batches` begin with, chosen at random, those of one timestep together.

    Shots that cannot be walked again from a prompt, as they are of given pictures, are left out.
    """
    numbers: set[int] = set()
    for rows in batches:
        numbers |= set(rows.shots.tolist())
        if len(numbers) >= count:
            break
    chosen = random.Random(seed).sample(sorted(numbers), min(count, len(numbers)))
    shots = [each for each in map(shot, sorted(chosen)) if each.picture is None]
    return sorted(shots, key=lambda each: -(each.timestep or 0.0))


def _edits(dictionary: Dictionary, mean: Float[Tensor, " width"]) -> Edits:
    def reconstruction(x: Float[Tensor, "batch token width"], _: object) -> Float[Tensor, "batch token width"]:
        return dictionary.decode(dictionary.encode(x.flatten(0, 1))).view(x.shape)

    return {
        "reconstruction": reconstruction,
        "mean": lambda x, _: mean.to(x).expand_as(x),
        "zero": lambda x, _: torch.zeros_like(x),
    }


def _predicted(outcomes: Iterable[Outcomes]) -> tuple[Float64[Tensor, "shot column"], list[float]]:
    """For each shot the squared length of what is predicted plainly, then of the change by each edit; and its timestep."""
    rows, timesteps = [torch.empty(0, 1 + len(NAMES), dtype=torch.float64)], []
    for outcome in outcomes:
        plain = outcome.plain.double().flatten(1)
        changes = [outcome.edited[name].double().flatten(1) - plain for name in NAMES]
        rows.append(torch.stack([each.square().sum(1) for each in (plain, *changes)], dim=1).cpu())
        timesteps += [shot.timestep or 0.0 for shot in outcome.shots]
    return torch.cat(rows), timesteps


def _drawn(outcomes: Iterable[Outcomes], measures: Mapping[str, Measure]) -> dict[str, Float64[Tensor, "picture edit"]]:
    """The squared error and each of `measures` of each picture under each edit."""
    every = {ERROR: lambda edited, plain: (edited - plain).square().mean((1, 2, 3)), **measures}
    rows = {name: [torch.empty(0, len(NAMES), dtype=torch.float64)] for name in every}
    for outcome in outcomes:
        plain = outcome.plain.float()
        for name, measure in every.items():
            values = [measure(outcome.edited[edit].float(), plain) for edit in NAMES]
            rows[name].append(torch.stack(values, dim=1).double().cpu())
    return {name: torch.cat(parts) for name, parts in rows.items()}


def _shares(changes: Float64[Tensor, "shot column"]) -> Replaced:
    plain, *edited = changes.sum(0).tolist()
    return Replaced(**{name: each / plain for name, each in zip(NAMES, edited, strict=True)})


def _means(values: Float64[Tensor, "picture edit"]) -> Replaced:
    return Replaced(**dict(zip(NAMES, values.mean(0).tolist(), strict=True)))
