"""Correlations of residuals with all atoms: by the Gram matrix, or by products with the residual."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from difflex.dictionaries.sparse import dot_products, sparse_matmul
from difflex.errors import BadInput
from difflex.records import Codes

PANEL = 512
"""Columns of a Gram matrix that are stored together: a dictionary that grows fills panel after panel and moves nothing."""
BLOCK = 128
"""Neighbouring atoms of which only the best is compared first."""
ExcludedAtoms = Bool[Tensor, "token last"] | None
"""For each signal, which of the last atoms it must not pick."""


def product(signals: Float[Tensor, "token width"], rows: Float[Tensor, "size width"]) -> Float[Tensor, "token size"]:
    """Return `signals @ rows.T`, as fast as float32 accuracy allows."""
    if signals.device.type != "cpu" or signals.dtype != torch.float32 or not _medium_is_accurate():
        return signals @ rows.T
    with _matmul_precision("medium"):
        return signals @ rows.T


def check_norms(atoms: Float[Tensor, "size width"], zero_allowed: bool = False) -> None:
    """Raise an error for the first of the `atoms` that has not norm one."""
    norms = torch.linalg.vector_norm(atoms, dim=1)
    wrong = ~((norms - 1).abs() <= 1e-3) & ~((norms == 0) & zero_allowed)
    if wrong.any():
        first = int(wrong.nonzero()[0, 0])
        expected = "one or zero" if zero_allowed else "one"
        raise BadInput(f"Atoms must have norm {expected}; atom {first} has {float(norms[first]):.4g}. Normalise the rows.")


@cache
def _medium_is_accurate() -> bool:
    """Whether torch's precision `medium` keeps float32 accuracy: on many CPUs it only selects another library, twice as fast.

    On CPUs with matrix units for bfloat16 it really uses them, and is not used here. Decided by the error, never by timing, so
    that a machine always computes the same bits.
    """
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 64, 512, generator=generator)
    with _matmul_precision("medium"):
        fast = left @ right.T
    return float((fast - left.double() @ right.double().T).abs().max()) < 1e-5 * 512**0.5


@contextmanager
def _matmul_precision(setting: str) -> Iterator[None]:
    """Set torch's float32 matmul precision for the duration of the block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@final
