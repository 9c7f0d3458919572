"""The operations of an update as plain dense products, for devices without Triton; the kernels are tested against them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from difflex.training.operations import SortedPairs, TokenPairs, UpdateOperations
from difflex.training.update import AdamWeight

ROWS = 8192
"""Features whose gradients are in memory at a time."""


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
