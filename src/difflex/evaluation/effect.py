"""The effect on a model's predictions and images when a dictionary's reconstruction replaces the activations of a site."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from difflex.devices import find_device
from difflex.dictionaries import Dictionary
from difflex.errors import BadInput, NonFinite
from difflex.evaluation.image_similarity import ImageMeasure, ssim
from difflex.records import ActivationBatch, EditOutcomes, Shot

Edits = Mapping[str, Callable[[Float[Tensor, "batch token width"], object], Float[Tensor, "batch token width"]]]
"""Functions that replace a site's activations, by name; the second argument, the hook context, is not used."""

SQUARED_ERROR, MANHATTAN = "squared error", "manhattan"


@dataclass(frozen=True, kw_only=True)
class ReplacementEffect:
    """How much one measure changes when a site's activations are replaced."""

    reconstruction: float
    """Change when they are replaced by the dictionary's reconstruction."""
    mean: float
    """Change under mean ablation: every activation becomes the mean of the training tokens."""
    zero: float
    """Change under zero ablation."""

    @property
    def of_mean(self) -> float:
        """The change by the reconstruction relative to mean ablation; NaN if mean ablation changes nothing."""
        return self.reconstruction / self.mean if self.mean else math.nan

    @property
    def of_zero(self) -> float:
        """The change by the reconstruction relative to zero ablation; NaN if zero ablation changes nothing."""
        return self.reconstruction / self.zero if self.zero else math.nan


@dataclass(frozen=True, kw_only=True)
class ModelEffect:
    """The effect of replacing a site's activations on the model's output; under guidance in the conditional half."""

    shots: int
    """Number of shots at which the denoiser's predictions were compared."""
    prediction: ReplacementEffect
    """sum |v' - v|^2 / sum |v|^2 for the denoiser's prediction v and its prediction v' after the replacement."""
    timesteps: dict[float, ReplacementEffect]
    """The same for the shots of each timestep."""
    images: int
    """Number of generated images that were compared; the site is replaced at every denoising step."""
    image_error: ReplacementEffect | None
    """Mean squared difference of pixels between 0 and 1; None without images."""
    similarity: dict[str, ReplacementEffect]
    """`ssim`, `manhattan` and every other image measure by name, averaged over images."""
    precision: str | None = None
    """Of the model's weights; None for that of the harvest."""
    medians: dict[str, ReplacementEffect] = field(default_factory=dict)
    """The same measures, the median over images."""

    @property
    def psnr(self) -> ReplacementEffect | None:
        """Peak signal-to-noise ratio in decibels over all images; infinite if no pixel changes."""
        errors = vars(self.image_error) if self.image_error else {}
        ratios = {name: -10 * math.log10(error) if error else math.inf for name, error in errors.items()}
        return ReplacementEffect(**ratios) if ratios else None


def measure_effects(
    dictionaries: Sequence[Dictionary],
    mean: Float[Tensor, " width"],
    predictions: Callable[[Edits], Iterable[EditOutcomes]],
    images: Callable[[Edits], Iterable[EditOutcomes]] | None = None,
    *,
    measures: Mapping[str, ImageMeasure] | None = None,
) -> list[ModelEffect]:
    """Measure the effect of each of `dictionaries` of one site on the model, with mean and zero ablation as baselines.

    `predictions` and `images` run the model on fixed shots under edits of that site, as the methods of a pipeline do; without
    `images` only predictions are compared. `measures` compare images in addition to SSIM. The unedited model and the baselines
    run once for all dictionaries.
    """
    edits = _edits(dictionaries, mean)
    changes, timesteps = _prediction_changes(predictions(edits), list(edits))
    if not len(timesteps):
        raise BadInput(f"There are no shots to measure the effect of {dictionaries[0].name} at. Harvest more prompts.")
    every = {"ssim": ssim, MANHATTAN: manhattan, **(measures or {})}
    comparisons = _compare_images([] if images is None else images(edits), list(edits), every)
    for output, values in (("predictions", changes[:, 1:]), ("images", comparisons[SQUARED_ERROR])):
        for name, column in zip(edits, values.T, strict=True):
            if not bool(torch.isfinite(column).all()):
                raise NonFinite(
                    f"With {name} in the place of {dictionaries[0].site} the {output} of the model hold NaN or infinity."
                )
    return [_effect(changes, timesteps, comparisons, number) for number in range(len(dictionaries))]


