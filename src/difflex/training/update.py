"""One update in closed form: from pairs (which feature fired at which token) and errors to moved weights.

With error rows `e = d loss / d y`, values `a` and pulls `g = d loss / d score`, the gradients are
`d decoder[f] = sum a e`, `g = decoder[f] . e` and `d encoder[f] = sum g z` over the pairs of f: no product is dense.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from difflex.dictionaries.sae import SAEWeights
from difflex.dictionaries.scores import EncoderSearch
from difflex.dictionaries.sparse import dots, sums
from difflex.training.adam import Adam, AdamWeight
from difflex.training.config import AdamConfig

__all__ = ["SAEParameters", "UpdateInputs"]

CACHED_BYTES = 1 << 20
"""Of a block of rows: about eight such blocks take part in its update."""
BUSY = 0.5
"""Share of rows with a gradient over which a block is updated whole, although its other rows would not move."""
ROWWISE = ("encoder", "decoder", "encoder_bias", "floor")


@dataclass(frozen=True, kw_only=True)
class UpdateInputs:
    """What an update is made from; pairs stand in the order of their features."""

    features: Int[Tensor, " pair"]
    tokens: Int[Tensor, " pair"]
    """Rows of `z`."""
    rows: Int[Tensor, " pair"]
    """Rows of `errors`."""
    values: Float[Tensor, " pair"]
    open: Bool[Tensor, " pair"] | None = None
    """Where the loss reaches the score; None for everywhere. A closed pair moves nothing but its feature's floor."""
    slopes: Float[Tensor, " pair"] | None = None
    """What `g` is multiplied with in the gradient of the floor."""
    pushes: Float[Tensor, " pair"] | None = None
    """What is added to the gradient of the floor."""
    z: Float[Tensor, "token width"]
    """The input, less the bias."""
    errors: Float[Tensor, "row width"]
    """The derivative of the loss by each reconstruction."""
    bias: Float[Tensor, " width"]
    """The derivative of the loss by the bias, as far as it is part of the reconstructions."""

    def part(self, first: int, last: int, start: int) -> UpdateInputs:
        """Pairs from `first` to `last`, their features counted from `start`."""
        cut = {
            name: tensor[first:last]
            for name, tensor in vars(self).items()
            if isinstance(tensor, Tensor) and tensor.ndim == 1 and name != "bias"
        }
        return UpdateInputs(**{**vars(self), **cut, "features": self.features[first:last] - start})

    def bound(self, longest: float) -> float:
        """No less than the length of the gradient, where decoder rows have length one and encoder rows at most `longest`."""
        errors = torch.linalg.vector_norm(self.errors, dim=1)
        met = errors[self.rows]  # no pull is larger, as the rows of the decoder have length one
        pulls, tokens = float(met.square().sum()), len(self.z)
        decoder = float(self.values.square().sum()) * float(errors.square().sum())
        encoder = pulls * float(self.z.square().sum()) + pulls * tokens
        return (decoder + encoder + (float(self.bias.norm()) + float(met.sum()) * longest) ** 2) ** 0.5


class RowBlock(NamedTuple):
    """Some rows of the parameters in an update."""

    rows: slice | Tensor
    matrices: dict[str, AdamWeight]
    gradients: dict[str, Tensor]
    back: Float[Tensor, " width"]
    """What the bias feels through the scores of these rows."""

    def square(self) -> float:
        """The squared length of the gradients."""
        return float(sum(torch.linalg.vector_norm(gradient).square() for gradient in self.gradients.values()))


