"""A dictionary on its way: batches come in, tokens that it does not explain become its atoms."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from difflex.dictionary.itda.config import Growth
from difflex.dictionary.itda.curve import Moment
from difflex.dictionary.itda.dictionary import means_of
from difflex.dictionary.itda.judged import Judged, independent
from difflex.dictionary.itda.ranks import Ranks
from difflex.dictionary.pursuit import RULES
from difflex.dictionary.pursuit.correlations import Atoms
from difflex.dictionary.pursuit.gram import Gram
from difflex.dictionary.pursuit.products import product
from difflex.records import Rows

__all__ = ["Grower"]

SLACK = {torch.float32: 1e-4, torch.float16: 2e-2}
"""How close a new atom must come to one that was picked to count as picked in its place: more than rounding can be."""


@final
class Grower:
    """The atoms so far, with their Gram matrix where that pays, and the growth curve."""

    def __init__(self, growth: Growth, threshold: float, width: int, device: torch.device, ranks: Ranks) -> None:
        """The empty dictionary, with room for `growth.size` atoms."""
        self.growth, self.threshold, self._ranks, self._rule = growth, threshold, ranks, RULES[growth.pursuit]
        self.means = means_of(growth.pursuit, growth.size, width, growth.k, device)
        self._rows = torch.empty(growth.size, width, device=device)
        self._gram = None if self.means.gram is None else Gram(growth.size, dtype=self.means.gram, device=device)
        self.shots = torch.zeros(growth.size, dtype=torch.long)
        self.tokens = torch.zeros(growth.size, dtype=torch.long)
        self.size = 0
        self.curve: list[Moment] = []
        self.idle = 0
        """Tokens since the last new atom."""

    @property
    def atoms(self) -> Atoms:
        """The atoms so far."""
        return Atoms(self._rows[: self.size], self._gram, self.means.pool)

    @property
    def seen(self) -> int:
        """Tokens so far, on all ranks."""
        return self.curve[-1].tokens if self.curve else 0

    @property
    def done(self) -> bool:
        """Whether the dictionary is full, or nothing has been added for so long that nothing will be."""
        return self.size == self.growth.size or self.idle >= self.growth.patience

    def take(self, rows: Rows) -> None:
        """Let the tokens of this rank's batch, with normalised values, become atoms where they must."""
        before = self.size
        room = min(self.growth.size - self.size, sum(counts := self._ranks.counts(len(rows.values))))
        judged = Judged(rows.values, self.atoms, self._rule, self.growth.k, room)
        over = sum(self._ranks.counts(int((judged.unexplained > self.threshold).sum())))
        left = self.growth.size - self.size
        if self.growth.most_per_batch is not None:
            left = min(left, self.growth.most_per_batch)
        while left and (added := self._wave(judged, rows, left)):
            left -= added
        self.idle = 0 if self.size > before else self.idle + sum(counts)
        self.curve.append(Moment(self.seen + sum(counts), over, self.size))

    def _wave(self, judged: Judged, rows: Rows, most: int) -> int:
        """The number of atoms added: tokens over the threshold, none of which sways another's path; then all are judged again."""
        unexplained = judged.unexplained
        mine = (unexplained > self.threshold).nonzero()[:, 0]
        new, cross = self._candidates(judged, mine)
        worth = self._ranks.gathered(unexplained[mine])
        if not len(worth):
            return 0
        all_new, all_cross = self._ranks.gathered(new), self._ranks.gathered(cross)
        sways = self._ranks.gathered(judged.swayed(mine, all_new, all_cross, self._slack).to(torch.uint8)).bool()
        order = list(range(len(worth)))
        if self.growth.most_per_batch is not None:
            order = worth.argsort(descending=True, stable=True).tolist()
        accepted = torch.tensor(independent(sways, order, most), device=new.device)
        shots, tokens = self._ranks.gathered(rows.shots[mine]), self._ranks.gathered(rows.tokens[mine])
        chosen, old = all_new[accepted], self.size
        self.append(chosen, all_cross[accepted], shots[accepted], tokens[accepted])
        first = sum(self._ranks.counts(len(mine))[: self._ranks.rank])
        own = accepted[(accepted >= first) & (accepted < first + len(mine))] - first
        judged.settled[mine[own]] = True
        judged.extend(chosen, old)
        open_ones = (~judged.settled).nonzero()[:, 0]
        stale = judged.swayed(open_ones, chosen, all_cross[accepted], self._slack).any(1)
        judged.again(open_ones[stale], self.atoms)
        return len(accepted)

    def _candidates(self, judged: Judged, tokens: Int[Tensor, " new"]) -> tuple[Tensor, Tensor]:
        """What these tokens would be as atoms, and their products with all atoms."""
        if self.growth.add == "point":
            return judged.points(tokens), judged.point_products(tokens, self.size)
        new = judged.residuals(tokens, self.atoms)
        return new, product(new, self._rows[: self.size])

    @property
    def _slack(self) -> float:
        return SLACK[self.means.gram or torch.float32]

    def append(
        self,
        new: Float[Tensor, "new width"],
        cross: Float[Tensor, "new size"],
        shots: Int[Tensor, " new"],
        tokens: Int[Tensor, " new"],
    ) -> None:
        """Add `new` atoms, whose products with the old ones are known."""
        here = slice(self.size, self.size + len(new))
        self._rows[here], self.shots[here], self.tokens[here] = new, shots.cpu(), tokens.cpu()
        if self._gram is not None:
            self._gram.append(cross, product(new, new))
        self.size = here.stop

    def part(self, start: int) -> dict[str, Tensor]:
        """The atoms from number `start` on, for a file."""
        here = slice(start, self.size)
        tensors = {"rows": self._rows[here], "shots": self.shots[here], "tokens": self.tokens[here]}
        if self._gram is not None:
            tensors["gram"] = self._gram.rows(torch.arange(start, self.size, device=self._rows.device))
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    def refill(self, part: dict[str, Tensor]) -> None:
        """Take back atoms that `part` gave, bit for bit."""
        here = slice(self.size, self.size + len(part["rows"]))
        self._rows[here], self.shots[here], self.tokens[here] = part["rows"], part["shots"], part["tokens"]
        if self._gram is not None:
            gram = part["gram"].to(self._rows.device)
            self._gram.append(gram[:, : here.start], gram[:, here.start :])
        self.size = here.stop
