"""Joint moments of activations and their reconstructions: what every figure of a reconstruction is made of, mergeable."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn import functional as F

from difflex.evaluation.record import ReconstructionMetrics

__all__ = ["JointMoments", "both", "figures", "joint"]

STILL = 1e-12
"""An axis whose deviation is less than this share of its mean does not vary: what is left is float64's own rounding."""


class JointMoments(NamedTuple):
    """Of activations x and reconstructions y, axis by axis; products are summed about the means, so no offset eats digits."""

    tokens: int
    x: Float64[Tensor, " width"]
    """Mean."""
    y: Float64[Tensor, " width"]
    xx: Float64[Tensor, " width"]
    """Sum of squared deviations from the mean; `xy` and `yy` likewise."""
    yy: Float64[Tensor, " width"]
    xy: Float64[Tensor, " width"]
    ee: Float64[Tensor, " width"]
    """Of the error x - y; not made from the other three, which cancel where a reconstruction is good."""
    cosine: float
    """Sum over the tokens."""


def joint(x: Float[Tensor, "token width"], y: Float[Tensor, "token width"]) -> JointMoments:
    """The moments of these rows."""
    cosine = float(F.cosine_similarity(x, y, dim=1).sum(dtype=torch.float64))
    a, b = x.double(), y.double()
    x_mean, y_mean = a.mean(0), b.mean(0)
    a, b = a - x_mean, b - y_mean
    xx, yy, xy = (torch.linalg.vecdot(one, other, dim=0) for one, other in ((a, a), (b, b), (a, b)))
    return JointMoments(len(x), x_mean, y_mean, xx, yy, xy, (a - b).square_().sum(0), cosine)


def both(one: JointMoments, other: JointMoments) -> JointMoments:
    """The moments of the rows of both (Chan, Golub & LeVeque 1983)."""
    tokens = one.tokens + other.tokens
    share, weight = other.tokens / tokens, one.tokens * other.tokens / tokens
    x, y = other.x - one.x, other.y - one.y
    return JointMoments(
        tokens,
        one.x + share * x,
        one.y + share * y,
        one.xx + other.xx + weight * x.square(),
        one.yy + other.yy + weight * y.square(),
        one.xy + other.xy + weight * x * y,
        one.ee + other.ee + weight * (x - y).square(),
        one.cosine + other.cosine,
    )


def figures(of: JointMoments) -> ReconstructionMetrics:
    """What the moments say of the reconstruction; axes that do not vary are left out of the means over axes."""
    left = float((of.ee + of.tokens * (of.x - of.y).square()).sum())
    spread, length = float(of.xx.sum()), float((of.xx + of.tokens * of.x.square()).sum())
    varies, follows = _varies(of.xx, of.x, of.tokens), _varies(of.yy, of.y, of.tokens)
    # An axis that the reconstruction leaves still follows nothing of it: its correlation is 0, not 0 / 0.
    r2 = torch.where(follows, of.xy.square() / (of.xx * of.yy), 0.0)[varies]
    ev = 1 - of.ee[varies] / of.xx[varies]
    return ReconstructionMetrics(
        fvu=left / spread if bool(varies.any()) else None,
        fvu_raw=left / length if length else None,
        r2=float(r2.mean()) if len(r2) else None,
        ev=float(ev.mean()) if len(ev) else None,
        cosine=of.cosine / of.tokens,
    )


def _varies(squares: Float64[Tensor, " width"], mean: Float64[Tensor, " width"], tokens: int) -> Tensor:
    return squares > tokens * (STILL * mean).square()
