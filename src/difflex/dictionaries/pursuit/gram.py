"""The Gram matrix of a dictionary: what its atoms have in common, so that a pursuit need not come back to the signals."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from difflex.dictionaries.pursuit.products import product
from difflex.errors import BadInput

__all__ = ["PANEL", "GramMatrix"]

PANEL = 512
"""Columns that stand together in memory: a dictionary that grows fills panels one by one and never moves what stands."""


@final
class GramMatrix:
    """`atoms @ atoms.T`, which grows by rows and columns without being recomputed; in float16 it takes half the memory."""

    def __init__(
        self,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        panel: int = PANEL,
    ) -> None:
        """The empty Gram matrix of up to `capacity` atoms; memory is only taken as they come (on a CPU)."""
        self.size = 0
        self.capacity = capacity
        self.panel = min(panel, max(capacity, 1))
        count = -(-capacity // self.panel)
        self._panels = torch.empty(count, capacity, self.panel, dtype=dtype, device=device)

    @classmethod
    def of(cls, atoms: Float[Tensor, "size width"], dtype: torch.dtype | None = None, panel: int = PANEL) -> GramMatrix:
        """The Gram matrix of `atoms`, which may not grow."""
        gram = cls(len(atoms), dtype=dtype or atoms.dtype, device=atoms.device, panel=panel)
        for start in range(0, len(atoms), 512):
            rows = atoms[start : start + 512]
            gram.append(product(rows, atoms[:start]), product(rows, rows))
        return gram

    @property
    def dtype(self) -> torch.dtype:
        return self._panels.dtype

    @staticmethod
    def bytes(size: int, dtype: torch.dtype) -> int:
        """The memory that the Gram matrix of `size` atoms takes."""
        return size * size * dtype.itemsize

    def append(self, cross: Float[Tensor, "new size"], own: Float[Tensor, "new new"]) -> None:
        """Take in new atoms: their inner products with those that are there, and with each other."""
        start, stop = self.size, self.size + len(own)
        if stop > self.capacity:
            raise BadInput(f"A Gram matrix for {self.capacity} atoms has {start}; {len(own)} more do not fit. Ask for more room.")
        for panel, (low, high) in enumerate(self._spans(stop)):
            block = self._panels[panel]
            old = min(high, start)
            if low < old:
                block[start:stop, : old - low] = cross[:, low:old]
            new = max(low, start)
            if new < high:
                block[start:stop, new - low : high - low] = own[:, new - start : high - start]
                block[:start, new - low : high - low] = cross[new - start : high - start].T
        self.size = stop

    def cut(self, size: int) -> None:
        """Forget the atoms after the first `size`."""
        self.size = min(self.size, size)

    def rows(self, atoms: Int[Tensor, " atom"]) -> Float[Tensor, "atom size"]:
        """The rows of `atoms`."""
        parts = [self._panels[panel, atoms, : high - low] for panel, (low, high) in enumerate(self._spans(self.size))]
        return torch.cat(parts, 1)

    def between(self, atoms: Int[Tensor, " token"], others: Int[Tensor, "token slot"]) -> Float[Tensor, "token slot"]:
        """The inner product of each token's atom with each of its `others`."""
        places = (others // self.panel * self.capacity + atoms[:, None]) * self.panel + others % self.panel
        return self._panels.take(places)

    def subtract(
        self, scores: Float[Tensor, "token size"], atoms: Int[Tensor, "token slot"], weights: Float[Tensor, "token slot"]
    ) -> None:
        """Take `weights @ gram[atoms]` from `scores`, in place."""
        count, slots = atoms.shape
        weights = weights.to(self.dtype).reshape(-1)
        atoms, starts = atoms.reshape(-1), torch.arange(0, count * slots, slots, device=atoms.device)
        for panel, (low, high) in enumerate(self._spans(self.size)):
            part = torch.embedding_bag(self._panels[panel], atoms, starts, False, 0, False, weights)[0]
            scores[:, low:high].sub_(part[:, : high - low])

    def _spans(self, size: int) -> list[tuple[int, int]]:
        """The first column of every panel in use, and the one after its last."""
        return [(low, min(low + self.panel, size)) for low in range(0, size, self.panel)]
