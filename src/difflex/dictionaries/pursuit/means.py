"""What a pursuit works with: the Gram matrix, whole or in half precision, or products; chosen by shapes and memory, and said."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from difflex.dictionaries.pursuit.correlations import CandidatePool
from difflex.dictionaries.pursuit.gram import GramMatrix
from difflex.files import Json

__all__ = ["PursuitBackend", "free_memory", "means"]

SHARE = 0.6
"""Of the memory at hand, what a Gram matrix may take."""
GRAMS = {"float32": torch.float32, "float16": torch.float16}
"""The precisions of a Gram matrix, the best first."""
WIDTH_PER_MOVE = 8
"""A row of the Gram matrix takes as long as a product with activations of about this width: products are computed better."""


class PursuitBackend(NamedTuple):
    """How correlations are kept up to date."""

    gram: torch.dtype | None
    """The precision of the Gram matrix; None where there is none."""
    pool: CandidatePool | None
    reason: str
    """In words."""

    def as_json(self) -> dict[str, Json]:
        """These means as plain JSON."""
        return {
            "gram": None if self.gram is None else str(self.gram).removeprefix("torch."),
            "pool": None if self.pool is None else list(self.pool),
            "reason": self.reason,
        }

    @classmethod
    def of_json(cls, entries: Mapping[str, Json]) -> PursuitBackend:
        """The means that `as_json` was called of; a KeyError or ValueError where it was of none."""
        gram, pool = entries["gram"], entries["pool"]
        if pool is not None and not isinstance(pool, list):
            raise ValueError(f"the pool is {pool!r}")
        rounds = None if pool is None else CandidatePool(*(int(str(number)) for number in pool))
        return cls(None if gram is None else GRAMS[str(gram)], rounds, str(entries["reason"]))


def means(size: int, width: int, k: int, *, least_squares: bool, single: bool, free: int) -> PursuitBackend:
    """The means for a dictionary of `size` atoms; `single` pursuits move one weight in a round, others all."""
    if width <= WIDTH_PER_MOVE * (1 if single else k):
        return PursuitBackend(None, None, f"products, as a width of {width} is small beside k {k}")
    need = 0
    for name, dtype in GRAMS.items():
        need = GramMatrix.bytes(size, dtype)
        if need <= SHARE * free:
            return PursuitBackend(dtype, None, f"a Gram matrix in {name} ({_gb(need)} of {_gb(free)} free)")
    short = f"products, as not even half a Gram matrix ({_gb(need)}) fits in {_gb(free)} free"
    return (
        PursuitBackend(None, CandidatePool(), f"{short}; picks come from pools")
        if least_squares
        else PursuitBackend(None, None, short)
    )


def free_memory(device: torch.device | str) -> int:
    """Bytes at hand on `device`."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux: assume that half of the memory is free
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
