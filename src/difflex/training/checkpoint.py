"""The resumable state of a learner: one safetensors file, replaced in one go, that any number of ranks can take up."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from difflex.dictionaries.normalisation import Normalisation
from difflex.dictionaries.sae import SAEWeights
from difflex.errors import BrokenFile, StaleWork
from difflex.files import Json, write_file
from difflex.training.config import TrainingConfig
from difflex.training.learner import Learner, UpdateMetrics
from difflex.training.team import Team

__all__ = ["as_json", "load_state", "save_state", "whole_weights"]

FORMAT = 1
ALIKE = ("bias",)
"""Weights that all ranks hold alike; the others have a row for each feature of the rank."""


@dataclass(frozen=True, kw_only=True)
class CheckpointHeader:
    """What stands in the file beside the tensors."""

    format: int
    training: dict[str, Json]
    data: str
    """What the batches were made from; work on other data is not continued."""
    normalisation: dict[str, Json]
    updates: int
    tokens: int
    threshold: float | None
    floor: float | None
    last: dict[str, Any] | None


def as_json(training: TrainingConfig) -> dict[str, Json]:
    """`training` as plain JSON."""
    return json.loads(json.dumps(asdict(training)))


def save_state(path: Path, learner: Learner, normalisation: Normalisation, data: str) -> None:
    """Write the state of `learner`, gathered from all ranks; rank 0 writes."""
    tensors = {name: _gathered(name, tensor, learner.team) for name, tensor in _tensors(learner).items()}
    if learner.team.rank:
        return
    header = CheckpointHeader(
        format=FORMAT,
        training=as_json(learner.config),
        data=data,
        normalisation=dict(normalisation.settings()),
        updates=learner.updates,
        tokens=learner.tokens,
        threshold=learner.threshold,
        floor=learner.floor,
        last=None if learner.last is None else asdict(learner.last),
    )
    packed = {name: tensor.cpu().contiguous() for name, tensor in {**tensors, **normalisation.tensors()}.items()}
    write_file(path, save(packed, metadata={"state": json.dumps(asdict(header))}))


def load_state(
    path: Path, config: TrainingConfig, data: str, team: Team, device: torch.device
) -> tuple[Learner, Normalisation] | None:
    """The learner that was saved at `path`, with this rank's features, and its normalisation; None where nothing was saved."""
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, "pt", device=str(device)) as file:
            header = _header(path, (file.metadata() or {}).get("state"))
            _same(path, "data", header.data, data)
            _same(path, "training", header.training, as_json(config))
            rows = team.rows(config.size)
            # Cloned, because products of tensors that start at odd addresses may differ in their last bit.
            names = list(file.keys())
            tensors = {name: file.get_slice(name)[rows if _by_feature(name) else slice(None)].clone() for name in names}
    except safetensors.SafetensorError as error:
        raise BrokenFile(f"The training state {path} is damaged: {error}. Remove it to train from the start.") from error
    weights = SAEWeights.of(
        {name.removesuffix(".weight"): tensor for name, tensor in tensors.items() if name.endswith(".weight")}
    )
    learner = Learner(config, weights, team)
    for name, tensor in _tensors(learner).items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            raise BrokenFile(f"The training state {path} lacks {name} in its shape. Remove it to train from the start.")
        tensor.copy_(tensors[name])
    learner.updates, learner.tokens = header.updates, header.tokens
    learner.threshold, learner.floor = header.threshold, header.floor
    learner.last = None if header.last is None else UpdateMetrics(**header.last)
    return learner, Normalisation.of(header.normalisation, tensors)


def whole_weights(learner: Learner) -> SAEWeights:
    """The weights to be used from now on, of all ranks' features: averaged, if an average was kept, with unit decoder rows."""
    learner.parameters.caught_up(learner.updates)
    team, matrices = learner.team, learner.parameters.matrices
    tensors = {
        name: _gathered(name, matrix.weight if matrix.average is None else matrix.average, team).clone()
        for name, matrix in matrices.items()
    }
    tensors["decoder"] /= torch.linalg.vector_norm(tensors["decoder"], dim=1, keepdim=True)
    if learner.floor is not None:
        tensors["floor"] = torch.full_like(tensors["encoder"][:, 0], learner.floor)
    return SAEWeights.of(tensors)


def _tensors(learner: Learner) -> dict[str, Tensor]:
    parameters = learner.parameters
    matrices = {
        f"{name}.{part}": tensor for name, matrix in parameters.matrices.items() for part, tensor in matrix.named().items()
    }
    return {**matrices, "fresh": parameters.fresh, "silence": learner.silence, "firings": learner.firings}


def _by_feature(name: str) -> bool:
    """Whether the tensor has a row for each feature."""
    return name.split(".")[0] not in (*ALIKE, "normalisation")


def _gathered(name: str, tensor: Tensor, team: Team) -> Tensor:
    return team.gather(tensor) if team.shards > 1 and _by_feature(name) else tensor


def _header(path: Path, text: str | None) -> CheckpointHeader:
    try:
        entries = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise BrokenFile(f"The head of {path} is damaged: {error}. Remove it to train from the start.") from error
    if entries.get("format") != FORMAT or set(entries) != {field.name for field in fields(CheckpointHeader)}:
        raise BrokenFile(f"{path} is not a training state of format {FORMAT}. Remove it to train from the start.")
    return CheckpointHeader(**entries)


def _same(path: Path, what: str, found: Json, asked: Json) -> None:
    """An error that names the differences, where there are any."""
    if found == asked:
        return
    if isinstance(found, Mapping) and isinstance(asked, Mapping):
        names = [name for name in asked if found.get(name) != asked[name]]
        found, asked = {name: found.get(name) for name in names}, {name: asked[name] for name in names}
    raise StaleWork(
        f"{path} holds the state of a training with other {what}: {found}, asked is {asked}. "
        "Ask for the same to go on, or name another folder, or remove this one to train from the start.",
        path.parent,
    )
