"""The default strength of an edit: the largest one at which images stay intact, by the loss of the unedited model on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

__all__ = ["BROKEN", "LOSS_LEVELS", "STRENGTHS", "IntactStrength", "intact_strengths"]

LOSS_LEVELS = (0.3, 0.6, 0.9)
"""Noise levels at which the unedited model's loss on finished images is measured."""
BROKEN = 1.5
"""Images with this many times the loss of unedited ones, or more, are broken."""
STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)
"""The strengths to choose from."""


class IntactStrength(NamedTuple):
    """The largest strength at which an image stays intact; the smallest of all if it stays so at none."""

    strength: float
    loss: float
    """The loss at this strength, over that of the unedited image."""


def intact_strengths(losses: Callable[[Sequence[float]], Float[Tensor, " image"]], images: int) -> list[IntactStrength]:
    """Return the default strength for each of some images, by bisection: losses rise with the strength.

    `losses` generates every image at a strength of its own, 0 for none, and returns the unedited model's loss on each.
    """
    unedited = losses([0.0] * images)
    low, high = [0] * images, [len(STRENGTHS) - 1] * images
    best = [IntactStrength(STRENGTHS[0], float("nan"))] * images
    while any(first <= last for first, last in zip(low, high, strict=True)):
        middle = [min((first + last) // 2, len(STRENGTHS) - 1) for first, last in zip(low, high, strict=True)]
        ratios = (losses([STRENGTHS[i] for i in middle]) / unedited).tolist()
        for image, (i, ratio) in enumerate(zip(middle, ratios, strict=True)):
            if low[image] > high[image]:
                continue
            if ratio < BROKEN or i == 0:
                best[image] = IntactStrength(STRENGTHS[i], ratio)
            if ratio < BROKEN:
                low[image] = i + 1
            else:
                high[image] = i - 1
    return best
