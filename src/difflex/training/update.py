"""One update of an SAE in closed form: from pairs (which feature fired at which token) and errors to new weights.

With error rows `e = d loss / d y`, values `a` and score gradients `g = d loss / d score`, the gradients are
`d decoder[f] = sum a e`, `g = decoder[f] . e` and `d encoder[f] = sum g z` over the pairs of f: no product is dense.

Adam updates a block of rows while the block's gradient is still in the CPU's cache; the whole gradient is never in memory. With
beta1 = 0, a row without a gradient does not move, only its second moment (and the moving average) decays. Such rows are skipped,
and the skipped decay is applied, exactly, when they fire again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from difflex.dictionaries import SAEWeights
from difflex.dictionaries.sparse import EncoderSearch, dot_products, segment_sums
from difflex.distributed import Ranks
from difflex.training.config import AdamConfig

VECTORS = ("bias", "pre_bias")
"""The weights that are not of one feature: every rank holds all of them."""
CACHED_BYTES = 1 << 20
"""Bytes of a block of rows; the update of a block touches about eight arrays of this size."""
DENSE_SHARE = 0.5
"""Share of rows with a gradient above which a whole block is updated, although its other rows do not move."""

RowIndex = slice | Int[Tensor, " row"]
"""A range of rows, or a list of them."""


@dataclass(frozen=True, kw_only=True)
class AdamWeight:
    """A weight and its optimiser state. A vector counts as a weight of one column."""

    weight: Float[Tensor, "row ..."]
    first: Float[Tensor, "row ..."] | None
    """First moment; None if beta1 is 0, as it is then the gradient."""
    second: Float[Tensor, "row ..."]
    average: Float[Tensor, "row ..."] | None
    """Moving average of the weight, if `ema` is set."""

    @classmethod
    def initial(cls, weight: Tensor, config: AdamConfig) -> AdamWeight:
        """Return the state before the first update."""
        first = torch.zeros_like(weight) if config.beta1 else None
        average = weight.clone() if config.ema is not None else None
        return cls(weight=weight, first=first, second=torch.zeros_like(weight), average=average)

    def read(self, rows: RowIndex) -> AdamWeight:
        """Return some rows: a view of a range, a copy of a list."""
        return replace(self, **{name: tensor[rows] for name, tensor in self.named().items()})

    def write(self, rows: RowIndex, part: AdamWeight) -> None:
        """Write back what `read` returned."""
        if isinstance(rows, Tensor):
            for name, tensor in self.named().items():
                tensor[rows] = part.named()[name]

    def named(self) -> dict[str, Tensor]:
        """Return the tensors by name, without those that are None."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def update_average(self, config: AdamConfig) -> None:
        """Add the updated weight to its moving average."""
        if self.average is not None and config.ema is not None:
            self.average.lerp_(self.weight, 1 - config.ema)

    def apply_skipped(self, config: AdamConfig, skipped: Int[Tensor, " row"]) -> None:
        """Apply the decay of `skipped` updates, in which the rows had no gradient."""
        powers = skipped.to(self.weight.dtype).unsqueeze(-1) if self.weight.ndim == 2 else skipped.to(self.weight.dtype)
        self.second.mul_(config.beta2**powers)
        if self.average is not None and config.ema is not None:
            self.average.lerp_(self.weight, 1 - config.ema**powers)


class Adam(NamedTuple):
    """One update, the same for all weights."""

    config: AdamConfig
    number: int
    """Counts from 1."""
    learning_rate: float
    scale: float
    """The factor that clips the gradients."""

    def apply(self, matrix: AdamWeight, gradient: Tensor) -> None:
        """Update the weight in place, but not its average; `gradient` is overwritten."""
        if self.scale != 1.0:
            gradient.mul_(self.scale)
        torch._fused_adam_(
            [matrix.weight],
            [gradient],
            [torch.empty_like(gradient).zero_() if matrix.first is None else matrix.first],
            [matrix.second],
            [],
            [torch.tensor(float(self.number), device=gradient.device)],
            lr=self.learning_rate,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            weight_decay=0.0,
            eps=self.config.eps,
            amsgrad=False,
            maximize=False,
        )


class JumpGradients(NamedTuple):
    """What `jumprelu` adds to the pairs."""

    active: Bool[Tensor, " pair"]
    """Whether the feature fires. Other pairs are just below the threshold of their feature, and change only that."""
    slopes: Float[Tensor, " pair"]
    """Derivatives of the values by the thresholds."""
    losses: Float[Tensor, " pair"]
    """Derivatives of the sparsity loss by the thresholds."""


