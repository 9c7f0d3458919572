"""Edits as hooks: functions of a site's activations that change the tokens an edit names and leave all others bit for bit."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from difflex.errors import BadInput
from difflex.images import open_image
from difflex.records import Edit, HookContext, Rectangle, Region, RegionMap, Site
from difflex.steering.features import EditFeatures

Grid = tuple[int, int]
RegionShape = Rectangle | Bool[Tensor, "row column"] | Float[Tensor, "row column"]
"""A rectangle, the light part of an image, or the weights of a map."""


class SteeringHook(NamedTuple):
    """A change of the activations at one site; `Pipeline.generate` takes several."""

    site: Site
    change: Callable[[Float[Tensor, "batch token width"], HookContext], Float[Tensor, "batch token width"] | None]


def steering_hooks(
    edits: Iterable[Edit], features: Callable[[Edit], EditFeatures], maps: Callable[[Edit], TransplantMaps] | None = None
) -> list[SteeringHook]:
    """Return one hook for each site of `edits`, for `Pipeline.generate`.

    `features` returns the features of an edit, `maps` the maps of a transplant. All edits of a site see the same activation.
    Where edits replace it, its new value is the sum of what they write, else the activation itself; the changes by all other
    edits are added to that. The sum is of float32 numbers, and rounded once.
    """
    placed = [(site, edit) for edit in edits for site in edit.sites]
    prepared = {
        id(edit): _PreparedEdit.of(
            edit,
            None if edit.operation == "zero" else features(edit),
            maps(edit) if maps is not None and edit.operation == "transplant" else None,
        )
        for edit in {id(edit): edit for _, edit in placed}.values()
    }
    groups = groupby(sorted(placed, key=lambda item: item[0]), key=lambda item: item[0])
    return [SteeringHook(site, _SiteEdits(site, [prepared[id(edit)] for _, edit in group])) for site, group in groups]


@final
class _SiteEdits:
    """The edits of one site; warns at the end of a run in which those of the region `fires` changed nothing."""

    def __init__(self, site: Site, edits: Sequence[_PreparedEdit]) -> None:
        self._site, self._edits = site, edits
        self._silent: list[_PreparedEdit] = []

    def __call__(self, x: Float[Tensor, "batch token width"], context: HookContext) -> Float[Tensor, "batch token width"] | None:
        """Return the activations after the edits; None if nothing changes."""
        if context.step == 0:
            self._silent = [item for item in self._edits if item.is_meant_to_fire]
        edited: _EditedActivations | None = None
        for prepared in self._edits:
            for change in prepared.changes(x, context, self._site) if prepared.is_active(context) else ():
                edited = edited or _EditedActivations(x)
                self._silent = [item for item in self._silent if item is not prepared]
                edited.change(change, prepared.edit.replaces)
        if context.shots and context.step == _run_steps(context) - 1 and context.half != "unconditional":
            for item in self._silent:
                assert item.features is not None
                warnings.warn(
                    f"{item.features.description} fires at no token of {_images(context)}, so the edit changes nothing there. "
                    "Leave out the region, or give another one.",
                    stacklevel=2,
                )
            self._silent = []
        return None if edited is None else edited.values()


class _TokenChange(NamedTuple):
    """What an edit adds to some tokens, or writes there."""

    images: int | slice
    tokens: Tensor | slice
    """A mask, or numbers."""
    value: Tensor


@final
class _EditedActivations:
    """The activations of a site under the changes of several edits."""

    def __init__(self, x: Float[Tensor, "batch token width"]) -> None:
        self._x = x
        self._sum = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        self._changed, self._replaced = (torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device) for _ in range(2))

    def change(self, change: _TokenChange, replaces: bool) -> None:
        """Add a change to the others."""
        at = change.images, change.tokens
        self._sum[at] += change.value
        self._changed[at] = True
        self._replaced[at] |= replaces

    def values(self) -> Float[Tensor, "batch token width"]:
        """Return the activations after all changes; tokens without a change keep their bits."""
        kept = self._x.to(self._sum.dtype).masked_fill(self._replaced[..., None], 0.0)
        return torch.where(self._changed[..., None], (kept + self._sum).to(self._x.dtype), self._x)


def _run_steps(context: HookContext) -> int:
    """Return how many steps the run of a shot has."""
    return context.steps or (context.shots[0].steps if context.shots else context.step + 1)


def _images(context: HookContext) -> str:
    """Return how a message calls the images of a batch."""
    shots = context.shots or ()
    return f"'{shots[0].prompt:.60}', seed {shots[0].seed}" if len(shots) == 1 else f"{len(shots)} images"


@final
@dataclass(frozen=True)
class _PreparedEdit:
    """An edit with its features, and its strength as codes."""

    edit: Edit
    features: EditFeatures | None
    """None for an edit to zero."""
    amounts: Float[Tensor, " feature"]
    region: RegionShape | None
    maps: TransplantMaps | None

    @classmethod
    def of(cls, edit: Edit, features: EditFeatures | None, maps: TransplantMaps | None) -> _PreparedEdit:
        if features is None or features.reconstruct is not None:
            return cls(edit, features, torch.empty(0), read_region(edit.region), maps)
        if edit.has_unit and edit.unit not in features.units:
            units = ", ".join(features.units)
            raise BadInput(f"The unit {edit.unit} needs the scales of {features.description}. Units without them: {units}.")
        unit = features.units[edit.unit] if edit.has_unit else torch.ones(len(features.decoder))
        amounts = edit.strength * unit
        if not bool(torch.isfinite(amounts.to(features.decoder) @ features.decoder).all()):
            raise BadInput(f"A strength of {edit.strength:g} of {features.description} is infinite. Choose a lower one.")
        return cls(edit, features, amounts, read_region(edit.region), maps)

    @property
    def is_meant_to_fire(self) -> bool:
        """Whether the edit changes something where its features fire, and nothing elsewhere."""
        neutral = {"add": 0.0, "scale": 1.0}.get(self.edit.operation)
        return self.edit.region == "fires" and self.edit.strength != neutral

    def is_active(self, context: HookContext) -> bool:
        """Return whether the edit applies to this step and this half."""
        if self.edit.steps is not None:
            first, end = self.edit.steps
            run = _run_steps(context) if context.shots else end
            if end > run:
                raise BadInput(f"Steps {first} to {end - 1} cannot be edited: the run has {run}, numbered from 0.")
            if not first <= context.step < end:
                return False
        return context.half != "unconditional" or self.edit.half != "conditional"

    def changes(self, x: Float[Tensor, "batch token width"], context: HookContext, site: Site) -> Iterable[_TokenChange]:
        """Yield what changes in the activations of `site`."""
        if self.features is None:
            yield _TokenChange(slice(None), self._tokens(x, context)[0], x.new_zeros(()))
            return
        self.features.check_use(self.edit.site, x, context, site)
        if self.features.reconstruct is not None:
            tokens, _ = self._tokens(x, context)
            for number, row in enumerate(x):
                yield _TokenChange(number, tokens, self.features.reconstruct(row[tokens].float()))
        elif self.edit.operation in ("add", "replace") and self.edit.region != "fires":
            yield from self._same_change(self.features, x, context)
        else:
            yield from self._code_changes(self.features, x, context)

    def _same_change(self, features: EditFeatures, x: Tensor, context: HookContext) -> Iterable[_TokenChange]:
        """Yield a change that is the same at each token, but for weights and the norm of the image."""
        tokens, weights = self._tokens(x, context)
        value = self._sign(context) * (self.amounts.to(x.device) @ features.decoder.to(x.device))
        value = value if weights is None else weights[:, None] * value
        if self.edit.replaces or bool(value.any()):
            yield _TokenChange(slice(None), tokens, value if not self._is_relative else _mean_norms(x)[:, None, None] * value)

    def _code_changes(self, features: EditFeatures, x: Tensor, context: HookContext) -> Iterable[_TokenChange]:
        """Yield the changes of codes, image by image."""
        tokens, weights = self._tokens(x, context)
        inside = torch.arange(x.shape[1], device=x.device)[tokens]
        lengths = _mean_norms(x) if self._is_relative else None
        for number, row in enumerate(x):
            codes = features.codes(row[inside].float())
            delta = self._added_codes(codes, inside, context)
            delta = delta if weights is None else weights[:, None] * delta
            delta = delta if lengths is None else lengths[number] * delta
            changed = (delta != 0).any(1)
            if self.edit.region == "fires":
                changed &= (codes > 0).any(1)
            if bool(changed.any()):
                value = self._sign(context) * (delta[changed] @ features.decoder.to(x.device))
                yield _TokenChange(number, inside[changed], value)

    def _sign(self, context: HookContext) -> float:
        return -1.0 if self.edit.half == "opposed" and context.half == "unconditional" else 1.0

    @property
    def _is_relative(self) -> bool:
        """Whether the strength is in norms of the activations that are edited."""
        return self.edit.unit == "current-norm" and self.edit.operation in ("add", "replace")

    def _tokens(self, x: Tensor, context: HookContext) -> tuple[Bool[Tensor, " token"] | slice, Float[Tensor, " inside"] | None]:
        """Return the tokens to edit, and the weight of each; None where all have the weight 1."""
        if self.region is None:
            return slice(None), None
        if context.grid is None:
            raise BadInput(f"The tokens of {self.edit.site} have no place in the image. Leave the region out.")
        if isinstance(self.region, Tensor) and self.region.is_floating_point() and not self.edit.replaces:
            weights = _resampled(self.region, context.grid).flatten().to(x.device)
            return weights > 0, weights[weights > 0]
        return region_tokens(self.region, context.grid).to(x.device), None

    def _added_codes(self, codes: Float[Tensor, "token feature"], tokens: Tensor, context: HookContext) -> Tensor:
        amounts = self.amounts.to(codes)
        if self.edit.operation == "add":
            return amounts.expand_as(codes)
        if self.edit.operation == "set":
            return amounts - codes
        if self.edit.operation == "scale":
            return (amounts - 1) * codes
        if self.edit.operation == "ablate":
            return -codes
        assert self.maps is not None
        return self.maps.codes(context, tokens, codes) - codes


def _mean_norms(x: Float[Tensor, "batch token width"]) -> Float[Tensor, " batch"]:
    return x.float().norm(dim=-1).mean(1)


@final
class TransplantMaps:
    """The codes of an edit's features at each token and step of a source image; a hook for `Pipeline.at` that records them."""

    def __init__(self, edit: Edit, features: EditFeatures) -> None:
        self._edit, self._features = edit, features
        self._target, self._source = read_region(edit.region), read_region(edit.source.region if edit.source else None)
        self._by_step: dict[int, Float[Tensor, "token feature"]] = {}
        self._grid: Grid | None = None

    def __call__(self, x: Float[Tensor, "batch token width"], context: HookContext) -> None:
        """Record the codes of the first image at this step, of the conditional half."""
        self._features.check_use(self._edit.site, x, context)
        if context.half != "unconditional":
            self._by_step[context.step], self._grid = self._features.codes(x[0].float()), context.grid

    def codes(
        self, context: HookContext, tokens: Int[Tensor, " inside"], current: Float[Tensor, "inside feature"]
    ) -> Float[Tensor, "inside feature"]:
        """Return the codes that replace `current` at `tokens`: those of the source, whose region is centred on the edit's.

        Tokens that the region of the source does not reach keep their codes.
        """
        if context.step not in self._by_step or self._grid is None or context.grid != self._grid:
            raise BadInput(
                f"The source of the transplant has no map for step {context.step} on a grid of {context.grid}; it was generated "
                f"on {self._grid} with {len(self._by_step)} steps. Generate both with the same steps and pixels."
            )
        columns = self._grid[1]
        target, source = _tokens_or_all(self._target, self._grid), _tokens_or_all(self._source, self._grid)
        row, column = (_middle(source, columns)[axis] - _middle(target, columns)[axis] for axis in (0, 1))
        source_rows, source_columns = tokens.cpu() // columns + row, tokens.cpu() % columns + column
        within = (source_rows >= 0) & (source_rows < self._grid[0]) & (source_columns >= 0) & (source_columns < columns)
        source_tokens = (source_rows * columns + source_columns).where(within, torch.zeros_like(source_rows))
        replaced = (within & source[source_tokens]).to(current.device)
        codes = self._by_step[context.step].to(current)[source_tokens.to(current.device)]
        return torch.where(replaced[:, None], codes, current)


