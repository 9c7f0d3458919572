"""Adam in place on a block of rows, while the block's gradient is still in the cache; whole gradients never exist.

With beta1 = 0 a row without a gradient does not move, and only its second moment decays. So rows that do not fire are left alone
and `decayed` makes up for it, exactly, when they fire again; the running average of the weights likewise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from difflex.training.config import AdamConfig

__all__ = ["Adam", "AdamWeight", "Rows"]

Rows = slice | Int[Tensor, " row"]
"""Neighbouring rows, or a list of them."""


@dataclass(frozen=True, kw_only=True)
class AdamWeight:
    """A weight with what its updates need; a vector is a weight of one column."""

    weight: Float[Tensor, "row ..."]
    first: Float[Tensor, "row ..."] | None
    """First moment; None where beta1 is 0, as it would be the gradient itself."""
    second: Float[Tensor, "row ..."]
    average: Float[Tensor, "row ..."] | None
    """Running average of the weight; None where none is kept."""

    @classmethod
    def of(cls, weight: Tensor, settings: AdamConfig) -> AdamWeight:
        """`weight` before its first update."""
        first = torch.zeros_like(weight) if settings.beta1 else None
        average = weight.clone() if settings.ema is not None else None
        return cls(weight=weight, first=first, second=torch.zeros_like(weight), average=average)

    def at(self, rows: Rows) -> AdamWeight:
        """Some rows: a view where they are neighbours, a copy where they are listed."""
        first = None if self.first is None else self.first[rows]
        average = None if self.average is None else self.average[rows]
        return AdamWeight(weight=self.weight[rows], first=first, second=self.second[rows], average=average)

    def put(self, rows: Rows, part: AdamWeight) -> None:
        """Write back what `at` gave."""
        if isinstance(rows, Tensor):
            for name, tensor in self.named().items():
                tensor[rows] = part.named()[name]

    def named(self) -> dict[str, Tensor]:
        """The tensors there are, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}


@final
class Adam:
    """The arithmetic of one update, the same for all weights."""

    def __init__(self, settings: AdamConfig, *, update: int, lr: float, scale: float = 1.0) -> None:
        """Update number `update`, counted from 1; all gradients are multiplied by `scale`."""
        self.settings, self.update, self.lr, self.scale = settings, update, lr, scale
        self._count = torch.tensor(float(update))

    def step(self, matrix: AdamWeight, gradient: Tensor) -> None:
        """Move the weight against `gradient`, which is spent."""
        if self.scale != 1.0:
            gradient.mul_(self.scale)
        settings = self.settings
        torch._fused_adam_(
            [matrix.weight],
            [gradient],
            [torch.empty_like(gradient).zero_() if matrix.first is None else matrix.first],
            [matrix.second],
            [],
            [self._count.to(gradient.device)],
            lr=self.lr,
            beta1=settings.beta1,
            beta2=settings.beta2,
            weight_decay=0.0,
            eps=settings.eps,
            amsgrad=False,
            maximize=False,
        )

    def averaged(self, matrix: AdamWeight) -> None:
        """Take the moved weight into its average."""
        if matrix.average is not None and self.settings.ema is not None:
            matrix.average.lerp_(matrix.weight, 1 - self.settings.ema)

    def decayed(self, matrix: AdamWeight, missed: Int[Tensor, " row"]) -> None:
        """Make up for `missed` updates, in which the rows had no gradient and beta1 was 0."""
        powers = missed.to(matrix.weight.dtype).unsqueeze(-1) if matrix.weight.ndim == 2 else missed.to(matrix.weight.dtype)
        matrix.second.mul_(self.settings.beta2**powers)
        if matrix.average is not None and self.settings.ema is not None:
            matrix.average.lerp_(matrix.weight, 1 - self.settings.ema**powers)
