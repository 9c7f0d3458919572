"""`SweepCost`: the memory and disk that the training of several SAEs takes, and the groups in which they fit a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

from difflex.choices import CheckpointKind, WeightsDtype
from difflex.training.config import TrainingConfig

DeviceType = Literal["cpu", "cuda"]

ROWS_IN_WORK = 8
"""Copies of a batch in float32 that an update holds: the input, the errors, and what they are computed from."""
PAIR_BYTES = 64
"""Bytes that an update holds for each token and feature that fires."""
SCORES = {"cpu": 1 << 24, "cuda": 1 << 29}
"""Bytes of scores that are in memory at a time."""
WINDOWS = 2
"""Shuffle windows in memory: one is harvested while the other is trained on."""
HEADER = 12_000
"""Bytes of the config of a dictionary, the header of its checkpoint and its log."""


@final
@dataclass(frozen=True, kw_only=True)
class SweepCost:
    """Bytes that the training of several SAEs takes."""

    states: tuple[int, ...]
    """On the device, for each SAE: its weights and the state of its optimiser."""
    working: int
    """On the device besides: an update, and a dictionary that is saved."""
    host: int
    """In the memory of the CPU: the windows of a live training, and the checkpoint that is being written."""
    checkpoints: int
    """On disk during the training; compact ones are removed at its end."""
    dictionaries: int
    """On disk at the end, without checkpoints."""

    @property
    def device(self) -> int:
        """On the device, if all SAEs are trained at once."""
        return sum(self.states) + self.working

    @property
    def least(self) -> int:
        """On the device, if they are trained one after another."""
        return max(self.states, default=0) + self.working

    def groups(self, free: int) -> list[list[int]] | None:
        """Divide the SAEs, by their index, into as few groups as fit `free` bytes; None if the largest one alone does not."""
        largest_first = sorted(range(len(self.states)), key=lambda index: -self.states[index])
        for count in range(1, len(self.states) + 1):
            groups: list[list[int]] = [[] for _ in range(count)]
            sizes = [self.working] * count
            for index in largest_first:
                smallest = sizes.index(min(sizes))
                groups[smallest].append(index)
                sizes[smallest] += self.states[index]
            if max(sizes) <= free:
                return [sorted(group) for group in groups]
        return None


def training_cost(
    trainings: Sequence[tuple[TrainingConfig, int]],
    *,
    batch: int,
    device: DeviceType = "cpu",
    parts: int = 1,
    window: int = 0,
    sites: Sequence[int] = (),
    checkpoints: CheckpointKind = "exact",
    weights: WeightsDtype = "fp32",
) -> SweepCost:
    """Return what SAEs take, each with its width, if each rank holds one of `parts` of their features.

    `window` rows of the widths `sites` are shuffled in a live training.
    """
    states = tuple(training.memory(width, parts, device) for training, width in trainings)
    updates = [4 * ROWS_IN_WORK * batch * width + PAIR_BYTES * batch * training.k for training, width in trainings]
    saved = max((8 * training.size * width for training, width in trainings), default=0)
    checkpoint = [checkpoint_bytes(training, width, checkpoints) for training, width in trainings]
    # A checkpoint is gathered in the memory of the CPU, and once more as the bytes of its file.
    written = (1 + (device != "cpu")) * max(checkpoint, default=0)
    return SweepCost(
        states=states,
        working=max(max(updates, default=0) + SCORES[device], saved, written if device == "cpu" else 0),
        host=2 * WINDOWS * window * sum(sites) + (written if device != "cpu" else 0),
        checkpoints=sum(checkpoint),
        dictionaries=sum(dictionary_bytes(training, width, weights) for training, width in trainings),
    )


def checkpoint_bytes(training: TrainingConfig, width: int, kind: CheckpointKind) -> int:
    """Return the bytes of a checkpoint on disk."""
    matrices, vectors = 2 * training.size * width, 2 * training.size + 2 * width
    if kind == "compact":  # weights in 16 bits, one second moment for each row and each column
        tensors = 2 * matrices + 4 * (vectors + 2 * training.size + 2 * width)
    else:
        tensors = 4 * _copies(training) * (matrices + vectors)
    return tensors + 24 * training.size + _normalisation_bytes(training, width) + HEADER


def dictionary_bytes(training: TrainingConfig, width: int, weights: WeightsDtype) -> int:
    """Return the bytes of a dictionary on disk."""
    matrices = 2 * training.size * width * (4 if weights == "fp32" else 2)
    return matrices + 4 * (training.size + width) + _normalisation_bytes(training, width) + HEADER


def _copies(training: TrainingConfig) -> int:
    """Return how many tensors of the shape of a weight are saved: it, its moments, its average."""
    return 2 + (training.optimiser.beta1 > 0) + (training.optimiser.ema is not None)


def _normalisation_bytes(training: TrainingConfig, width: int) -> int:
    return 4 * (2 * width + width**2 * (training.normalisation == "whiten"))
