"""The transfer of representations between two generations: which parts are added and removed, where, and the hooks that do it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from difflex.devices import find_device
from difflex.dictionaries import Dictionary
from difflex.effects.edit_bench.items import EditItem, TransferMasks, on_tokens
from difflex.records import Activations, Codes, HookContext, Site
from difflex.steering import SteeringHook
from difflex.steering.contrast import find_contrast

Method = Literal["features", "neurons", "activations", "contrast"]
"""What is transferred."""
METHODS: tuple[Method, ...] = ("features", "neurons", "activations", "contrast")
RunKey = tuple[str, int]
"""The prompt and the seed of a run."""
Deltas = Mapping[float, Float[Tensor, "token width"]]
"""What is added to the activations of a site at each timestep."""


class RecordedRun:
    """The activations of a run at several sites, by timestep."""

    def __init__(self) -> None:
        self._values: dict[Site, dict[float, Tensor]] = {}
        self._grids: dict[Site, tuple[int, int] | None] = {}

    def add(self, site: Site, timestep: float, values: Float[Tensor, "token width"], grid: tuple[int, int] | None) -> None:
        """Add the activations of a site at a timestep; they are held on the CPU."""
        self._values.setdefault(site, {})[timestep] = values.cpu()
        self._grids[site] = grid

    def grid(self, site: Site) -> tuple[int, int] | None:
        """Return rows and columns of the tokens of a site; None for text."""
        return self._grids[site]

    def at(self, site: Site) -> dict[float, Float[Tensor, "token width"]]:
        """Return the activations of a site by timestep, in the order of the run."""
        return dict(sorted(self._values[site].items(), reverse=True))


def record_runs(batches: Iterable[Activations]) -> dict[RunKey, RecordedRun]:
    """Return the runs that activations are of."""
    runs: dict[RunKey, RecordedRun] = {}
    for activations in batches:
        for shot, values in zip(activations.shots, activations.values, strict=True):
            run = runs.setdefault((shot.prompt, shot.seed), RecordedRun())
            run.add(activations.site, shot.timestep or 0.0, values, activations.grid)
    return runs


class EncodedTokens(ABC):
    """Tokens of a site as sums of parts."""

    @abstractmethod
    def means(self) -> Float[Tensor, " part"]:
        """Return the mean weight of each part over the tokens."""

    @abstractmethod
    def sums(self, parts: Bool[Tensor, " part"]) -> Float[Tensor, "token width"]:
        """Return the sum of some of the parts at each token."""


@final
class CodedTokens(EncodedTokens):
    """Tokens by the features of a dictionary."""

    def __init__(self, dictionary: Dictionary, x: Float[Tensor, "token width"]) -> None:
        self._dictionary = dictionary.on(find_device())
        self._codes = self._dictionary.encode(x.to(self._dictionary.device).float())

    def means(self) -> Float[Tensor, " part"]:
        values, indices = self._codes
        zeros = torch.zeros(self._dictionary.size, device=values.device)
        return (zeros.index_add(0, indices.flatten(), values.flatten()) / max(len(values), 1)).cpu()

    def sums(self, parts: Bool[Tensor, " part"]) -> Float[Tensor, "token width"]:
        values, indices = self._codes
        return self._dictionary.delta(Codes(values * parts.to(indices.device)[indices], indices)).cpu()


@final
class NeuronTokens(EncodedTokens):
    """Tokens by their coordinates: the neurons of an MLP."""

    def __init__(self, x: Float[Tensor, "token width"]) -> None:
        self._x = x.float()

    def means(self) -> Float[Tensor, " part"]:
        return self._x.mean(0)

    def sums(self, parts: Bool[Tensor, " part"]) -> Float[Tensor, "token width"]:
        return self._x * parts


@final
class WholeTokens(EncodedTokens):
    """Tokens as they are: their only part is all of them."""

    def __init__(self, x: Float[Tensor, "token width"]) -> None:
        self._x = x.float()

    def means(self) -> Float[Tensor, " part"]:
        return torch.ones(1)

    def sums(self, parts: Bool[Tensor, " part"]) -> Float[Tensor, "token width"]:
        return self._x


Encode = Callable[[Float[Tensor, "token width"]], EncodedTokens]


def part_scores(donor: Float[Tensor, " part"], edited: Float[Tensor, " part"]) -> Float[Tensor, " part"]:
    """Return each part's share in the sum of mean weights at the donor's tokens, minus that at the edited tokens.

    The score of SAeUron, as RIEBench uses it; weights may be negative, and the sum is of their absolute values.
    """
    donor_share, edited_share = (means / means.abs().sum().clamp(min=1e-30) for means in (donor, edited))
    return donor_share - edited_share


class ChosenParts(NamedTuple):
    """The parts that a transfer adds and removes at one site."""

    added: Bool[Tensor, " part"]
    removed: Bool[Tensor, " part"]


def choose_parts(scores: Sequence[Float[Tensor, " part"]], count: int | None) -> list[ChosenParts]:
    """Return for each of several sites the parts to add and to remove: over all sites the `count` of the highest scores above
    0, and the `count` of the lowest below 0; with None all parts, both added and removed.
    """
    if count is None:
        return [ChosenParts(torch.ones_like(own, dtype=torch.bool), torch.ones_like(own, dtype=torch.bool)) for own in scores]
    whole = torch.cat(list(scores))
    count = min(count, len(whole))
    masks = []
    for sign in (1.0, -1.0):
        values, order = (sign * whole).topk(count)
        mask = torch.zeros(len(whole), dtype=torch.bool)
        mask[order[values > 0]] = True
        masks.append(mask.split([len(own) for own in scores]))
    return [ChosenParts(added, removed) for added, removed in zip(*masks, strict=True)]


@dataclass(frozen=True)
class ItemTransfer:
    """The transfer of an item at the sites of a place: the encoded tokens of both runs, of which parts are chosen."""

    item: EditItem
    masks: TransferMasks
    source: RecordedRun
    target: RecordedRun

    def deltas(self, encoders: Mapping[Site, Encode], counts: Sequence[int | None]) -> Iterator[dict[Site, Deltas]]:
        """Yield for each of `counts` what to add to the activations of each site: so many parts of the highest scores less as
        many of the lowest, or with None all parts.
        """
        encoded = {site: self._encoded(site, encode) for site, encode in encoders.items()}
        first = [next(iter(steps.values())) for steps in encoded.values()]
        scores = [part_scores(donor.means(), edited.means()) for donor, edited in first]
        for count in counts:
            yield {
                site: {timestep: self._delta(site, *pair, parts) for timestep, pair in steps.items()}
                for (site, steps), parts in zip(encoded.items(), choose_parts(scores, count), strict=True)
            }

    def _encoded(self, site: Site, encode: Encode) -> dict[float, tuple[EncodedTokens, EncodedTokens]]:
        """Return the tokens that are read, by timestep: those of the donor and the edited ones."""
        donor, edited = self._tokens(site)
        run = self.source if self.item.type == "delete" else self.target
        before = self.source.at(site)
        return {timestep: (encode(x[donor]), encode(before[timestep][edited])) for timestep, x in run.at(site).items()}

    def _tokens(self, site: Site) -> tuple[Bool[Tensor, " token"] | slice, Bool[Tensor, " token"] | slice]:
        grid = self.source.grid(site)
        donor, edited = on_tokens(self.masks.donor, grid), on_tokens(self.masks.edited, grid)
        if self.item.type == "delete" and isinstance(donor, Tensor) and isinstance(edited, Tensor):
            rest = donor & ~edited  # tokens at the border of the object belong to it
            donor = rest if bool(rest.any()) else donor
        return donor, edited

    def _delta(self, site: Site, donor: EncodedTokens, edited: EncodedTokens, parts: ChosenParts) -> Float[Tensor, "token width"]:
        """Return the added parts at the donor's tokens, or for `delete` their mean at all edited ones, less the removed parts."""
        at_donor, at_edited = self._tokens(site)
        added = donor.sums(parts.added)
        example = next(iter(self.source.at(site).values()))
        delta = torch.zeros(len(example), added.shape[1])
        if self.item.type == "delete":
            delta[at_edited] += added.mean(0)
        else:
            delta[at_donor] += added
        delta[at_edited] -= edited.sums(parts.removed)
        return delta

    def contrast_deltas(self, sites: Sequence[Site], directions: Mapping[Site, Float[Tensor, " width"]]) -> dict[Site, Deltas]:
        """Return directions at the edited tokens, at each timestep as long as the difference of the means of the tokens read."""
        deltas: dict[Site, Deltas] = {}
        for site in sites:
            _, at_edited = self._tokens(site)
            unit, by_step = directions[site] / directions[site].norm(), dict[float, Tensor]()
            everything = torch.ones(1, dtype=torch.bool)
            for timestep, (donor, edited) in self._encoded(site, WholeTokens).items():
                length = (donor.sums(everything).mean(0) - edited.sums(everything).mean(0)).norm()
                delta = torch.zeros(len(self.source.at(site)[timestep]), len(unit))
                delta[at_edited] += length * unit
                by_step[timestep] = delta
            deltas[site] = by_step
        return deltas


