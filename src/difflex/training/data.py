"""The data of a training: batches of activations, their shuffling, and statistics of the first ones."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from difflex.dictionaries.normalisation import VECTORS_PER_AXIS, VectorMoments
from difflex.errors import BadInput, NonFinite
from difflex.records import ActivationBatch
from difflex.store import require_split
from difflex.training.parallel import TrainingRanks

__all__ = ["BatchFeed", "Batches", "DataPreview", "non_finite_message", "shuffled"]

Batches = Callable[[int], Iterator[ActivationBatch]]
"""The batches of a run from a given number on. The batch of a number is always the same."""
MAX_PREVIEW = 32_768
"""Vectors of the preview that stay in memory, for the initial bias and thresholds."""
LARGE_MEAN = 1.0
"""|mean| / |standard deviation| above which normalisation prevents dead features (arXiv 2605.31518)."""
LARGE_STRETCH = 30.0
"""Largest over median variance of an axis, likewise."""


def shuffled(rows_from: Callable[[int], Iterator[ActivationBatch]], *, window: int, batch: int, seed: int) -> Batches:
    """Return batches of `batch` rows, shuffled within windows of a stream that `rows_from` yields from a given row on.

    A live stream can so be trained on without being stored. One window of `window` rows is in memory; a run that resumes
    harvests no more than one window again.
    """
    if window % batch:
        raise BadInput(f"A window of {window} rows is not made of whole batches of {batch}: choose a multiple.")

    def batches(start: int) -> Iterator[ActivationBatch]:
        number, skipped = divmod(start, window // batch)
        for rows in _windows(require_split(rows_from(number * window), "train"), window):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            order = torch.randperm(len(rows.values), generator=generator).to(rows.values.device)
            for first in range(skipped * batch, len(rows.values) - batch + 1, batch):
                yield ActivationBatch(*(column[order[first : first + batch]] for column in rows))
            number, skipped = number + 1, 0

    return batches


def _windows(stream: Iterator[ActivationBatch], window: int) -> Iterator[ActivationBatch]:
    """Yield the rows of the stream in pieces of `window`; the last one may be shorter."""
    pending: list[ActivationBatch] = []
    for rows in stream:
        pending.append(rows)
        while sum(len(piece.values) for piece in pending) >= window:
            joined = _join(pending)
            yield ActivationBatch(*(column[:window] for column in joined))
            pending = [ActivationBatch(*(column[window:] for column in joined))]
    if pending and len(pending[0].values):
        yield _join(pending)


def _join(pieces: list[ActivationBatch]) -> ActivationBatch:
    return pieces[0] if len(pieces) == 1 else ActivationBatch(*(torch.cat(column) for column in zip(*pieces, strict=True)))


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
