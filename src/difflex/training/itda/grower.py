"""A dictionary on its way: batches come in, tokens that it does not explain become its atoms."""

from __future__ import annotations

from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from difflex.devices import free_memory
from difflex.dictionaries.itda import GrowthConfig
from difflex.dictionaries.itda.dictionary import means_of
from difflex.dictionaries.pursuit import RULES
from difflex.dictionaries.pursuit.correlations import AtomSet
from difflex.dictionaries.pursuit.gram import GramMatrix
from difflex.dictionaries.pursuit.means import PursuitBackend
from difflex.dictionaries.pursuit.products import product
from difflex.distributed import Ranks
from difflex.records import ActivationBatch
from difflex.training.itda.curve import GrowthInterval
from difflex.training.itda.judged import PursuitBatch

__all__ = ["AtomGrower"]

SLACK = {torch.float32: 1e-4, torch.float16: 2e-2}
"""How close a new atom must come to one that was picked to count as picked in its place: more than rounding can be."""

ENOUGH = 1000
"""Tokens of shots that were kept out, by which a full dictionary is judged."""


class AtomQueue(NamedTuple):
    """Tokens over the threshold that wait to become atoms."""

    place: Int[Tensor, " mine"]
    """Where in the line this rank's tokens stand."""
    new: Float[Tensor, "new width"]
    """What they would be as atoms."""
    cross: Float[Tensor, "new size"]
    """The products with the atoms that are there."""
    worth: Float[Tensor, " new"]
    """What is unexplained of each."""
    shots: Int[Tensor, " new"]
    tokens: Int[Tensor, " new"]


