"""The operations of an update in Triton kernels.

Search: one product with the copy of the encoder per chunk of tokens; from the largest score of each block of features, a
bisection finds a score that k features reach. Features that may or may not be among the k largest, because of rounding, are
scored again in float32, so that the selection is exact; those that are in any case keep the score of the product. Rounding errors
of the inputs are taken for noise: their variance is at most `|z|_4^2 |w|_4^2` times that of one rounding, and six standard
deviations bound them in practice. If more than ROOM features are within them, the largest are kept.

Update: one program per row sums the gradient of its pairs on the chip, then updates the row. Pairs of popular features are
summed in segments first, so that no program has more than a segment to itself. Features that do not fire cost two numbers read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, final

import torch
import triton
from jaxtyping import Float, Int
from torch import Tensor

from difflex.training import kernels
from difflex.training.config import AdamConfig
from difflex.training.operations import SortedPairs, TokenPairs, UpdateOperations
from difflex.training.update import AdamWeight

BLOCK = 32
"""Neighbouring features of which only the largest score is compared first."""
SLACK = 6.0 / 3**0.5
"""Six standard deviations of the difference of two scores whose factors were rounded, in units of one rounding."""
SPARE = 32
"""Candidates besides k, at least; and at least half of k."""
SEGMENT, PAIRS = 128, 4
"""Pairs of a feature that one program sums, and those that it reads at a time."""
SPAN = 1024
"""Encoder rows that one program weighs."""


def launch(kernel: Any, grid: Sequence[int], *arguments: Any, warps: int = 4, **constants: Any) -> None:
    """Launch a kernel."""
    kernel[tuple(grid)](*arguments, num_warps=warps, enable_fp_fusion=True, **constants)


def _power(count: int, most: int = 1 << 30) -> int:
    """Return the least power of 2 that is no less than `count`, up to `most`."""
    return min(triton.next_power_of_2(count), most)


class CandidateScores(NamedTuple):
    """The features that may be among the k largest of each token."""

    features: Int[Tensor, "token slot"]
    values: Float[Tensor, "token slot"]
    """Scores of the product, minus infinity in empty slots."""
    numbers: Int[Tensor, " token"]
    """How many, the first of them, must be scored again."""


class RowSource(NamedTuple):
    """What the kernels sum the gradient of one matrix from, in the order of their arguments."""

    starts: Int[Tensor, " edge"]
    segments: Int[Tensor, " edge"]
    """The first whole segment of every feature, and the end of the last."""
    partial: Float[Tensor, "segment width"]
    """Sums over the segments."""
    places: Int[Tensor, " pair"]
    """Rows of the inputs."""
    weights: Float[Tensor, " pair"]
    inputs: Float[Tensor, "row width"]


@final
class FusedOperations(UpdateOperations[dict[str, RowSource]]):
    """Operations in kernels, on a GPU."""

    def top_k(self, z: Float[Tensor, "token width"], copy: Float[Tensor, "token width"], k: int) -> TokenPairs:
        state, weights = self.state, self.state.parameters.weights
        blocks = -(-state.size // BLOCK)
        if 4 * k > blocks:  # a small dictionary: all scores in float32
            chunks = [_scores(z[chunk], weights.encoder, weights.encoder_bias) for chunk in state.chunks(len(z), 2 * state.size)]
            tops = [scores.topk(k) for scores in chunks]
            return TokenPairs(torch.cat([top.indices for top in tops]).int(), torch.cat([top.values for top in tops]))
        room = _power(k + max(SPARE, k // 2))
        candidates = torch.empty(len(z), room, dtype=torch.int32, device=z.device)
        values = torch.empty(len(z), room, device=z.device)
        numbers = torch.empty(len(z), dtype=torch.int32, device=z.device)
        bias, largest = None, torch.zeros_like(state.controls[0])
        if weights.encoder_bias is not None:
            bias, largest = weights.encoder_bias.to(copy.dtype), weights.encoder_bias.abs().amax()
        rounding = torch.finfo(copy.dtype).eps
        slack = torch.linalg.vector_norm(z, ord=4, dim=1).mul_(SLACK * rounding)
        limits = torch.stack([state.fourths.amax().pow(0.25), largest])
        for chunk in state.chunks(len(z), state.size):
            scores = _scores(copy[chunk], state.encoder, bias)
            chosen = CandidateScores(candidates[chunk], values[chunk], numbers[chunk])
            self._choose(scores, slack[chunk], limits, chosen, k, rounding)
        self._dots(weights.encoder, candidates, z, weights.encoder_bias, -torch.inf, numbers, values)
        top = values.topk(k, sorted=False)
        return TokenPairs(candidates.gather(1, top.indices), top.values)

    def _choose(
        self, scores: Tensor, slack: Tensor, limits: Tensor, candidates: CandidateScores, k: int, rounding: float
    ) -> None:
        """Write the candidates of a chunk of tokens."""
        (count, size), room, device = scores.shape, candidates.features.shape[1], scores.device
        blocks = -(-size // BLOCK)
        maxima, reached = torch.empty(count, blocks, device=device), torch.empty(count, 2, device=device)
        chosen = torch.empty(count, room, dtype=torch.int32, device=device)
        counts = torch.empty(count, dtype=torch.int32, device=device)
        tile = _power(blocks, 128)
        launch(kernels.block_maxima, (count, -(-blocks // tile)), scores, maxima, size, blocks, BLOCK=BLOCK, TILE=tile)
        launch(
            kernels.choose_blocks,
            (count,),
            *(maxima, slack, limits, reached, chosen, counts, blocks, k, rounding),
            warps=min(16, max(4, _power(blocks) // 512)),
            BLOCKS=_power(blocks),
            ROOM=room,
        )
        launch(
            kernels.choose_candidates,
            (count,),
            *(scores, reached, chosen, counts, *candidates, size, k),
            warps=8,
            BLOCK=BLOCK,
            ROOM=room,
        )

    def _dots(
        self,
        matrix: Tensor,
        features: Tensor,
        vectors: Tensor,
        bias: Tensor | None,
        fill: float,
        numbers: Tensor | None = None,
        products: Tensor | None = None,
    ) -> Float[Tensor, "token slot"]:
        """Return the product of every token's vector with some rows of a matrix; with `numbers`, write the first so many."""
        (count, slots), (size, width) = features.shape, matrix.shape
        products = torch.empty(count, slots, device=matrix.device) if products is None else products
        tile = _power(slots, 16)
        launch(
            kernels.pair_dots,
            (count, -(-slots // tile)),
            *(matrix, features, features if numbers is None else numbers, vectors, products if bias is None else bias, products),
            *(size, width, slots, fill),
            NUMBERED=numbers is not None,
            BIAS=bias is not None,
            TILE=tile,
            COLUMNS=_power(width, 256),
        )
        return products

    def scores(self, features: Int[Tensor, "token slot"], z: Float[Tensor, "token width"]) -> Float[Tensor, "token slot"]:
        weights = self.state.parameters.weights
        return self._dots(weights.encoder, features, z, weights.encoder_bias, -torch.inf)

    def pulls(self, features: Int[Tensor, "token slot"], errors: Float[Tensor, "token width"]) -> Float[Tensor, "token slot"]:
        return self._dots(self.state.decoder, features, errors, None, 0.0)

    def decode(
        self, pairs: TokenPairs, base: Float[Tensor, "token width"], sign: float
    ) -> tuple[Float[Tensor, "token width"], Float[Tensor, ""]]:
        (count, slots), (size, width) = pairs.features.shape, self.state.decoder.shape
        columns = _power(width, 1024)
        errors = torch.empty(count, width, dtype=self.state.decoder.dtype, device=base.device)
        squares = torch.empty(count, -(-width // columns), device=base.device)
        launch(
            kernels.decode_errors,
            squares.shape,
            *(self.state.decoder, pairs.features, pairs.values, base, errors, squares, size, width, slots, sign),
            PAIRS=_power(slots, 8),
            COLUMNS=columns,
        )
        return errors, squares.sum()

    def weighted_rows(self, weights: Float[Tensor, " size"]) -> Float[Tensor, " width"]:
        size, width = self.state.encoder.shape
        sums = torch.empty(-(-size // SPAN), width, device=weights.device)
        columns = _power(width, 512)
        grid = (-(-width // columns), len(sums))
        launch(
            kernels.weighted_rows,
            grid,
            self.state.encoder,
            weights,
            sums,
            size,
            width,
            SPAN,
            ROWS=_power(size, 16),
            COLUMNS=columns,
        )
        return sums.sum(0)

    def source(
        self, pairs: SortedPairs, z: Float[Tensor, "token width"], errors: Float[Tensor, "row width"]
    ) -> dict[str, RowSource]:
        size, width = self.state.encoder.shape
        count = len(pairs.features) // SEGMENT if len(errors) >= SEGMENT else 0  # a feature has at most one pair a row
        segments = torch.zeros_like(pairs.starts)
        torch.cumsum((pairs.starts[1:] - pairs.starts[:-1]) // SEGMENT, 0, dtype=torch.int32, out=segments[1:])
        partial = torch.empty(2, max(1, count), width, device=z.device)
        sources = {
            "encoder": RowSource(pairs.starts, segments, partial[0], pairs.tokens, pairs.pulls, z),
            "decoder": RowSource(pairs.starts, segments, partial[1], pairs.rows, pairs.values, errors),
        }
        for source in sources.values() if count else ():
            constants = {**_row_constants(width), "SEGMENT": SEGMENT, "ROUNDS": size.bit_length()}
            launch(kernels.sum_segments, (count,), *source, size, width, **constants)
        return sources

    def measure_rows(self, source: dict[str, RowSource], needed: Int[Tensor, ""]) -> None:
        state, (size, width) = self.state, self.state.encoder.shape
        for name, rows in source.items():
            arguments = (needed, state.squares, *rows, state.parameters.matrices[name].weight, width)
            launch(kernels.measure_rows, (size,), *arguments, UNIT=name == "decoder", **_gradient_constants(source))

    def update_rows(self, source: dict[str, RowSource]) -> None:
        state, (size, width) = self.state, self.state.encoder.shape
        for (name, rows), copy in zip(source.items(), (state.encoder, state.decoder), strict=True):
            launch(
                kernels.update_rows,
                (size,),
                *(state.failed, state.number, state.controls, state.squares, state.fourths, state.parameters.last_update),
                *(*rows, *_state_of(state.parameters.matrices[name]), copy, width, *_numbers(state.config.optimiser)),
                UNIT=name == "decoder",
                **_gradient_constants(source),
                **_options(state.config.optimiser, lazy=state.is_lazy),
            )

    def update_vector(self, name: str, gradient: Float[Tensor, " entry"], starts: Int[Tensor, " edge"] | None) -> None:
        state, block = self.state, _power(len(gradient), 1024)
        rowwise = (state.parameters.last_update, starts if starts is not None else state.parameters.last_update)
        launch(
            kernels.update_vector,
            (-(-len(gradient) // block),),
            *(state.failed, state.number, state.controls, *rowwise, *_state_of(state.parameters.matrices[name]), gradient),
            *(len(gradient), *_numbers(state.config.optimiser)),
            **_options(state.config.optimiser, lazy=starts is not None),
            BLOCK=block,
        )


def _scores(
    z: Float[Tensor, "token width"], encoder: Float[Tensor, "size width"], bias: Float[Tensor, " size"] | None
) -> Float[Tensor, "token size"]:
    """Return the scores in the type of `z`."""
    return torch.mm(z, encoder.T) if bias is None else torch.addmm(bias, z, encoder.T)


def _row_constants(width: int) -> dict[str, int]:
    """Return the constants of a kernel that has a whole row on the chip."""
    block = _power(width)
    return {"warps": min(16, max(1, block // 512)), "PAIRS": PAIRS, "BLOCK": block}


def _gradient_constants(source: dict[str, RowSource]) -> dict[str, int]:
    """Return the constants of a kernel that sums the gradient of a row."""
    errors = source["decoder"].inputs
    return {**_row_constants(errors.shape[1]), "SEGMENT": SEGMENT if len(errors) >= SEGMENT else 0}


def _state_of(weight: AdamWeight) -> list[Tensor]:
    """Return a weight and its state; the kernels do not read what stands in for tensors that it lacks."""
    return [weight.weight, *(weight.weight if part is None else part for part in (weight.first, weight.second, weight.average))]


def _numbers(adam: AdamConfig) -> list[float]:
    """Return the constants of Adam and of the moving average, with the logarithms by which they are applied several times."""
    ema = adam.ema or 0.0
    return [adam.beta1, adam.beta2, math.log2(max(adam.beta2, 1e-38)), adam.eps, ema, math.log2(max(ema, 1e-38))]


def _options(adam: AdamConfig, *, lazy: bool) -> dict[str, bool]:
    """Return which parts of Adam the kernels compile."""
    return {"LAZY": lazy, "MOMENT": adam.beta1 > 0, "AVERAGE": adam.ema is not None}
