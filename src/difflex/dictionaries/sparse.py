"""Products with sparse codes, and an exact search for the largest pre-activations of an encoder.

`sparse_matmul` and `segment_sums` are embedding bags, sums of weighted rows; `dot_products` is the derivative of an embedding
bag by its weights. No dense matrix of codes is built. Entries sorted by feature read each feature's row once, which is four
times faster than entries sorted by token.

`EncoderSearch` computes scores `z W^T + b` in 8-bit integers where this is faster (four times on a CPU with VNNI), then computes
the few that matter again in float32. The result is exact: the standard deviation of the rounding error is known, and six of them,
the `slack`, bound it in practice. If k coarse scores reach t, a score among the k largest has a coarse score below t only through
two errors, its own and that of one of those k. So all pairs within sqrt(2) slack of t are scored in float32, and the k largest of
these are the k largest of all. In rows where one entry dominates, the others round to zero and the error is not noise: these are
scored in float32 from the start. If a float32 score breaks the bound, or too many pairs are candidates, the batch is searched
again without integers.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from difflex.records import Codes

__all__ = ["CooCodes", "EncoderSearch", "dot_products", "segment_sums", "sparse_matmul"]

BLOCK = 32
"""Neighbouring features of which only the largest coarse score is compared first."""
CHUNK_BYTES = {"cpu": 1 << 24, "cuda": 1 << 29}
"""Bytes of scores in memory at a time: larger chunks do not fit the cache of a CPU, smaller ones leave a GPU idle."""
MIN_TOKENS = 32
"""Tokens in a product on a GPU: its integer product refuses fewer than 17."""
SLACK = 6.0 / 12**0.5
"""Six standard deviations of an error that is uniform over one integer."""
MIN_MEAN_INTEGER = 4.0
"""Mean absolute integer of a row below which its rounding error is not treated as noise."""
PAIRS_PER_CANDIDATE = 8
"""If more than one in this many pairs is a candidate, the search without integers is faster."""
MIN_WIDTH = 128
"""Width below which integers are no faster on a CPU."""
BISECTIONS = 8
"""Rounds of the search for a token's threshold; what remains of the interval costs a few more candidates."""


class CooCodes(NamedTuple):
    """Codes in coordinate (COO) form: one entry per pair of a token and a feature, whatever the number of features per token."""

    tokens: Int[Tensor, " pair"]
    features: Int[Tensor, " pair"]
    values: Float[Tensor, " pair"]

    def to_codes(self, tokens: int, fill: float) -> Codes:
        """Return entries sorted by token as one row for each of `tokens`; empty slots hold the value `fill` and feature 0."""
        per_token = torch.bincount(self.tokens, minlength=tokens)
        first = per_token.cumsum(0) - per_token
        slots = torch.arange(len(self.tokens), device=self.tokens.device) - first[self.tokens]
        values = self.values.new_full((tokens, int(per_token.max()) if tokens else 0), fill)
        features = torch.zeros_like(values, dtype=torch.long)
        values[self.tokens, slots] = self.values
        features[self.tokens, slots] = self.features
        return Codes(values, features)


def sparse_matmul(codes: Codes, rows: Float[Tensor, "size width"]) -> Float[Tensor, "token width"]:
    """Return `values @ rows[indices]` for every token."""
    return F.embedding_bag(codes.indices, rows, mode="sum", per_sample_weights=codes.values.to(rows.dtype))


def segment_sums(
    rows: Float[Tensor, "row width"],
    indices: Int[Tensor, " pair"],
    weights: Float[Tensor, " pair"],
    starts: Int[Tensor, " segment"],
) -> Float[Tensor, "segment width"]:
    """Return the sum of `weight * rows[index]` over every segment; segment i starts at pair `starts[i]`."""
    if len(indices) == 0:
        return rows.new_zeros(len(starts), rows.shape[1])
    return F.embedding_bag(indices, rows, starts, mode="sum", per_sample_weights=weights)


def dot_products(
    left: Float[Tensor, "row width"],
    left_indices: Int[Tensor, " pair"],
    right: Float[Tensor, "other width"],
    right_indices: Int[Tensor, " pair"],
) -> Float[Tensor, " pair"]:
    """Return `left[left_index] @ right[right_index]` for every pair; fastest if `left_indices` are sorted."""
    if len(left_indices) == 0:
        return left.new_zeros(0)
    starts = left_indices[:1] * 0  # not read, because the segment of every pair is given
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(left, right, right_indices, starts, left_indices, 0)


