"""Matching, gradient and orthogonal pursuit: the rounds that all share, and the rule by which each changes its weights.

In every round the atom that correlates best with the residual joins the support, then the rule changes the weights. Equations
are those of Blumensath and Davies, "Gradient Pursuits", IEEE Transactions on Signal Processing 56 (6), 2008: the weights on the
support move in a direction d by <r, c> / |c|^2 with c = atoms[support]^T d (section III); gradient pursuit takes
d = atoms[support] r.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from difflex.choices import PursuitName
from difflex.devices import free_memory
from difflex.dictionaries.pursuit.correlations import BestAtoms, Correlations, ExcludedAtoms
from difflex.dictionaries.pursuit.pooled import AtomSet
from difflex.errors import NonFinite
from difflex.records import Codes

SCORES_IN_CHUNK = 1 << 22
"""Correlations in memory at a time on a CPU (signals times atoms): larger chunks do not fit the cache."""
GPU_SHARE = 4
"""A chunk takes at most one part in so many of the free memory of a GPU."""
MIN_CHUNK, MAX_CHUNK = 64, {"cpu": 1024, "cuda": 4096}
"""Signals in a chunk: fewer read the atoms too often for one product, more gain nothing."""
ROUNDS_UNSEEN = 4
"""Rounds on a GPU after which the host asks how many signals are finished, as asking waits for all the work so far."""


class PursuitPath(NamedTuple):
    """The results of the pursuits of some signals, with the correlations that other atoms must exceed to change them."""

    support: Int[Tensor, "token k"]
    """The atom picked in each round."""
    weights: Float[Tensor, "token k"]
    """Their weights; 0 for a round that added no new atom."""
    energy: Float[Tensor, " token"]
    """The squared norm of each signal."""
    residual_energy: Float[Tensor, " token"]
    """The squared norm of its residual."""
    best_correlations: Float[Tensor, "token k"]
    """The correlation with which the atom of each round was picked; infinite in rounds that were not needed."""
    history: Float[Tensor, "token _ k"]
    """The weights before each round, if requested."""

    @property
    def codes(self) -> Codes:
        """The weights and atoms as codes, in the order of the rounds."""
        return Codes(self.weights, self.support)

    @property
    def unexplained(self) -> Float[Tensor, " token"]:
        """The residual's share of each signal's squared norm; 0 for a zero signal."""
        return self.residual_energy / self.energy.where(self.energy > 0, 1)


@dataclass
class PursuitState:
    """The state of the pursuits of a chunk of signals; one slot per round."""

    energy: Float[Tensor, " token"]
    residual_energy: Float[Tensor, " token"]
    active: Bool[Tensor, " token"]
    """Whether another round may still change the signal's weights."""
    support: Int[Tensor, "token k"]
    is_new: Bool[Tensor, "token k"]
    """Whether the slot holds an atom that no earlier slot holds."""
    weights: Float[Tensor, "token k"]
    gram: Float[Tensor, "token _ k"]
    """The inner products of the atoms in the slots, if the rule needs them."""
    inverse_cholesky: Float[Tensor, "token _ k"]
    """The inverse of the lower Cholesky factor of `gram`, if the rule needs it."""
    best_correlations: Float[Tensor, "token k"]
    history: Float[Tensor, "token _ k"]

    @classmethod
    def of(cls, energy: Float[Tensor, " token"], k: int, rule: PursuitRule, with_history: bool) -> PursuitState:
        """Return the state before the first round, for signals of this `energy`."""
        count = len(energy)
        empty, square = (count, 0, k), (count, k, k)
        return cls(
            energy=energy,
            residual_energy=energy.clone(),
            active=energy > 0,
            support=torch.zeros(count, k, dtype=torch.long, device=energy.device),
            is_new=torch.zeros(count, k, dtype=torch.bool, device=energy.device),
            weights=energy.new_zeros(count, k),
            gram=energy.new_zeros(square if rule.needs_gram else empty),
            inverse_cholesky=energy.new_zeros(square if rule.needs_cholesky else empty),
            best_correlations=energy.new_full((count, k), torch.inf),
            history=energy.new_zeros(square if with_history else empty),
        )

    def select(self, rows: Int[Tensor, " row"]) -> PursuitState:
        """Return a copy of the state of these signals alone."""
        return type(self)(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def write(self, rows: Int[Tensor, " row"], state: PursuitState) -> None:
        """Write the `state` of these signals back."""
        for field in fields(self):
            getattr(self, field.name)[rows] = getattr(state, field.name)


class PursuitRule(ABC):
    """How the weights change once the atom of a round is picked."""

    signed: bool
    """Whether weights may be negative."""
    monotone: bool = True
    """Whether no round increases the residual."""
    single_weight: bool = False
    """Whether a round changes the weight of the picked atom alone."""
    needs_gram: bool = False
    needs_cholesky: bool = False

    @abstractmethod
    def change(self, state: PursuitState, slot: int, correlations: Correlations, best: BestAtoms) -> Codes:
        """Change the weights in round `slot`, in which `best` was picked, and the residual energy; return the change."""


@final
class GradientRule(PursuitRule):
    """Move all weights along the gradient; without signs, cut them at zero, as ITDA does, which may increase the residual."""

    needs_gram = True

    def __init__(self, *, signed: bool) -> None:
        self.signed = self.monotone = signed

    def change(self, state: PursuitState, slot: int, correlations: Correlations, best: BestAtoms) -> Codes:
        slots = slice(slot + 1)
        gram, support = state.gram[:, slots, slots], state.support[:, slots]
        gradient = correlations.at(support) * state.is_new[:, slots]
        curvature = (gradient * _matvec(gram, gradient)).sum(1)
        # <r, c> is the squared norm of the gradient, as c = atoms^T gradient and gradient = atoms r.
        movable = state.active & (curvature > 0)
        length = torch.where(movable, gradient.square().sum(1) / curvature.where(curvature > 0, 1), 0)
        amounts = length[:, None] * gradient
        if not self.signed:
            # Cut at zero; the weights before are never negative.
            amounts = torch.maximum(amounts, -state.weights[:, slots])
        state.weights[:, slots].add_(amounts)
        gain = (amounts * (2 * gradient - _matvec(gram, amounts))).sum(1)
        state.residual_energy = state.residual_energy - gain
        return Codes(amounts, support)


@final
class MatchingRule(PursuitRule):
    """Move the weight of the picked atom alone, by its correlation; an atom may be picked again."""

    single_weight = True

    def __init__(self, *, signed: bool) -> None:
        self.signed = signed

    def change(self, state: PursuitState, slot: int, correlations: Correlations, best: BestAtoms) -> Codes:
        amounts = best.correlations if self.signed else best.correlations.clamp_min(0)
        amounts = torch.where(state.active, amounts, 0)
        earlier = (state.support[:, :slot] == best.atoms[:, None]) & state.is_new[:, :slot]
        state.weights[:, :slot].add_(earlier * amounts[:, None])
        state.weights[:, slot] = torch.where(state.is_new[:, slot], amounts, 0)
        state.residual_energy = state.residual_energy - amounts.square()
        return Codes(amounts[:, None], state.support[:, slot : slot + 1])


@final
class OrthogonalRule(PursuitRule):
    """Set the weights to the least-squares solution on the support, by one move along the new part of the picked atom.

    Row `slot` of the inverse Cholesky factor writes the unit vector along that part as a sum of atoms, so no system is solved.
    """

    signed = needs_gram = needs_cholesky = True

    def change(self, state: PursuitState, slot: int, correlations: Correlations, best: BestAtoms) -> Codes:
        inverse = state.inverse_cholesky[:, :slot, :slot]
        shared = _matvec(inverse, state.gram[:, slot, :slot])
        pivot = state.gram[:, slot, slot] - shared.square().sum(1)
        # An atom in the span of the support is only ever picked when nothing but rounding errors remains.
        independent = state.active & state.is_new[:, slot] & (pivot > 16 * torch.finfo(pivot.dtype).eps)
        length = pivot.where(independent, 1).sqrt()
        direction = torch.cat([-torch.einsum("ts,tsj->tj", shared, inverse), torch.ones_like(length)[:, None]], 1)
        direction = direction / length[:, None]
        amount = torch.where(independent, best.correlations / length, 0)
        state.inverse_cholesky[:, slot, : slot + 1] = direction
        amounts = amount[:, None] * direction
        state.weights[:, : slot + 1].add_(amounts)
        state.residual_energy = state.residual_energy - amount.square()
        return Codes(amounts, state.support[:, : slot + 1])


RULES: Mapping[PursuitName, PursuitRule] = MappingProxyType(
    {
        "orthogonal": OrthogonalRule(),
        "gradient": GradientRule(signed=False),
        "signed-gradient": GradientRule(signed=True),
        "matching": MatchingRule(signed=True),
        "positive-matching": MatchingRule(signed=False),
    }
)
"""The rule of every pursuit."""


@torch.no_grad()
def run_pursuit(
    atoms: AtomSet,
    rule: PursuitRule,
    signals: Float[Tensor, "token width"],
    k: int,
    *,
    tolerance: float = 0.0,
    scores: Float[Tensor, "token size"] | None = None,
    excluded: ExcludedAtoms = None,
    with_history: bool = False,
) -> PursuitPath:
    """Run k rounds for every signal; a signal whose unexplained share is `tolerance` or less needs no more.

    `scores` are `signals @ atoms.rows.T`, if they are known already. Of the last atoms, those `excluded` for a signal are not
    picked for it. The path only holds the weights before each round `with_history`.
    """
    energy = signals.square().sum(1)
    _check_finite(signals, energy)
    chunk, paths = _chunk(atoms, signals, k), []
    for start in range(0, max(len(signals), 1), chunk):
        here = slice(start, start + chunk)
        state = PursuitState.of(energy[here], k, rule, with_history)
        if atoms.size and len(state.energy):
            parts = (None if tensor is None else tensor[here] for tensor in (scores, excluded))
            run_rounds(state, rule, atoms.correlations(signals[here], k, *parts), k, tolerance)
        else:
            state.best_correlations[state.active, :1] = 0  # any atom would be picked
        weights, residual_energy = state.weights * state.is_new, state.residual_energy.clamp_min(0)
        paths.append(PursuitPath(state.support, weights, state.energy, residual_energy, state.best_correlations, state.history))
    return paths[0] if len(paths) == 1 else PursuitPath(*(torch.cat(parts) for parts in zip(*paths, strict=True)))


def _chunk(atoms: AtomSet, signals: Tensor, k: int) -> int:
    """Return how many signals are pursued at a time."""
    if signals.device.type == "cpu":
        return min(MAX_CHUNK["cpu"], max(MIN_CHUNK, SCORES_IN_CHUNK // max(atoms.size, 1)))
    pool = 0 if atoms.pool is None else atoms.pool.atoms
    per_signal = 12 * atoms.size + 4 * signals.shape[1] * (2 * pool + k + 4) + 24 * k * (pool + k)
    return min(MAX_CHUNK["cuda"], max(MIN_CHUNK, free_memory(signals.device) // GPU_SHARE // per_signal))


def run_rounds(whole: PursuitState, rule: PursuitRule, correlations: Correlations, k: int, tolerance: float) -> None:
    """Run the pursuits of a chunk to their end; on a GPU without waiting for it, unless there is a `tolerance` to reach."""
    rows, state, on_cpu = torch.arange(len(whole.energy), device=whole.energy.device), whole, whole.energy.device.type == "cpu"
    for slot in range(k):
        change = _run_round(state, rule, correlations, slot, max(tolerance, 8 * torch.finfo(whole.energy.dtype).eps))
        looks = on_cpu or (tolerance > 0 and (slot + 1) % ROUNDS_UNSEEN == 0)
        active = int(state.active.sum()) if looks else len(rows)
        if active == 0 or slot + 1 == k:
            break
        correlations.update(change)
        # Continue without the finished signals once they are the majority.
        if 2 * active < len(rows):
            if state is not whole:
                whole.write(rows, state)
            unfinished = state.active.nonzero()[:, 0]
            rows, state = rows[unfinished], state.select(unfinished)
            correlations.select(unfinished)
    if state is not whole:
        whole.write(rows, state)


def _run_round(state: PursuitState, rule: PursuitRule, correlations: Correlations, slot: int, tolerance: float) -> Codes:
    """Pick the atoms of round `slot` and change the weights; finished signals stay as they are."""
    if len(state.history[0]):
        state.history[:, slot, :slot] = state.weights[:, :slot]
    best = correlations.best(rule.signed)
    merit = best.merit.clamp_min(0) if rule.signed else best.merit
    state.best_correlations[:, slot] = torch.where(state.active, merit, torch.inf)
    state.active &= best.merit > -torch.inf
    earlier = (state.support[:, :slot] == best.atoms[:, None]) & state.is_new[:, :slot]
    state.support[:, slot] = best.atoms
    state.is_new[:, slot] = state.active & ~earlier.any(1)
    if rule.needs_gram:
        products = correlations.between(best.atoms, state.support[:, : slot + 1])
        state.gram[:, slot, : slot + 1] = state.gram[:, : slot + 1, slot] = products
    change = rule.change(state, slot, correlations, best)
    state.active &= change.values.any(1) & (state.residual_energy > tolerance * state.energy)
    return change


def _check_finite(signals: Tensor, energy: Tensor) -> None:
    # The squared norm of a row is finite if all its entries are, unless they are huge.
    if torch.isfinite(energy).all():
        return
    bad = ~torch.isfinite(signals).all(1)
    if bad.any():
        raise NonFinite(f"A pursuit needs finite signals; row {int(bad.nonzero()[0, 0])} holds NaN or infinity.")


def _matvec(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Return `matrix @ vector` for every token."""
    return torch.bmm(matrices, vectors[:, :, None])[:, :, 0]