def _tokens_or_all(region: RegionShape | None, grid: Grid) -> Bool[Tensor, " token"]:
    return torch.ones(grid[0] * grid[1], dtype=torch.bool) if region is None else region_tokens(region, grid)


def _middle(tokens: Bool[Tensor, " token"], columns: int) -> tuple[int, int]:
    """Return the row and column halfway between the outermost tokens."""
    numbers = tokens.nonzero()[:, 0]
    rows, across = numbers // columns, numbers % columns
    return int(rows.min() + rows.max()) // 2, int(across.min() + across.max()) // 2


def rectangle(numbers: Sequence[float], pixels: tuple[int, int] | None = None) -> Rectangle:
    """Return the rectangle left, top, right, bottom, given in fractions, or in pixels where a number is above 1."""
    text = ",".join(f"{number:g}" for number in numbers)
    if len(numbers) != 4 or not all(map(math.isfinite, numbers)):
        raise BadInput(f"The region {text} is not LEFT,TOP,RIGHT,BOTTOM. Write four numbers: 0.5,0,1,1 is the right half.")
    left, top, right, bottom = numbers
    if max(numbers) > 1:
        if pixels is None:
            raise BadInput(f"The region {text} is in pixels, but the size of the image is not known. Write fractions.")
        height, width = pixels
        left, top, right, bottom = left / width, top / height, right / width, bottom / height
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        size = f" of {pixels[1]} x {pixels[0]} pixels" if pixels else ""
        raise BadInput(f"The region {text} is empty or outside the image{size}. LEFT must be below RIGHT, and TOP below BOTTOM.")
    return Rectangle(left, top, right, bottom)


