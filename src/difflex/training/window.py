"""A live stream shuffled through a window, so that it can train without ever being stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from difflex.errors import BadInput
from difflex.records import ActivationBatch, of_split

__all__ = ["Batches", "shuffled"]

Batches = Callable[[int], Iterator[ActivationBatch]]
"""The batches of a run from the given number on: the same batch under the same number, whenever it is asked."""


def shuffled(rows_from: Callable[[int], Iterator[ActivationBatch]], *, window: int, batch: int, seed: int) -> Batches:
    """Batches of `batch` rows, shuffled within each `window` rows of a stream that `rows_from` yields from a given row on.

    Every window is filled anew, so that a run resumes by harvesting no more than one window again. Memory: one window.
    """
    if window % batch:
        raise BadInput(f"A window of {window} rows is not made of whole batches of {batch}: choose a multiple.")

    def batches(start: int) -> Iterator[ActivationBatch]:
        per_window = window // batch
        number, skipped = divmod(start, per_window)
        for whole in _windows(of_split(rows_from(number * window), "train"), window):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            order = torch.randperm(len(whole.values), generator=generator).to(whole.values.device)
            for first in range(skipped * batch, len(whole.values) - batch + 1, batch):
                yield ActivationBatch(*(part[order[first : first + batch]] for part in whole))
            number, skipped = number + 1, 0

    return batches


def _windows(rows: Iterator[ActivationBatch], window: int) -> Iterator[ActivationBatch]:
    """The rows of the stream in pieces of exactly `window`; the last one may be shorter."""
    waiting: list[ActivationBatch] = []
    for some in rows:
        waiting.append(some)
        while sum(len(part.values) for part in waiting) >= window:
            joined = _joined(waiting)
            yield ActivationBatch(*(part[:window] for part in joined))
            waiting = [ActivationBatch(*(part[window:] for part in joined))]
    if waiting and len(waiting[0].values):
        yield _joined(waiting)


def _joined(parts: list[ActivationBatch]) -> ActivationBatch:
    return parts[0] if len(parts) == 1 else ActivationBatch(*(torch.cat(column) for column in zip(*parts, strict=True)))