@final
class AtomGrower:
    """The atoms so far, with their Gram matrix where that pays, and the growth curve."""

    def __init__(
        self,
        growth: GrowthConfig,
        threshold: float,
        width: int,
        device: torch.device,
        ranks: Ranks,
        means: PursuitBackend | None = None,
    ) -> None:
        """The empty dictionary, with room for `growth.size` atoms; without `means`, those that fit the memory at hand."""
        self.growth, self.threshold, self._ranks, self._rule = growth, threshold, ranks, RULES[growth.pursuit]
        self.means = means or means_of(growth.pursuit, growth.size, width, growth.k, free_memory(device))
        # A batch of candidates stands behind the atoms while it is judged.
        room = growth.size + growth.batch * ranks.world_size
        self._rows = torch.empty(room, width, device=device)
        self._gram = None if self.means.gram is None else GramMatrix(room, dtype=self.means.gram, device=device)
        self.shots = torch.zeros(growth.size, dtype=torch.long)
        self.tokens = torch.zeros(growth.size, dtype=torch.long)
        self.size = 0
        self.curve: list[GrowthInterval] = []
        self.idle = 0
        """Tokens since the last new atom."""

    @property
    def atoms(self) -> AtomSet:
        """The atoms so far."""
        return AtomSet(self._rows[: self.size], self._gram, self.means.pool)

    @property
    def seen(self) -> int:
        """Tokens so far, on all ranks."""
        return self.curve[-1].tokens if self.curve else 0

    @property
    def full(self) -> bool:
        """Whether there is no room for another atom."""
        return self.size == self.growth.size

    @property
    def filled(self) -> int:
        """Tokens seen when the dictionary was full; where it is not, all tokens so far."""
        return next((moment.tokens for moment in self.curve if moment.size == self.growth.size), self.seen)

    @property
    def done(self) -> bool:
        """Whether nothing more is to be learned: it is full and known how new images fare, or nothing was added for long."""
        if not self.full:
            return self.idle >= self.growth.patience
        filled = self.filled
        watched = sum(moment.watched for moment in self.curve if moment.tokens > filled)
        return self.growth.kept_out == 0 or watched >= ENOUGH or self.idle >= self.growth.patience

    def take(self, rows: ActivationBatch, watched: Bool[Tensor, " token"] | None = None) -> None:
        """Let the tokens of this rank's batch, with normalised values, become atoms where they must; those `watched` never do."""
        before = self.size
        counts = self._ranks.gather_counts(len(rows.values))
        judged = PursuitBatch(rows.values, self.atoms, self._rule, self.growth.k, self.threshold, sum(counts))
        moment = self._moment(judged, watched)
        if watched is not None:
            judged.settled |= watched
        left = self.growth.size - self.size
        if self.growth.most_per_batch is not None:
            left = min(left, self.growth.most_per_batch)
        while left and (added := self._add(judged, rows, left)):
            left -= added
        self.idle = 0 if self.size > before else self.idle + sum(counts)
        self.curve.append(moment._replace(size=self.size))

    def _moment(self, judged: PursuitBatch, watched: Bool[Tensor, " token"] | None) -> GrowthInterval:
        """What the tokens of all ranks say before any of them becomes an atom."""
        over = judged.unexplained > self.threshold
        seen = torch.zeros_like(over) if watched is None else watched
        mine = torch.stack([torch.ones_like(over), over, seen, over & seen]).sum(1)
        count, *rest = self._ranks.sum(mine).tolist()
        return GrowthInterval(self.seen + count, rest[0], self.size, *rest[1:])

    def _add(self, judged: PursuitBatch, rows: ActivationBatch, most: int) -> int:
        """The number of atoms added from tokens over the threshold, `most` at most; then all tokens are judged again.

        One after the other, a token becomes an atom if with those before it, it still is over the threshold.
        """
        mine = (judged.unexplained > self.threshold).nonzero()[:, 0]
        line = self._line(judged, rows, mine)
        if not len(line.worth):
            return 0
        size, count = self.size, len(line.worth)
        own = product(line.new, line.new)
        self._append(line.new, line.cross, own)
        judged.extend(line.new, size)
        swayed = judged.swayed(mine, line.new, line.cross, self._slack)
        kept = self._kept(judged, mine, line.place, swayed, most, count).nonzero()[:, 0]
        # Those in front of the first that is dropped stand where they are.
        firm = int((kept == torch.arange(len(kept), device=kept.device)).sum())
        self._cut(size + firm)
        judged.keep(size, kept, count)
        self.shots[size : size + len(kept)], self.tokens[size : size + len(kept)] = (
            line.shots[kept].cpu(),
            line.tokens[kept].cpu(),
        )
        cross, among = line.cross[kept], own[kept][:, kept]
        self._append(line.new[kept[firm:]], torch.cat([cross[firm:], among[firm:, :firm]], 1), among[firm:, firm:])
        judged.settled[mine[torch.isin(line.place, kept)]] = True
        others = (~judged.settled).nonzero()[:, 0]
        stale = judged.swayed(others, line.new[kept], torch.cat([cross, among], 1), self._slack).any(1)
        judged.again(others[stale], self.atoms)
        return len(kept)

    def _kept(
        self, judged: PursuitBatch, mine: Tensor, place: Tensor, swayed: Tensor, most: int, count: int
    ) -> Bool[Tensor, " new"]:
        """Which of the candidates become atoms, those in front first.

        All are believed to at first; whose path others would sway is judged anew with those before it that are believed to, and
        so on until nothing changes. Invariant: after round i, the verdicts on the first i candidates at least are those of one
        after the other. A verdict hangs on those before it alone, and is renewed when one of these fell off its path or came in.
        So it ends, after few rounds as a rule.
        """
        before = torch.arange(count, device=place.device) < place[:, None]
        kept = torch.ones(count, dtype=torch.bool, device=place.device)
        doubtful = (swayed & before).any(1)
        while True:
            judged.again(mine[doubtful], self.atoms, ~(before[doubtful] & kept))
            over = torch.zeros(count, dtype=torch.bool, device=place.device)
            over[self._ranks.gather(place[judged.unexplained[mine] > self.threshold])] = True
            over &= over.cumsum(0) <= most
            if torch.equal(over, kept):
                return kept
            lost = torch.zeros(self.size, dtype=torch.bool, device=place.device)
            lost[self.size - count :] = kept & ~over
            doubtful = judged.picked(mine, lost) | (before & over & ~kept).any(1)
            kept = over

    def _line(self, judged: PursuitBatch, rows: ActivationBatch, mine: Tensor) -> AtomQueue:
        """The candidates of all ranks, in the order in which they may become atoms."""
        worth = judged.unexplained[mine]
        parts = (*self._candidates(judged, mine), worth, rows.shots[mine], rows.tokens[mine])
        first = sum(self._ranks.gather_counts(len(mine))[: self._ranks.rank])
        place = torch.arange(first, first + len(mine), device=worth.device)
        line = AtomQueue(place, *map(self._ranks.gather, parts))
        if self.growth.most_per_batch is None:
            return line
        order = line.worth.argsort(descending=True, stable=True)
        return AtomQueue(order.argsort()[place], *(part[order] for part in line[1:]))

    def _candidates(self, judged: PursuitBatch, tokens: Int[Tensor, " new"]) -> tuple[Tensor, Tensor]:
        """What these tokens would be as atoms, and their products with all atoms."""
        if self.growth.add == "point":
            return judged.points(tokens), judged.point_products(tokens, self.size)
        new = judged.residuals(tokens, self.atoms)
        return new, product(new, self._rows[: self.size])

    @property
    def _slack(self) -> float:
        return SLACK[self.means.gram or torch.float32]

    def _append(self, new: Float[Tensor, "new width"], cross: Float[Tensor, "new size"], own: Float[Tensor, "new new"]) -> None:
        """Add `new` atoms, whose products with the old ones and with each other are known."""
        self._rows[self.size : self.size + len(new)] = new
        if self._gram is not None:
            self._gram.append(cross, own)
        self.size += len(new)

    def _cut(self, size: int) -> None:
        """Forget the atoms after the first `size`."""
        self.size = size
        if self._gram is not None:
            self._gram.cut(size)

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
