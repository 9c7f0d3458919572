"""The statistics of a whole store: merged from its shards, written beside them, read again."""

from collections.abc import Iterator
from functools import reduce
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from difflex.errors import BrokenFile
from difflex.files import write_file
from difflex.records import Split
from difflex.store.manifest import STATISTICS, Manifest, ShardEntry, shard_paths
from difflex.store.shard import MappedShard, PackedRows, ShardFormat, unpack
from difflex.store.statistics import RowMoments, StoreStatistics, covariance, merged, sample_size

__all__ = ["chosen", "open_shard", "read_statistics", "summarise", "write_statistics"]

CHUNK = 1024
AGAIN = "Delete it and give the command that wrote the store again: it is made from the shards."


def chosen(entry: ShardEntry, split: Split) -> Int[Tensor, " shot"]:
    """The shots of a shard that belong to `split`."""
    held_out = torch.tensor(entry.held_out, dtype=torch.int64)
    if split == "held-out":
        return held_out
    train = torch.ones(entry.shots, dtype=torch.bool)
    train[held_out] = False
    return train.nonzero().squeeze(1)


def open_shard(folder: Path, manifest: Manifest, shard: int) -> MappedShard:
    """A shard of the store in `folder`, mapped."""
    return MappedShard(shard_paths(folder, shard)[0], manifest.head.form, manifest.shards[shard].shots)


def summarise(folder: Path, manifest: Manifest) -> StoreStatistics:
    """The statistics of all `train` rows in `folder`: the same whoever wrote which shard."""
    form, shards = manifest.head.form, sorted(manifest.shards)
    none = torch.zeros(form.width, dtype=torch.float64)
    parts = (open_shard(folder, manifest, shard).moments() for shard in shards)
    mean, squares, totals = reduce(merged, parts, RowMoments(none, none, torch.zeros(3, dtype=torch.float64)))
    count, norms, peak = totals.tolist()
    sampled = sample_size(int(count), form.width)
    return StoreStatistics(
        count=int(count),
        mean=mean,
        variance=squares / max(count, 1),
        mean_norm=norms / max(count, 1),
        peak_norm=peak,
        covariance=covariance(_sample(folder, manifest, int(count), sampled), mean) if sampled else None,
        sampled=sampled,
    )


def _sample(folder: Path, manifest: Manifest, count: int, sampled: int) -> Iterator[Float[Tensor, "row width"]]:
    """Evenly spaced rows out of the `count` rows of split `train`, in chunks."""
    form, before = manifest.head.form, 0
    places = torch.arange(sampled) * count // sampled
    for shard in sorted(manifest.shards):
        train = chosen(manifest.shards[shard], "train")
        here = places[(places >= before) & (places < before + len(train) * form.tokens)] - before
        rows = train[here // form.tokens] * form.tokens + here % form.tokens
        mapped = open_shard(folder, manifest, shard)
        for chunk in rows.split(CHUNK) if len(rows) else ():
            yield _rows(mapped, chunk, form)
        before += len(train) * form.tokens


def _rows(mapped: MappedShard, rows: Int[Tensor, " row"], form: ShardFormat) -> Float[Tensor, "row width"]:
    return unpack(PackedRows(mapped.values[rows], None if mapped.scales is None else mapped.scales[rows]))


def write_statistics(folder: Path, statistics: StoreStatistics, rank: int) -> str:
    """The SHA-256 of the file in `folder` that now holds `statistics`."""
    tensors = {
        name: value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        for name, value in vars(statistics).items()
        if value is not None
    }
    return write_file(folder / STATISTICS, save(tensors, metadata={"format": "difflex statistics 1"}), rank)


def read_statistics(folder: Path) -> StoreStatistics:
    """What `write_statistics` wrote."""
    path = folder / STATISTICS
    try:
        said = load_file(path)
        return StoreStatistics(
            count=int(said["count"]),
            mean=said["mean"],
            variance=said["variance"],
            mean_norm=float(said["mean_norm"]),
            peak_norm=float(said["peak_norm"]),
            covariance=said.get("covariance"),
            sampled=int(said["sampled"]),
        )
    except FileNotFoundError as error:
        raise BrokenFile(f"{path} is missing. {AGAIN}") from error
    except (SafetensorError, KeyError, OSError) as error:
        raise BrokenFile(f"{path} cannot be read ({error}): it is damaged. {AGAIN}") from error
