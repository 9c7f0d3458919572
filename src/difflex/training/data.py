"""What a training learns from: batches of activations, their division among processes, and statistics of the first ones.

Processes divide one of two things. `data`: every rank holds all features and encodes its share of a batch. The ranks gather the
pairs that they found and make the same update from them, so that their weights stay equal bit for bit without exchanging
gradients. `features`: every rank holds size / N features and sees the whole batch. The k largest scores are chosen among the k
largest of all ranks, so the choice is exact.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from difflex.dictionaries.normalisation import VECTORS_PER_AXIS, VectorMoments
from difflex.distributed import Ranks
from difflex.errors import BadInput, NonFinite
from difflex.records import ActivationBatch
from difflex.store import require_split

Split = Literal["data", "features"]
Batches = Callable[[int], Iterator[ActivationBatch]]
"""The batches of a run from a given number on. The batch of a number is always the same."""
MAX_PREVIEW = 32_768
"""Vectors of the preview that stay in memory, for the initial bias and thresholds."""
LARGE_MEAN = 1.0
"""|mean| / |standard deviation| above which normalisation prevents dead features (arXiv 2605.31518)."""
LARGE_STRETCH = 30.0
"""Largest over median variance of an axis, likewise."""


@final
class TrainingRanks(Ranks):
    """The ranks that train together."""

    def __init__(self, split: Split = "data") -> None:
        """All ranks of the process group."""
        super().__init__()
        alone = Ranks(0, 1)
        self.by_token: Ranks = self if split == "data" else alone
        """The ranks that encode other tokens of a batch: all of them, or this one alone."""
        self.by_feature: Ranks = self if split == "features" else alone
        """The ranks that hold other features: all of them, or this one alone."""

    def features(self, size: int) -> slice:
        """Return the features that this rank holds."""
        count, rank = self.by_feature.world_size, self.by_feature.rank
        if size % count:
            raise BadInput(f"Size {size} cannot be split evenly over {count} ranks: choose a multiple of {count}.")
        return slice(size // count * rank, size // count * (rank + 1))

    def batch_share(self, tokens: int) -> slice:
        """Return the tokens of a whole batch that this rank loads."""
        return slice(tokens * self.rank // self.world_size, tokens * (self.rank + 1) // self.world_size)

    def among_largest(self, values: Float[Tensor, "token k"], k: int) -> Bool[Tensor, "token k"]:
        """Return which of the largest values of this rank's features are among the k largest of all features."""
        if self.by_feature.world_size == 1:
            return torch.ones_like(values, dtype=torch.bool)
        winners = self.gather_columns(values).topk(k, dim=1).indices - self.rank * values.shape[1]
        own = (winners >= 0) & (winners < values.shape[1])
        mask = torch.zeros(len(values), values.shape[1] + 1, dtype=torch.bool, device=values.device)
        return mask.scatter_(1, torch.where(own, winners, values.shape[1]), True)[:, :-1]


class DataPreview(NamedTuple):
    """The first vectors of the data, with their statistics."""

    moments: VectorMoments
    vectors: Float[Tensor, "token width"]

    @property
    def mean_over_spread(self) -> float:
        """|mean| / |standard deviation|."""
        return float(self.moments.mean.norm() / self.moments.variance.sum().sqrt().clamp_min(1e-30))

    def warn_of_dead_features(self, method: str) -> None:
        """Warn if the data, normalised by `method`, will make many features die."""
        variance = self.moments.variance
        stretch = float(variance.max() / variance.median().clamp_min(1e-30))
        if method in ("none", "scale") and (self.mean_over_spread > LARGE_MEAN or stretch > LARGE_STRETCH):
            warnings.warn(
                f"Normalisation '{method}' leaves the mean at {self.mean_over_spread:.1f} standard deviations and the widest "
                f"axis at {stretch:.0f} times the median variance: many features will die. Choose 'standardise' or 'whiten'.",
                stacklevel=2,
            )


@final
class BatchFeed:
    """The batches that this rank learns from, on its device; the time spent waiting for them is measured."""

    def __init__(self, batches: Batches, ranks: TrainingRanks, device: torch.device, *, sharded: bool) -> None:
        """`sharded`: whether `batches` already yields this rank's share of every batch."""
        self._batches, self._ranks, self._device, self._sharded = batches, ranks, device, sharded
        self.seconds_waited = 0.0

    def batches(self, start: int) -> Iterator[ActivationBatch]:
        """Yield this rank's share of the batches from number `start` on, in float32."""
        stream = require_split(self._batches(start), "train")
        while True:
            began = time.perf_counter()
            rows = next(stream, None)
            self.seconds_waited += time.perf_counter() - began
            if rows is None:
                return
            if not self._sharded:
                share = self._ranks.batch_share(len(rows.values))
                rows = ActivationBatch(*(column[share] for column in rows))
            yield rows._replace(values=rows.values.to(self._device, torch.float32))

    def preview(self, *, covariance: bool, max_vectors: int | None = None) -> DataPreview:
        """Return statistics of the first 10 x width vectors (at least, unless `max_vectors` are fewer), equal on all ranks."""
        moments, vectors = None, []
        for number, rows in enumerate(self.batches(0)):
            if message := non_finite_message(number, rows):
                raise NonFinite(f"{message} Training did not start. Harvest that shot again.")
            values = self._ranks.gather(rows.values)
            if moments is None:
                moments = VectorMoments(values.shape[1], covariance=covariance, device=self._device)
            if moments.count < MAX_PREVIEW:
                vectors.append(values)
            moments.add(values)
            if moments.count >= min(VECTORS_PER_AXIS * values.shape[1], max_vectors or math.inf):
                break
        if moments is None:
            raise BadInput("Training got a stream without batches. Harvest some activations first.")
        return DataPreview(moments, torch.cat(vectors)[:MAX_PREVIEW])


def non_finite_message(number: int, rows: ActivationBatch) -> str:
    """Return a sentence about the rows of batch `number` with NaN or infinity, or an empty string."""
    bad = (~torch.isfinite(rows.values)).any(1).nonzero()[:, 0].tolist()
    if not bad:
        return ""
    return (
        f"Batch {number} holds NaN or infinity in {len(bad)} rows, first that of shot {int(rows.shots[bad[0]])}, token "
        f"{int(rows.tokens[bad[0]])}."
    )