def _edits(dictionaries: Sequence[Dictionary], mean: Float[Tensor, " width"]) -> Edits:
    """Return the reconstruction by each dictionary, then mean ablation, then zero ablation.

    The model runs with one edit after another, and a GPU holds the dictionary of one at a time.
    """
    device = find_device()
    held: dict[int, Dictionary] = {}

    def reconstruction(number: int):
        def replaced(x: Float[Tensor, "batch token width"], _: object) -> Float[Tensor, "batch token width"]:
            if number not in held:
                held.clear()
                held[number] = dictionaries[number] if dictionaries[number].device == device else dictionaries[number].to(device)
            return held[number].decode(held[number].encode(x.flatten(0, 1))).view(x.shape)

        return replaced

    edits = {f"reconstruction {i} by {dictionary.name}": reconstruction(i) for i, dictionary in enumerate(dictionaries)}
    return {**edits, "mean": lambda x, _: mean.to(x).expand_as(x), "zero": lambda x, _: torch.zeros_like(x)}


def _prediction_changes(
    outcomes: Iterable[EditOutcomes], edits: Sequence[str]
) -> tuple[Float64[Tensor, "shot column"], Float64[Tensor, " shot"]]:
    """Return squared lengths for each shot (the unedited prediction, then the change by each edit), and its timestep."""
    rows, timesteps = [torch.empty(0, 1 + len(edits), dtype=torch.float64)], []
    for outcome in outcomes:
        plain = outcome.plain.double().flatten(1)
        changes = (outcome.edited[name].double().flatten(1) - plain for name in edits)
        rows.append(torch.stack([vectors.square().sum(1) for vectors in (plain, *changes)], dim=1).cpu())
        timesteps += [shot.timestep or 0.0 for shot in outcome.shots]
    return torch.cat(rows), torch.tensor(timesteps, dtype=torch.float64)


def _compare_images(
    outcomes: Iterable[EditOutcomes], edits: Sequence[str], measures: Mapping[str, ImageMeasure]
) -> dict[str, Float64[Tensor, "image edit"]]:
    """Return the squared error, and each of `measures`, of each image under each edit."""
    measures = {SQUARED_ERROR: lambda edited, plain: (edited - plain).square().mean((1, 2, 3)), **measures}
    rows = {name: [torch.empty(0, len(edits), dtype=torch.float64)] for name in measures}
    for outcome in outcomes:
        plain = outcome.plain.float()
        for name, measure in measures.items():
            values = [measure(outcome.edited[edit].float(), plain) for edit in edits]
            rows[name].append(torch.stack(values, dim=1).double().cpu())
    return {name: torch.cat(parts) for name, parts in rows.items()}


def _effect(
    changes: Float64[Tensor, "shot column"],
    timesteps: Float64[Tensor, " shot"],
    comparisons: Mapping[str, Float64[Tensor, "image edit"]],
    number: int,
) -> ModelEffect:
    """Return the effect of the dictionary with that number."""

    def replacement(by_edit: Float64[Tensor, " edit"]) -> ReplacementEffect:
        return ReplacementEffect(reconstruction=float(by_edit[number]), mean=float(by_edit[-2]), zero=float(by_edit[-1]))

    def relative_change(rows: Float64[Tensor, "shot column"]) -> ReplacementEffect:
        sums = rows.sum(0)
        return replacement(sums[1:] / sums[0])

    images = len(comparisons[SQUARED_ERROR])
    similarity = {name: replacement(values.mean(0)) for name, values in comparisons.items()} if images else {}
    medians = {name: replacement(values.quantile(0.5, dim=0)) for name, values in comparisons.items()} if images else {}
    medians.pop(SQUARED_ERROR, None)
    return ModelEffect(
        shots=len(timesteps),
        prediction=relative_change(changes),
        timesteps={at: relative_change(changes[timesteps == at]) for at in sorted(set(timesteps.tolist()), reverse=True)},
        images=images,
        image_error=similarity.pop(SQUARED_ERROR, None),
        similarity=similarity,
        medians=medians,
    )


def manhattan(
    images: Float[Tensor, "image channel row column"], references: Float[Tensor, "image channel row column"]
) -> Float[Tensor, " image"]:
    """Return the Manhattan distance of each pair of images per pixel and channel, in levels from 0 to 255."""
    return 255 * (images - references).abs().mean((1, 2, 3))


def sample_shots(batches: Iterable[ActivationBatch], shot: Callable[[int], Shot], count: int, seed: int = 0) -> list[Shot]:
    """Sample up to `count` of the first shots in `batches`, and sort them by timestep, the noisiest first.

    Shots of given images are left out, because they cannot be generated again from a prompt.
    """
    numbers: set[int] = set()
    for rows in batches:
        numbers |= set(rows.shots.tolist())
        if len(numbers) >= count:
            break
    sample = random.Random(seed).sample(sorted(numbers), min(count, len(numbers)))
    shots = [candidate for candidate in map(shot, sorted(sample)) if candidate.image is None]
    return sorted(shots, key=lambda candidate: -(candidate.timestep or 0.0))
