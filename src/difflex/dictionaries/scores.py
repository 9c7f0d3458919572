"""Scores: the pre-activations `z W^T + b`, searched for the few that matter without ever being whole.

The dense product runs in 8-bit integers where that is faster (four times on a CPU with VNNI). The standard deviation
of its rounding error is known, and six of them, the `slack`, bound it in practice. If k coarse scores reach t, a score among the
k largest can have a coarse score under t only by two errors together, its own and that of one of the k, so all that come within
sqrt(2) slack of t are scored again in float32: the k largest of these are exactly the k largest of all. Rows of which one entry
outgrows all others round to little but zeros, whose error is no noise: these are scored in float32 at once. Should a rescored
pair leave the bound, or should integers leave too many candidates, the batch is searched again without them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from difflex.dictionaries.sparse import SparsePairs, dots, padded
from difflex.records import Codes

__all__ = ["EncoderSearch"]

BLOCK = 32
"""Neighbouring features, of which only the largest score is looked at first."""
CHUNK_BYTES = {"cpu": 1 << 24, "cuda": 1 << 29}
"""Scores at hand at any time: larger chunks fall out of a CPU's cache, smaller ones leave a card idle."""
FEWEST = 32
"""Tokens that a card multiplies at least: its integer product refuses fewer than 17."""
SLACK = 6.0 / 12**0.5
"""Six standard deviations of an error that is uniform within half a step."""
ROUGH = 4.0
"""Mean absolute integer of a row under which its rounding is taken for more than noise."""
MOST = 8
"""One part in this many of all pairs may become candidates."""
NARROW = 128
"""Width under which a product is too small for integers to pay."""
HALVINGS = 8
"""Of the interval in which a token's threshold lies; what is left of it costs a few more candidates."""


class QuantisedRows(NamedTuple):
    """8-bit copies of rows: `row ~ step * integers`."""

    integers: Tensor
    steps: Float[Tensor, " row"]
    lengths: Float[Tensor, " row"]
    """Of the true rows."""
    rough: Bool[Tensor, " row"]
    """Where one entry leaves few steps to the others."""

    @classmethod
    def of(cls, rows: Float[Tensor, "row width"]) -> QuantisedRows:
        """The nearest integers to `rows`, the largest entry of each row at 127."""
        steps = torch.maximum(rows.amax(1), -rows.amin(1)).clamp_min(1e-12) / 127
        integers = (rows * (1 / steps)[:, None]).round_().to(torch.int8)
        rough = torch.linalg.vector_norm(rows, ord=1, dim=1) < ROUGH * rows.shape[1] * steps
        return cls(integers, steps, torch.linalg.vector_norm(rows, dim=1), rough)


class CandidatePairs(NamedTuple):
    """Pairs that may be wanted, with their coarse scores in units of the token's step."""

    tokens: Int[Tensor, " pair"]
    features: Int[Tensor, " pair"]
    coarse: Float[Tensor, " pair"]


