"""The log of a training: JSON lines always, Weights & Biases and TensorBoard where asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Literal, final

from difflex.errors import MissingExtra
from difflex.files import Json

__all__ = ["Also", "TrainingLog"]

Also = Literal["wandb", "tensorboard"]


@final
class TrainingLog:
    """Writes one entry per line to `log.jsonl` and hands its numbers to whoever else was asked to listen."""

    def __init__(self, folder: Path, name: str, updates: int, also: Sequence[Also] = ()) -> None:
        """The log in `folder`, cut back to the entries up to `updates`: what came later is about to happen again."""
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "log.jsonl"
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        kept = [line for line in lines if _update_of(line) <= updates]
        self._path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._listeners = [LISTENERS[listener](folder, name) for listener in also]

    def write(self, update: int, entry: Mapping[str, Json]) -> None:
        """Add `entry`, made at `update`."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"update": update, **entry}) + "\n")
        numbers = {name: float(value) for name, value in entry.items() if isinstance(value, int | float)}
        for listener in self._listeners:
            listener(update, numbers)


def _update_of(line: str) -> float:
    """The update that a line was written at; infinite where a kill cut the line short."""
    try:
        return float(json.loads(line)["update"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")


Listener = Callable[[int, Mapping[str, float]], None]


def _wandb(folder: Path, name: str) -> Listener:
    try:
        wandb = import_module("wandb")
    except ImportError as error:
        raise MissingExtra.of("wandb", "logs", "Logging to Weights & Biases") from error
    run = wandb.init(project="difflex", name=name, dir=str(folder))
    return lambda update, numbers: run.log(dict(numbers), step=update)


def _tensorboard(folder: Path, name: str) -> Listener:
    try:
        writer = import_module("torch.utils.tensorboard").SummaryWriter(str(folder / "tensorboard"))
    except ImportError as error:
        raise MissingExtra.of("tensorboard", "logs", "Logging to TensorBoard") from error

    def listen(update: int, numbers: Mapping[str, float]) -> None:
        for key, value in numbers.items():
            writer.add_scalar(f"{name}/{key}", value, update)
        writer.flush()

    return listen


LISTENERS: dict[Also, Callable[[Path, str], Listener]] = {"wandb": _wandb, "tensorboard": _tensorboard}
