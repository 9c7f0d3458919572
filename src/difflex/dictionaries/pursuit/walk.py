"""The walk of a pursuit: round after round the best atom is looked up, then a rule says how the weights move."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from difflex.dictionaries.pursuit.correlations import AtomSet, BestAtoms, Correlations, Hidden, WeightChange
from difflex.errors import NonFinite

__all__ = ["PursuitPath", "PursuitRule", "PursuitState", "walk"]

SCORES_AT_HAND = 1 << 22
"""Correlations held at any time (signals times atoms): larger chunks fall out of the cache."""
FEWEST, MOST = 64, 1024
"""Signals in a chunk: fewer read the atoms too often for one product, more gain nothing."""


class PursuitPath(NamedTuple):
    """Where pursuits ended, and what would have led them elsewhere."""

    support: Int[Tensor, "token k"]
    """The atom picked in each round."""
    weights: Float[Tensor, "token k"]
    energy: Float[Tensor, " token"]
    """The squared length of each signal, ..."""
    left: Float[Tensor, " token"]
    """... and of what of it is not explained."""
    winners: Float[Tensor, "token k"]
    """The correlation with which each round's atom was picked; infinite in rounds that were not needed."""
    history: Float[Tensor, "token _ k"]
    """The weights before each round, where they were asked for."""

    @property
    def unexplained(self) -> Float[Tensor, " token"]:
        """The share of each signal's squared length that is left; 0 for a signal of length zero."""
        return self.left / self.energy.where(self.energy > 0, 1)