class QuantisedRows(NamedTuple):
    """8-bit copies of rows: `row ~ scale * integers`."""

    integers: Tensor
    scales: Float[Tensor, " row"]
    norms: Float[Tensor, " row"]
    """Norms of the original rows."""
    peaked: Bool[Tensor, " row"]
    """Rows in which one entry dominates, so that most others round to zero."""

    @classmethod
    def of(cls, rows: Float[Tensor, "row width"]) -> QuantisedRows:
        """Round `rows` so that the largest entry of each becomes 127."""
        scales = torch.maximum(rows.amax(1), -rows.amin(1)).clamp_min(1e-12) / 127
        integers = (rows * (1 / scales)[:, None]).round_().to(torch.int8)
        peaked = torch.linalg.vector_norm(rows, ord=1, dim=1) < MIN_MEAN_INTEGER * rows.shape[1] * scales
        return cls(integers, scales, torch.linalg.vector_norm(rows, dim=1), peaked)


@final
class EncoderSearch:
    """An exact search for the largest scores `z W^T + b`; see the top of this file.

    `rows` (W) and `bias` are shared with their owner, who calls `refresh` after changing rows.
    """

    def __init__(self, rows: Float[Tensor, "size width"], bias: Float[Tensor, " size"] | None = None) -> None:
        """Make an 8-bit copy of `rows` where it makes the search faster."""
        self.rows, self.bias = rows, bias
        size, width = rows.shape
        self._quantised: QuantisedRows | None = None
        self._buffers: tuple[Tensor, Tensor] | None = None
        if size % BLOCK == 0 and size >= 32 * BLOCK and _integers_are_faster(width, rows.device):
            parts = [QuantisedRows.of(part) for part in rows.split(1024)]
            self._quantised = QuantisedRows(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def refresh(self, rows: slice | Int[Tensor, " row"]) -> None:
        """Update the 8-bit copies of `rows`, whose values have changed."""
        if self._quantised is not None:
            for whole, part in zip(self._quantised, QuantisedRows.of(self.rows[rows]), strict=True):
                whole[rows] = part

    def top_k(self, z: Float[Tensor, "token width"], k: int) -> Codes:
        """Return the k largest scores of every token, largest first, and their features."""
        if self._quantised is not None and 4 * k <= len(self.rows) // BLOCK:
            pairs = self._score_candidates(self._quantised, z, k=k)
            if pairs is not None and len(z):
                padded = pairs.to_codes(len(z), fill=-torch.inf)
                top = padded.values.topk(k)
                return Codes(top.values, padded.indices.gather(1, top.indices))
        values, indices = zip(*(scores.topk(k) for _, scores in self._dense_chunks(z)), strict=True)
        return Codes(torch.cat(values), torch.cat(indices))

    def above(self, z: Float[Tensor, "token width"], thresholds: Float[Tensor, " size"]) -> CooCodes:
        """Return all scores above the threshold of their feature, sorted by token."""
        pairs = None if self._quantised is None else self._score_candidates(self._quantised, z, thresholds=thresholds)
        if pairs is None:
            parts = []
            for start, scores in self._dense_chunks(z):
                tokens, features = (scores > thresholds).nonzero(as_tuple=True)
                parts.append(CooCodes(tokens + start, features, scores[tokens, features]))
            return CooCodes(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
        above = pairs.values > thresholds[pairs.features]
        return CooCodes(pairs.tokens[above], pairs.features[above], pairs.values[above])

    def _chunks(self, z: Float[Tensor, "token width"]) -> Iterator[tuple[int, Tensor]]:
        """Yield the first token and the rows of every chunk of `z`; one empty chunk if `z` is empty."""
        return ((start, z[start : start + self._chunk]) for start in range(0, max(len(z), 1), self._chunk))

    @property
    def _chunk(self) -> int:
        """The number of tokens scored at a time."""
        return max(MIN_TOKENS, CHUNK_BYTES.get(self.rows.device.type, CHUNK_BYTES["cpu"]) // (8 * len(self.rows)))

    def _dense_chunks(self, z: Float[Tensor, "token width"]) -> Iterator[tuple[int, Tensor]]:
        """Yield the first token and all float32 scores of every chunk of `z`."""
        for start, chunk in self._chunks(z):
            scores = chunk @ self.rows.T
            yield start, scores if self.bias is None else scores.add_(self.bias)

    def _score_candidates(
        self,
        quantised: QuantisedRows,
        z: Float[Tensor, "token width"],
        k: int = 0,
        thresholds: Float[Tensor, " size"] | None = None,
    ) -> CooCodes | None:
        """Return the float32 scores of all pairs that may be wanted; None if the error bound fails or they are too many."""
        offset = self.bias if thresholds is None else (-thresholds if self.bias is None else self.bias - thresholds)
        max_norm, max_scale = float(quantised.norms.max()), float(quantised.scales.max())
        parts, slacks, scales = [], [], []
        inputs = QuantisedRows.of(z)
        peaked = z[inputs.peaked]
        # In one product, because reading the rows takes long; if they would fill a chunk, each chunk computes its own.
        at_once = peaked @ self.rows.T if 0 < len(peaked) <= self._chunk else None
        for start, chunk in self._chunks(z):
            tokens = QuantisedRows(*(tensor[start : start + len(chunk)] for tensor in inputs))
            first = int(inputs.peaked[:start].sum())
            here = slice(first, first + int(tokens.peaked.sum()))
            exact = peaked[here] @ self.rows.T if at_once is None else at_once[here]
            slack = SLACK * ((tokens.scales * max_norm).square() + (tokens.norms * max_scale).square()).sqrt()
            scores = self._coarse_scores(chunk, tokens, quantised, offset, exact)
            candidates = _candidates(scores, slack / tokens.scales, k)
            if len(candidates.tokens) * PAIRS_PER_CANDIDATE > scores.numel():
                return None
            parts.append(candidates._replace(tokens=candidates.tokens + start))
            slacks.append(slack)
            scales.append(tokens.scales)
        tokens, features, coarse = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        values = self._exact_scores(z, tokens, features)
        excess = values if thresholds is None else values - thresholds[features]
        error = (excess - coarse * torch.cat(scales)[tokens]).abs()
        return CooCodes(tokens, features, values) if bool((error <= torch.cat(slacks)[tokens]).all()) else None

    def _coarse_scores(
        self,
        chunk: Float[Tensor, "token width"],
        tokens: QuantisedRows,
        quantised: QuantisedRows,
        offset: Float[Tensor, " size"] | None,
        exact: Float[Tensor, "peaked size"],
    ) -> Float[Tensor, "token size"]:
        """Return the scores of a chunk in units of each token's scale; valid until the next call.

        `exact` holds the float32 scores of its peaked tokens, `offset` is added to all scores.
        """
        count, size = len(tokens.integers), len(quantised.integers)
        if self._buffers is None or len(self._buffers[0]) < count:
            room, device = max(count, MIN_TOKENS), self.rows.device
            self._buffers = torch.empty(room, size, dtype=torch.int32, device=device), torch.empty(room, size, device=device)
        integers, scores = self._buffers[0], self._buffers[1][:count]
        if count == 0:
            return scores
        missing = MIN_TOKENS - count if self.rows.device.type == "cuda" else 0
        padded = F.pad(tokens.integers, (0, 0, 0, missing)) if missing > 0 else tokens.integers
        torch._int_mm(padded, quantised.integers.T, out=integers[: len(padded)])
        scores.copy_(integers[:count]).mul_(quantised.scales)
        if len(exact):
            scores[tokens.peaked] = exact / tokens.scales[tokens.peaked, None]
        if bool(quantised.peaked.any()):
            scores[:, quantised.peaked] = chunk @ self.rows[quantised.peaked].T / tokens.scales[:, None]
        return scores if offset is None else scores.addr_(1 / tokens.scales, offset)

    def _exact_scores(
        self, z: Float[Tensor, "token width"], tokens: Int[Tensor, " pair"], features: Int[Tensor, " pair"]
    ) -> Float[Tensor, " pair"]:
        """Return the float32 score of every pair."""
        sorted_features, order = torch.sort(features, stable=True)
        values = z.new_empty(len(tokens))
        values[order] = dot_products(self.rows, sorted_features, z, tokens[order])
        return values if self.bias is None else values.add_(self.bias[features])


def _candidates(scores: Float[Tensor, "token size"], slack: Float[Tensor, " token"], k: int) -> CooCodes:
    """Return the coarse scores within sqrt(2) `slack` of the k-th largest of their token; with k 0, those above `-slack`."""
    count, size = scores.shape
    blocks = scores.view(count, size // BLOCK, BLOCK)
    peaks = blocks.amax(2)
    threshold = _reached_by_k(peaks, k) - 2**0.5 * slack if k else -slack
    tokens, positions = (peaks >= threshold[:, None]).nonzero(as_tuple=True)
    members = blocks.reshape(-1, BLOCK)[tokens * (size // BLOCK) + positions]
    chosen, inside = (members >= threshold[tokens, None]).nonzero(as_tuple=True)
    return CooCodes(tokens[chosen], positions[chosen] * BLOCK + inside, members[chosen, inside])


def _reached_by_k(peaks: Float[Tensor, "token block"], k: int) -> Float[Tensor, " token"]:
    """Return for every row a number close below its k-th largest entry, by bisection, which is faster than sorting."""
    low, high = peaks.amin(1), peaks.amax(1)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        enough = (peaks >= middle[:, None]).sum(1) >= k
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low


@cache
def _integers_are_faster(width: int, device: torch.device) -> bool:
    """Whether 8-bit integers are multiplied faster than float32 on `device`.

    Decided by the kind of processor, never by timing: the last bits of a score depend on it, and a resumed run must equal an
    uninterrupted one.
    """
    if device.type == "cpu":
        return width >= MIN_WIDTH and torch.cpu._is_vnni_supported()
    return device.type == "cuda" and width % 8 == 0