@final
class SAEParameters:
    """The weights of one dictionary with their moments, and how an update moves them."""

    def __init__(
        self, weights: SAEWeights, settings: AdamConfig, total: Callable[[Tensor], Tensor] = lambda tensor: tensor
    ) -> None:
        """`weights` before their first update, to be moved in place; `total` sums over ranks that hold other features."""
        assert all(tensor.is_contiguous() for tensor in weights.named().values()), "fused Adam misreads other layouts"
        self.weights, self.settings, self._total = weights, settings, total
        self.matrices = {name: AdamWeight.of(tensor, settings) for name, tensor in weights.named().items()}
        self.scores = EncoderSearch(weights.encoder, weights.encoder_bias)
        self.fresh = torch.zeros(len(weights.encoder), dtype=torch.long, device=weights.encoder.device)
        """The last update that each row took part in: where beta1 is 0, rows without a gradient are left alone."""
        self._lazy = settings.beta1 == 0
        on_cpu = weights.encoder.device.type == "cpu"
        self._height = max(32, CACHED_BYTES // (4 * weights.encoder.shape[1])) if on_cpu else 8192
        if on_cpu:
            # glibc gives memory back to the system, and fetches it again page by page, up to the size of the largest block below
            # 32 MB that was ever freed. Without this line, a third of the time of an update goes there.
            torch.empty(31 << 20, dtype=torch.uint8)

    def update(self, work: UpdateInputs, *, number: int, lr: float, measured: bool = True) -> float | None:
        """Move all weights for the `number`-th time, counted from 1; if `measured`, the gradient's length before it was cut."""
        bounds = self._bounds(work)
        adam = Adam(self.settings, update=number, lr=lr, scale=self._scale(work, bounds))
        square, back = 0.0, torch.zeros_like(work.bias)
        for start, stop, first, last in bounds:
            block = self._block(work.part(first, last, start), start, stop)
            square, back = square + (block.square() if measured else 0.0), back + block.back
            self._move(block, adam)
        square, gradient = self._whole(square, back, work)
        adam.step(self.matrices["bias"], gradient)
        adam.averaged(self.matrices["bias"])
        return square**0.5 if measured else None

    def caught_up(self, number: int) -> None:
        """Bring the rows that were left alone up to update `number`, so that their averages can be read."""
        if self._lazy:
            for name in ROWWISE:
                if name in self.matrices:
                    Adam(self.settings, update=number, lr=0).decayed(self.matrices[name], number - self.fresh)
            self.fresh.fill_(number)

    def _bounds(self, work: UpdateInputs) -> list[tuple[int, int, int, int]]:
        """First and last row, first and last pair of every block."""
        edges = [*range(0, len(self.fresh), self._height), len(self.fresh)]
        pairs = torch.searchsorted(work.features, torch.tensor(edges, device=work.features.device)).tolist()
        return list(zip(edges, edges[1:], pairs, pairs[1:], strict=False))

    def _scale(self, work: UpdateInputs, bounds: list[tuple[int, int, int, int]]) -> float:
        """What shortens the gradient to the longest allowed; found without making it wherever a bound is enough."""
        clip = self.settings.clip
        if clip is None or work.bound(float(torch.linalg.vector_norm(self.weights.encoder, dim=1).max())) <= clip:
            return 1.0
        square, back = 0.0, torch.zeros_like(work.bias)
        for start, stop, first, last in bounds:
            block = self._block(work.part(first, last, start), start, stop)
            square, back = square + block.square(), back + block.back
        return min(1.0, clip / max(self._whole(square, back, work)[0] ** 0.5, 1e-30))

    def _whole(self, square: float, back: Tensor, work: UpdateInputs) -> tuple[float, Tensor]:
        """The squared length of the whole gradient, and the gradient of the bias, from what the blocks gave."""
        sums_over_ranks = self._total(torch.cat([back, back.new_tensor([square])]))
        gradient = work.bias - sums_over_ranks[:-1]
        return float(sums_over_ranks[-1] + gradient.square().sum()), gradient

    def _block(self, work: UpdateInputs, start: int, stop: int) -> RowBlock:
        """The rows from `start` to `stop` (of these, those with a gradient where few have one) and their gradients."""
        rows, places, count = slice(start, stop), work.features, stop - start
        if self._lazy:
            firing, inverse = torch.unique_consecutive(places, return_inverse=True)
            if len(firing) < BUSY * count:
                rows, places, count = firing + start, inverse, len(firing)
        matrices = {name: self.matrices[name].at(rows) for name in ROWWISE if name in self.matrices}
        encoder, decoder = matrices["encoder"].weight, matrices["decoder"].weight
        g = dots(decoder, places, work.errors, work.rows)
        pull = g if work.open is None else g * work.open
        starts = torch.searchsorted(places, torch.arange(count, device=places.device))
        gradients = {
            "encoder": sums(work.z, work.tokens, pull, starts),
            "decoder": sums(work.errors, work.rows, work.values, starts),
        }
        # Rows keep length one, so what would lengthen them is no gradient: as g = decoder . e, that is sum a g of each row.
        along = g.new_zeros(count).index_add_(0, places, g * work.values)
        gradients["decoder"].addcmul_(along[:, None], decoder, value=-1)
        pulls = pull.new_zeros(count).index_add_(0, places, pull)
        if "encoder_bias" in matrices:
            gradients["encoder_bias"] = pulls
        if work.slopes is not None and work.pushes is not None:
            gradients["floor"] = pull.new_zeros(count).index_add_(0, places, g * work.slopes + work.pushes)
        return RowBlock(rows, matrices, gradients, pulls @ encoder)

    def _move(self, block: RowBlock, adam: Adam) -> None:
        missed = adam.update - 1 - self.fresh[block.rows]
        self.fresh[block.rows] = adam.update
        left_alone = self._lazy and bool(missed.any())
        for name, matrix in block.matrices.items():
            if left_alone:
                adam.decayed(matrix, missed)
            if name in block.gradients:
                adam.step(matrix, block.gradients[name])
            if name == "decoder":
                matrix.weight.div_(torch.linalg.vector_norm(matrix.weight, dim=1, keepdim=True))
            adam.averaged(matrix)
            self.matrices[name].put(block.rows, matrix)
        self.scores.refresh(block.rows)