@final
class EncoderSearch:
    """The search through the scores of one encoder; `rows` and `bias` stay their owner's, who says `refresh` after a change."""

    def __init__(self, rows: Float[Tensor, "size width"], bias: Float[Tensor, " size"] | None = None) -> None:
        """The search over `rows`; it keeps an 8-bit copy of them where that makes it faster."""
        self.rows, self.bias = rows, bias
        size, width = rows.shape
        self._coarse: QuantisedRows | None = None
        self._buffers: tuple[Tensor, Tensor] | None = None
        if size % BLOCK == 0 and size >= 32 * BLOCK and _integers_pay(width, rows.device):
            steps, lengths = (torch.empty(size, device=rows.device) for _ in range(2))
            integers = torch.empty(size, width, dtype=torch.int8, device=rows.device)
            self._coarse = QuantisedRows(integers, steps, lengths, torch.empty(size, dtype=torch.bool, device=rows.device))
            for start in range(0, size, 1024):
                self.refresh(slice(start, start + 1024))

    def refresh(self, rows: slice | Int[Tensor, " row"]) -> None:
        """Take note that these rows have changed."""
        if self._coarse is not None:
            for whole, part in zip(self._coarse, QuantisedRows.of(self.rows[rows]), strict=True):
                whole[rows] = part

    def top(self, z: Float[Tensor, "token width"], k: int) -> Codes:
        """The k largest scores of every token, largest first, and their features."""
        if self._coarse is not None and 4 * k <= len(self.rows) // BLOCK:
            pairs = self._rescored(self._coarse, z, k=k)
            if pairs is not None and len(z):
                return _top_of(pairs, len(z), k)
        values, indices = zip(*(scores.topk(k) for _, scores in self._dense_chunks(z)), strict=True)
        return Codes(torch.cat(values), torch.cat(indices))

    def above(self, z: Float[Tensor, "token width"], floor: Float[Tensor, " size"]) -> SparsePairs:
        """All pairs whose score exceeds its feature's `floor`, token by token."""
        pairs = None if self._coarse is None else self._rescored(self._coarse, z, floor=floor)
        if pairs is None:
            found = []
            for start, scores in self._dense_chunks(z):
                tokens, features = (scores > floor).nonzero(as_tuple=True)
                found.append(SparsePairs(tokens + start, features, scores[tokens, features]))
            return SparsePairs(*(torch.cat(part) for part in zip(*found, strict=True)))
        kept = pairs.values > floor[pairs.features]
        return SparsePairs(pairs.tokens[kept], pairs.features[kept], pairs.values[kept])

    def _chunks(self, z: Float[Tensor, "token width"]) -> Iterator[tuple[int, Tensor]]:
        """The first token and the rows of every chunk of `z`; one empty chunk where `z` is empty."""
        return ((start, z[start : start + self._chunk]) for start in range(0, max(len(z), 1), self._chunk))

    @property
    def _chunk(self) -> int:
        """How many tokens are scored at a time."""
        return max(FEWEST, CHUNK_BYTES.get(self.rows.device.type, CHUNK_BYTES["cpu"]) // (8 * len(self.rows)))

    def _dense_chunks(self, z: Float[Tensor, "token width"]) -> Iterator[tuple[int, Tensor]]:
        """The scores in float32, chunk by chunk."""
        for start, part in self._chunks(z):
            scores = part @ self.rows.T
            yield start, scores if self.bias is None else scores.add_(self.bias)

    def _rescored(
        self, coarse: QuantisedRows, z: Float[Tensor, "token width"], k: int = 0, floor: Float[Tensor, " size"] | None = None
    ) -> SparsePairs | None:
        """Every pair among the k largest or over the floor, and some more, scored in float32; None if the bound was broken."""
        lift = self.bias if floor is None else (-floor if self.bias is None else self.bias - floor)
        longest, widest = float(coarse.lengths.max()), float(coarse.steps.max())
        found, slacks, steps = [], [], []
        every = QuantisedRows.of(z)
        rough = z[every.rough]
        # All at once, as the rows are long to read; where they would fill a chunk they are many, and each chunk has its own.
        together = rough @ self.rows.T if 0 < len(rough) <= self._chunk else None
        for start, part in self._chunks(z):
            token = QuantisedRows(*(each[start : start + len(part)] for each in every))
            first = int(every.rough[:start].sum())
            mine = slice(first, first + int(token.rough.sum()))
            exact = rough[mine] @ self.rows.T if together is None else together[mine]
            slack = SLACK * ((token.steps * longest).square() + (token.lengths * widest).square()).sqrt()
            scores = self._product(part, token, coarse, lift, exact)
            some = _candidates(scores, slack / token.steps, k)
            if len(some.tokens) * MOST > scores.numel():
                return None
            found.append(some._replace(tokens=some.tokens + start))
            slacks.append(slack)
            steps.append(token.steps)
        tokens, features, units = (torch.cat(part) for part in zip(*found, strict=True))
        values = _scored(self.rows, self.bias, z, tokens, features)
        lifted = values if floor is None else values - floor[features]
        error = (lifted - units * torch.cat(steps)[tokens]).abs()
        return SparsePairs(tokens, features, values) if bool((error <= torch.cat(slacks)[tokens]).all()) else None

    def _product(
        self,
        part: Float[Tensor, "token width"],
        token: QuantisedRows,
        coarse: QuantisedRows,
        lift: Float[Tensor, " size"] | None,
        exact: Float[Tensor, "rough size"],
    ) -> Float[Tensor, "token size"]:
        """The coarse scores in units of each token's step, from the `exact` ones of its rough rows; valid until the next call."""
        count, size = len(token.integers), len(coarse.integers)
        if self._buffers is None or len(self._buffers[0]) < count:
            room, device = max(count, FEWEST), self.rows.device
            self._buffers = torch.empty(room, size, dtype=torch.int32, device=device), torch.empty(room, size, device=device)
        integers, scores = self._buffers[0], self._buffers[1][:count]
        if count == 0:
            return scores
        few = FEWEST - count if self.rows.device.type == "cuda" else 0
        padded_rows = F.pad(token.integers, (0, 0, 0, few)) if few > 0 else token.integers
        torch._int_mm(padded_rows, coarse.integers.T, out=integers[: len(padded_rows)])
        scores.copy_(integers[:count]).mul_(coarse.steps)
        if len(exact):
            scores[token.rough] = exact / token.steps[token.rough, None]
        if bool(coarse.rough.any()):
            scores[:, coarse.rough] = part @ self.rows[coarse.rough].T / token.steps[:, None]
        return scores if lift is None else scores.addr_(1 / token.steps, lift)


def _candidates(scores: Float[Tensor, "token size"], slack: Float[Tensor, " token"], k: int) -> CandidatePairs:
    """Where `scores` come within sqrt(2) `slack` of the k-th largest; without k, where they exceed `-slack`."""
    count, size = scores.shape
    blocks = scores.view(count, size // BLOCK, BLOCK)
    peaks = blocks.amax(2)
    threshold = _reached(peaks, k) - 2**0.5 * slack if k else -slack
    tokens, places = (peaks >= threshold[:, None]).nonzero(as_tuple=True)
    members = blocks.reshape(-1, BLOCK)[tokens * (size // BLOCK) + places]
    which, inside = (members >= threshold[tokens, None]).nonzero(as_tuple=True)
    return CandidatePairs(tokens[which], places[which] * BLOCK + inside, members[which, inside])


def _reached(peaks: Float[Tensor, "token block"], k: int) -> Float[Tensor, " token"]:
    """For every row a number that at least k of its entries reach, close under the k-th largest: far quicker than sorting."""
    low, high = peaks.amin(1), peaks.amax(1)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        enough = (peaks >= middle[:, None]).sum(1) >= k
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low


def _scored(
    rows: Float[Tensor, "size width"],
    bias: Float[Tensor, " size"] | None,
    z: Float[Tensor, "token width"],
    tokens: Int[Tensor, " pair"],
    features: Int[Tensor, " pair"],
) -> Float[Tensor, " pair"]:
    """The float32 score of every pair."""
    ordered, order = torch.sort(features, stable=True)
    values = z.new_empty(len(tokens))
    values[order] = dots(rows, ordered, z, tokens[order])
    return values if bias is None else values.add_(bias[features])


def _top_of(pairs: SparsePairs, count: int, k: int) -> Codes:
    """The k largest values of every token and their features, from pairs that come token by token."""
    rows = padded(pairs, count, empty=-torch.inf)
    top = rows.values.topk(k)
    return Codes(top.values, rows.indices.gather(1, top.indices))


@cache
def _integers_pay(width: int, device: torch.device) -> bool:
    """Whether 8-bit integers are multiplied faster than float32 there, by what the processor is.

    Never by the clock: the last bits of a score depend on it, and with them whether a resumed run equals an undisturbed one.
    """
    if device.type == "cpu":
        return width >= NARROW and torch.cpu._is_vnni_supported()
    return device.type == "cuda" and width % 8 == 0
