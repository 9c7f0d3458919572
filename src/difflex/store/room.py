"""What a recording takes on disk, and whether there is room for it: all its files count."""

import json
import math
import shutil
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict
from typing import final

import torch

from difflex.errors import OutOfSpace
from difflex.records import Shot
from difflex.store.ledger import SiteRecorder
from difflex.store.shard import ShardFormat, shard_size
from difflex.store.statistics import WIDEST

__all__ = ["DiskBudget", "said_size", "store_bytes", "text_bytes"]

PER_STORE = 2048
"""Bytes of a manifest's head and of the names of the statistics, at most."""
PER_SHARD = 512
"""Bytes of a shard's entry in the manifest and of the head of the file with its shots, at most."""
PER_SHOT = 2
"""Bytes that the manifest takes to say which shots are held out."""


@final
class DiskBudget:
    """The disk that the stores are on, and the limit that is set to them."""

    def __init__(self, ledgers: Sequence[SiteRecorder], limit: int | None) -> None:
        self._ledgers = ledgers
        self._limit = limit

    def check(self, total: int, run: Sequence[Shot], known: Sequence[Shot]) -> None:
        """Nothing; `total` shots that take more than the limit or the free disk are an error that says how many would not.

        Shots come in runs like `run`; how long they are on disk is told from those that are `known`.
        """
        text = max(text_bytes(run), text_bytes(known))
        folder = self._ledgers[0].folder
        there = sum(ledger.bytes for ledger in self._ledgers)
        free = there + shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.is_dir())).free
        allowed = free if self._limit is None else min(free, self._limit)
        if self._needed(total, text) <= allowed:
            return
        fitting = range(total // len(run) + 1)
        runs = bisect_right(fitting, allowed, key=lambda runs: self._needed(runs * len(run), text)) - 1
        tokens = runs * len(run) * min(ledger.head.tokens for ledger in self._ledgers)
        advice = (
            f"Ask for {tokens:,} tokens or fewer" if runs > 0 else "Not even one run fits: free some space or raise the limit"
        )
        smaller = "" if self._ledgers[0].head.dtype == "int8" else " or for int8"
        what = "free on the disk are" if allowed == free else "the limit is"
        raise OutOfSpace(
            f"{total} shots at {len(self._ledgers)} sites take {said_size(self._needed(total, text))}; "
            f"{what} {said_size(allowed)}. {advice}, or ask for fewer sites{smaller}."
        )

    def check_shard(self, shots: Sequence[Shot], missing: Sequence[SiteRecorder]) -> None:
        """Nothing; a shard of `shots` at the `missing` sites that would pass the limit is an error."""
        assert self._limit is not None, "without a limit the disk itself says when it is full"
        there = sum(ledger.bytes + PER_STORE + _statistics_bytes(ledger.head.form) for ledger in self._ledgers)
        more = sum(_shard_bytes(ledger.head.form, len(shots)) + math.ceil(len(shots) * text_bytes(shots)) for ledger in missing)
        if there + more > self._limit:
            raise OutOfSpace(
                f"The next shard would pass the limit of {said_size(self._limit)}: later prompts are longer than the first ones. "
                "What is finished is kept; raise the limit, or ask for fewer tokens, and give the same command again."
            )

    def _needed(self, total: int, text: float) -> int:
        """Bytes of all files with `total` shots, each of which takes `text` bytes to describe."""
        return sum(store_bytes(ledger.head.form, ledger.head.shots_per_shard, total, text) for ledger in self._ledgers)


def store_bytes(form: ShardFormat, length: int, total: int, text: float) -> int:
    """Bytes of a store with `total` shots, `length` of them to a shard, each of which takes `text` bytes to describe."""
    whole, rest = divmod(total, length)
    shards = whole * _shard_bytes(form, length) + (_shard_bytes(form, rest) if rest else 0)
    return shards + math.ceil(total * text) + _statistics_bytes(form) + 2 * PER_STORE


def _shard_bytes(form: ShardFormat, shots: int) -> int:
    return shard_size(form, shots) + PER_SHARD + PER_SHOT * shots


def _statistics_bytes(form: ShardFormat) -> int:
    axes = 2 * form.width + (form.width**2 if form.width <= WIDEST else 0)
    return axes * torch.float64.itemsize


def text_bytes(shots: Sequence[Shot]) -> float:
    """Bytes that one of `shots` takes to describe, mean."""
    return sum(len(json.dumps(asdict(shot))) + 2 for shot in shots) / len(shots)


def said_size(count: int) -> str:
    """A number of bytes in words."""
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
