"""What a training writes while it runs: a resumable state, which any number of ranks can load, and a log."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Literal, final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from difflex.dictionaries import Normalisation, SAEWeights
from difflex.errors import BrokenFile, MissingExtra, StaleWork
from difflex.files import Json, disk_errors, parsing, write_file
from difflex.tensors import check_tensors, read_tensors, write_tensors
from difflex.training.config import CheckpointKind, TrainingConfig
from difflex.training.data import TrainingRanks
from difflex.training.learner import Learner, UpdateMetrics
from difflex.training.update import AdamWeight

FORMAT = 3
RESTART = "Move it away to train from the start."
COUNTS = {"updates": int, "tokens": int, "batch_threshold": float, "inference_threshold": float}
"""The numbers of a learner that are saved beside its tensors."""
ROWWISE = [
    "last_update",
    "silence",
    "firings",
    *(f"{name}.{part}" for name in ("encoder", "decoder", "encoder_bias", "thresholds") for part in AdamWeight.__annotations__),
    "encoder.second_rows",
    "decoder.second_rows",
]
"""The tensors with a row for each feature of a rank; all ranks hold the others."""

LoggerName = Literal["wandb", "tensorboard"]


def save_state(path: Path, learner: Learner, normalisation: Normalisation, data: str, kind: CheckpointKind = "exact") -> None:
    """Gather the state of `learner` from all ranks; rank 0 writes it atomically."""
    own = _tensors(learner) if kind == "exact" else _compact(_tensors(learner), learner.ranks)
    tensors = {name: _gather(name, tensor, learner.ranks) for name, tensor in own.items()}
    if learner.ranks.rank:
        return
    header: dict[str, Json] = {
        "training": learner.config.as_json(),
        "data": data,
        "normalisation": dict(normalisation.settings()),
        **{name: getattr(learner, name) for name in COUNTS},
        "metrics": None if learner.metrics is None else asdict(learner.metrics),
    }
    write_tensors(path, FORMAT, {**tensors, **normalisation.tensors()}, header)


def load_state(
    path: Path, config: TrainingConfig, data: str, ranks: TrainingRanks, device: torch.device
) -> tuple[Learner, Normalisation] | None:
    """Return the learner saved at `path`, with this rank's features, and its normalisation; None if there is no file."""
    if not path.exists():
        return None
    rows = ranks.features(config.size)
    header, tensors = read_tensors(path, FORMAT, RESTART, rows=dict.fromkeys(ROWWISE, rows))  # to the CPU: a GPU holds them once
    check_same(path, "data", header.get("data"), data)
    check_same(path, "settings", header.get("training"), config.as_json())
    is_compact = _expand(tensors)
    weights = {name.removesuffix(".weight"): tensor for name, tensor in tensors.items() if name.endswith(".weight")}
    optional = {"encoder_bias": config.encoder_bias, "pre_bias": config.pre_bias, "thresholds": config.kind == "jumprelu"}
    expected = {"encoder", "decoder", "bias", *(name for name, used in optional.items() if used)}
    if weights.keys() != expected or len(weights["encoder"]) != rows.stop - rows.start:
        raise BrokenFile(f"The training state {path} has no weights of {config.label}: it has {sorted(weights)}. {RESTART}")
    with parsing(path, "a training state", RESTART):
        learner = Learner(config, SAEWeights.from_tensors({name: tensor.to(device) for name, tensor in weights.items()}), ranks)
        for name, tensor in _tensors(learner).items():
            if name not in tensors and is_compact:  # a first moment starts at zero, an average at the weight
                continue
            if tensors[name].shape != tensor.shape or tensors[name].dtype != tensor.dtype:
                raise BrokenFile(f"The training state {path} has no tensor {name} of the right shape and type. {RESTART}")
            tensor.copy_(tensors[name])
        for name, kind in COUNTS.items():
            setattr(learner, name, None if header[name] is None else kind(header[name]))
        learner.metrics = None if header["metrics"] is None else UpdateMetrics(**header["metrics"])
        return learner, Normalisation.from_saved(header["normalisation"], tensors).to(device)


def saved_width(path: Path) -> int | None:
    """Return the width of the SAE whose state is at `path`; None without one, or if it is damaged."""
    if not path.exists():
        return None
    try:
        with disk_errors(path, "read"), safe_open(path, "pt") as file:
            return int(file.get_slice("encoder.weight").get_shape()[1])
    except (SafetensorError, ValueError, IndexError):
        return None


def check_state(path: Path) -> None:
    """Check the training state beside a finished dictionary, if there is one."""
    if path.exists():
        check_tensors(path, f"The dictionary in {path.parent.parent} is finished and intact: move this file away.")


def trained_weights(learner: Learner) -> SAEWeights:
    """Return the weights for inference, of all ranks' features: averaged if `ema` is set, with decoder rows of norm 1."""
    learner.parameters.apply_skipped(learner.updates)
    tensors = {
        name: _gather(f"{name}.weight", matrix.weight if matrix.average is None else matrix.average, learner.ranks).clone()
        for name, matrix in learner.parameters.matrices.items()
    }
    tensors["decoder"] /= torch.linalg.vector_norm(tensors["decoder"], dim=1, keepdim=True)
    if "thresholds" in tensors:
        tensors["thresholds"].clamp_min_(0)
    if learner.inference_threshold is not None:
        tensors["thresholds"] = torch.full_like(tensors["encoder"][:, 0], learner.inference_threshold)
    return SAEWeights.from_tensors(tensors)


