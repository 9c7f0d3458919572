"""Correlations of what is left of the signals with every atom: by the Gram matrix, by products, or by a pool of the best."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from difflex.dictionaries.pursuit.gram import GramMatrix
from difflex.dictionaries.pursuit.products import product
from difflex.dictionaries.sparse import bag, dots
from difflex.records import Codes

__all__ = ["AtomSet", "BestAtoms", "CandidatePool", "Correlations", "Hidden", "WeightChange"]

BLOCK = 128
"""Neighbouring atoms of which only the best is looked at first."""
Hidden = Bool[Tensor, "token last"] | None
"""Which of the last atoms each signal may not pick."""


class WeightChange(NamedTuple):
    """A change of weights."""

    atoms: Int[Tensor, "token slot"]
    change: Float[Tensor, "token slot"]


class CandidatePool(NamedTuple):
    """How a pursuit spares products where no Gram matrix is at hand: near exact, and several times faster."""

    rounds: int = 4
    """The correlations with all atoms are renewed every so many rounds ..."""
    atoms: int = 32
    """... and in between an atom is picked from so many, the best at that time."""


class BestAtoms(NamedTuple):
    """The atom that correlates best with what is left of each signal."""

    atoms: Int[Tensor, " token"]
    correlations: Float[Tensor, " token"]
    """With their signs."""
    merit: Float[Tensor, " token"]
    """The correlation by which it is the best; negative infinity where every atom is hidden from the signal."""


class Correlations(ABC):
    """The correlations of one chunk's residuals with the atoms, kept up to date as the weights move."""

    @abstractmethod
    def best(self, signed: bool) -> BestAtoms:
        """The largest correlation of every residual, by absolute value where `signed`."""

    @abstractmethod
    def at(self, support: Int[Tensor, "token slot"]) -> Float[Tensor, "token slot"]:
        """The correlations of every residual with the atoms of its support."""

    @abstractmethod
    def between(self, picked: Int[Tensor, " token"], support: Int[Tensor, "token slot"]) -> Float[Tensor, "token slot"]:
        """The inner products of the atom picked with those of the support."""

    @abstractmethod
    def advance(self, moved: WeightChange) -> None:
        """Take note that the weights moved."""

    @abstractmethod
    def take(self, rows: Int[Tensor, " row"]) -> None:
        """Go on with these signals alone."""


@final
class GramCorrelations(Correlations):
    """All correlations, moved by rows of the Gram matrix: size x support per round, whatever the width."""

    def __init__(self, gram: GramMatrix, scores: Float[Tensor, "token size"], hidden: Hidden) -> None:
        """From the correlations of the whole signals, which are worked on in place."""
        self._gram, self._scores, self._hidden = gram, scores, hidden

    def best(self, signed: bool) -> BestAtoms:
        return _largest(self._scores, signed, self._hidden)

    def at(self, support: Tensor) -> Tensor:
        return self._scores.gather(1, support)

    def between(self, picked: Tensor, support: Tensor) -> Tensor:
        return self._gram.between(picked, support).to(self._scores.dtype)

    def advance(self, moved: WeightChange) -> None:
        self._gram.subtract(self._scores, moved.atoms, moved.change)

    def take(self, rows: Tensor) -> None:
        self._scores = self._scores[rows]
        self._hidden = None if self._hidden is None else self._hidden[rows]