@dataclass(frozen=True, kw_only=True)
class UpdateInputs:
    """What an update is computed from. Pairs are sorted by feature."""

    features: Int[Tensor, " pair"]
    tokens: Int[Tensor, " pair"]
    """Rows of `z`."""
    rows: Int[Tensor, " pair"]
    """Rows of `errors`."""
    values: Float[Tensor, " pair"]
    jump: JumpGradients | None = None
    """For `jumprelu`."""
    z: Float[Tensor, "token width"]
    """The input of the encoder: the activation minus the bias, plus the pre-bias if there is one."""
    errors: Float[Tensor, "row width"]
    """The derivative of the loss by each reconstruction."""
    bias: Float[Tensor, " width"]
    """The derivative of the loss by the bias as a part of the reconstructions."""

    def part(self, first: int, last: int, start: int) -> UpdateInputs:
        """Return pairs `first` to `last`, with features counted from `start`."""
        pairs = slice(first, last)
        return replace(
            self,
            features=self.features[pairs] - start,
            tokens=self.tokens[pairs],
            rows=self.rows[pairs],
            values=self.values[pairs],
            jump=None if self.jump is None else JumpGradients(*(column[pairs] for column in self.jump)),
        )

    def gradient_bound(self, encoder_norm: float, pre_bias: bool) -> float:
        """Return an upper bound of the gradient's norm; decoder rows have norm 1, encoder rows at most `encoder_norm`."""
        errors = torch.linalg.vector_norm(self.errors, dim=1)
        pair_errors = errors[self.rows]  # no score gradient is larger, as decoder rows have norm 1
        scores, tokens = float(pair_errors.square().sum()), len(self.z)
        decoder = float(self.values.square().sum()) * float(errors.square().sum())
        encoder = scores * float(self.z.square().sum()) + scores * tokens
        by_scores = float(pair_errors.sum()) * encoder_norm
        return (decoder + encoder + (float(self.bias.norm()) + by_scores) ** 2 + pre_bias * by_scores**2) ** 0.5


class RowBlock(NamedTuple):
    """Some rows of the parameters in an update."""

    rows: RowIndex
    matrices: dict[str, AdamWeight]
    gradients: dict[str, Tensor]
    score_bias: Float[Tensor, " width"]
    """Minus the gradient of the bias through the scores of these rows."""

    def square(self) -> float:
        """Return the squared norm of the gradients."""
        return float(sum(torch.linalg.vector_norm(gradient).square() for gradient in self.gradients.values()))


