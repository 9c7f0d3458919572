"""A batch of tokens under judgement: how well each is explained, and whether new atoms would change that."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from difflex.dictionaries.pursuit.correlations import AtomSet, Hidden
from difflex.dictionaries.pursuit.products import product
from difflex.dictionaries.pursuit.walk import PursuitPath, PursuitRule, walk
from difflex.dictionaries.sparse import bag
from difflex.records import Codes

__all__ = ["PursuitBatch"]

MOST_AT_HAND = 1 << 24
"""Numbers held at a time when tokens are compared with new atoms."""


@final
class PursuitBatch:
    """The tokens of one batch and the paths of their pursuits, kept up to date while atoms are added."""

    def __init__(
        self, z: Float[Tensor, "token width"], atoms: AtomSet, rule: PursuitRule, k: int, threshold: float, room: int
    ) -> None:
        """The tokens judged by `atoms`; at most `room` atoms will be added."""
        self._z, self._rule, self._k = z, rule, k
        # Where more rounds can only explain more, a token under the threshold needs no more of them.
        self._until = threshold if rule.monotone else 0.0
        self._scores = z.new_empty(len(z), atoms.size + room)
        self._scores[:, : atoms.size] = product(z, atoms.rows)
        self._path = self._walk(torch.arange(len(z), device=z.device), atoms, None)
        self.settled = torch.zeros(len(z), dtype=torch.bool, device=z.device)
        """Tokens that have become atoms, and those that never may."""

    @property
    def unexplained(self) -> Float[Tensor, " token"]:
        """The share of each token's squared length that is left; 0 for those that are settled."""
        return torch.where(self.settled, 0, self._path.unexplained)

    def points(self, tokens: Int[Tensor, " new"]) -> Float[Tensor, "new width"]:
        """These tokens at length one."""
        return F.normalize(self._z[tokens], dim=1)

    def residuals(self, tokens: Int[Tensor, " new"], atoms: AtomSet) -> Float[Tensor, "new width"]:
        """What is left of these tokens, at length one."""
        if not atoms.size:
            return self.points(tokens)
        return F.normalize(
            self._z[tokens] - bag(Codes(self._path.weights[tokens], self._path.support[tokens]), atoms.rows), dim=1
        )

    def point_products(self, tokens: Int[Tensor, " new"], size: int) -> Float[Tensor, "new size"]:
        """The inner products of `points` with all atoms: correlations that are known already."""
        return self._scores[tokens, :size] / self._path.energy[tokens].sqrt()[:, None]

    def swayed(
        self, tokens: Int[Tensor, " token"], new: Float[Tensor, "new width"], cross: Float[Tensor, "new size"], slack: float
    ) -> Bool[Tensor, "token new"]:
        """Which of the `new` atoms would have been picked, by which of `tokens`, in some round instead of the atom that was.

        Where none would, the token's path stays as it is, however many atoms are added. `cross` holds the products of new and old
        atoms. A new atom that comes within `slack` of the winner counts as picked.
        """
        per_token = self._k * max(1, len(new))
        by_atom = cross.T.contiguous()
        parts = tokens.split(max(1, MOST_AT_HAND // per_token))
        return torch.cat([self._swayed(part, new, by_atom, slack) for part in parts])

    def _swayed(self, tokens: Tensor, new: Tensor, by_atom: Tensor, slack: float) -> Tensor:
        path = PursuitPath(*(part[tokens] for part in self._path))
        correlations = product(self._z[tokens], new)[:, None, :]
        if len(by_atom):
            correlations = correlations - torch.bmm(path.history, by_atom[path.support])
        if self._rule.signed:
            correlations = correlations.abs()
        floor = path.winners - slack * path.winners.abs()
        return (correlations >= floor[:, :, None]).any(1)

    def extend(self, new: Float[Tensor, "new width"], size: int) -> None:
        """Take note of `new` atoms, which come after the first `size`."""
        self._scores[:, size : size + len(new)] = product(self._z, new)

    def keep(self, size: int, kept: Int[Tensor, " kept"], of: int) -> None:
        """Forget those of the last `of` atoms, after the first `size`, that are not `kept`; the others move up."""
        self._scores[:, size : size + len(kept)] = self._scores[:, size + kept]
        places = torch.zeros(size + of, dtype=torch.long, device=kept.device)
        places[:size] = torch.arange(size, device=kept.device)
        places[size + kept] = size + torch.arange(len(kept), device=kept.device)
        self._path.support.copy_(places[self._path.support])

    def picked(self, tokens: Int[Tensor, " token"], atoms: Bool[Tensor, " size"]) -> Bool[Tensor, " token"]:
        """Which of `tokens` have one of these `atoms` on their path."""
        return (atoms[self._path.support[tokens]] & (self._path.winners[tokens] < torch.inf)).any(1)

    def again(self, tokens: Int[Tensor, " some"], atoms: AtomSet, hidden: Hidden = None) -> None:
        """Judge these tokens anew; of the last atoms, some are `hidden` from each."""
        if not len(tokens):
            return
        for whole, part in zip(self._path, self._walk(tokens, atoms, hidden), strict=True):
            whole[tokens] = part

    def _walk(self, tokens: Tensor, atoms: AtomSet, hidden: Hidden) -> PursuitPath:
        z, known = self._z[tokens], self._scores[tokens, : atoms.size]
        return walk(atoms, self._rule, z, self._k, until=self._until, correlations=known, hidden=hidden, traced=True)
