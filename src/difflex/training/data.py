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
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Literal, NamedTuple, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from difflex.dictionaries.normalisation import VECTORS_PER_AXIS, VectorMoments
from difflex.distributed import Ranks
from difflex.errors import BadInput, NonFinite
from difflex.records import ActivationBatch, Site
from difflex.training.config import PREVIEW

Split = Literal["data", "features"]
Batches = Callable[[int], Iterator[ActivationBatch]]
"""The batches of a run from a given number on. The batch of a number is always the same."""
SiteBatch = Mapping[Site, ActivationBatch]
"""The rows of a batch at each site."""
SiteBatches = Callable[[int], Iterator[SiteBatch]]
"""The batches of a run at several sites."""
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

    def __init__(
        self, batches: SiteBatches, ranks: TrainingRanks, device: torch.device, *, sharded: bool, replay: bool = False
    ) -> None:
        """`sharded`: whether `batches` already yields this rank's share of every batch.

        `replay`: the first batches are kept in memory until they are trained on, because they are costly to read again.
        """
        self._batches, self._ranks, self._device, self._sharded = batches, ranks, device, sharded
        self._replay = replay
        self._kept: list[SiteBatch] = []
        self._open: Iterator[SiteBatch] | None = None
        """The stream after the batches that are kept."""
        self.seconds_waited = 0.0

    def batches(self, start: int) -> Iterator[SiteBatch]:
        """Yield this rank's share of the batches from number `start` on, in float32."""
        kept, stream = self._kept, self._open
        self._kept, self._open = [], None
        if start or stream is None:
            return self._load(self._batches(start))
        kept.reverse()
        return self._load(chain((kept.pop() for _ in range(len(kept))), stream))

    def widths(self) -> dict[Site, int]:
        """Return the width of the activations at each site."""
        first = next(self._first_batches(), None)
        if first is None:
            raise BadInput("Training got a stream without batches. Harvest some activations first.")
        return {site: rows.values.shape[1] for site, rows in first.items()}

    def preview(self, covariance: Mapping[Site, bool], *, max_vectors: int | None = None) -> dict[Site, DataPreview]:
        """Return statistics of the first 10 x width vectors at each site, or `max_vectors` if they are fewer, equal on all ranks.

        The sites are those of `covariance`, which says whether that is measured.
        """
        moments: dict[Site, VectorMoments] = {}
        vectors: dict[Site, list[Tensor]] = {site: [] for site in covariance}
        missing = set(covariance)
        for number, batch in enumerate(self._load(self._first_batches())):
            for site in missing.copy():
                rows = batch[site]
                if message := non_finite_message(number, rows):
                    raise NonFinite(f"{message} Training did not start. Harvest that shot again.")
                values = self._ranks.gather(rows.values)
                if site not in moments:
                    moments[site] = VectorMoments(values.shape[1], covariance=covariance[site], device=self._device)
                if moments[site].count < PREVIEW:
                    vectors[site].append(values)
                moments[site].add(values)
                if moments[site].count >= min(VECTORS_PER_AXIS * values.shape[1], max_vectors or math.inf):
                    missing.remove(site)
            if not missing:
                break
        if not moments:
            raise BadInput("Training got a stream without batches. Harvest some activations first.")
        return {site: DataPreview(moments[site], torch.cat(vectors.pop(site))[:PREVIEW]) for site in covariance}

    def _first_batches(self) -> Iterator[SiteBatch]:
        """Yield the batches from the first one on, to be trained on later."""
        if not self._replay:
            yield from self._batches(0)
            return
        if self._open is None:
            self._open = self._batches(0)
        yield from list(self._kept)
        for batch in self._open:
            self._kept.append(batch)
            yield batch

    def _load(self, stream: Iterator[SiteBatch]) -> Iterator[SiteBatch]:
        """Yield this rank's share of each batch, on its device."""
        while True:
            began = time.perf_counter()
            batch = next(stream, None)
            self.seconds_waited += time.perf_counter() - began
            if batch is None:
                return
            yield {site: self._share(rows) for site, rows in batch.items()}

    def _share(self, rows: ActivationBatch) -> ActivationBatch:
        if not self._sharded:
            share = self._ranks.batch_share(len(rows.values))
            rows = ActivationBatch(*(column[share] for column in rows))
        values = rows.values
        if self._device.type == "cuda" and not values.is_cuda:  # from pinned memory, a copy does not stop the host
            values = values.pin_memory().to(self._device, non_blocking=True)
        return rows._replace(values=values.to(self._device, torch.float32))


def non_finite_message(number: int, rows: ActivationBatch) -> str:
    """Return a sentence about the rows of batch `number` with NaN or infinity, or an empty string."""
    bad = (~torch.isfinite(rows.values)).any(1).nonzero()[:, 0].tolist()
    if not bad:
        return ""
    return (
        f"Batch {number} holds NaN or infinity in {len(bad)} rows, first that of shot {int(rows.shots[bad[0]])}, token "
        f"{int(rows.tokens[bad[0]])}."
    )
