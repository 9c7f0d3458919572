"""The one dense product of a pursuit, as fast as float32 accuracy allows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["product"]


def product(signals: Float[Tensor, "token width"], rows: Float[Tensor, "size width"]) -> Float[Tensor, "token size"]:
    """`signals @ rows.T`."""
    if signals.device.type != "cpu" or signals.dtype != torch.float32 or not _medium_is_accurate():
        return signals @ rows.T
    with _precision("medium"):
        return signals @ rows.T


@cache
def _medium_is_accurate() -> bool:
    """Whether torch's setting `medium` keeps float32 accuracy here: on many CPUs it only means another, twice as fast library.

    Where the CPU has matrix units for bfloat16 it really uses them, and is left alone. Decided by the error, never by the clock,
    so that the same machine always gives the same bits.
    """
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 64, 512, generator=generator)
    with _precision("medium"):
        quick = left @ right.T
    return float((quick - left.double() @ right.double().T).abs().max()) < 1e-5 * 512**0.5


@contextmanager
def _precision(setting: str) -> Iterator[None]:
    """torch's float32 matmul precision, held for as long as the block takes."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
