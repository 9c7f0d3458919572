"""Edits as hooks: functions of a site's activations that change the tokens an edit names and leave all others bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from difflex.errors import BadInput
from difflex.records import Edit, HookContext, Rectangle, Site
from difflex.steering.features import EditFeatures

Grid = tuple[int, int]


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
    for edit in ordered:
        _check(edit)
    hooks = []
    for site, group in groupby(ordered, key=lambda edit: edit.site):
        prepared = [
            _PreparedEdit.of(edit, features(edit), maps(edit) if maps is not None and edit.operation == "transplant" else None)
            for edit in group
        ]
        if len(prepared) > 1 and any(item.edit.operation == "replace" for item in prepared):
            raise BadInput(f"A replace at {site} cannot be combined with another edit there. Run the other edit on its own.")
        hooks.append(SteeringHook(site, partial(_change, prepared)))
    return hooks


def _change(
    edits: Sequence[_PreparedEdit], x: Float[Tensor, "batch token width"], context: HookContext
) -> Float[Tensor, "batch token width"] | None:
    """Return the activations of one site after its edits; None if nothing changes."""
    edited: Tensor | None = None
    for prepared in edits:
        for images, tokens, delta in prepared.changes(x, context) if prepared.is_active(context) else ():
            edited = x.clone() if edited is None else edited
            if prepared.edit.operation == "replace":
                edited[images, tokens] = delta.to(x)
            else:
                edited[images, tokens] += delta.to(x)
    return edited


@final
@dataclass(frozen=True)
class _PreparedEdit:
    """An edit with its features, and its strength as codes."""

    edit: Edit
    features: EditFeatures
    amounts: Float[Tensor, " feature"]
    maps: TransplantMaps | None

    @classmethod
    def of(cls, edit: Edit, features: EditFeatures, maps: TransplantMaps | None) -> _PreparedEdit:
        if edit.operation != "scale" and edit.unit not in features.units:
            units = ", ".join(features.units)
            raise BadInput(f"The unit {edit.unit} needs the scales of {features.description}. Units without them: {units}.")
        unit = torch.ones(len(features.decoder)) if edit.operation == "scale" else features.units[edit.unit]
        return cls(edit, features, edit.strength * unit, maps)

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
        sign = -1.0 if self.edit.half == "opposed" and context.half == "unconditional" else 1.0
        tokens = self._tokens(x, context)
        if self.edit.operation in ("add", "replace") and self.edit.region != "fires":
            value = sign * (self.amounts.to(x.device) @ self.features.decoder.to(x.device))
            if self.edit.operation == "replace" or bool(value.any()):
                yield slice(None), tokens, value
            return
        inside = torch.arange(x.shape[1], device=x.device)[tokens]
        for number, row in enumerate(x):
            codes = self.features.codes(row[inside].float())
            delta = self._new_codes(codes, inside, context) - codes
            changed = (delta != 0).any(1)
            if self.edit.region == "fires":
                changed &= (codes > 0).any(1)
            if bool(changed.any()):
                yield number, inside[changed], sign * (delta[changed] @ self.features.decoder.to(x.device))

    def _tokens(self, x: Tensor, context: HookContext) -> Bool[Tensor, " token"] | slice:
        region = self.edit.region
        if region is None or region == "fires":
            return slice(None)
        if context.grid is None:
            raise BadInput(f"The tokens of {self.edit.site} have no place in the image. Leave the region out.")
        return region_tokens(region, context.grid).to(x.device)

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


def _check(edit: Edit) -> None:
    """Refuse impossible combinations of settings."""
    if not math.isfinite(edit.strength):
        raise BadInput(f"A strength of {edit.strength} is not possible. Give a finite number.")
    if edit.operation == "set" and edit.unit == "norm":
        raise BadInput("A code cannot be set in units of norm, which is a length. Use peak, mean or code.")
    if edit.half == "opposed" and edit.operation == "replace":
        raise BadInput("A replace has no opposite. Use half='both' or 'conditional'.")
    if edit.operation == "transplant" and edit.source is None:
        raise BadInput("A transplant needs a source: the prompt and seed of the image that its maps are taken from.")
    if edit.region == "fires" and edit.operation in ("replace", "transplant"):
        raise BadInput(f"The region of a {edit.operation} cannot be 'fires': it does not read the codes of the image.")
    if edit.steps is not None and not 0 <= edit.steps[0] < edit.steps[1]:
        raise BadInput(f"Steps {edit.steps[0]}:{edit.steps[1]} are empty. Write START:END with START below END.")


@final
class TransplantMaps:
    """The codes of an edit's features at each token and step of a source image; a hook for `Pipeline.at` that records them."""

    def __init__(self, edit: Edit, codes: Callable[[Float[Tensor, "token width"]], Float[Tensor, "token feature"]]) -> None:
        self._edit, self._codes = edit, codes
        self._by_step: dict[int, Float[Tensor, "token feature"]] = {}
        self._grid: Grid | None = None

    def __call__(self, x: Float[Tensor, "batch token width"], context: HookContext) -> None:
        """Record the codes of the first image at this step, of the conditional half."""
        if context.half != "unconditional":
            self._by_step[context.step], self._grid = self._codes(x[0].float()), context.grid

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
        assert self._edit.source is not None
        columns = self._grid[1]
        target, source = _tokens_or_all(self._edit.region, self._grid), _tokens_or_all(self._edit.source.region, self._grid)
        row, column = (_middle(source, columns)[axis] - _middle(target, columns)[axis] for axis in (0, 1))
        source_rows, source_columns = tokens.cpu() // columns + row, tokens.cpu() % columns + column
        within = (source_rows >= 0) & (source_rows < self._grid[0]) & (source_columns >= 0) & (source_columns < columns)
        source_tokens = (source_rows * columns + source_columns).where(within, torch.zeros_like(source_rows))
        replaced = (within & source[source_tokens]).to(current.device)
        codes = self._by_step[context.step].to(current)[source_tokens.to(current.device)]
        return torch.where(replaced[:, None], codes, current)


def _tokens_or_all(region: Rectangle | str | None, grid: Grid) -> Bool[Tensor, " token"]:
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


def region_tokens(region: Rectangle | str, grid: Grid) -> Bool[Tensor, " token"]:
    """Return the tokens that `region` covers by half or more; in a smaller region, those it covers most."""
    shares = _rectangle_shares(region, grid) if isinstance(region, Rectangle) else _image_shares(Path(region), grid)
    shares = shares.flatten()
    if not shares.any():
        raise BadInput(f"The region {region} covers no token: the image has no light part. Paint the region white.")
    return shares >= min(0.5, float(shares.max()))


def _rectangle_shares(region: Rectangle, grid: Grid) -> Float[Tensor, "row column"]:
    def along(start: float, end: float, count: int) -> Tensor:
        edges = torch.arange(count + 1, dtype=torch.float64) / count
        return (edges[1:].clamp(max=end) - edges[:-1].clamp(min=start)).clamp(min=0) * count

    rows, columns = grid
    return torch.outer(along(region.top, region.bottom, rows), along(region.left, region.right, columns)).float()


def _image_shares(path: Path, grid: Grid) -> Float[Tensor, "row column"]:
    """Return the share of each token that is light in the image at `path`."""
    try:
        with Image.open(path) as file:
            grey = file.convert("L")
    except (OSError, UnidentifiedImageError) as error:
        raise BadInput(f"The region {path} cannot be read as an image ({error}). Name a PNG that is white inside.") from error
    light = torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).view(grey.height, grey.width) >= 128
    return F.adaptive_avg_pool2d(light.float()[None], grid)[0]
