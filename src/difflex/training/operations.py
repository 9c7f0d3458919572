"""What an update on a device is made of: its state there, and its operations, in kernels (`fused`) or products (`dense`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from difflex.training.config import TrainingConfig
from difflex.training.update import SAEParameters

CHUNK_SHARE, MIN_CHUNK, MAX_CHUNK = 8, 1 << 25, 1 << 28
"""Scores that are in memory at a time take this part of the weights' bytes, within these bounds."""


class TokenPairs(NamedTuple):
    """As many pairs for each token; empty slots have the value 0 and the feature `size`, which does not exist."""

    features: Int[Tensor, "token slot"]
    values: Float[Tensor, "token slot"]


class SortedPairs(NamedTuple):
    """All pairs of an update, sorted by feature; empty slots come last."""

    features: Int[Tensor, " pair"]
    starts: Int[Tensor, " edge"]
    """The first pair of every feature, and the end of the last."""
    tokens: Int[Tensor, " pair"]
    """Rows of the encoder's input."""
    rows: Int[Tensor, " pair"]
    """Rows of the errors."""
    values: Float[Tensor, " pair"]
    """Values times the scale of their loss."""
    pulls: Float[Tensor, " pair"]
    """Derivatives of the loss by the values, and so by the scores."""


Source = TypeVar("Source")
"""What the operations prepare from pairs, inputs and errors, to sum gradients from."""


@dataclass(frozen=True, kw_only=True)
class DeviceState:
    """The parameters of an SAE on a device, and what an update keeps there between its launches."""

    config: TrainingConfig
    parameters: SAEParameters
    encoder: Float[Tensor, "size width"]
    """Copies of the weights, which the products and gathers read."""
    decoder: Float[Tensor, "size width"]
    fourths: Float[Tensor, " size"]
    """Sums of the fourth powers of the encoder's rows, which bound the rounding errors of scores."""
    squares: Float[Tensor, " size"]
    """Squared norms of the rows' gradients."""
    failed: Int[Tensor, ""]
    """The first update whose loss was not finite; 0 if there was none. From it on, no weight is updated."""
    number: Int[Tensor, ""]
    """The number of the update, from 1."""
    controls: Float[Tensor, 3]
    """Learning rate and second moment's factor, both corrected for the start from zero, and the factor that clips gradients."""

    @classmethod
    def of(cls, config: TrainingConfig, parameters: SAEParameters, copies: torch.dtype) -> DeviceState:
        """Copy the weights in the type `copies`."""
        weights = parameters.weights
        encoder = weights.encoder
        return cls(
            config=config,
            parameters=parameters,
            encoder=encoder.to(copies, copy=True),
            decoder=weights.decoder.to(copies, copy=True),
            fourths=torch.cat([rows.pow(4).sum(1) for rows in encoder.split(4096)]),
            squares=torch.zeros_like(encoder[:, 0]),
            failed=torch.zeros((), dtype=torch.long, device=encoder.device),
            number=torch.zeros((), dtype=torch.long, device=encoder.device),
            controls=torch.ones(3, device=encoder.device),
        )

    @property
    def size(self) -> int:
        """The number of features."""
        return len(self.encoder)

    @property
    def is_lazy(self) -> bool:
        """Whether rows that do not fire are skipped."""
        return self.config.optimiser.beta1 == 0

    def chunks(self, tokens: int, columns: int) -> Iterator[slice]:
        """Yield the tokens whose scores of `columns` features are in memory at a time."""
        room = min(MAX_CHUNK, max(MIN_CHUNK, self.parameters.weights.encoder.nbytes * 2 // CHUNK_SHARE))
        step = max(64, room // (self.encoder.element_size() * columns) // 64 * 64)
        return (slice(start, min(start + step, tokens)) for start in range(0, tokens, step))


class UpdateOperations(ABC, Generic[Source]):
    """The operations of an update, all of fixed shapes and without waiting for the device."""

    def __init__(self, state: DeviceState) -> None:
        """`state` is shared with the update."""
        self.state = state

    @abstractmethod
    def top_k(self, z: Float[Tensor, "token width"], copy: Float[Tensor, "token width"], k: int) -> TokenPairs:
        """Return the k largest scores of every token; `copy` is `z` in the type of the copies."""

    @abstractmethod
    def scores(self, features: Int[Tensor, "token slot"], z: Float[Tensor, "token width"]) -> Float[Tensor, "token slot"]:
        """Return the scores of some features of every token, minus infinity in empty slots."""

    @abstractmethod
    def decode(
        self, pairs: TokenPairs, base: Float[Tensor, "token width"], sign: float
    ) -> tuple[Float[Tensor, "token width"], Float[Tensor, ""]]:
        """Return `sum value * decoder[feature] + sign * base` in the type of the copies, and its summed square."""

    @abstractmethod
    def pulls(self, features: Int[Tensor, "token slot"], errors: Float[Tensor, "token width"]) -> Float[Tensor, "token slot"]:
        """Return `decoder[feature] . error`, and 0 in empty slots."""

    @abstractmethod
    def weighted_rows(self, weights: Float[Tensor, " size"]) -> Float[Tensor, " width"]:
        """Return `sum weight * encoder row`."""

    @abstractmethod
    def source(self, pairs: SortedPairs, z: Float[Tensor, "token width"], errors: Float[Tensor, "row width"]) -> Source:
        """Prepare what `measure_rows` and `update_rows` read."""

    @abstractmethod
    def measure_rows(self, source: Source, needed: Int[Tensor, ""]) -> None:
        """Add the squared norms of the rows' gradients to zeros if `needed` is not 0."""

    @abstractmethod
    def update_rows(self, source: Source) -> None:
        """Update the encoder and the decoder, their state and their copies, and write the squared norms of the gradients."""

    @abstractmethod
    def update_vector(self, name: str, gradient: Float[Tensor, " entry"], starts: Int[Tensor, " edge"] | None) -> None:
        """Update a vector; `starts`, if its entries are of features that are skipped when they do not fire."""
