"""Contrast directions: what a site's activations have more of under one set of prompts than under another."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from difflex.choices import ContrastMethod
from difflex.dictionaries import Dictionary, DictionaryOrigin
from difflex.errors import BadInput, BrokenFile, DifflexError, NonFinite, UnknownName
from difflex.records import Activations, Rectangle, Shot, Site
from difflex.steering.features import EditFeatures
from difflex.steering.hooks import region_tokens
from difflex.tensors import read_tensors, write_tensors
from difflex.values import check_fields

__all__ = [
    "Contrast",
    "FeatureContribution",
    "contrast_features",
    "decompose",
    "find_contrast",
    "find_contrasts",
    "pair_activations",
]

FORMAT = 3
ADVICE = "Run difflex contrast again."
FIRST_SEED = 10**6
"""The seed of the first pair of prompts."""
Region = Callable[[Shot], Rectangle | None]
"""The part of a shot's image to read activations from; None for all of it."""


class FeatureContribution(NamedTuple):
    """How much a feature contributes to a direction."""

    feature: int
    code: float
    """Its code in the best fit of the direction by all contributing features."""
    cosine: float
    """Of the direction and the feature's decoder row."""
    explained: float
    """The share of the direction's squared norm that is explained by the features up to this one."""


@final
@dataclass(frozen=True, kw_only=True)
class Contrast:
    """A direction at a site, and how it was found."""

    site: Site
    model: str
    revision: str | None
    method: ContrastMethod | Literal["effect"]
    """How it was found; `effect` by gradients of a judge."""
    pairs: int
    timesteps: tuple[float, ...]
    """Of the activations."""
    positive: tuple[str, ...]
    """The prompts that the direction points to."""
    negative: tuple[str, ...]
    norm: float
    """Mean norm of the activations."""
    direction: Float[Tensor, " width"]
    """As long as the mean difference: adding it at strength 1 bridges the distance between the two sets."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not bool(torch.isfinite(self.direction).all() and self.direction.any()):
            raise NonFinite(f"{self.name} is zero, NaN or infinite. Find it again, on activations that are finite.")

    @property
    def name(self) -> str:
        """It in messages."""
        return f"the contrast at {self.site}"

    @property
    def origin(self) -> DictionaryOrigin:
        """The model and site that it was found at."""
        return DictionaryOrigin(site=self.site, model=self.model, revision=self.revision)

    def save(self, path: Path) -> Path:
        """Write the contrast to `path` and return the path."""
        entries = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "direction"}
        return write_tensors(path, FORMAT, {"direction": self.direction}, {**entries, "site": str(self.site)})

    @classmethod
    def load(cls, path: Path) -> Contrast:
        """Return the contrast in `path`."""
        if not path.is_file():
            names = sorted(file.stem for file in path.parent.glob("*.safetensors"))
            raise UnknownName.among("The contrast", path.stem, names, "difflex contrast makes one.")
        entries, tensors = read_tensors(path, FORMAT, ADVICE)
        try:
            values = {name: tuple(value) if isinstance(value, list) else value for name, value in entries.items()}
            return cls(**{**values, "site": Site.parse(entries["site"])}, direction=tensors["direction"])
        except (DifflexError, TypeError, KeyError, AttributeError) as error:
            raise BrokenFile(f"{path} cannot be read as a contrast: {error} {ADVICE}") from error


def find_contrast(
    positive: Iterable[Activations],
    negative: Iterable[Activations],
    method: ContrastMethod = "mean",
    region: Region | None = None,
) -> Contrast:
    """Return the direction from `negative` to `positive`, as `find_contrasts` does, found on all pairs."""
    return find_contrasts(positive, negative, [None], method, region)[0]


def find_contrasts(
    positive: Iterable[Activations],
    negative: Iterable[Activations],
    counts: Iterable[int | None],
    method: ContrastMethod = "mean",
    region: Region | None = None,
) -> list[Contrast]:
    """Return for each of `counts` the direction from `negative` to `positive` on the first so many pairs (None: all).

    Both sides are activations at one site, of pairs of prompts in the same order with the same seeds and timesteps. Each is the
    mean over a shot's tokens in `region`; a pair's difference is the mean over its timesteps. `mean`: the mean of the
    differences. `principal`: their first principal component about zero, with the sign and the norm of that mean.
    """
    sides = _ContrastSide(positive, region), _ContrastSide(negative, region)
    pairs, others = (len(side.means) for side in sides)
    if not pairs or pairs != others:
        raise BadInput(f"A contrast takes pairs of prompts: {pairs} are positive, {others} negative.")
    if sides[0].site != sides[1].site or sides[0].timesteps != sides[1].timesteps:
        texts = [f"{side.site} at timesteps {sorted(side.timesteps)}" for side in sides]
        raise BadInput(f"The two sides of a contrast differ in more than prompts: {texts[0]} and {texts[1]}.")
    return [_contrast_of_pairs(*sides, pairs if count is None else count, method) for count in counts]


def _contrast_of_pairs(positive: _ContrastSide, negative: _ContrastSide, count: int, method: ContrastMethod) -> Contrast:
    if not 0 < count <= len(positive.means):
        pairs = len(positive.means)
        raise BadInput(f"A contrast cannot be found on {count} pairs of {pairs}. Ask for 1 to {pairs}.")
    differences = torch.stack([*positive.means.values()][:count]) - torch.stack([*negative.means.values()][:count])
    mean = differences.mean(0)
    if not bool(mean.any()):
        raise BadInput(f"The two sides of the contrast do not differ at {positive.site}. Name other prompts.")
    return Contrast(
        site=positive.site,
        model=positive.model,
        revision=positive.revision,
        method=method,
        pairs=count,
        timesteps=tuple(sorted(positive.timesteps, reverse=True)),
        positive=tuple(dict.fromkeys(prompt for prompt, _ in [*positive.means][:count])),
        negative=tuple(dict.fromkeys(prompt for prompt, _ in [*negative.means][:count])),
        norm=(positive.norm + negative.norm) / 2,
        direction=(mean if method == "mean" else _principal(differences, mean)).float(),
    )


class _ContrastSide:
    """The mean activation of each run, in the order of the prompts."""

    def __init__(self, activations: Iterable[Activations], region: Region | None) -> None:
        by_run: dict[tuple[str, int], list[Tensor]] = {}
        norms, self.timesteps, sites = [], set(), set()
        for batch in activations:
            sites.add(batch.site)
            self.site, self.model, self.revision = batch.site, batch.shots[0].model, batch.shots[0].revision
            values = batch.values.double()
            if not bool(torch.isfinite(values).all()):
                raise NonFinite(f"The activations of {batch.site} hold NaN or infinity, so there is no contrast of them.")
            norms.append(float(values.norm(dim=-1).mean()))
            for shot, tokens in zip(batch.shots, values, strict=True):
                part = None if region is None else region(shot)
                if part is not None and batch.grid is not None:
                    tokens = tokens[region_tokens(part, batch.grid).to(tokens.device)]
                self.timesteps.add(shot.timestep or 0.0)
                by_run.setdefault((shot.prompt, shot.seed), []).append(tokens.mean(0).cpu())
        if len(sites) > 1:
            raise BadInput(f"A contrast is at one site, but the activations are of {', '.join(map(str, sorted(sites)))}.")
        self.means = {run: torch.stack(means).mean(0) for run, means in by_run.items()}
        self.norm = sum(norms) / max(1, len(norms))


def _principal(differences: Float[Tensor, "pair width"], mean: Float[Tensor, " width"]) -> Float[Tensor, " width"]:
    first = torch.linalg.svd(differences, full_matrices=False).Vh[0]
    return first * math.copysign(float(mean.norm()), float(first @ mean))


def contrast_features(contrast: Contrast) -> EditFeatures:
    """Return a contrast direction as a single feature, whose code is a token's projection in lengths of the direction."""
    direction, one = contrast.direction.float(), torch.ones(1)
    length = direction.norm()

    def codes(x: Float[Tensor, "token width"]) -> Float[Tensor, "token feature"]:
        return (x @ direction.to(x.device) / length.square().to(x.device))[:, None]

    units = {"code": one, "peak": one, "mean": one, "norm": one * contrast.norm / length, "current-norm": one / length}
    return EditFeatures(contrast.name, codes, direction[None], units, contrast.origin)