def contrast_directions(
    item: EditItem, sites: Sequence[Site], batches: Iterable[Activations]
) -> dict[Site, Float[Tensor, " width"]]:
    """Return for each site the mean difference of all tokens between runs of an item's two prompts with other seeds."""
    sides: dict[tuple[Site, str], list[Activations]] = {}
    for activations in batches:
        for shot, values in zip(activations.shots, activations.values, strict=True):
            own = Activations(site=activations.site, values=values[None].cpu(), shots=(shot,), grid=activations.grid)
            sides.setdefault((activations.site, shot.prompt), []).append(own)
    return {site: find_contrast(sides[site, item.target], sides[site, item.source]).direction for site in sites}


@final
@dataclass(frozen=True)
class TransferHook:
    """Adds deltas of its own to each image of a batch, in the conditional half under guidance."""

    deltas: Mapping[RunKey, Deltas]
    strength: float

    def __call__(self, x: Float[Tensor, "batch token width"], context: HookContext) -> Float[Tensor, "batch token width"] | None:
        """Return the activations with the deltas of this timestep; None if no image has any."""
        if context.half == "unconditional" or context.shots is None:
            return None
        edited, is_changed = x.clone(), False
        for row, shot in enumerate(context.shots):
            delta = self.deltas.get((shot.prompt, shot.seed), {}).get(context.timestep)
            if delta is not None and bool(delta.any()):
                edited[row] = (x[row].float() + self.strength * delta.to(x.device)).to(x.dtype)
                is_changed = True
        return edited if is_changed else None


def transfer_hooks(by_run: Mapping[RunKey, Mapping[Site, Deltas]], strength: float) -> list[SteeringHook]:
    """Return a hook for each site that adds `strength` times the deltas of each run."""
    sites = dict.fromkeys(site for deltas in by_run.values() for site in deltas)
    return [
        SteeringHook(site, TransferHook({key: deltas[site] for key, deltas in by_run.items() if site in deltas}, strength))
        for site in sites
    ]
