"""A growing dictionary: batches come in, and tokens that it does not explain become its atoms."""

from __future__ import annotations

from typing import Literal, NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from difflex.dictionaries.itda import GrowthConfig
from difflex.dictionaries.pursuit import (
    RULES,
    AtomSet,
    GramMatrix,
    PursuitBackend,
    PursuitPath,
    choose_backend,
    product,
    run_pursuit,
)
from difflex.dictionaries.sparse import sparse_matmul
from difflex.distributed import Ranks
from difflex.records import ActivationBatch
from difflex.training.itda.state import ENOUGH_HOLDOUT, GrowthInterval

SLACK = {torch.float32: 1e-4, torch.float16: 2e-2}
"""A new atom whose correlation is within this share of the picked atom's counts as picked; larger than rounding errors."""
MAX_COMPARISONS = 1 << 24
"""Numbers in memory at a time when tokens are compared with new atoms."""


@final
class PursuitBatch:
    """The tokens of one batch and their pursuits, kept up to date while atoms are added."""

    def __init__(
        self, z: Float[Tensor, "token width"], atoms: AtomSet, growth: GrowthConfig, threshold: float, room: int
    ) -> None:
        """Run the pursuits with `atoms`; at most `room` atoms will be added."""
        self._z, self._rule, self._k = z, RULES[growth.pursuit], growth.k
        # If more rounds can only explain more, a token below the threshold needs no more of them.
        self._tolerance = threshold if self._rule.monotone else 0.0
        # On a GPU the pursuits compute their own, in half precision.
        self._scores = z.new_empty(len(z), atoms.size + room) if z.device.type == "cpu" else None
        if self._scores is not None:
            self._scores[:, : atoms.size] = product(z, atoms.rows)
        self._path = self._run(torch.arange(len(z), device=z.device), atoms, None)
        self.excluded = torch.zeros(len(z), dtype=torch.bool, device=z.device)
        """Tokens that have become atoms, and those that never may."""

    @property
    def unexplained(self) -> Float[Tensor, " token"]:
        """The unexplained share of each token's squared norm; 0 for tokens that are excluded."""
        return torch.where(self.excluded, 0, self._path.unexplained)

    def new_atoms(
        self, tokens: Int[Tensor, " new"], atoms: AtomSet, add: Literal["point", "residual"]
    ) -> tuple[Float[Tensor, "new width"], Float[Tensor, "new size"]]:
        """Return these tokens or their residuals at norm 1, and the products with all atoms."""
        z = self._z[tokens]
        if add == "point" and self._scores is not None:  # the products are those of the correlations in memory
            return F.normalize(z, dim=1), self._scores[tokens, : atoms.size] / self._path.energy[tokens].sqrt()[:, None]
        if add == "residual" and atoms.size:
            z = z - sparse_matmul(PursuitPath(*(part[tokens] for part in self._path)).codes, atoms.rows)
        new = F.normalize(z, dim=1)
        return new, product(new, atoms.rows)

    def would_pick(
        self, tokens: Int[Tensor, " token"], new: Float[Tensor, "new width"], cross: Float[Tensor, "new size"], slack: float
    ) -> Bool[Tensor, "token new"]:
        """Return which of the `new` atoms the pursuits of `tokens` would pick, in some round, instead of the atom picked there.

        A token that would pick none keeps its path, however many atoms are added. `cross` holds the products of new and old
        atoms. A new atom within `slack` of the picked one counts as picked.
        """
        per_token = self._k * max(1, len(new))
        by_atom = cross.T.contiguous()
        parts = tokens.split(max(1, MAX_COMPARISONS // per_token))
        return torch.cat([self._would_pick(part, new, by_atom, slack) for part in parts])

    def _would_pick(self, tokens: Tensor, new: Tensor, by_atom: Tensor, slack: float) -> Tensor:
        path = PursuitPath(*(part[tokens] for part in self._path))
        correlations = product(self._z[tokens], new)[:, None, :]
        if len(by_atom):
            correlations = correlations - torch.bmm(path.history, by_atom[path.support])
        if self._rule.signed:
            correlations = correlations.abs()
        bound = path.best_correlations - slack * path.best_correlations.abs()
        return (correlations >= bound[:, :, None]).any(1)

    def add_atoms(self, new: Float[Tensor, "new width"], size: int) -> None:
        """Compute the correlations with `new` atoms, which come after the first `size`."""
        if self._scores is not None:
            self._scores[:, size : size + len(new)] = product(self._z, new)

    def keep_atoms(self, size: int, winners: Int[Tensor, " winner"], count: int) -> None:
        """Of the `count` atoms after the first `size`, forget all but the `winners`, which move up."""
        end, device = size + len(winners), winners.device
        if self._scores is not None:
            self._scores[:, size:end] = self._scores[:, size + winners]
        places = torch.zeros(size + count, dtype=torch.long, device=device)
        places[:size] = torch.arange(size, device=device)
        places[size + winners] = torch.arange(size, end, device=device)
        self._path.support.copy_(places[self._path.support])

    def picked_any(self, tokens: Int[Tensor, " token"], atoms: Bool[Tensor, " size"]) -> Bool[Tensor, " token"]:
        """Return which of `tokens` have picked one of these `atoms`."""
        needed = self._path.best_correlations[tokens] < torch.inf
        return (atoms[self._path.support[tokens]] & needed).any(1)

    def rerun(
        self, tokens: Int[Tensor, " some"], atoms: AtomSet, excluded_atoms: Bool[Tensor, "some last"] | None = None
    ) -> None:
        """Run the pursuits of these tokens again; some of the last atoms are excluded for each token."""
        if not len(tokens):
            return
        for whole, part in zip(self._path, self._run(tokens, atoms, excluded_atoms), strict=True):
            whole[tokens] = part

    def _run(self, tokens: Tensor, atoms: AtomSet, excluded_atoms: Tensor | None) -> PursuitPath:
        return run_pursuit(
            atoms,
            self._rule,
            self._z[tokens],
            self._k,
            tolerance=self._tolerance,
            scores=None if self._scores is None else self._scores[tokens, : atoms.size],
            excluded=excluded_atoms,
            with_history=True,
        )


class AtomCandidates(NamedTuple):
    """The tokens of all ranks that are over the threshold, in the order in which they may become atoms."""

    places: Int[Tensor, " own"]
    """The places of this rank's tokens in this order."""
    rows: Float[Tensor, "new width"]
    """The atoms that they would be."""
    cross: Float[Tensor, "new size"]
    """Their products with the atoms of the dictionary."""
    unexplained: Float[Tensor, " new"]
    shots: Int[Tensor, " new"]
    tokens: Int[Tensor, " new"]


@final
class AtomGrower:
    """The atoms so far, with their Gram matrix if the backend uses one, and the growth curve."""

    def __init__(
        self,
        growth: GrowthConfig,
        threshold: float,
        width: int,
        device: torch.device,
        ranks: Ranks,
        backend: PursuitBackend | None = None,
    ) -> None:
        """Make an empty dictionary; without `backend`, one is chosen by the shapes."""
        self.growth, self.threshold, self._ranks = growth, threshold, ranks
        self.backend = backend or choose_backend(growth.pursuit, growth.size, width, growth.k, device.type)
        # A batch of candidates is stored after the atoms while it is examined.
        room = growth.size + growth.batch * ranks.world_size
        self._rows = torch.empty(room, width, device=device)
        self._gram = None if self.backend.gram is None else GramMatrix(room, dtype=self.backend.gram, device=device)
        self._half = AtomSet.half_rows(self._rows[:0], room) if self.backend.half else None
        self.shots = torch.zeros(growth.size, dtype=torch.long)
        self.tokens = torch.zeros(growth.size, dtype=torch.long)
        self.size = 0
        self.curve: list[GrowthInterval] = []
        self.idle_tokens = 0
        """Tokens since the last new atom."""

    @property
    def atoms(self) -> AtomSet:
        """The atoms so far."""
        return AtomSet(self._rows[: self.size], self._gram, self.backend.pool, self._half)

    @property
    def token_count(self) -> int:
        """Tokens so far, on all ranks."""
        return self.curve[-1].tokens if self.curve else 0

    @property
    def is_full(self) -> bool:
        """Whether there is no room for another atom."""
        return self.size == self.growth.size

    @property
    def tokens_until_full(self) -> int:
        """Tokens after which the dictionary was full, or all tokens so far."""
        return next((interval.tokens for interval in self.curve if interval.size == self.growth.size), self.token_count)

    @property
    def is_done(self) -> bool:
        """Whether growth has ended: the dictionary is full and its hold-out was measured, or it found no new atom for long."""
        if not self.is_full:
            return self.idle_tokens >= self.growth.patience
        full_at = self.tokens_until_full
        holdout_tokens = sum(interval.holdout_tokens for interval in self.curve if interval.tokens > full_at)
        return self.growth.holdout == 0 or holdout_tokens >= ENOUGH_HOLDOUT or self.idle_tokens >= self.growth.patience

    def add_batch(self, rows: ActivationBatch, holdout: Bool[Tensor, " token"] | None = None) -> None:
        """Grow by tokens of this rank's batch of normalised values; tokens in `holdout` never become atoms."""
        before = self.size
        counts = self._ranks.gather_counts(len(rows.values))
        batch = PursuitBatch(rows.values, self.atoms, self.growth, self.threshold, sum(counts))
        holdout = torch.zeros_like(batch.excluded) if holdout is None else holdout
        interval = self._interval(batch, holdout)
        batch.excluded |= holdout
        room = self.growth.size - self.size
        if self.growth.max_per_batch is not None:
            room = min(room, self.growth.max_per_batch)
        while room and (added := self._add_atoms(batch, rows, room)):
            room -= added
        self.idle_tokens = 0 if self.size > before else self.idle_tokens + sum(counts)
        self.curve.append(interval._replace(size=self.size))

    def _interval(self, batch: PursuitBatch, holdout: Bool[Tensor, " token"]) -> GrowthInterval:
        """Count the tokens of all ranks before any of them becomes an atom."""
        over = batch.unexplained > self.threshold
        counts = torch.stack([torch.ones_like(over), over, holdout, over & holdout]).sum(1)
        count, over_threshold, *holdout_counts = self._ranks.sum(counts).tolist()
        return GrowthInterval(self.token_count + count, over_threshold, self.size, *holdout_counts)

    def _add_atoms(self, batch: PursuitBatch, rows: ActivationBatch, limit: int) -> int:
        """Add at most `limit` atoms from tokens over the threshold, and update the pursuits; return how many were added.

        The result is that of adding one after the other every token that the atoms before it leave over the threshold.
        """
        own = (batch.unexplained > self.threshold).nonzero()[:, 0]
        candidates = self._candidates(batch, rows, own)
        if not len(candidates.unexplained):
            return 0
        size, count = self.size, len(candidates.unexplained)
        among = product(candidates.rows, candidates.rows)
        self._append(candidates.rows, candidates.cross, among)
        batch.add_atoms(candidates.rows, size)
        would_pick = batch.would_pick(own, candidates.rows, candidates.cross, self._slack)
        winners = self._select(batch, own, candidates.places, would_pick, limit).nonzero()[:, 0]
        # The candidates before the first that is dropped are in their places already.
        fixed = int((winners == torch.arange(len(winners), device=winners.device)).sum())
        self.size = size + fixed
        if self._gram is not None:
            self._gram.truncate(self.size)
        batch.keep_atoms(size, winners, count)
        end = size + len(winners)
        self.shots[size:end], self.tokens[size:end] = candidates.shots[winners].cpu(), candidates.tokens[winners].cpu()
        cross, among = candidates.cross[winners], among[winners][:, winners]
        self._append(
            candidates.rows[winners[fixed:]], torch.cat([cross[fixed:], among[fixed:, :fixed]], 1), among[fixed:, fixed:]
        )
        batch.excluded[own[torch.isin(candidates.places, winners)]] = True
        remaining = (~batch.excluded).nonzero()[:, 0]
        changed = batch.would_pick(remaining, candidates.rows[winners], torch.cat([cross, among], 1), self._slack).any(1)
        batch.rerun(remaining[changed], self.atoms)
        return len(winners)

    def _select(
        self, batch: PursuitBatch, own: Tensor, places: Tensor, would_pick: Bool[Tensor, "own new"], limit: int
    ) -> Bool[Tensor, " new"]:
        """Return which candidates become atoms.

        At first all are assumed to. The candidates whose path would change are tested again with the selected ones before them,
        until nothing changes. Invariant: after round i, at least the first i decisions are those of testing one after the other.
        A decision depends only on candidates before it, and is renewed when one of them left its path or was selected. So the
        loop ends, usually after few rounds.
        """
        count = would_pick.shape[1]
        before = torch.arange(count, device=places.device) < places[:, None]
        selected = torch.ones(count, dtype=torch.bool, device=places.device)
        doubtful = (would_pick & before).any(1)
        while True:
            batch.rerun(own[doubtful], self.atoms, ~(before[doubtful] & selected))
            over = torch.zeros(count, dtype=torch.bool, device=places.device)
            over[self._ranks.gather(places[batch.unexplained[own] > self.threshold])] = True
            over &= over.cumsum(0) <= limit
            if torch.equal(over, selected):
                return selected
            dropped = torch.zeros(self.size, dtype=torch.bool, device=places.device)
            dropped[self.size - count :] = selected & ~over
            doubtful = batch.picked_any(own, dropped) | (before & over & ~selected).any(1)
            selected = over

    def _candidates(self, batch: PursuitBatch, rows: ActivationBatch, own: Int[Tensor, " own"]) -> AtomCandidates:
        """Gather the candidates of all ranks."""
        unexplained = batch.unexplained[own]
        parts = (*batch.new_atoms(own, self.atoms, self.growth.add), unexplained, rows.shots[own], rows.tokens[own])
        first = sum(self._ranks.gather_counts(len(own))[: self._ranks.rank])
        places = torch.arange(first, first + len(own), device=unexplained.device)
        candidates = AtomCandidates(places, *map(self._ranks.gather, parts))
        if self.growth.max_per_batch is None:
            return candidates
        order = candidates.unexplained.argsort(descending=True, stable=True)
        return AtomCandidates(order.argsort()[places], *(part[order] for part in candidates[1:]))

    @property
    def _slack(self) -> float:
        return SLACK[self.backend.gram or torch.float32]

    def _append(self, new: Float[Tensor, "new width"], cross: Float[Tensor, "new size"], among: Float[Tensor, "new new"]) -> None:
        """Add atoms with their products with the old atoms and among each other."""
        self._rows[self.size : self.size + len(new)] = new
        if self._half is not None:
            self._half[self.size : self.size + len(new)] = new
        if self._gram is not None:
            self._gram.append(cross, among)
        self.size += len(new)

    def atoms_from(self, start: int) -> dict[str, Tensor]:
        """Return the atoms from number `start` on, as tensors for a file."""
        part = slice(start, self.size)
        tensors = {"rows": self._rows[part], "shots": self.shots[part], "tokens": self.tokens[part]}
        if self._gram is not None:
            tensors["gram"] = self._gram.rows(torch.arange(start, self.size, device=self._rows.device))
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    def restore(self, part: dict[str, Tensor]) -> None:
        """Append atoms that `atoms_from` returned, bit for bit."""
        place = slice(self.size, self.size + len(part["rows"]))
        self._rows[place], self.shots[place], self.tokens[place] = part["rows"], part["shots"], part["tokens"]
        if self._half is not None:
            self._half[place] = self._rows[place]
        if self._gram is not None:
            gram = part["gram"].to(self._rows.device)
            self._gram.append(gram[:, : place.start], gram[:, place.start :])
        self.size = place.stop