@dataclass
class PursuitState:
    """A chunk of signals on their way: what every rule keeps of them. One slot per round."""

    energy: Float[Tensor, " token"]
    left: Float[Tensor, " token"]
    live: Bool[Tensor, " token"]
    """Whether another round may still change the signal's weights."""
    support: Int[Tensor, "token k"]
    used: Bool[Tensor, "token k"]
    """Whether the slot holds an atom that no earlier slot holds."""
    weights: Float[Tensor, "token k"]
    gram: Float[Tensor, "token _ k"]
    """The inner products of the atoms in the slots, where a rule needs them."""
    factor: Float[Tensor, "token _ k"]
    """The inverse of the lower Cholesky factor of `gram`, likewise."""
    winners: Float[Tensor, "token k"]
    history: Float[Tensor, "token _ k"]

    @classmethod
    def of(cls, energy: Float[Tensor, " token"], k: int, rule: PursuitRule, traced: bool) -> PursuitState:
        """The beginning of a walk by `rule` of signals of so much `energy`; its history is kept if `traced`."""
        count = len(energy)
        nothing, square = (count, 0, k), (count, k, k)
        return cls(
            energy=energy,
            left=energy.clone(),
            live=energy > 0,
            support=torch.zeros(count, k, dtype=torch.long, device=energy.device),
            used=torch.zeros(count, k, dtype=torch.bool, device=energy.device),
            weights=energy.new_zeros(count, k),
            gram=energy.new_zeros(square if rule.pairs else nothing),
            factor=energy.new_zeros(square if rule.factors else nothing),
            winners=energy.new_full((count, k), torch.inf),
            history=energy.new_zeros(square if traced else nothing),
        )

    def take(self, rows: Int[Tensor, " row"]) -> PursuitState:
        """The walk of these signals alone."""
        return type(self)(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def put(self, rows: Int[Tensor, " row"], other: PursuitState) -> None:
        """Write the walk of these signals back."""
        for field in fields(self):
            getattr(self, field.name)[rows] = getattr(other, field.name)


class PursuitRule(ABC):
    """How the weights move once the round's atom is picked."""

    signed: bool
    """Whether an atom may be picked, and weighted, negatively."""
    monotone: bool = True
    """Whether every round leaves less, or as much, as the one before."""
    pairs: bool = False
    """Whether it needs the inner products of the atoms that a signal has picked, ..."""
    factors: bool = False
    """... and their Cholesky factor."""

    @abstractmethod
    def move(self, walk: PursuitState, t: int, scores: Correlations, best: BestAtoms) -> WeightChange:
        """The change of weights in round `t`, in which `best` was picked; `walk.left` is brought up to date."""


@torch.no_grad()
def walk(
    atoms: AtomSet,
    rule: PursuitRule,
    signals: Float[Tensor, "token width"],
    k: int,
    *,
    until: float = 0.0,
    correlations: Float[Tensor, "token size"] | None = None,
    hidden: Hidden = None,
    traced: bool = False,
) -> PursuitPath:
    """The ends of the pursuits of `signals`; `correlations` with all atoms are taken as they are where they are known.

    Of the last atoms, those that are `hidden` from a signal are not picked for it. The history is kept if `traced`.
    """
    energy = signals.square().sum(1)
    _finite(signals, energy)
    chunk = min(MOST, max(FEWEST, SCORES_AT_HAND // max(atoms.size, 1)))
    paths = []
    for start in range(0, max(len(signals), 1), chunk):
        here = slice(start, start + chunk)
        known, unseen = (None if part is None else part[here] for part in (correlations, hidden))
        whole = PursuitState.of(energy[here], k, rule, traced)
        if atoms.size and len(whole.left):
            enough = max(until, 8 * torch.finfo(signals.dtype).eps)
            _all_rounds(whole, rule, atoms.begin(signals[here], known, unseen), k, enough)
        else:
            whole.winners[whole.live, :1] = 0  # any atom would be welcome
        weights, left = whole.weights * whole.used, whole.left.clamp_min(0)
        paths.append(PursuitPath(whole.support, weights, whole.energy, left, whole.winners, whole.history))
    return paths[0] if len(paths) == 1 else PursuitPath(*(torch.cat(parts) for parts in zip(*paths, strict=True)))


def _all_rounds(whole: PursuitState, rule: PursuitRule, scores: Correlations, k: int, enough: float) -> None:
    rows, here = torch.arange(len(whole.left), device=whole.left.device), whole
    for t in range(k):
        moved = _round(here, rule, scores, t, enough)
        live = int(here.live.sum())
        if live == 0 or t + 1 == k:
            break
        scores.advance(moved)
        # Those that have arrived are left behind once they are the majority.
        if 2 * live < len(rows):
            if here is not whole:
                whole.put(rows, here)
            kept = here.live.nonzero()[:, 0]
            rows, here = rows[kept], here.take(kept)
            scores.take(kept)
    if here is not whole:
        whole.put(rows, here)


def _round(here: PursuitState, rule: PursuitRule, scores: Correlations, t: int, enough: float) -> WeightChange:
    """What moved in round `t`; signals that have arrived stay as they are."""
    if len(here.history[0]):
        here.history[:, t, :t] = here.weights[:, :t]
    best = scores.best(rule.signed)
    here.winners[:, t] = torch.where(here.live, best.merit.clamp_min(0) if rule.signed else best.merit, torch.inf)
    here.live &= best.merit > -torch.inf
    known = (here.support[:, :t] == best.atoms[:, None]) & here.used[:, :t]
    here.support[:, t] = best.atoms
    here.used[:, t] = here.live & ~known.any(1)
    if rule.pairs:
        here.gram[:, t, : t + 1] = here.gram[:, : t + 1, t] = scores.between(best.atoms, here.support[:, : t + 1])
    moved = rule.move(here, t, scores, best)
    here.live &= moved.change.any(1) & (here.left > enough * here.energy)
    return moved


def _finite(signals: Tensor, energy: Tensor) -> None:
    # The squared length of a row is finite where all of it is, unless it is huge.
    if torch.isfinite(energy).all():
        return
    bad = ~torch.isfinite(signals).all(1)
    if bad.any():
        raise NonFinite(f"A pursuit needs finite signals; row {int(bad.nonzero()[0, 0])} holds NaN or infinity.")
