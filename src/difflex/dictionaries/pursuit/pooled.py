"""The atoms that a pursuit picks from, and pursuits that pick from pools of candidates.

A round of gradient or orthogonal pursuit needs as many rows of the Gram matrix as atoms were picked, and a GPU multiplies by
some 200 coordinates while it reads one row. So there is no Gram matrix on a GPU. Once in some rounds the residuals are scored
against all atoms, there in half precision, and the best of each signal become its pool. What the rounds until then need,
correlations with the pool and inner products with the support, comes from the rows of the pool, in full precision. With a new
pool in every round each pick is the best of all atoms, unless more atoms than the pool holds are as good up to rounding errors
of half precision.

Shapes are fixed, and nothing waits for the GPU.
"""

from __future__ import annotations

from typing import NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from difflex.dictionaries.pursuit.correlations import (
    BestAtoms,
    Correlations,
    ExcludedAtoms,
    GramCorrelations,
    GramMatrix,
    ProductCorrelations,
    largest_of_few,
    merit_of,
    product,
)
from difflex.records import Codes

BLOCK = 64
"""Neighbouring atoms of which only the best is compared first; rows in half precision are a multiple of it."""


class CandidatePool(NamedTuple):
    """How a pursuit without a Gram matrix saves products with all atoms: nearly exact, and several times faster."""

    rounds: int = 4
    """The correlations with all atoms are computed once in so many rounds."""
    atoms: int = 32
    """In these rounds, atoms are picked from so many that correlated best."""