@final
class ProductCorrelations(Correlations):
    """All correlations by a product with the residual, in every round or, with a pool, every few."""

    def __init__(
        self, rows: Float[Tensor, "size width"], signals: Tensor, scores: Tensor, pool: CandidatePool | None, hidden: Hidden
    ) -> None:
        """From the correlations of the whole `signals`."""
        self._rows, self._residual, self._scores, self._hidden = rows, signals.clone(), scores, hidden
        self._pool = pool if pool is not None and pool.rounds > 1 and pool.atoms < len(rows) else None
        self._round = 0
        self._members: Tensor | None = None
        self._member_rows: Tensor | None = None

    def best(self, signed: bool) -> BestAtoms:
        if self._pool is not None and self._members is None:
            self._choose(self._pool, signed)
        best = _largest(self._scores, signed, self._hidden if self._members is None else None)
        return best if self._members is None else best._replace(atoms=self._members.gather(1, best.atoms[:, None])[:, 0])

    def at(self, support: Tensor) -> Tensor:
        return self._dots(support, self._residual)

    def between(self, picked: Tensor, support: Tensor) -> Tensor:
        return self._dots(support, self._rows[picked])

    def advance(self, moved: WeightChange) -> None:
        self._residual -= bag(Codes(moved.change, moved.atoms), self._rows)
        self._round += 1
        if self._member_rows is not None and self._pool is not None and self._round % self._pool.rounds:
            self._scores = torch.einsum("tmw,tw->tm", self._member_rows, self._residual)
        else:
            self._members = self._member_rows = None
            self._scores = product(self._residual, self._rows)

    def take(self, rows: Tensor) -> None:
        self._residual, self._scores = self._residual[rows], self._scores[rows]
        self._hidden = None if self._hidden is None else self._hidden[rows]
        if self._members is not None and self._member_rows is not None:
            self._members, self._member_rows = self._members[rows], self._member_rows[rows]

    def _choose(self, pool: CandidatePool, signed: bool) -> None:
        merit = _merit(self._scores, signed, self._hidden)
        self._members = merit.topk(pool.atoms, sorted=False).indices
        self._member_rows = self._rows[self._members]
        shown = merit.gather(1, self._members) > -torch.inf
        self._scores = torch.where(shown, self._scores.gather(1, self._members), 0)
        self._member_rows *= shown[:, :, None]

    def _dots(self, support: Tensor, vectors: Tensor) -> Tensor:
        """The inner product of each token's vector with each atom of its support."""
        count, slots = support.shape
        tokens = torch.arange(count, device=support.device).repeat_interleave(slots)
        return dots(self._rows, support.contiguous().view(-1), vectors, tokens).view(count, slots)


@final
class AtomSet:
    """The atoms that a pursuit picks from, and the way to their correlations."""

    def __init__(
        self, rows: Float[Tensor, "size width"], gram: GramMatrix | None = None, pool: CandidatePool | None = None
    ) -> None:
        """Unit (or zero) `rows`; with their Gram matrix, or else by products, spared by a `pool` where one is given."""
        self.rows, self.gram, self.pool = rows, gram, pool

    @property
    def size(self) -> int:
        return len(self.rows)

    def begin(
        self, signals: Float[Tensor, "token width"], known: Float[Tensor, "token size"] | None = None, hidden: Hidden = None
    ) -> Correlations:
        """The correlations of `signals` with all atoms, at the beginning of a walk; `known` ones are copied."""
        scores = product(signals, self.rows) if known is None else known.clone()
        if self.gram is not None:
            return GramCorrelations(self.gram, scores, hidden)
        return ProductCorrelations(self.rows, signals, scores, self.pool, hidden)


def _merit(scores: Float[Tensor, "token atom"], signed: bool, hidden: Hidden) -> Float[Tensor, "token atom"]:
    """By what atoms are compared."""
    merit = scores.abs() if signed else scores
    if hidden is None:
        return merit
    shown = scores.shape[1] - hidden.shape[1]
    return torch.cat([merit[:, :shown], merit[:, shown:].masked_fill(hidden, -torch.inf)], 1)


def _largest(scores: Float[Tensor, "token atom"], signed: bool, hidden: Hidden = None) -> BestAtoms:
    """The best of every row, looked for among the best of short blocks: several times faster than along whole rows."""
    size = scores.shape[1]
    whole = size - size % BLOCK if hidden is None else (size - hidden.shape[1]) // BLOCK * BLOCK
    if not whole:
        return _largest_of_few(scores, signed, hidden)
    blocks = scores[:, :whole].unflatten(1, (-1, BLOCK))
    peaks = torch.maximum(blocks.amax(2), -blocks.amin(2)) if signed else blocks.amax(2)
    block = peaks.argmax(1)
    rows = torch.arange(len(scores), device=scores.device)
    inside = _largest_of_few(blocks[rows, block], signed, None)
    best = inside._replace(atoms=block * BLOCK + inside.atoms)
    if whole == size:
        return best
    rest = _largest_of_few(scores[:, whole:], signed, hidden)
    better = rest.merit > best.merit
    return BestAtoms(
        *(torch.where(better, new, old) for new, old in zip(rest._replace(atoms=whole + rest.atoms), best, strict=True))
    )


def _largest_of_few(scores: Float[Tensor, "token atom"], signed: bool, hidden: Hidden) -> BestAtoms:
    merit = _merit(scores, signed, hidden)
    atoms = merit.argmax(1, keepdim=True)
    return BestAtoms(atoms[:, 0], scores.gather(1, atoms)[:, 0], merit.gather(1, atoms)[:, 0])
