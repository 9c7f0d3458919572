"""Edits as functions of a site's activations: x becomes x + delta, and a token without a delta keeps its very bits."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from difflex.dictionaries import Dictionary
from difflex.errors import BadInput, StaleWork, UnknownName
from difflex.records import Edit, HookContext, Site
from difflex.steering.contrast import Contrast
from difflex.steering.maps import TransplantMaps
from difflex.steering.regions import covered
from difflex.steering.scales import FeatureScales

__all__ = ["EditFeatures", "SteeringHook", "at_random", "check_maker", "features_of", "steered_along", "steerings"]

Codes = Callable[[Float[Tensor, "token width"]], Float[Tensor, "token feature"]]


class EditFeatures(NamedTuple):
    """The features that an edit is about."""

    told: str
    """What they are, for messages."""
    codes: Codes
    """Their codes at each token."""
    decoder: Float[Tensor, "feature width"]
    """What one unit of code of each writes."""
    units: Mapping[str, Float[Tensor, " feature"]]
    """The code that a strength of 1 is, by unit."""


class SteeringHook(NamedTuple):
    """What is done at one site; `Pipeline.generate` takes several."""

    site: Site
    change: Callable[[Float[Tensor, "batch token width"], HookContext], Float[Tensor, "batch token width"] | None]


def features_of(dictionary: Dictionary, features: Iterable[int], scales: FeatureScales | None) -> EditFeatures:
    """Those features of a dictionary; without `scales` a strength is a code."""
    chosen = torch.tensor(list(features), dtype=torch.long)
    if not len(chosen):
        raise BadInput(f"No feature of {dictionary.name} was named. Name one or more, from 0 to {dictionary.size - 1}.")
    outside = [feature for feature in chosen.tolist() if not 0 <= feature < dictionary.size]
    if outside:
        raise UnknownName(f"{dictionary.name} has no feature {outside[0]}; its features are numbered 0 to {dictionary.size - 1}.")

    def codes(x: Float[Tensor, "token width"]) -> Float[Tensor, "token feature"]:
        values, indices = dictionary.encode(x)
        among = indices[..., None] == chosen.to(indices.device)
        return (values[..., None] * among).sum(1).to(x.device)  # a dictionary may be elsewhere

    decoder = dictionary.decoder_of(chosen.to(dictionary.constant.device)).float()
    units = {"code": torch.ones(len(chosen))}
    if scales is not None:
        units |= {"peak": scales.peaks[chosen], "mean": scales.means[chosen]}
        units["norm"] = scales.norm / decoder.cpu().norm(dim=1).clamp(min=1e-30)
        for feature in chosen[scales.peaks[chosen] == 0].tolist():
            warnings.warn(
                f"Feature {feature} of {dictionary.name} fired at none of the tokens looked at: it is dead.", stacklevel=2
            )
    return EditFeatures(f"{dictionary.name} {', '.join(map(str, chosen.tolist()))}", codes, decoder, units)


def steered_along(contrast: Contrast) -> EditFeatures:
    """A direction found by contrast as the only feature: its code is how far a token lies along it, in its own lengths."""
    direction = contrast.direction.float()
    one, length = torch.ones(1), direction.norm()

    def codes(x: Float[Tensor, "token width"]) -> Float[Tensor, "token feature"]:
        return (x @ direction.to(x.device) / length.square().to(x.device))[:, None]

    units = {"code": one, "peak": one, "mean": one, "norm": one * contrast.norm / length}
    return EditFeatures(f"the contrast at {contrast.site}", codes, direction[None], units)


def at_random(features: EditFeatures, seed: int = 0) -> EditFeatures:
    """Random directions in place of what the features write, each as long: what any direction does."""
    drawn = torch.randn(features.decoder.shape, generator=torch.Generator().manual_seed(seed)).to(features.decoder)
    lengths = features.decoder.norm(dim=1, keepdim=True) / drawn.norm(dim=1, keepdim=True)
    return features._replace(told="random directions", decoder=drawn * lengths)


def steerings(
    edits: Iterable[Edit], features: Callable[[Edit], EditFeatures], maps: Callable[[Edit], TransplantMaps] | None = None
) -> list[SteeringHook]:
    """What `Pipeline.generate` makes of `edits`: for each of their sites one function.

    `features` gives what an edit is about, `maps` what a transplant takes over. All edits of a site see the same activation, and
    their deltas are added; a replacement stands alone.
    """
    ordered = sorted(edits, key=lambda edit: edit.site)
    for edit in ordered:
        _check(edit)
    made = []
    for site, group in groupby(ordered, key=lambda edit: edit.site):
        here = [
            _PreparedEdit.of(edit, features(edit), maps(edit) if maps is not None and edit.what == "transplant" else None)
            for edit in group
        ]
        if len(here) > 1 and any(each.edit.what == "replace" for each in here):
            raise BadInput(
                f"At {site} something is replaced and edited, too. A replacement stands alone: give the other its own run."
            )
        made.append(SteeringHook(site, _JointHook(tuple(here))))
    return made


@final
@dataclass(frozen=True)
class _JointHook:
    """The edits of one site."""

    edits: tuple[_PreparedEdit, ...]

    def __call__(self, x: Float[Tensor, "batch token width"], moment: HookContext) -> Float[Tensor, "batch token width"] | None:
        edited: Tensor | None = None
        for each in self.edits:
            if not each.is_due(moment):
                continue
            for number, tokens, delta in each.changes(x, moment):
                edited = x.clone() if edited is None else edited
                if each.edit.what == "replace":
                    edited[number, tokens] = delta.to(x)
                else:
                    edited[number, tokens] += delta.to(x)
        return edited


@final
@dataclass(frozen=True)
class _PreparedEdit:
    """An edit with all that it needs."""

    edit: Edit
    features: EditFeatures
    amounts: Float[Tensor, " feature"]
    """The code that the strength stands for."""
    maps: TransplantMaps | None

    @classmethod
    def of(cls, edit: Edit, features: EditFeatures, maps: TransplantMaps | None) -> _PreparedEdit:
        if edit.what != "scale" and edit.unit not in features.units:
            raise BadInput(
                f"A strength in units of {edit.unit} needs the scales of {features.told}; known: {', '.join(features.units)}."
            )
        unit = torch.ones(len(features.decoder)) if edit.what == "scale" else features.units[edit.unit]
        return cls(edit, features, edit.strength * unit, maps)

    def is_due(self, moment: HookContext) -> bool:
        """Whether it is this step's and this half's turn."""
        if self.edit.steps is not None:
            first, end = self.edit.steps
            run = moment.shots[0].steps if moment.shots else end
            if end > run:
                raise BadInput(f"Steps {first} to {end - 1} were to be edited, the run has {run}, numbered from 0.")
            if not first <= moment.step < end:
                return False
        return moment.half != "unconditional" or self.edit.half != "conditional"

    def changes(
        self, x: Float[Tensor, "batch token width"], moment: HookContext
    ) -> Iterable[tuple[int | slice, Bool[Tensor, " token"] | slice, Tensor]]:
        """Which tokens of which activations change, and by how much: what is not named keeps its bits."""
        sign = -1.0 if self.edit.half == "opposed" and moment.half == "unconditional" else 1.0
        tokens = self._tokens(x, moment)
        if self.edit.what in ("add", "replace") and self.edit.region != "fires":
            written = sign * (self.amounts.to(x.device) @ self.features.decoder.to(x.device))
            if self.edit.what == "replace" or bool(written.any()):
                yield slice(None), tokens, written
            return
        inside = torch.arange(x.shape[1], device=x.device)[tokens]
        for number, row in enumerate(x):
            codes = self.features.codes(row[inside].float())
            delta = self._wanted(codes, inside, moment) - codes
            changed = (delta != 0).any(1)
            if self.edit.region == "fires":
                changed &= (codes > 0).any(1)
            if bool(changed.any()):
                yield number, inside[changed], sign * (delta[changed] @ self.features.decoder.to(x.device))

    def _tokens(self, x: Tensor, moment: HookContext) -> Bool[Tensor, " token"] | slice:
        region = self.edit.region
        if region is None or region == "fires":
            return slice(None)
        if moment.grid is None:
            raise BadInput(f"{self.edit.site} has no place in the image: a region cannot be edited there. Leave it out.")
        return covered(region, moment.grid).to(x.device)

    def _wanted(self, codes: Float[Tensor, "token feature"], tokens: Tensor, moment: HookContext) -> Tensor:
        """The codes that are to be in place of `codes`."""
        amounts = self.amounts.to(codes)
        if self.edit.what == "add":
            return codes + amounts
        if self.edit.what == "set":
            return amounts.expand_as(codes)
        if self.edit.what == "scale":
            return codes * amounts
        if self.edit.what == "ablate":
            return torch.zeros_like(codes)
        assert self.maps is not None
        return self.maps.codes(moment, tokens, codes)


def _check(edit: Edit) -> None:
    """Nothing; an edit that has no meaning is an error."""
    if not math.isfinite(edit.strength):
        raise BadInput(f"A strength of {edit.strength} is not possible. Give a finite number.")
    if edit.what == "set" and edit.unit == "norm":
        raise BadInput("A code cannot be set in units of norm, which is a length. Use peak, mean or code.")
    if edit.half == "opposed" and edit.what == "replace":
        raise BadInput("A replacement has no opposite. Use half='both' or 'conditional'.")
    if edit.what == "transplant" and edit.source is None:
        raise BadInput("A transplant needs a source: the prompt and seed that its maps are taken from.")
    if edit.region == "fires" and edit.what in ("replace", "transplant"):
        raise BadInput(f"'fires' cannot be the region of {edit.what}: it does not look at the codes that are there.")
    if edit.steps is not None and not 0 <= edit.steps[0] < edit.steps[1]:
        raise BadInput(f"Steps {edit.steps[0]}:{edit.steps[1]} are none. Write START:END with START below END.")


def check_maker(dictionary: Dictionary, site: Site, model: str, revision: str | None) -> None:
    """Nothing; a dictionary of another site or model is refused."""
    origin = dictionary.origin
    if origin.site != site:
        raise StaleWork(f"{dictionary.name} was made for {origin.site}, the edit is at {site}. Edit the site it was made for.")
    if origin.model is not None and (origin.model, origin.revision) != (model, revision):
        raise StaleWork(f"{dictionary.name} was made for {origin.model}@{origin.revision}, the model is {model}@{revision}.")
