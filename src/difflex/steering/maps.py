"""Maps of features from one generation, on their way into another."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from difflex.errors import BadInput
from difflex.records import Edit, HookContext, Rectangle
from difflex.steering.regions import covered

__all__ = ["TransplantMaps"]


@final
class TransplantMaps:
    """The codes of an edit's features at each token and step of its source; given to `Pipeline.at` while the source is drawn."""

    def __init__(self, edit: Edit, codes: Callable[[Float[Tensor, "token width"]], Float[Tensor, "token feature"]]) -> None:
        """Of the features whose `codes` these are."""
        self._edit, self._codes = edit, codes
        self._by_step: dict[int, Float[Tensor, "token feature"]] = {}
        self._grid: tuple[int, int] | None = None

    def __call__(self, x: Float[Tensor, "batch token width"], moment: HookContext) -> None:
        """Keeps the maps of this step of the first image, as the conditional half has them."""
        if moment.half != "unconditional":
            self._by_step[moment.step], self._grid = self._codes(x[0].float()), moment.grid

    def codes(
        self, moment: HookContext, tokens: Int[Tensor, " inside"], there: Float[Tensor, "inside feature"]
    ) -> Float[Tensor, "inside feature"]:
        """What is to be at `tokens` instead of the codes `there`: those of the source, its region laid middle on middle."""
        if moment.step not in self._by_step or self._grid is None or moment.grid != self._grid:
            raise BadInput(
                f"The source of the transplant has no map for step {moment.step} on a grid of {moment.grid}; it was drawn on "
                f"{self._grid} with {len(self._by_step)} steps. Draw both with the same steps and pixels."
            )
        assert self._edit.source is not None
        columns = self._grid[1]
        ours, theirs = _inside(self._edit.region, self._grid), _inside(self._edit.source.region, self._grid)
        row, column = (_middle(theirs, columns)[axis] - _middle(ours, columns)[axis] for axis in (0, 1))
        rows_from, columns_from = tokens.cpu() // columns + row, tokens.cpu() % columns + column
        within = (rows_from >= 0) & (rows_from < self._grid[0]) & (columns_from >= 0) & (columns_from < columns)
        come_from = (rows_from * columns + columns_from).where(within, torch.zeros_like(rows_from))
        taken = (within & theirs[come_from]).to(there.device)
        return torch.where(taken[:, None], self._by_step[moment.step].to(there)[come_from.to(there.device)], there)


def _inside(region: Rectangle | str | None, grid: tuple[int, int]) -> Bool[Tensor, " token"]:
    return torch.ones(grid[0] * grid[1], dtype=torch.bool) if region is None else covered(region, grid)


def _middle(tokens: Bool[Tensor, " token"], columns: int) -> tuple[int, int]:
    """Row and column halfway between the outermost tokens."""
    numbers = tokens.nonzero()[:, 0]
    rows, across = numbers // columns, numbers % columns
    return int(rows.min() + rows.max()) // 2, int(across.min() + across.max()) // 2
