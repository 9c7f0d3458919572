"""The rules of three pursuits: along the gradient, along one atom, and by least squares.

Equations are those of Blumensath and Davies, "Gradient Pursuits", IEEE Transactions on Signal Processing 56 (6), 2008:
the support grows by the atom that correlates best with the residual, then the weights on it move in a direction d by the
step <r, c> / |c|^2 with c = atoms[support]^T d (their section III); the gradient pursuit takes d = atoms[support] r.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from difflex.dictionaries.pursuit.correlations import BestAtoms, Correlations, WeightChange
from difflex.dictionaries.pursuit.walk import PursuitRule, PursuitState

__all__ = ["GradientRule", "MatchingRule", "OrthogonalRule"]


@final
class GradientRule(PursuitRule):
    """All weights move along the gradient; unsigned ones are then cut at zero, as ITDA does, and a cut may undo a gain."""

    pairs = True

    def __init__(self, *, signed: bool) -> None:
        self.signed = self.monotone = signed

    def move(self, walk: PursuitState, t: int, scores: Correlations, best: BestAtoms) -> WeightChange:
        on = slice(t + 1)
        gram, support = walk.gram[:, on, on], walk.support[:, on]
        slope = scores.at(support) * walk.used[:, on]
        bend = (slope * _times(gram, slope)).sum(1)
        # <r, c> is the squared slope, as c = atoms^T slope and slope = atoms r.
        step = torch.where(walk.live & (bend > 0), slope.square().sum(1) / bend.where(bend > 0, 1), 0)
        change = step[:, None] * slope
        if not self.signed:
            # Cut at zero; what stands is never negative.
            change = torch.maximum(change, -walk.weights[:, on])
        walk.weights[:, on] += change
        walk.left = walk.left - (change * (2 * slope - _times(gram, change))).sum(1)
        return WeightChange(support, change)


@final
class MatchingRule(PursuitRule):
    """The weight of the picked atom alone moves, by its correlation; an atom may be picked again."""

    def __init__(self, *, signed: bool) -> None:
        self.signed = signed

    def move(self, walk: PursuitState, t: int, scores: Correlations, best: BestAtoms) -> WeightChange:
        change = best.correlations if self.signed else best.correlations.clamp_min(0)
        change = torch.where(walk.live, change, 0)
        known = (walk.support[:, :t] == best.atoms[:, None]) & walk.used[:, :t]
        walk.weights[:, :t] += known * change[:, None]
        walk.weights[:, t] = torch.where(walk.used[:, t], change, 0)
        walk.left = walk.left - change.square()
        return WeightChange(walk.support[:, t : t + 1], change[:, None])


@final
class OrthogonalRule(PursuitRule):
    """The weights become the least squares on the support: one step along the part of the new atom that is new.

    `factor` holds the inverse of the Cholesky factor L of the support's Gram matrix; its row t writes the unit vector along
    that part as a sum of atoms, so that no system is ever solved.
    """

    signed = pairs = factors = True

    def move(self, walk: PursuitState, t: int, scores: Correlations, best: BestAtoms) -> WeightChange:
        inverse = walk.factor[:, :t, :t]
        shared = _times(inverse, walk.gram[:, t, :t])
        pivot = walk.gram[:, t, t] - shared.square().sum(1)
        # An atom that lies in the span of the support is only ever picked when nothing but rounding is left.
        fresh = walk.live & walk.used[:, t] & (pivot > 16 * torch.finfo(pivot.dtype).eps)
        length = pivot.where(fresh, 1).sqrt()
        direction = torch.cat([-torch.einsum("ts,tsj->tj", shared, inverse), torch.ones_like(length)[:, None]], 1)
        direction = direction / length[:, None]
        step = torch.where(fresh, best.correlations / length, 0)
        walk.factor[:, t, : t + 1] = direction
        change = step[:, None] * direction
        walk.weights[:, : t + 1] += change
        walk.left = walk.left - step.square()
        return WeightChange(walk.support[:, : t + 1], change)


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """`matrix @ vector` for every token."""
    return torch.bmm(matrices, vectors[:, :, None])[:, :, 0]