@final
class AtomSet:
    """The atoms that a pursuit picks from."""

    def __init__(
        self,
        rows: Float[Tensor, "size width"],
        gram: GramMatrix | None = None,
        pool: CandidatePool | None = None,
        half: Float[Tensor, "padded width"] | None = None,
    ) -> None:
        """Use `rows` of norm one (or zero); a `pool` only matters without their Gram matrix, and `half` only with a pool."""
        self.rows, self.gram, self.pool, self.half = rows, gram, pool, half

    @property
    def size(self) -> int:
        return len(self.rows)

    @staticmethod
    def half_rows(rows: Float[Tensor, "size width"], capacity: int = 0) -> Float[Tensor, "padded width"]:
        """Return `rows` in half precision, followed by zeros up to the `capacity` and to a whole number of blocks."""
        padded = -(-max(len(rows), capacity) // BLOCK) * BLOCK
        half = torch.zeros(padded, rows.shape[1], dtype=torch.float16, device=rows.device)
        half[: len(rows)] = rows
        return half

    def correlations(
        self,
        signals: Float[Tensor, "token width"],
        k: int,
        scores: Float[Tensor, "token size"] | None = None,
        excluded: ExcludedAtoms = None,
    ) -> Correlations:
        """Return the correlations of `signals` with all atoms, for k rounds; `scores` are these, where they are known already."""
        if self.gram is not None:
            return GramCorrelations(self.gram, product(signals, self.rows) if scores is None else scores.clone(), excluded)
        if self.pool is not None and self.pool.atoms < self.size:
            return PooledCorrelations(self, self.pool, signals, k, scores, excluded)
        return ProductCorrelations(self.rows, signals, product(signals, self.rows) if scores is None else scores, excluded)


@final
class PooledCorrelations(Correlations):
    """The correlations with a pool of atoms for each signal, which is filled again every few rounds.

    The atoms picked so far, one in each slot, follow the pool in `_scores` and `_products`.
    """

    def __init__(
        self,
        atoms: AtomSet,
        pool: CandidatePool,
        signals: Float[Tensor, "token width"],
        k: int,
        scores: Float[Tensor, "token size"] | None,
        excluded: ExcludedAtoms,
    ) -> None:
        """Start with the `signals`, no atoms and an empty pool; `scores` are those of the first round."""
        self._atoms, self._pool, self._signals, self._first, self._excluded = atoms, pool, signals, scores, excluded
        count, width = signals.shape
        self._slot = 0
        self._vectors = signals.new_empty(count, 1 + k, width)
        """The residual when the pool was filled, then the atoms picked so far."""
        self._weights = signals.new_zeros(count, k)
        self._scores = signals.new_zeros(count, pool.atoms + k)
        self._products = signals.new_zeros(count, pool.atoms + k, k)
        """The inner products of the pool and the picked atoms with the picked atoms."""
        self._members = torch.zeros(count, pool.atoms, dtype=torch.long, device=signals.device)
        self._member_rows = self._member_products = signals

    def best(self, signed: bool) -> BestAtoms:
        if self._slot % self._pool.rounds == 0:
            self._fill(signed)
        size, slot = self._pool.atoms, self._slot
        best = largest_of_few(self._scores[:, :size], signed)
        tokens, place = torch.arange(len(self._scores), device=self._scores.device), best.atoms
        self._vectors[:, 1 + slot] = self._member_rows[tokens, place]
        self._scores[:, size + slot] = best.correlations
        self._products[:, :size, slot] = self._member_products[tokens, place]
        own = self._products[tokens, place, : slot + 1]
        self._products[:, size + slot, : slot + 1] = own
        self._products[:, size : size + slot, slot] = own[:, :slot]
        return best._replace(atoms=self._members.gather(1, place[:, None])[:, 0])

    def at(self, support: Tensor) -> Tensor:
        return self._scores[:, self._pool.atoms :][:, : support.shape[1]]

    def between(self, picked: Tensor, support: Tensor) -> Tensor:
        return self._products[:, self._pool.atoms + self._slot, : support.shape[1]]

    def update(self, change: Codes) -> None:
        slots = slice(self._slot + 1 - change.values.shape[1], self._slot + 1)
        rows = slice(0, self._pool.atoms + self._slot + 1)
        self._weights[:, slots].add_(change.values)
        self._scores[:, rows].sub_(torch.bmm(self._products[:, rows, slots], change.values[:, :, None])[:, :, 0])
        self._slot += 1

    def select(self, rows: Tensor) -> None:
        self._signals, self._vectors, self._weights = self._signals[rows], self._vectors[rows], self._weights[rows]
        self._scores, self._products = self._scores[rows], self._products[rows]
        self._excluded = None if self._excluded is None else self._excluded[rows]
        if self._slot % self._pool.rounds:
            self._members, self._member_rows = self._members[rows], self._member_rows[rows]
            self._member_products = self._member_products[rows]

    def _fill(self, signed: bool) -> None:
        """Fill the pools with the atoms that correlate best with the residuals now."""
        size, slot = self._pool.atoms, self._slot
        explained = torch.bmm(self._weights[:, None, :slot], self._vectors[:, 1 : 1 + slot])[:, 0]
        self._vectors[:, 0] = self._signals - explained
        self._members, allowed = self._best_atoms(self._all_scores(self._vectors[:, 0], signed), signed)
        self._member_rows = self._atoms.rows[self._members]
        products = torch.bmm(self._member_rows, self._vectors[:, : 1 + slot].mT) * allowed[:, :, None]
        self._scores[:, :size], self._products[:, :size, :slot] = products[:, :, 0], products[:, :, 1:]
        self._member_products = torch.bmm(self._member_rows, self._member_rows.mT) * (allowed[:, :, None] & allowed[:, None])

    def _all_scores(self, residual: Float[Tensor, "token width"], signed: bool) -> Float[Tensor, "token atom"]:
        """Return the correlations with all atoms up to a factor for each signal, lowest for what must not be picked."""
        if self._atoms.half is None:
            scores = product(residual, self._atoms.rows) if self._slot or self._first is None else self._first.clone()
        else:
            lengths = torch.linalg.vector_norm(residual, dim=1, keepdim=True)
            unit = (residual / lengths.where(lengths > 0, 1)).to(self._atoms.half.dtype)
            scores = unit @ self._atoms.half[: -(-self._atoms.size // BLOCK) * BLOCK].T
        lowest = 0.0 if signed else -torch.inf
        scores[:, self._atoms.size :] = lowest
        if self._excluded is not None:
            last = scores[:, self._atoms.size - self._excluded.shape[1] : self._atoms.size]
            last.masked_fill_(self._excluded, lowest)
        return scores

    def _best_atoms(self, scores: Float[Tensor, "token atom"], signed: bool) -> tuple[Int[Tensor, "token member"], Tensor]:
        """Return the pool of every signal, and which of its members may be picked."""
        count, places = self._pool.atoms, None
        if scores.shape[1] % BLOCK == 0 and scores.shape[1] >= 2 * count * BLOCK:
            blocks = scores.unflatten(1, (-1, BLOCK))
            low, high = torch.aminmax(blocks, dim=2)
            places = merit_of(torch.maximum(high, -low) if signed else high, False, None).topk(count, sorted=False).indices
            scores = blocks.gather(1, places[:, :, None].expand(-1, -1, BLOCK)).flatten(1)
        merit, inside = merit_of(scores, signed, None).topk(count, sorted=False)
        members = inside if places is None else places.gather(1, inside // BLOCK) * BLOCK + inside % BLOCK
        return members.clamp_max(self._atoms.size - 1), merit > (0.0 if signed else -torch.inf)
