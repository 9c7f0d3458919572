"""The feed: batches of this rank, by number, and what is known of the data before the first update."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from typing import NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from difflex.dictionaries.normalisation import VECTORS_PER_AXIS, VectorMoments
from difflex.errors import BadInput, NonFinite
from difflex.records import ActivationBatch, of_split
from difflex.training.team import Team
from difflex.training.window import Batches

__all__ = ["BatchFeed", "DataPreview", "non_finite"]

MOST_KEPT = 32_768
"""Vectors of the preview that are kept, for the first bias and the first floors."""
FAR_OFF = 1.0
"""|mean| / |standard deviation| over which normalisation helps: dead features grow with it (arXiv 2605.31518)."""
STRETCHED = 30.0
"""Largest over median variance of an axis, likewise."""


class DataPreview(NamedTuple):
    """The first vectors of the data."""

    moments: VectorMoments
    vectors: Float[Tensor, "token width"]

    def off_centre(self) -> float:
        """|mean| / |standard deviation|."""
        return float(self.moments.mean.norm() / self.moments.variance.sum().sqrt().clamp_min(1e-30))

    def warn(self, method: str) -> None:
        """Warn where `method` leaves the data in a shape that makes dead features."""
        variance = self.moments.variance
        stretch = float(variance.max() / variance.median().clamp_min(1e-30))
        if method in ("none", "scale") and (self.off_centre() > FAR_OFF or stretch > STRETCHED):
            warnings.warn(
                f"Normalisation '{method}' leaves the mean at {self.off_centre():.1f} standard deviations and the widest axis at "
                f"{stretch:.0f} times the median variance: many features will die. Choose 'standardise' or 'whiten'.",
                stacklevel=2,
            )


@final
class BatchFeed:
    """Batches of this rank, timed."""

    def __init__(self, batches: Batches, team: Team, device: torch.device, *, own_share: bool) -> None:
        """The feed from `batches`, which yields whole batches, to be cut here, or (`own_share`) what this rank should learn."""
        self._batches, self._team, self._device, self._own_share = batches, team, device, own_share
        self.waited = 0.0
        """Seconds spent waiting for data."""

    def rows(self, start: int) -> Iterator[ActivationBatch]:
        """The shares of this rank in the batches from number `start` on."""
        stream = of_split(self._batches(start), "train")
        while True:
            began = time.perf_counter()
            rows = next(stream, None)
            self.waited += time.perf_counter() - began
            if rows is None:
                return
            if not self._own_share:
                share = self._team.share(len(rows.values))
                rows = ActivationBatch(*(part[share] for part in rows))
            yield rows._replace(values=rows.values.to(self._device, torch.float32))

    def preview(self, *, covariance: bool, most: int | None = None) -> DataPreview:
        """Statistics of the first 10 x width vectors (at least, but no more than `most`), on all ranks alike."""
        moments, kept = None, []
        for number, rows in enumerate(self.rows(0)):
            if found := non_finite(number, rows):
                raise NonFinite(f"{found} Nothing was learned yet. Harvest that shot again.")
            values = self._team.gather(rows.values)
            if moments is None:
                moments = VectorMoments(values.shape[1], covariance=covariance, device=self._device)
            if moments.count < MOST_KEPT:
                kept.append(values)
            moments.add(values)
            if moments.count >= min(VECTORS_PER_AXIS * values.shape[1], most or math.inf):
                break
        if moments is None:
            raise BadInput("Training was given a stream without a batch. Harvest some activations first.")
        return DataPreview(moments, torch.cat(kept)[:MOST_KEPT])


def non_finite(number: int, rows: ActivationBatch) -> str:
    """A sentence on the rows of batch `number` that hold NaN or infinity; nothing where there are none."""
    bad = (~torch.isfinite(rows.values)).any(1).nonzero()[:, 0].tolist()
    if not bad:
        return ""
    return (
        f"Batch {number} holds NaN or infinity in {len(bad)} rows, first that of shot {int(rows.shots[bad[0]])}, token "
        f"{int(rows.tokens[bad[0]])}."
    )