class GramMatrix:
    """`atoms @ atoms.T`, which grows by rows and columns without being recomputed; float16 takes half the memory."""

    def __init__(
        self,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        panel: int = PANEL,
    ) -> None:
        """Create the empty Gram matrix of up to `capacity` atoms; a CPU only provides memory as they are added."""
        self.size = 0
        self.capacity = capacity
        self.panel = min(panel, max(capacity, 1))
        count = -(-capacity // self.panel)
        self._panels = torch.empty(count, capacity, self.panel, dtype=dtype, device=device)

    @classmethod
    def of(cls, atoms: Float[Tensor, "size width"], dtype: torch.dtype | None = None, panel: int = PANEL) -> GramMatrix:
        """Return the Gram matrix of `atoms`, without room for more."""
        gram = cls(len(atoms), dtype=dtype or atoms.dtype, device=atoms.device, panel=panel)
        for start in range(0, len(atoms), 512):
            rows = atoms[start : start + 512]
            gram.append(product(rows, atoms[:start]), product(rows, rows))
        return gram

    @property
    def dtype(self) -> torch.dtype:
        return self._panels.dtype

    def append(self, cross: Float[Tensor, "new size"], own: Float[Tensor, "new new"]) -> None:
        """Add new atoms, given their inner products with the present atoms and with each other."""
        start, stop = self.size, self.size + len(own)
        if stop > self.capacity:
            raise BadInput(
                f"A Gram matrix for {self.capacity} atoms has {start}; {len(own)} more do not fit. Create it with more capacity."
            )
        for panel, (low, high) in enumerate(self._spans(stop)):
            block = self._panels[panel]
            old = min(high, start)
            if low < old:
                block[start:stop, : old - low] = cross[:, low:old]
            new = max(low, start)
            if new < high:
                block[start:stop, new - low : high - low] = own[:, new - start : high - start]
                block[:start, new - low : high - low] = cross[new - start : high - start].T
        self.size = stop

    def truncate(self, size: int) -> None:
        """Remove the atoms after the first `size`."""
        self.size = min(self.size, size)

    def rows(self, atoms: Int[Tensor, " atom"]) -> Float[Tensor, "atom size"]:
        """Return the rows of `atoms`."""
        parts = [self._panels[panel, atoms, : high - low] for panel, (low, high) in enumerate(self._spans(self.size))]
        return torch.cat(parts, 1)

    def between(self, atoms: Int[Tensor, " token"], others: Int[Tensor, "token slot"]) -> Float[Tensor, "token slot"]:
        """Return the inner product of each token's atom with each of its `others`."""
        positions = (others // self.panel * self.capacity + atoms[:, None]) * self.panel + others % self.panel
        return self._panels.take(positions)

    def subtract(self, codes: Codes, scores: Float[Tensor, "token size"]) -> None:
        """Subtract `values @ gram[indices]` of the codes from `scores`, in place."""
        atoms, weights = codes.indices.reshape(-1), codes.values.to(self.dtype).reshape(-1)
        count, slots = codes.indices.shape
        starts = torch.arange(0, count * slots, slots, device=atoms.device)
        for panel, (low, high) in enumerate(self._spans(self.size)):
            part = torch.embedding_bag(self._panels[panel], atoms, starts, False, 0, False, weights)[0]
            scores[:, low:high].sub_(part[:, : high - low])

    def _spans(self, size: int) -> list[tuple[int, int]]:
        """Return the first column of every panel in use, and the column after its last."""
        return [(low, min(low + self.panel, size)) for low in range(0, size, self.panel)]


class BestAtoms(NamedTuple):
    """The atom that correlates best with the residual of each signal."""

    atoms: Int[Tensor, " token"]
    correlations: Float[Tensor, " token"]
    """With their signs."""
    merit: Float[Tensor, " token"]
    """The number by which atoms are compared; negative infinity if every atom is excluded for the signal."""


class Correlations(ABC):
    """The correlations of a chunk of residuals with the atoms, updated as the weights change."""

    @abstractmethod
    def best(self, signed: bool) -> BestAtoms:
        """Return the largest correlation of every residual, by absolute value if `signed`."""

    @abstractmethod
    def at(self, support: Int[Tensor, "token slot"]) -> Float[Tensor, "token slot"]:
        """Return the correlations of every residual with the atoms of its support."""

    @abstractmethod
    def between(self, picked: Int[Tensor, " token"], support: Int[Tensor, "token slot"]) -> Float[Tensor, "token slot"]:
        """Return the inner products of each signal's picked atom with those of its support."""

    @abstractmethod
    def update(self, change: Codes) -> None:
        """Update the correlations after a change of the weights."""

    @abstractmethod
    def select(self, rows: Int[Tensor, " row"]) -> None:
        """Continue with these signals alone."""


@final
class GramCorrelations(Correlations):
    """All correlations, updated by rows of the Gram matrix: size x support operations per round, whatever the width."""

    def __init__(self, gram: GramMatrix, scores: Float[Tensor, "token size"], excluded: ExcludedAtoms) -> None:
        """Start from the correlations of the signals, which are changed in place."""
        self._gram, self._scores, self._excluded = gram, scores, excluded

    def best(self, signed: bool) -> BestAtoms:
        return largest(self._scores, signed, self._excluded)

    def at(self, support: Tensor) -> Tensor:
        return self._scores.gather(1, support)

    def between(self, picked: Tensor, support: Tensor) -> Tensor:
        return self._gram.between(picked, support).to(self._scores.dtype)

    def update(self, change: Codes) -> None:
        self._gram.subtract(change, self._scores)

    def select(self, rows: Tensor) -> None:
        self._scores = self._scores[rows]
        self._excluded = None if self._excluded is None else self._excluded[rows]


@final
class ProductCorrelations(Correlations):
    """All correlations, by a product with the residual in every round."""

    def __init__(self, rows: Float[Tensor, "size width"], signals: Tensor, scores: Tensor, excluded: ExcludedAtoms) -> None:
        """Start from the correlations of the `signals`."""
        self._rows, self._residual, self._scores, self._excluded = rows, signals.clone(), scores, excluded

    def best(self, signed: bool) -> BestAtoms:
        return largest(self._scores, signed, self._excluded)

    def at(self, support: Tensor) -> Tensor:
        return self._dot_products(support, self._residual)

    def between(self, picked: Tensor, support: Tensor) -> Tensor:
        return self._dot_products(support, self._rows[picked])

    def update(self, change: Codes) -> None:
        self._residual -= sparse_matmul(change, self._rows)
        self._scores = product(self._residual, self._rows)

    def select(self, rows: Tensor) -> None:
        self._residual, self._scores = self._residual[rows], self._scores[rows]
        self._excluded = None if self._excluded is None else self._excluded[rows]

    def _dot_products(self, support: Tensor, vectors: Tensor) -> Tensor:
        """Return the inner products of each token's vector with the atoms of its support."""
        count, slots = support.shape
        tokens = torch.arange(count, device=support.device).repeat_interleave(slots)
        return dot_products(self._rows, support.contiguous().view(-1), vectors, tokens).view(count, slots)


def merit_of(scores: Float[Tensor, "token atom"], signed: bool, excluded: ExcludedAtoms) -> Float[Tensor, "token atom"]:
    """Return the numbers by which atoms are compared."""
    merit = scores.abs() if signed else scores
    if excluded is None:
        return merit
    start = scores.shape[1] - excluded.shape[1]
    return torch.cat([merit[:, :start], merit[:, start:].masked_fill(excluded, -torch.inf)], 1)


def largest(scores: Float[Tensor, "token atom"], signed: bool, excluded: ExcludedAtoms = None) -> BestAtoms:
    """Return the best atom of every row, searched among the best of short blocks: several times faster than along whole rows."""
    size = scores.shape[1]
    whole = size - size % BLOCK if excluded is None else (size - excluded.shape[1]) // BLOCK * BLOCK
    if not whole:
        return largest_of_few(scores, signed, excluded)
    blocks = scores[:, :whole].unflatten(1, (-1, BLOCK))
    peaks = torch.maximum(blocks.amax(2), -blocks.amin(2)) if signed else blocks.amax(2)
    block = peaks.argmax(1)
    rows = torch.arange(len(scores), device=scores.device)
    inside = largest_of_few(blocks[rows, block], signed)
    best = inside._replace(atoms=block * BLOCK + inside.atoms)
    if whole == size:
        return best
    rest = largest_of_few(scores[:, whole:], signed, excluded)
    better = rest.merit > best.merit
    return BestAtoms(
        *(torch.where(better, new, old) for new, old in zip(rest._replace(atoms=whole + rest.atoms), best, strict=True))
    )


def largest_of_few(scores: Float[Tensor, "token atom"], signed: bool, excluded: ExcludedAtoms = None) -> BestAtoms:
    """Return the best atom of every row."""
    merit = merit_of(scores, signed, excluded)
    atoms = merit.argmax(1, keepdim=True)
    return BestAtoms(atoms[:, 0], scores.gather(1, atoms)[:, 0], merit.gather(1, atoms)[:, 0])
