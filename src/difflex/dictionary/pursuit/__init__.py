"""Pursuits: a signal as a sum of few atoms, found by looking again and again for the atom that explains most of what is left.

Pure functions of (signals, atoms, k). Rows of `atoms` have length one (or zero: such are never picked). Give their Gram matrix
where it fits in memory and the activations are wide; without it every round is a product with the residual; a `Pool` spares most.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from difflex.dictionary.pursuit.correlations import Atoms, Pool
from difflex.dictionary.pursuit.gram import Gram
from difflex.dictionary.pursuit.rules import Gradient, Matching, Orthogonal
from difflex.dictionary.pursuit.walk import Rule, walk
from difflex.errors import BadInput
from difflex.records import Codes

__all__ = ["RULES", "Gram", "Pool", "Pursued", "Way", "gradient_pursuit", "matching_pursuit", "orthogonal_pursuit"]

Way = Literal["orthogonal", "gradient", "signed-gradient", "matching", "positive-matching"]
"""The pursuits by name. `gradient` is ITDA's for images, with non-negative weights; `matching` that of ITDA's authors, signed."""
RULES: Mapping[Way, Rule] = MappingProxyType(
    {
        "orthogonal": Orthogonal(),
        "gradient": Gradient(signed=False),
        "signed-gradient": Gradient(signed=True),
        "matching": Matching(signed=True),
        "positive-matching": Matching(signed=False),
    }
)


class Pursued(NamedTuple):
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
    gram: Gram | None = None,
    until: float = 0.0,
) -> Pursued:
    """k rounds of gradient pursuit (Blumensath and Davies 2008); by default weights stay non-negative, as in ITDA's papers.

    A signal is done when its unexplained share is `until` or less.
    """
    return _pursued(Gradient(signed=signed), signals, Atoms(atoms, gram), k, until)


def matching_pursuit(
    signals: Float[Tensor, "token width"],
    atoms: Float[Tensor, "size width"],
    k: int,
    *,
    signed: bool = True,
    gram: Gram | None = None,
    until: float = 0.0,
) -> Pursued:
    """k rounds of matching pursuit (Mallat and Zhang 1993), which may pick an atom again; ITDA's authors use the signed one."""
    return _pursued(Matching(signed=signed), signals, Atoms(atoms, gram), k, until)


def orthogonal_pursuit(
    signals: Float[Tensor, "token width"],
    atoms: Float[Tensor, "size width"],
    k: int,
    *,
    gram: Gram | None = None,
    pool: Pool | None = None,
    until: float = 0.0,
) -> Pursued:
    """k atoms by orthogonal matching pursuit: after every pick the weights are the least squares on all atoms picked so far."""
    return _pursued(Orthogonal(), signals, Atoms(atoms, gram, pool), k, until)


def _pursued(rule: Rule, signals: Tensor, atoms: Atoms, k: int, until: float) -> Pursued:
    _check(signals, atoms, k)
    path = walk(atoms, rule, signals, k, until=until)
    return Pursued(Codes(path.weights, path.support), path.unexplained)


def _check(signals: Tensor, atoms: Atoms, k: int) -> None:
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
