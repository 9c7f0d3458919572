"""The statistics of a whole store: merged from its shards, written to a file, read again."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from jaxtyping import Float, Float64, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from difflex.errors import BrokenFile
from difflex.files import write_file
from difflex.store.manifest import STATISTICS, Manifest, map_shard
from difflex.store.shard import PackedRows, RowMoments, unpack

__all__ = ["StoreStatistics", "read_statistics", "statistics_bytes", "summarise", "write_statistics"]

SAMPLE = 16
"""Rows in the sample for the covariance, as a multiple of the width."""
LARGEST_WIDTH = 8192
"""Of a store with a covariance."""
STRIP = 256
CHUNK = 1024
REMEDY = "Delete it and run the command that wrote the store again: it is computed from the shards."


@dataclass(frozen=True, kw_only=True)
class StoreStatistics:
    """Moments of all `train` rows."""

    count: int
    mean: Float64[Tensor, " width"]
    variance: Float64[Tensor, " width"]
    """Of the population: divided by the count."""
    mean_norm: float
    peak_norm: float
    """The largest Euclidean norm of a row."""
    covariance: Float64[Tensor, "width width"] | None
    """Of an even sample of at most 16 x width rows, about the sample's own mean; None for a width over 8192."""
    sampled: int
    """Rows in that sample."""


def statistics_bytes(width: int) -> int:
    """Return the bytes of the tensors of a statistics file."""
    return (2 * width + (width**2 if width <= LARGEST_WIDTH else 0)) * torch.float64.itemsize


def summarise(folder: Path, manifest: Manifest) -> StoreStatistics:
    """Compute the statistics of all `train` rows in `folder`; which rank wrote which shard makes no difference."""
    width = manifest.head.width
    zeros = torch.zeros(width, dtype=torch.float64)
    moments = (map_shard(folder, manifest, shard).moments() for shard in sorted(manifest.shards))
    mean, squares, totals = reduce(RowMoments.merge, moments, RowMoments(zeros, zeros, torch.zeros(3, dtype=torch.float64)))
    count, norms, peak = totals.tolist()
    sampled = min(int(count), SAMPLE * width) if width <= LARGEST_WIDTH else 0
    return StoreStatistics(
        count=int(count),
        mean=mean,
        variance=squares / max(count, 1),
        mean_norm=norms / max(count, 1),
        peak_norm=peak,
        covariance=_covariance(_sample(folder, manifest, int(count), sampled), mean) if sampled else None,
        sampled=sampled,
    )


def _sample(folder: Path, manifest: Manifest, count: int, sampled: int) -> Iterator[Float[Tensor, "row width"]]:
    """Yield `sampled` evenly spaced rows out of the `count` rows of split `train`, in chunks."""
    tokens, first = manifest.head.tokens, 0
    places = torch.arange(sampled) * count // sampled
    for shard in sorted(manifest.shards):
        shots = manifest.shards[shard].shots_of("train")
        local = places[(places >= first) & (places < first + len(shots) * tokens)] - first
        rows: Int[Tensor, " row"] = shots[local // tokens] * tokens + local % tokens
        mapped = map_shard(folder, manifest, shard)
        for chunk in rows.split(CHUNK) if len(rows) else ():
            yield unpack(PackedRows(mapped.values[chunk], None if mapped.scales is None else mapped.scales[chunk]))
        first += len(shots) * tokens


def _covariance(chunks: Iterable[Float[Tensor, "row width"]], mean: Float64[Tensor, " width"]) -> Float64[Tensor, "width width"]:
    """Return the covariance of all rows in `chunks` about their own mean, which is near `mean`."""
    products = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    total, count = torch.zeros_like(mean), 0
    for chunk in chunks:
        x = chunk.double() - mean
        for start in range(0, len(mean), STRIP):
            # The entries below the diagonal mirror those above it.
            products[start : start + STRIP, start:].addmm_(x[:, start : start + STRIP].T, x[:, start:])
        total += x.sum(0)
        count += len(x)
    total /= count
    return (products.triu() + products.triu(1).T) / count - torch.outer(total, total)


def write_statistics(folder: Path, statistics: StoreStatistics, rank: int) -> str:
    """Write `statistics` to their file in `folder` and return its SHA-256."""
    tensors = {
        name: value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        for name, value in vars(statistics).items()
        if value is not None
    }
    return write_file(folder / STATISTICS, save(tensors, metadata={"format": "difflex statistics 1"}), rank)


def read_statistics(folder: Path) -> StoreStatistics:
    """Read what `write_statistics` wrote."""
    path = folder / STATISTICS
    try:
        tensors = load_file(path)
        return StoreStatistics(
            count=int(tensors["count"]),
            mean=tensors["mean"],
            variance=tensors["variance"],
            mean_norm=float(tensors["mean_norm"]),
            peak_norm=float(tensors["peak_norm"]),
            covariance=tensors.get("covariance"),
            sampled=int(tensors["sampled"]),
        )
    except FileNotFoundError as error:
        raise BrokenFile(f"{path} is missing. {REMEDY}") from error
    except (SafetensorError, KeyError, OSError) as error:
        raise BrokenFile(f"{path} cannot be read ({error}): it is damaged. {REMEDY}") from error
