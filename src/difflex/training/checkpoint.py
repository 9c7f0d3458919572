"""What a training writes while it runs: a resumable state, which any number of ranks can load, and a log."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, final

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from difflex.dictionaries import Normalisation, SAEWeights
from difflex.errors import BrokenFile, MissingExtra, StaleWork
from difflex.files import Json, write_file
from difflex.training.config import TrainingConfig
from difflex.training.data import TrainingRanks
from difflex.training.learner import Learner, UpdateMetrics

FORMAT = 2
RESTART = "Remove it to train from the start."
COUNTS = ("updates", "tokens", "batch_threshold", "inference_threshold")
"""The numbers of a learner that are saved beside its tensors."""

LoggerName = Literal["wandb", "tensorboard"]


def save_state(path: Path, learner: Learner, normalisation: Normalisation, data: str) -> None:
    """Gather the state of `learner` from all ranks; rank 0 writes it atomically."""
    tensors = {name: _gather(name, tensor, learner.ranks) for name, tensor in _tensors(learner).items()}
    if learner.ranks.rank:
        return
    header = {
        "format": FORMAT,
        "training": learner.config.as_json(),
        "data": data,
        "normalisation": normalisation.settings(),
        **{name: getattr(learner, name) for name in COUNTS},
        "metrics": None if learner.metrics is None else asdict(learner.metrics),
    }
    contents = {name: tensor.cpu().contiguous() for name, tensor in {**tensors, **normalisation.tensors()}.items()}
    write_file(path, save(contents, metadata={"state": json.dumps(header)}))


def load_state(
    path: Path, config: TrainingConfig, data: str, ranks: TrainingRanks, device: torch.device
) -> tuple[Learner, Normalisation] | None:
    """Return the learner saved at `path`, with this rank's features, and its normalisation; None if there is no file."""
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, "pt", device=str(device)) as file:
            header = _header(path, (file.metadata() or {}).get("state"))
            _check_same(path, "data", header["data"], data)
            _check_same(path, "training", header["training"], config.as_json())
            rows = ranks.features(config.size)
            # Cloned, because products of tensors that start at odd addresses may differ in their last bit.
            names = list(file.keys())
            tensors = {name: file.get_slice(name)[rows if _is_by_feature(name) else slice(None)].clone() for name in names}
    except safetensors.SafetensorError as error:
        raise BrokenFile(f"The training state {path} is damaged: {error}. {RESTART}") from error
    weights = {name.removesuffix(".weight"): tensor for name, tensor in tensors.items() if name.endswith(".weight")}
    learner = Learner(config, SAEWeights.from_tensors(weights), ranks)
    for name, tensor in _tensors(learner).items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            raise BrokenFile(f"The training state {path} has no tensor {name} of the right shape. {RESTART}")
        tensor.copy_(tensors[name])
    for name in COUNTS:
        setattr(learner, name, header[name])
    learner.metrics = None if header["metrics"] is None else UpdateMetrics(**header["metrics"])
    return learner, Normalisation.from_saved(header["normalisation"], tensors)


def trained_weights(learner: Learner) -> SAEWeights:
    """Return the weights for inference, of all ranks' features: averaged if `ema` is set, with decoder rows of norm 1."""
    learner.parameters.apply_skipped(learner.updates)
    tensors = {
        name: _gather(name, matrix.weight if matrix.average is None else matrix.average, learner.ranks).clone()
        for name, matrix in learner.parameters.matrices.items()
    }
    tensors["decoder"] /= torch.linalg.vector_norm(tensors["decoder"], dim=1, keepdim=True)
    if learner.inference_threshold is not None:
        tensors["thresholds"] = torch.full_like(tensors["encoder"][:, 0], learner.inference_threshold)
    return SAEWeights.from_tensors(tensors)


def _tensors(learner: Learner) -> dict[str, Tensor]:
    parameters = learner.parameters
    matrices = {
        f"{name}.{part}": tensor for name, matrix in parameters.matrices.items() for part, tensor in matrix.named().items()
    }
    return {**matrices, "last_update": parameters.last_update, "silence": learner.silence, "firings": learner.firings}


def _is_by_feature(name: str) -> bool:
    """Return whether the tensor has a row for each feature of a rank; all ranks hold the others."""
    return name.split(".")[0] not in ("bias", "normalisation")


def _gather(name: str, tensor: Tensor, ranks: TrainingRanks) -> Tensor:
    return ranks.by_feature.gather(tensor) if _is_by_feature(name) else tensor


def _header(path: Path, text: str | None) -> dict[str, Any]:
    try:
        header = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise BrokenFile(f"The header of {path} is damaged: {error}. {RESTART}") from error
    if (number := header.get("format")) != FORMAT:
        raise BrokenFile(f"{path} is a training state of format {number}; this version reads format {FORMAT}. {RESTART}")
    return header


def _check_same(path: Path, subject: str, saved: Json, requested: Json) -> None:
    """Raise an error that names the differences."""
    if saved == requested:
        return
    if isinstance(saved, Mapping) and isinstance(requested, Mapping):
        names = [name for name in requested if saved.get(name) != requested[name]]
        saved, requested = {name: saved.get(name) for name in names}, {name: requested[name] for name in names}
    raise StaleWork(
        f"{path} holds the state of a training with other {subject}: {saved}, not {requested}. "
        "Use the same settings to resume, or another folder, or remove this one to train from the start.",
        path.parent,
    )


@final
class TrainingLog:
    """Writes `log.jsonl`, and sends its numbers to Weights & Biases or TensorBoard."""

    def __init__(self, folder: Path, name: str, updates: int, loggers: Sequence[LoggerName] = ()) -> None:
        """Entries after `updates` are removed from an existing log: those updates will be made again."""
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "log.jsonl"
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        lines = [line for line in lines if _update_of(line) <= updates]
        self._path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        self._loggers = [LOGGERS[logger](folder, name) for logger in loggers]

    def write(self, update: int, entry: Mapping[str, Json]) -> None:
        """Append an entry."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"update": update, **entry}) + "\n")
        numbers = {name: float(value) for name, value in entry.items() if isinstance(value, int | float)}
        for logger in self._loggers:
            logger(update, numbers)


def _update_of(line: str) -> float:
    """Return the update of a line of the log; infinity for a line that a kill cut short."""
    try:
        return float(json.loads(line)["update"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")


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
