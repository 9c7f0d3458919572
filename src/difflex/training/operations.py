"""What an update on a device is made of: its state there, and its operations, here in plain dense products.

`fused` has them in kernels, which are tested against these; devices without Triton use these.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from difflex.training.config import TrainingConfig
from difflex.training.update import AdamWeight, SAEParameters

ROWS = 8192
"""Features whose dense gradients are in memory at a time."""
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


class DenseSource(NamedTuple):
    """What dense gradients are made of."""

    pairs: SortedPairs
    z: Float[Tensor, "token width"]
    errors: Float[Tensor, "row width"]


@final
class DenseOperations(UpdateOperations[DenseSource]):
    """Operations in dense products of the copies."""

    def top_k(self, z: Float[Tensor, "token width"], copy: Float[Tensor, "token width"], k: int) -> TokenPairs:
        tops = [self._all_scores(copy[chunk]).topk(k) for chunk in self.state.chunks(len(z), self.state.size)]
        features = torch.cat([top.indices for top in tops])
        return TokenPairs(features.int(), torch.cat([top.values for top in tops]).float())

    def _all_scores(self, z: Float[Tensor, "token width"]) -> Float[Tensor, "token size"]:
        bias = self.state.parameters.weights.encoder_bias
        return F.linear(z, self.state.encoder, None if bias is None else bias.to(z.dtype))

    def scores(self, features: Int[Tensor, "token slot"], z: Float[Tensor, "token width"]) -> Float[Tensor, "token slot"]:
        copy, chunks = z.to(self.state.encoder.dtype), self.state.chunks(len(z), self.state.size)
        values = torch.cat([_gather(self._all_scores(copy[chunk]), features[chunk]) for chunk in chunks])
        return torch.where(features < self.state.size, values.float(), -torch.inf)

    def decode(
        self, pairs: TokenPairs, base: Float[Tensor, "token width"], sign: float
    ) -> tuple[Float[Tensor, "token width"], Float[Tensor, ""]]:
        decoder, size = self.state.decoder, self.state.size
        parts = []
        for chunk in self.state.chunks(len(base), size):
            codes = decoder.new_zeros(len(pairs.features[chunk]), size + 1)
            codes.scatter_(1, pairs.features[chunk].long(), pairs.values[chunk].to(decoder.dtype))
            parts.append((codes[:, :size] @ decoder).float())
        errors = torch.cat(parts).add_(base, alpha=sign)
        return errors.to(decoder.dtype), errors.square().sum()

    def pulls(self, features: Int[Tensor, "token slot"], errors: Float[Tensor, "token width"]) -> Float[Tensor, "token slot"]:
        chunks = self.state.chunks(len(errors), self.state.size)
        values = torch.cat([_gather(errors[chunk] @ self.state.decoder.T, features[chunk]) for chunk in chunks])
        return torch.where(features < self.state.size, values.float(), 0.0)

    def weighted_rows(self, weights: Float[Tensor, " size"]) -> Float[Tensor, " width"]:
        return (weights.to(self.state.encoder.dtype) @ self.state.encoder).float()

    def source(self, pairs: SortedPairs, z: Float[Tensor, "token width"], errors: Float[Tensor, "row width"]) -> DenseSource:
        return DenseSource(pairs, z, errors)

    def _gradients(self, source: DenseSource) -> Iterator[tuple[slice, dict[str, Float[Tensor, "feature width"]]]]:
        """Yield both gradients of some rows at a time, without the part along the decoder's rows."""
        (features, _, tokens, rows, values, pulls), size = source.pairs, self.state.size
        for start in range(0, size, ROWS):
            stop = min(start + ROWS, size)
            place = torch.where((features >= start) & (features < stop), features - start, stop - start).long()
            gradients = {}
            for name, inputs, index, weights in (
                ("encoder", source.z, tokens, pulls),
                ("decoder", source.errors, rows, values),
            ):
                codes = inputs.new_zeros(stop - start + 1, len(inputs))
                codes.index_put_((place, index.long()), weights.to(inputs.dtype), accumulate=True)
                gradients[name] = (codes[:-1] @ inputs).float()
            decoder = self.state.parameters.weights.decoder[start:stop]
            gradients["decoder"] -= (gradients["decoder"] * decoder).sum(1, keepdim=True) * decoder
            yield slice(start, stop), gradients

    def measure_rows(self, source: DenseSource, needed: Int[Tensor, ""]) -> None:
        for rows, gradients in self._gradients(source):
            self.state.squares[rows] = _squares(gradients)

    def update_rows(self, source: DenseSource) -> None:
        state, starts = self.state, source.pairs.starts
        for rows, gradients in self._gradients(source):
            state.squares[rows] = _squares(gradients)
            moves = self._moves(starts[1:][rows] - starts[:-1][rows])
            skipped = state.number - 1 - state.parameters.last_update[rows]
            for name, gradient in gradients.items():
                matrix = state.parameters.matrices[name].read(rows)
                self._apply(matrix, gradient, moves[:, None], skipped[:, None], unit=name == "decoder")
                copy = {"encoder": state.encoder, "decoder": state.decoder}[name]
                copy[rows] = matrix.weight.to(copy.dtype)
            state.parameters.last_update[rows] = torch.where(moves, state.number, state.parameters.last_update[rows])

    def update_vector(self, name: str, gradient: Float[Tensor, " entry"], starts: Int[Tensor, " edge"] | None) -> None:
        state, skipped = self.state, torch.zeros_like(gradient)
        moves = (state.failed == 0).expand(gradient.shape)
        if starts is not None:
            moves, skipped = self._moves(starts[1:] - starts[:-1]), state.number - 1 - state.parameters.last_update
        self._apply(state.parameters.matrices[name], gradient, moves, skipped, unit=False)

    def _moves(self, pairs: Int[Tensor, " row"]) -> Tensor:
        """Return which rows are updated."""
        return ((pairs > 0) | (not self.state.is_lazy)) & (self.state.failed == 0)

    def _apply(self, matrix: AdamWeight, gradient: Tensor, moves: Tensor, skipped: Tensor, *, unit: bool) -> None:
        """Update some rows where they move, after what they skipped."""
        adam, (rate, root, scale) = self.state.config.optimiser, self.state.controls.unbind()
        gradient, old = gradient * scale, matrix.weight.clone()
        skipped = skipped.float() * self.state.is_lazy
        second = matrix.second * adam.beta2**skipped * adam.beta2 + (1 - adam.beta2) * gradient.square()
        if matrix.first is not None:
            gradient = matrix.first * adam.beta1 + (1 - adam.beta1) * gradient
            matrix.first.copy_(torch.where(moves, gradient, matrix.first))
        new = old - rate * gradient / (second.sqrt() * root + adam.eps)
        new = F.normalize(new, dim=1) if unit else new
        matrix.weight.copy_(torch.where(moves, new, old))
        matrix.second.copy_(torch.where(moves, second, matrix.second))
        if matrix.average is not None and adam.ema is not None:
            average = old + (matrix.average - old) * adam.ema**skipped
            matrix.average.copy_(torch.where(moves, new + (average - new) * adam.ema, matrix.average))


def _gather(scores: Float[Tensor, "token size"], features: Int[Tensor, "token slot"]) -> Float[Tensor, "token slot"]:
    return scores.gather(1, features.clamp_max(scores.shape[1] - 1).long())


def _squares(gradients: dict[str, Tensor]) -> Float[Tensor, " row"]:
    return torch.stack([gradient.square().sum(1) for gradient in gradients.values()]).sum(0)