def decompose(direction: Float[Tensor, " width"], dictionary: Dictionary, parts: int = 10) -> list[FeatureContribution]:
    """Return the features that make up `direction`, found greedily, with codes above 0.

    Each is the one with the largest projection of the residual; the codes of all are then fitted again (matching pursuit).
    """
    if len(direction) != dictionary.width:
        raise BadInput(
            f"{dictionary.name} is for activations of width {dictionary.width}, but the direction has {len(direction)}."
        )
    unit = dictionary.directions.double()
    x = direction.to(unit)
    chosen: list[int] = []
    explained: list[float] = []
    weights, residual = x[:0], x
    while len(chosen) < min(parts, dictionary.size):
        projections = unit @ residual
        projections[chosen] = -math.inf
        best = int(projections.argmax())
        if float(projections[best]) <= 1e-9 * float(x.norm()):
            break
        chosen.append(best)
        weights = torch.linalg.lstsq(unit[chosen].T, x[:, None]).solution[:, 0]
        residual = x - weights @ unit[chosen]
        explained.append(1 - float(residual.square().sum() / x.square().sum()))
    lengths = dictionary.decoder_rows(torch.tensor(chosen, dtype=torch.long, device=unit.device)).norm(dim=1).double()
    cosines = unit @ (x / x.norm())
    return [
        FeatureContribution(feature, float(weight / length), float(cosines[feature]), share)
        for feature, share, weight, length in zip(chosen, explained, weights, lengths, strict=True)
    ]


def pair_activations(
    harvest: Callable[[Iterable[Shot]], Iterator[Activations]],
    shots: Sequence[Shot],
    pairs: Sequence[tuple[str, str]],
    seeds: range = range(1),
) -> tuple[Iterator[Activations], Iterator[Activations]]:
    """Return the activations of the first prompts of `pairs`, and those of the second; both of a pair start from the same noise.

    `shots` are the timesteps of one run. Each pair has a seed of its own, as a prompt may be part of several pairs; no image that
    edits are judged on has one of these seeds.
    """

    def of_side(side: int) -> Iterator[Shot]:
        for seed in seeds:
            for number, pair in enumerate(pairs):
                for shot in shots:
                    yield replace(shot, prompt=pair[side], seed=FIRST_SEED + seed * len(pairs) + number)

    return harvest(of_side(0)), harvest(of_side(1))