@final
class SAEParameters:
    """The weights of one SAE with their optimiser state."""

    def __init__(self, weights: SAEWeights, config: AdamConfig, ranks: Ranks) -> None:
        """`weights` are updated in place; `ranks` hold other features."""
        assert all(tensor.is_contiguous() for tensor in weights.tensors().values()), "fused Adam misreads other layouts"
        self.weights, self.config, self._ranks = weights, config, ranks
        self.matrices = {name: AdamWeight.initial(tensor, config) for name, tensor in weights.tensors().items()}
        self._rowwise = [name for name in self.matrices if name not in VECTORS]
        self.last_update = torch.zeros(len(weights.encoder), dtype=torch.long, device=weights.encoder.device)
        """The last update in which each row took part: with beta1 = 0, rows without a gradient are skipped."""
        self._skips_rows = config.beta1 == 0
        on_cpu = weights.encoder.device.type == "cpu"
        self._block_rows = max(32, CACHED_BYTES // (4 * weights.encoder.shape[1])) if on_cpu else 8192
        if on_cpu:
            # glibc returns freed memory to the system, and fetches it again page by page, up to the size of the largest block
            # below 32 MB that was ever freed. Without this line, that takes a third of the time of an update.
            torch.empty(31 << 20, dtype=torch.uint8)

    @cached_property
    def scores(self) -> EncoderSearch:
        """The search for the largest scores."""
        return EncoderSearch(self.weights.encoder, self.weights.encoder_bias)

    def update(self, inputs: UpdateInputs, *, number: int, learning_rate: float, measure_gradient: bool = True) -> float | None:
        """Update all weights, for the `number`-th time from 1; return the gradient's norm before clipping if it is measured."""
        adam = Adam(self.config, number, learning_rate, self._clip_scale(inputs))
        square, gradients = self._pass(inputs, measure_gradient, adam)
        for name, gradient in gradients.items():
            adam.apply(self.matrices[name], gradient)
            self.matrices[name].update_average(self.config)
        return square**0.5 if measure_gradient else None

    def apply_skipped(self, number: int) -> None:
        """Bring the rows that were skipped up to update `number`, so that their averages can be read."""
        if self._skips_rows:
            for name in self._rowwise:
                self.matrices[name].apply_skipped(self.config, number - self.last_update)
            self.last_update.fill_(number)

    def _blocks(self, inputs: UpdateInputs) -> Iterator[RowBlock]:
        """Yield all rows, block by block."""
        edges = [*range(0, len(self.last_update), self._block_rows), len(self.last_update)]
        pairs = torch.searchsorted(inputs.features, torch.tensor(edges, device=inputs.features.device)).tolist()
        for start, stop, first, last in zip(edges, edges[1:], pairs, pairs[1:], strict=False):
            yield self._block(inputs.part(first, last, start), start, stop)

    def _clip_scale(self, inputs: UpdateInputs) -> float:
        """Return the factor that clips the gradient; a bound of its norm often shows that it is 1."""
        clip = self.config.clip
        if clip is None:
            return 1.0
        encoder_norm = float(torch.linalg.vector_norm(self.weights.encoder, dim=1).max())
        if inputs.gradient_bound(encoder_norm, "pre_bias" in self.matrices) <= clip:
            return 1.0
        return min(1.0, clip / max(self._pass(inputs, True, None)[0] ** 0.5, 1e-30))

    def _pass(self, inputs: UpdateInputs, measure_gradient: bool, adam: Adam | None) -> tuple[float, dict[str, Tensor]]:
        """Return the squared norm of the gradient if it is measured, and the vectors' gradients; with `adam`, update all rows."""
        square, score_bias = 0.0, torch.zeros_like(inputs.bias)
        for block in self._blocks(inputs):
            square, score_bias = square + (block.square() if measure_gradient else 0.0), score_bias + block.score_bias
            if adam is not None:
                self._apply(block, adam)
        sums_over_ranks = self._ranks.sum(torch.cat([score_bias, score_bias.new_tensor([square])]))
        by_scores = sums_over_ranks[:-1]
        gradients = {"bias": inputs.bias - by_scores} | ({"pre_bias": by_scores} if "pre_bias" in self.matrices else {})
        square_of_vectors = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum()
        return float(sums_over_ranks[-1] + square_of_vectors), gradients

    def _block(self, inputs: UpdateInputs, start: int, stop: int) -> RowBlock:
        """Return rows `start` to `stop` with their gradients; if few of them have a gradient, only those that have."""
        rows, places, count = slice(start, stop), inputs.features, stop - start
        if self._skips_rows:
            firing, inverse = torch.unique_consecutive(places, return_inverse=True)
            if len(firing) < DENSE_SHARE * count:
                rows, places, count = firing + start, inverse, len(firing)
        matrices = {name: self.matrices[name].read(rows) for name in self._rowwise}
        encoder, decoder = matrices["encoder"].weight, matrices["decoder"].weight
        value_gradients = dot_products(decoder, places, inputs.errors, inputs.rows)
        score_gradients = value_gradients if inputs.jump is None else value_gradients * inputs.jump.active
        starts = torch.searchsorted(places, torch.arange(count, device=places.device))
        gradients = {
            "encoder": segment_sums(inputs.z, inputs.tokens, score_gradients, starts),
            "decoder": segment_sums(inputs.errors, inputs.rows, inputs.values, starts),
        }
        # Rows keep norm 1, so the gradient along a row does not count; it is sum a g, as g = decoder . e.
        along = value_gradients.new_zeros(count).index_add_(0, places, value_gradients * inputs.values)
        gradients["decoder"].addcmul_(along[:, None], decoder, value=-1)
        encoder_bias = score_gradients.new_zeros(count).index_add_(0, places, score_gradients)
        if "encoder_bias" in matrices:
            gradients["encoder_bias"] = encoder_bias
        if inputs.jump is not None:
            threshold_gradients = value_gradients * inputs.jump.slopes + inputs.jump.losses
            gradients["thresholds"] = score_gradients.new_zeros(count).index_add_(0, places, threshold_gradients)
        return RowBlock(rows, matrices, gradients, encoder_bias @ encoder)

    def _apply(self, block: RowBlock, adam: Adam) -> None:
        skipped = adam.number - 1 - self.last_update[block.rows]
        self.last_update[block.rows] = adam.number
        any_skipped = self._skips_rows and bool(skipped.any())
        for name, matrix in block.matrices.items():
            if any_skipped:
                matrix.apply_skipped(self.config, skipped)
            adam.apply(matrix, block.gradients[name])
            if name == "decoder":
                matrix.weight.div_(torch.linalg.vector_norm(matrix.weight, dim=1, keepdim=True))
            matrix.update_average(self.config)
            self.matrices[name].write(block.rows, matrix)
        self.scores.refresh(block.rows)