def _tensors(learner: Learner) -> dict[str, Tensor]:
    parameters = learner.parameters
    matrices = {
        f"{name}.{part}": tensor for name, matrix in parameters.matrices.items() for part, tensor in matrix.named().items()
    }
    return {**matrices, "last_update": parameters.last_update, "silence": learner.silence, "firings": learner.firings}


def _compact(tensors: Mapping[str, Tensor], ranks: TrainingRanks) -> dict[str, Tensor]:
    """Return the weights in 16 bits, the counts, and of second moments the means of rows and columns, whose product is close."""
    compact: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        part = name.rpartition(".")[2]
        if tensor.ndim == 2 and part == "weight":
            compact[name] = tensor.bfloat16()
        elif tensor.ndim == 2 and part == "second":
            columns = tensor.mean(0)
            compact[f"{name}_rows"] = tensor.mean(1)
            compact[f"{name}_columns"] = ranks.by_feature.sum(columns) / ranks.by_feature.world_size
        elif part not in ("first", "average"):
            compact[name] = tensor
    return compact


def _expand(tensors: dict[str, Tensor]) -> bool:
    """Put what `_compact` can give back in its place; return whether there was any."""
    names = [name.removesuffix("_rows") for name in tensors if name.endswith(".second_rows")]
    for name in names:
        rows, columns = tensors.pop(f"{name}_rows"), tensors.pop(f"{name}_columns")
        tensors[name] = torch.outer(rows, columns / columns.mean().clamp_min(torch.finfo(torch.float32).tiny))
    for name in [f"{name.removesuffix('.second')}.weight" for name in names]:
        tensors[name] = tensors[name].float()
        if name == "decoder.weight":
            tensors[name] = F.normalize(tensors[name], dim=1)
    return bool(names)


def _gather(name: str, tensor: Tensor, ranks: TrainingRanks) -> Tensor:
    return ranks.by_feature.gather(tensor) if name in ROWWISE else tensor


def _without(value: Json, other: Json) -> Json:
    """Return `value` without the entries, or the parts between commas, that are the same in `other`."""
    if isinstance(value, str) and isinstance(other, str):
        same = other.split(", ")
        return ", ".join(part for part in value.split(", ") if part not in same) or value
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        return {name: _without(entry, other.get(name)) for name, entry in value.items() if other.get(name) != entry}
    return value


def check_same(path: Path, subject: str, saved: Json, requested: Json) -> None:
    """Raise an error that names the differences between what was `saved` and what is `requested`."""
    if saved == requested:
        return
    raise StaleWork(
        f"{path} is of a training with other {subject}: {_without(saved, requested)}, not {_without(requested, saved)}. "
        "Use the same settings to resume, or another folder, or move this one away to train from the start.",
        path.parent if path.suffix else path,
    )


@final
class TrainingLog:
    """Writes `log.jsonl`, and sends its numbers to Weights & Biases or TensorBoard."""

    def __init__(self, folder: Path, name: str, updates: int, loggers: Sequence[LoggerName] = ()) -> None:
        """Entries after `updates`, which will be made again, and a line that a kill cut short are removed from the log."""
        self._path = folder / "log.jsonl"
        lines: list[bytes] = []
        with disk_errors(self._path, "read"):
            if self._path.exists():
                lines = self._path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith(b"\n") and _update_of(line) <= updates]
        if kept != lines or not lines:
            write_file(self._path, b"".join(kept))
        self._loggers = [LOGGERS[logger](folder, name) for logger in loggers]

    def write(self, update: int, entry: Mapping[str, Json], *, flush: bool = False) -> None:
        """Append an entry; with `flush`, it survives a loss of power."""
        with disk_errors(self._path), self._path.open("ab") as file:
            file.write((json.dumps({"update": update, **entry}) + "\n").encode())
            file.flush()
            if flush:
                os.fsync(file.fileno())
        numbers = {name: float(value) for name, value in entry.items() if isinstance(value, int | float)}
        for logger in self._loggers:
            logger(update, numbers)


def _update_of(line: bytes) -> float:
    """Return the update of a line of the log; infinity for a line that is damaged."""
    try:
        return float(json.loads(line)["update"])
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return math.inf


Logger = Callable[[int, Mapping[str, float]], None]


def _wandb(folder: Path, name: str) -> Logger:
    try:
        wandb = import_module("wandb")
    except ImportError as error:
        raise MissingExtra.of("wandb", "logs", "Logging to Weights & Biases") from error
    run = wandb.init(project="difflex", name=name, dir=str(folder))
    return lambda update, numbers: run.log(dict(numbers), step=update)


def _tensorboard(folder: Path, name: str) -> Logger:
    try:
        writer = import_module("torch.utils.tensorboard").SummaryWriter(str(folder / "tensorboard"))
    except ImportError as error:
        raise MissingExtra.of("tensorboard", "logs", "Logging to TensorBoard") from error

    def log(update: int, numbers: Mapping[str, float]) -> None:
        for key, value in numbers.items():
            writer.add_scalar(f"{name}/{key}", value, update)
        writer.flush()

    return log


LOGGERS: dict[LoggerName, Callable[[Path, str], Logger]] = {"wandb": _wandb, "tensorboard": _tensorboard}
