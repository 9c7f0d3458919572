"""Correlations of what is left of the signals with every atom: by the Gram matrix, by products, or by a pool of the best."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from difflex.dictionary.pursuit.gram import Gram
from difflex.dictionary.pursuit.products import product
from difflex.dictionary.sparse import bag, dots
from difflex.records import Codes

__all__ = ["Atoms", "Best", "Correlations", "Moved", "Pool"]


class Moved(NamedTuple):
    """A change of weights."""

    atoms: Int[Tensor, "token slot"]
    change: Float[Tensor, "token slot"]


class Pool(NamedTuple):
    """How a pursuit spares products where no Gram matrix is at hand: near exact, and several times faster."""

    rounds: int = 4
    """The correlations with all atoms are renewed every so many rounds ..."""
    atoms: int = 32
    """... and in between an atom is picked from so many, the best at that time."""


class Best(NamedTuple):
    """The atom that correlates best with what is left of each signal."""

    atoms: Int[Tensor, " token"]
    correlations: Float[Tensor, " token"]
    """With their signs."""


class Correlations(ABC):
    """The correlations of one chunk's residuals with the atoms, kept up to date as the weights move."""

    @abstractmethod
    def best(self, signed: bool) -> Best:
        """The largest correlation of every residual, by absolute value where `signed`."""

    @abstractmethod
    def at(self, support: Int[Tensor, "token slot"]) -> Float[Tensor, "token slot"]:
        """The correlations of every residual with the atoms of its support."""

    @abstractmethod
    def between(self, picked: Int[Tensor, " token"], support: Int[Tensor, "token slot"]) -> Float[Tensor, "token slot"]:
        """The inner products of the atom picked with those of the support."""

    @abstractmethod
    def advance(self, moved: Moved) -> None:
        """Take note that the weights moved."""

    @abstractmethod
    def take(self, rows: Int[Tensor, " row"]) -> None:
        """Go on with these signals alone."""


@final
class ByGram(Correlations):
    """All correlations, moved by rows of the Gram matrix: size x support per round, whatever the width."""

    def __init__(self, gram: Gram, scores: Float[Tensor, "token size"]) -> None:
        """From the correlations of the whole signals, which are worked on in place."""
        self._gram, self._scores = gram, scores

    def best(self, signed: bool) -> Best:
        return _largest(self._scores, signed)

    def at(self, support: Tensor) -> Tensor:
        return self._scores.gather(1, support)

    def between(self, picked: Tensor, support: Tensor) -> Tensor:
        return self._gram.between(picked, support).to(self._scores.dtype)

    def advance(self, moved: Moved) -> None:
        self._gram.subtract(self._scores, moved.atoms, moved.change)

    def take(self, rows: Tensor) -> None:
        self._scores = self._scores[rows]


@final
class ByProduct(Correlations):
    """All correlations by a product with the residual, in every round or, with a pool, every few."""

    def __init__(self, rows: Float[Tensor, "size width"], signals: Tensor, scores: Tensor, pool: Pool | None) -> None:
        """From the correlations of the whole `signals`."""
        self._rows, self._residual, self._scores = rows, signals.clone(), scores
        self._pool = pool if pool is not None and pool.rounds > 1 and pool.atoms < len(rows) else None
        self._round = 0
        self._members: Tensor | None = None
        self._member_rows: Tensor | None = None

    def best(self, signed: bool) -> Best:
        if self._pool is not None and self._members is None:
            self._choose(self._pool, signed)
        best = _largest(self._scores, signed)
        return best if self._members is None else best._replace(atoms=self._members.gather(1, best.atoms[:, None])[:, 0])

    def at(self, support: Tensor) -> Tensor:
        return self._dots(support, self._residual)

    def between(self, picked: Tensor, support: Tensor) -> Tensor:
        return self._dots(support, self._rows[picked])

    def advance(self, moved: Moved) -> None:
        self._residual -= bag(Codes(moved.change, moved.atoms), self._rows)
        self._round += 1
        if self._member_rows is not None and self._pool is not None and self._round % self._pool.rounds:
            self._scores = torch.einsum("tmw,tw->tm", self._member_rows, self._residual)
        else:
            self._members = self._member_rows = None
            self._scores = product(self._residual, self._rows)

    def take(self, rows: Tensor) -> None:
        self._residual, self._scores = self._residual[rows], self._scores[rows]
        if self._members is not None and self._member_rows is not None:
            self._members, self._member_rows = self._members[rows], self._member_rows[rows]

    def _choose(self, pool: Pool, signed: bool) -> None:
        merit = self._scores.abs() if signed else self._scores
        self._members = merit.topk(pool.atoms, sorted=False).indices
        self._member_rows = self._rows[self._members]
        self._scores = self._scores.gather(1, self._members)

    def _dots(self, support: Tensor, vectors: Tensor) -> Tensor:
        """The inner product of each token's vector with each atom of its support."""
        count, slots = support.shape
        tokens = torch.arange(count, device=support.device).repeat_interleave(slots)
        return dots(self._rows, support.contiguous().view(-1), vectors, tokens).view(count, slots)


@final
class Atoms:
    """The atoms that a pursuit picks from, and the way to their correlations."""

    def __init__(self, rows: Float[Tensor, "size width"], gram: Gram | None = None, pool: Pool | None = None) -> None:
        """Unit (or zero) `rows`; with their Gram matrix, or else by products, spared by a `pool` where one is given."""
        self.rows, self.gram, self.pool = rows, gram, pool

    @property
    def size(self) -> int:
        return len(self.rows)

    def begin(self, signals: Float[Tensor, "token width"], known: Float[Tensor, "token size"] | None = None) -> Correlations:
        """The correlations of `signals` with all atoms, at the beginning of a walk; `known` ones are copied."""
        scores = product(signals, self.rows) if known is None else known.clone()
        return ByProduct(self.rows, signals, scores, self.pool) if self.gram is None else ByGram(self.gram, scores)


def _largest(scores: Float[Tensor, "token atom"], signed: bool) -> Best:
    atoms = (scores.abs() if signed else scores).argmax(1)
    return Best(atoms, scores.gather(1, atoms[:, None])[:, 0])
