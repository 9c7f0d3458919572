"""Pursuits: write signals as sums of few atoms by picking, round after round, the atom that explains most of the residual.

`pursue` checks its input and runs any pursuit; `run_pursuit` is the same on an `AtomSet`, for callers that keep one. With a Gram
matrix of the atoms no round goes back to the signals; without it every round is a product with the residuals, of which a
`CandidatePool` saves most. `choose_backend` decides between these: on a GPU always for a pool (see `pooled`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from difflex.choices import PursuitName
from difflex.dictionaries.pursuit.algorithms import RULES, PursuitPath, run_pursuit
from difflex.dictionaries.pursuit.correlations import GramMatrix, check_norms, product
from difflex.dictionaries.pursuit.pooled import AtomSet, CandidatePool
from difflex.errors import BadInput
from difflex.files import Json

__all__ = [
    "RULES",
    "AtomSet",
    "CandidatePool",
    "GramMatrix",
    "PursuitBackend",
    "PursuitPath",
    "choose_backend",
    "product",
    "pursue",
    "run_pursuit",
]

GRAM_BYTES = 4 * 2**30
"""The memory that a Gram matrix may take: that of 32,768 atoms in float32."""
GRAM_DTYPES = {"float32": torch.float32, "float16": torch.float16}
"""The precisions of a Gram matrix, the best first."""
WIDTH_PER_GRAM_ROW = 8
"""A row of the Gram matrix takes as long as a product with activations of about this width."""
EXACT_POOL, EXACT_SIZE = CandidatePool(rounds=1, atoms=8), 16_384
"""The pool on a GPU of matching pursuit, and of all pursuits up to this many atoms: every pick is the best of all atoms."""
GRADIENT_POOL = CandidatePool(rounds=3, atoms=24)
"""The pool on a GPU of gradient pursuit, which suffers more from a pick that is not the best than orthogonal pursuit."""


def pursue(
    signals: Float[Tensor, "token width"],
    atoms: Float[Tensor, "size width"],
    k: int,
    pursuit: PursuitName = "orthogonal",
    *,
    gram: GramMatrix | None = None,
    pool: CandidatePool | None = None,
    tolerance: float = 0.0,
) -> PursuitPath:
    """Return at most k atoms per signal with their weights, in the order in which they were picked.

    `orthogonal` is orthogonal matching pursuit: after every pick the weights are the least-squares solution on all picked atoms.
    `gradient` and `signed-gradient` are gradient pursuit (Blumensath and Davies 2008), `matching` and `positive-matching` are
    matching pursuit (Mallat and Zhang 1993), which may pick an atom again. A signal is finished when its unexplained share is
    `tolerance` or less. Atoms of norm zero are never picked.
    """
    _check(signals, atoms, k, gram)
    return run_pursuit(AtomSet(atoms, gram, pool), RULES[pursuit], signals, k, tolerance=tolerance)


def _check(signals: Tensor, atoms: Tensor, k: int, gram: GramMatrix | None) -> None:
    if signals.ndim != 2 or atoms.ndim != 2 or signals.shape[1] != atoms.shape[1]:
        raise BadInput(
            f"A pursuit takes signals [token, width] and atoms [size, width]; it got {[*signals.shape]} and {[*atoms.shape]}."
        )
    if k < 1:
        raise BadInput(f"A pursuit needs at least one atom per signal; k is {k}.")
    if gram is not None and gram.size != len(atoms):
        raise BadInput(f"The Gram matrix is of {gram.size} atoms, but there are {len(atoms)}. Make it with GramMatrix.of(atoms).")
    if not signals.dtype == atoms.dtype == (atoms.dtype if gram is None or gram.dtype == torch.float16 else gram.dtype):
        raise BadInput(f"The dtypes of signals ({signals.dtype}), atoms ({atoms.dtype}) and Gram matrix differ: use one.")
    check_norms(atoms, zero_allowed=True)


class PursuitBackend(NamedTuple):
    """How the correlations of a pursuit are kept up to date."""

    gram: torch.dtype | None
    """The precision of the Gram matrix; None for products with the residual."""
    pool: CandidatePool | None
    reason: str
    """The choice and its reason, as a phrase to print."""
    half: bool = False
    """Whether pools are filled by products in half precision, with a copy of the atoms."""

    def memory(self, size: int, width: int) -> int:
        """Return the bytes that pursuits with `size` atoms need besides the atoms."""
        return (0 if self.gram is None else size * size * self.gram.itemsize) + 2 * size * width * self.half

    def as_json(self) -> dict[str, Json]:
        """Return this backend as plain JSON."""
        return {
            "gram": None if self.gram is None else str(self.gram).removeprefix("torch."),
            "pool": None if self.pool is None else list(self.pool),
            "reason": self.reason,
            **({"half": True} if self.half else {}),
        }

    @classmethod
    def from_json(cls, entries: Mapping[str, Json]) -> PursuitBackend:
        """Return the backend that `as_json` wrote; raise a KeyError or ValueError for anything else."""
        gram, pool = entries["gram"], entries["pool"]
        if pool is not None and not isinstance(pool, list):
            raise ValueError(f"the pool is {pool!r}")
        pool = None if pool is None else CandidatePool(*(int(str(number)) for number in pool))
        gram = None if gram is None else GRAM_DTYPES[str(gram)]
        return cls(gram, pool, str(entries["reason"]), half=entries.get("half", False) is True)


def choose_backend(pursuit: PursuitName, size: int, width: int, k: int, device: str = "cpu") -> PursuitBackend:
    """Choose the fastest backend for a dictionary of `size` atoms on a kind of `device`.

    The last bits of the results depend on it, so it is never chosen by how much memory happens to be free.
    """
    rule, need = RULES[pursuit], 0
    if device != "cpu":
        if size <= EXACT_SIZE or rule.single_weight:
            return PursuitBackend(None, EXACT_POOL, "products with the residual in half precision", half=True)
        pool = CandidatePool() if rule.needs_cholesky else GRADIENT_POOL
        return PursuitBackend(None, pool, "candidate pools from products with the residual in half precision", half=True)
    if width <= WIDTH_PER_GRAM_ROW * (1 if rule.single_weight else k):
        return PursuitBackend(None, None, f"products with the residual (faster at width {width} and k {k})")
    for name, dtype in GRAM_DTYPES.items():
        need = size * size * dtype.itemsize
        if need <= GRAM_BYTES:
            return PursuitBackend(dtype, None, f"a Gram matrix in {name} ({_gb(need)})")
    pool = CandidatePool() if rule.needs_cholesky else None
    picks = " and a candidate pool" if pool else ""
    return PursuitBackend(None, pool, f"products with the residual{picks} (a Gram matrix would take {_gb(need)})")


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