def read_region(region: Region | None) -> RegionShape | None:
    """Return the shape of a region: the light part of an image in place of its name, weights in place of a map."""
    if region is None or region == "fires":
        return None
    if isinstance(region, Rectangle):
        return region
    if isinstance(region, RegionMap):
        levels = torch.frombuffer(bytearray(region.levels), dtype=torch.uint8)
        return levels.view(region.rows, region.columns) / 255
    grey = open_image(Path(region), "L")
    light = torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).view(grey.height, grey.width) >= 128
    if not bool(light.any()):
        raise BadInput(f"The region {region} covers no token: the image has no light part. Paint the region white.")
    return light


def region_tokens(region: RegionShape, grid: Grid) -> Bool[Tensor, " token"]:
    """Return the tokens that `region` covers by half or more; in a smaller region, those it covers most."""
    shares = _rectangle_shares(region, grid) if isinstance(region, Rectangle) else _resampled(region, grid)
    shares = shares.flatten()
    return shares >= min(0.5, float(shares.max()))


def _rectangle_shares(region: Rectangle, grid: Grid) -> Float[Tensor, "row column"]:
    def along(start: float, end: float, count: int) -> Tensor:
        edges = torch.arange(count + 1, dtype=torch.float64) / count
        return (edges[1:].clamp(max=end) - edges[:-1].clamp(min=start)).clamp(min=0) * count

    rows, columns = grid
    return torch.outer(along(region.top, region.bottom, rows), along(region.left, region.right, columns)).float()


def _resampled(region: Tensor, grid: Grid) -> Float[Tensor, "row column"]:
    """Return the mean of a mask or of weights over each token."""
    return F.adaptive_avg_pool2d(region.float()[None], grid)[0]
