"""Pursuits: a signal as a sum of few atoms, found by looking again and again for the atom that explains most of what is left.

Pure functions of (signals, atoms, k). Rows of `atoms` have length one (or zero: such are never picked). Give their Gram matrix
where it fits in memory and the activations are wide; without it every round is a product with the residual; a `CandidatePool` spares most.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from difflex.dictionaries.pursuit.correlations import AtomSet, CandidatePool
from difflex.dictionaries.pursuit.gram import GramMatrix
from difflex.dictionaries.pursuit.rules import GradientRule, MatchingRule, OrthogonalRule
from difflex.dictionaries.pursuit.walk import PursuitRule, walk
from difflex.errors import BadInput
from difflex.records import Codes

__all__ = [
    "RULES",
    "CandidatePool",
    "GramMatrix",
    "PursuitResult",
    "Way",
    "gradient_pursuit",
    "matching_pursuit",
    "orthogonal_pursuit",
]

Way = Literal["orthogonal", "gradient", "signed-gradient", "matching", "positive-matching"]
"""The pursuits by name. `gradient` is ITDA's for images, with non-negative weights; `matching` that of ITDA's authors, signed."""
RULES: Mapping[Way, PursuitRule] = MappingProxyType(
    {
        "orthogonal": OrthogonalRule(),
        "gradient": GradientRule(signed=False),
        "signed-gradient": GradientRule(signed=True),
        "matching": MatchingRule(signed=True),
        "positive-matching": MatchingRule(signed=False),
    }
)


class PursuitResult(NamedTuple):
    """What a pursuit found."""

    codes: Codes
    """At most k atoms per signal in the order in which they were picked; a round that brought no new atom leaves a 0."""
    unexplained: Float[Tensor, " token"]
    """The share of each signal's squared length that is left; 0 for a signal of length zero."""


def gradient_pursuit(
    signals: Float[Tensor, "token width"],
    atoms: Float[Tensor, "size width"],
    k: int,
    *,
    signed: bool = False,
    gram: GramMatrix | None = None,
    until: float = 0.0,
) -> PursuitResult:
    """k rounds of gradient pursuit (Blumensath and Davies 2008); by default weights stay non-negative, as in ITDA's papers.

    A signal is done when its unexplained share is `until` or less.
    """
    return _pursued(GradientRule(signed=signed), signals, AtomSet(atoms, gram), k, until)


def matching_pursuit(
    signals: Float[Tensor, "token width"],
    atoms: Float[Tensor, "size width"],
    k: int,
    *,
    signed: bool = True,
    gram: GramMatrix | None = None,
    until: float = 0.0,
) -> PursuitResult:
    """k rounds of matching pursuit (Mallat and Zhang 1993), which may pick an atom again; ITDA's authors use the signed one."""
    return _pursued(MatchingRule(signed=signed), signals, AtomSet(atoms, gram), k, until)


def orthogonal_pursuit(
    signals: Float[Tensor, "token width"],
    atoms: Float[Tensor, "size width"],
    k: int,
    *,
    gram: GramMatrix | None = None,
    pool: CandidatePool | None = None,
    until: float = 0.0,
) -> PursuitResult:
    """k atoms by orthogonal matching pursuit: after every pick the weights are the least squares on all atoms picked so far."""
    return _pursued(OrthogonalRule(), signals, AtomSet(atoms, gram, pool), k, until)


def _pursued(rule: PursuitRule, signals: Tensor, atoms: AtomSet, k: int, until: float) -> PursuitResult:
    _check(signals, atoms, k)
    path = walk(atoms, rule, signals, k, until=until)
    return PursuitResult(Codes(path.weights, path.support), path.unexplained)


def _check(signals: Tensor, atoms: AtomSet, k: int) -> None:
    rows, gram = atoms.rows, atoms.gram
    if signals.ndim != 2 or rows.ndim != 2 or signals.shape[1] != rows.shape[1]:
        raise BadInput(
            f"A pursuit takes signals [token, width] and atoms [size, width]; found {[*signals.shape]}, {[*rows.shape]}."
        )
    if k < 1:
        raise BadInput(f"A pursuit needs at least one atom per signal; k is {k}.")
    if gram is not None and gram.size != len(rows):
        raise BadInput(f"The Gram matrix is of {gram.size} atoms, but {len(rows)} were given. Make it with Gram.of(atoms).")
    if not signals.dtype == rows.dtype == (rows.dtype if gram is None or gram.dtype == torch.float16 else gram.dtype):
        raise BadInput(f"Signals of {signals.dtype} and atoms of {rows.dtype} do not go together: give all in one precision.")
    lengths = torch.linalg.vector_norm(rows, dim=1)
    wrong = ~((lengths - 1).abs() <= 1e-3) & (lengths != 0)
    if wrong.any():
        place = int(wrong.nonzero()[0, 0])
        raise BadInput(f"Atoms must have length one (or zero); atom {place} has {float(lengths[place]):.4g}. Normalise the rows.")
