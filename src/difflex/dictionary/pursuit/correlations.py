"""Correlations of what is left of the signals with every atom: by the Gram matrix, by products, or by a pool of the best."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from difflex.dictionary.pursuit.gram import Gram
from difflex.dictionary.sparse import bag, dots
from difflex.records import Codes

__all__ = ["Atoms", "Correlations", "Moved", "Pool"]


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


class Correlations(ABC):
    """The correlations of one chunk's residuals with the atoms, kept up to date as the weights move."""

    def __init__(self, rows: Float[Tensor, "size width"], signals: Float[Tensor, "token width"]) -> None:
        self._rows, self._signals = rows, signals

    @abstractmethod
    def best(self, signed: bool) -> tuple[Float[Tensor, " token"], Int[Tensor, " token"]]:
        """The largest correlation (by absolute value where `signed`) of every signal, and its atom."""

    @abstractmethod
    def between(self, picked: Int[Tensor, " token"], support: Int[Tensor, "token slot"]) -> Float[Tensor, "token slot"]:
        """The inner products of the atom picked with those of the support."""

    @abstractmethod
    def advance(self, moved: Moved) -> None:
        """Take note that the weights moved."""

    def take(self, rows: Int[Tensor, " row"]) -> None:
        """Go on with these signals alone."""
        self._signals = self._signals[rows]

    def start(self, picked: Int[Tensor, " token"]) -> Float[Tensor, " token"]:
        """The correlation of every whole signal with its atom."""
        return (self._rows[picked] * self._signals).sum(1)


@final
class ByGram(Correlations):
    """All correlations, moved by rows of the Gram matrix: size x support per round, whatever the width."""

    def __init__(self, rows: Tensor, signals: Tensor, gram: Gram, known: Tensor | None) -> None:
        super().__init__(rows, signals)
        self._gram = gram
        self._scores = signals @ rows.T if known is None else known.clone()

    def best(self, signed: bool) -> tuple[Tensor, Tensor]:
        return _largest(self._scores, signed)

    def between(self, picked: Tensor, support: Tensor) -> Tensor:
        return self._gram.between(picked, support).to(self._scores.dtype)

    def advance(self, moved: Moved) -> None:
        self._gram.subtract(self._scores, moved.atoms, moved.change)

    def take(self, rows: Tensor) -> None:
        super().take(rows)
        self._scores = self._scores[rows]


@final
class ByProduct(Correlations):
    """All correlations by a product with the residual, in every round or, with a pool, every few."""

    def __init__(self, rows: Tensor, signals: Tensor, pool: Pool | None, known: Tensor | None) -> None:
        super().__init__(rows, signals)
        self._residual = signals.clone()
        self._pool = pool if pool is not None and pool.rounds > 1 and pool.atoms < len(rows) else None
        self._round = 0
        self._scores = signals @ rows.T if known is None else known.clone()
        self._members: Tensor | None = None
        self._member_rows: Tensor | None = None

    def best(self, signed: bool) -> tuple[Tensor, Tensor]:
        if self._pool is not None and self._members is None:
            self._choose(self._pool, signed)
        values, places = _largest(self._scores, signed)
        return values, places if self._members is None else self._members.gather(1, places[:, None])[:, 0]

    def between(self, picked: Tensor, support: Tensor) -> Tensor:
        count, slots = support.shape
        tokens = torch.arange(count, device=support.device).repeat_interleave(slots)
        return dots(self._rows, support.contiguous().view(-1), self._rows[picked], tokens).view(count, slots)

    def advance(self, moved: Moved) -> None:
        self._residual -= bag(Codes(moved.change, moved.atoms), self._rows)
        self._round += 1
        if self._member_rows is not None and self._pool is not None and self._round % self._pool.rounds:
            self._scores = torch.einsum("tmw,tw->tm", self._member_rows, self._residual)
        else:
            self._members = self._member_rows = None
            self._scores = self._residual @ self._rows.T

    def take(self, rows: Tensor) -> None:
        super().take(rows)
        self._residual, self._scores = self._residual[rows], self._scores[rows]
        if self._members is not None and self._member_rows is not None:
            self._members, self._member_rows = self._members[rows], self._member_rows[rows]

    def _choose(self, pool: Pool, signed: bool) -> None:
        merit = self._scores.abs() if signed else self._scores
        self._members = merit.topk(pool.atoms, sorted=False).indices
        self._member_rows = self._rows[self._members]
        self._scores = self._scores.gather(1, self._members)


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
        """The correlations of `signals` with all atoms, at the beginning of a walk."""
        if self.gram is not None:
            return ByGram(self.rows, signals, self.gram, known)
        return ByProduct(self.rows, signals, self.pool, known)


def _largest(scores: Float[Tensor, "token atom"], signed: bool) -> tuple[Float[Tensor, " token"], Int[Tensor, " token"]]:
    merit = scores.abs() if signed else scores
    places = merit.argmax(1)
    return merit.gather(1, places[:, None])[:, 0], places
