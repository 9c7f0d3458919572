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

    `features` returns the features of an edit, `maps` the maps of a transplant. All edits of a site see the same activation, and
    their changes are added; a site with a `replace` takes no other edit.
    """
    ordered = sorted(edits, key=lambda edit: edit.site)
    hooks = []
    for site, group in groupby(ordered, key=lambda edit: edit.site):
        prepared = [
            _PreparedEdit.of(edit, features(edit), maps(edit) if maps is not None and edit.operation == "transplant" else None)
            for edit in group
        ]
        if len(prepared) > 1 and any(item.edit.operation == "replace" for item in prepared):
            raise BadInput(f"A replace at {site} cannot be combined with another edit there. Run the other edit on its own.")
        hooks.append(SteeringHook(site, _SiteEdits(prepared)))
    return hooks


@final
class _SiteEdits:
    """The edits of one site; warns at the end of a run in which those of the region `fires` changed nothing."""

    def __init__(self, edits: Sequence[_PreparedEdit]) -> None:
        self._edits = edits
        self._silent: list[_PreparedEdit] = []

    def __call__(self, x: Float[Tensor, "batch token width"], context: HookContext) -> Float[Tensor, "batch token width"] | None:
        """Return the activations after the edits; None if nothing changes."""
        if context.step == 0:
            self._silent = [item for item in self._edits if item.is_meant_to_fire]
        edited: Tensor | None = None
        for prepared in self._edits:
            for images, tokens, delta in prepared.changes(x, context) if prepared.is_active(context) else ():
                edited = x.clone() if edited is None else edited
                self._silent = [item for item in self._silent if item is not prepared]
                if prepared.edit.operation == "replace":
                    edited[images, tokens] = delta.to(x)
                else:
                    edited[images, tokens] += delta.to(x)
        if context.shots and context.step == context.shots[0].steps - 1 and context.half != "unconditional":
            for item in self._silent:
                warnings.warn(
                    f"{item.features.description} fires at no token of {_images(context)}, so the edit changes nothing there. "
                    "Leave out the region, or give another one.",
                    stacklevel=2,
                )
            self._silent = []
        return edited


def _images(context: HookContext) -> str:
    """Return how a message calls the images of a batch."""
    shots = context.shots or ()
    return f"'{shots[0].prompt:.60}', seed {shots[0].seed}" if len(shots) == 1 else f"{len(shots)} images"


@final
@dataclass(frozen=True)
class _PreparedEdit:
    """An edit with its features, and its strength as codes."""

    edit: Edit
    features: EditFeatures
    amounts: Float[Tensor, " feature"]
    region: RegionShape | None
    maps: TransplantMaps | None

    @classmethod
    def of(cls, edit: Edit, features: EditFeatures, maps: TransplantMaps | None) -> _PreparedEdit:
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
            run = context.shots[0].steps if context.shots else end
            if end > run:
                raise BadInput(f"Steps {first} to {end - 1} cannot be edited: the run has {run}, numbered from 0.")
            if not first <= context.step < end:
                return False
        return context.half != "unconditional" or self.edit.half != "conditional"

    def changes(
        self, x: Float[Tensor, "batch token width"], context: HookContext
    ) -> Iterable[tuple[int | slice, Bool[Tensor, " token"] | slice, Tensor]]:
        """Yield images, their tokens that change, and by how much (of a replace: what replaces them)."""
        self.features.check_use(self.edit.site, x, context)
        sign = -1.0 if self.edit.half == "opposed" and context.half == "unconditional" else 1.0
        tokens, weights = self._tokens(x, context)
        lengths = x.float().norm(dim=-1).mean(1) if self._is_relative else None
        if self.edit.operation in ("add", "replace") and self.edit.region != "fires":
            value = sign * (self.amounts.to(x.device) @ self.features.decoder.to(x.device))
            value = value if weights is None else weights[:, None] * value
            if self.edit.operation == "replace" or bool(value.any()):
                yield slice(None), tokens, value if lengths is None else lengths[:, None, None] * value
            return
        inside = torch.arange(x.shape[1], device=x.device)[tokens]
        for number, row in enumerate(x):
            codes = self.features.codes(row[inside].float())
            delta = self._new_codes(codes, inside, context) - codes
            delta = delta if weights is None else weights[:, None] * delta
            delta = delta if lengths is None else lengths[number] * delta
            changed = (delta != 0).any(1)
            if self.edit.region == "fires":
                changed &= (codes > 0).any(1)
            if bool(changed.any()):
                yield number, inside[changed], sign * (delta[changed] @ self.features.decoder.to(x.device))

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
        if isinstance(self.region, Tensor) and self.region.is_floating_point() and self.edit.operation != "replace":
            weights = _resampled(self.region, context.grid).flatten().to(x.device)
            return weights > 0, weights[weights > 0]
        return region_tokens(self.region, context.grid).to(x.device), None

    def _new_codes(self, codes: Float[Tensor, "token feature"], tokens: Tensor, context: HookContext) -> Tensor:
        amounts = self.amounts.to(codes)
        if self.edit.operation == "add":
            return codes + amounts
        if self.edit.operation == "set":
            return amounts.expand_as(codes)
        if self.edit.operation == "scale":
            return codes * amounts
        if self.edit.operation == "ablate":
            return torch.zeros_like(codes)
        assert self.maps is not None
        return self.maps.codes(context, tokens, codes)


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
