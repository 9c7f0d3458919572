"""How well single features detect concepts: average precision and IoU of all pairs, from sparse codes.

A feature says where a concept is by where, and how strongly, it fires. Tokens at which it is silent are one tied block at the end
of its ranking, and equal values are tied too: the average precision is that of scikit-learn's `average_precision_score`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple, final

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from difflex.records import Codes

__all__ = ["DetectionScores", "FeatureFirings", "TokenRanking", "scores"]

ROOM = 1 << 22
"""Numbers that a block of (concept, feature, firing) holds at most, so that it stays near the processor."""
CHUNK = 8192
"""Tokens encoded at once."""


@final
class FeatureFirings:
    """Where each feature fires, strongest first: pairs of token and value, feature after feature."""

    def __init__(
        self, tokens: Int[Tensor, " pair"], values: Float[Tensor, " pair"], counts: Int[Tensor, " size"], of: int
    ) -> None:
        """The firings of `len(counts)` features at `of` tokens; `counts` says how many pairs each feature has."""
        self.tokens, self.values, self.counts, self.of = tokens, values, counts, of
        self.starts = counts.cumsum(0) - counts

    @classmethod
    def found(cls, encode: Callable[[Tensor], Codes], values: Float[Tensor, "token width"], size: int) -> FeatureFirings:
        """Where the features that `encode` knows fire at the activations `values`."""
        tokens, features, strengths = [], [], []
        for first in range(0, len(values), CHUNK):
            codes = encode(values[first : first + CHUNK])
            token, slot = (codes.values > 0).nonzero(as_tuple=True)
            tokens.append(token.cpu() + first)
            features.append(codes.indices[token, slot].cpu())
            strengths.append(codes.values[token, slot].float().cpu())
        return cls.sorted(torch.cat(tokens), torch.cat(features), torch.cat(strengths), size, len(values))

    @classmethod
    def sorted(cls, tokens: Tensor, features: Tensor, values: Tensor, size: int, of: int) -> FeatureFirings:
        """The same from pairs in any order."""
        order = values.argsort(descending=True)
        order = order[features[order].argsort(stable=True)]
        return cls(tokens[order], values[order], torch.bincount(features, minlength=size), of)

    @property
    def size(self) -> int:
        """The number of features."""
        return len(self.counts)

    def one(self, feature: int) -> tuple[Int[Tensor, " firing"], Float[Tensor, " firing"]]:
        """Tokens and values of one feature, strongest first."""
        start, count = int(self.starts[feature]), int(self.counts[feature])
        return self.tokens[start : start + count], self.values[start : start + count]

    def part(self, chosen: Tensor) -> FeatureFirings:
        """The firings at the `chosen` tokens (a mask), which are numbered anew."""
        kept = chosen[self.tokens]
        features = torch.repeat_interleave(torch.arange(self.size), self.counts)[kept]
        number = chosen.cumsum(0) - 1
        counts = torch.bincount(features, minlength=self.size)
        return FeatureFirings(number[self.tokens[kept]], self.values[kept], counts, int(chosen.sum()))

    def blocks(self, concepts: int) -> Iterator[FiringBlock]:
        """The firings of all features that fire, as rectangles: features of about equal counts together, shorter ones padded."""
        order = self.counts.argsort(descending=True)
        order = order[self.counts[order] > 0]
        while len(order):
            longest = int(self.counts[order[0]])
            features, order = order.tensor_split([max(1, ROOM // (longest * concepts))])
            places = torch.arange(longest)
            there = places < self.counts[features, None]
            pairs = torch.where(there, self.starts[features, None] + places, 0)
            yield FiringBlock(
                features, torch.where(there, self.tokens[pairs], self.of), torch.where(there, self.values[pairs], 0.0)
            )


class FiringBlock(NamedTuple):
    """Firings of some features as a rectangle; what is padded has value 0 and a token beyond the last."""

    features: Int[Tensor, " feature"]
    tokens: Int[Tensor, "feature firing"]
    values: Float[Tensor, "feature firing"]

    def ends(self) -> Int[Tensor, "feature firing"] | None:
        """For each firing the last one of the same value; None where all values differ."""
        last = torch.ones_like(self.values, dtype=torch.bool)
        last[:, :-1] = self.values[:, :-1] > self.values[:, 1:]
        if bool((last | (self.values == 0)).all()):
            return None
        places = torch.where(last, torch.arange(last.shape[1]), last.shape[1])
        return places.flip(1).cummin(1).values.flip(1)


@dataclass(frozen=True, kw_only=True)
class DetectionScores:
    """How well each feature detects each concept."""

    ap: Float[Tensor, "size concept"]
    """Average precision; the share of tokens that show the concept for a feature that never fires."""
    iou: Float[Tensor, "size concept"]
    """Tokens shared over tokens of either, where the feature is cut at the value that is best for it."""
    threshold: Float[Tensor, "size concept"]
    """That value."""
    precision: Float[Tensor, "size concept"]
    """At that value: the share of the tokens at which the feature fires that show the concept."""
    recall: Float[Tensor, "size concept"]
    """At that value: the share of the tokens that show the concept at which the feature fires."""


def scores(
    firings: FeatureFirings, truth: Int8[Tensor, "concept token"], thresholds: Float[Tensor, "size concept"] | None = None
) -> DetectionScores:
    """The scores of all pairs of feature and concept; with `thresholds`, features are cut at these instead of at their best."""
    positives, shown = (truth == 1).sum(1), (truth >= 0).sum(1)
    found = {field.name: torch.zeros(firings.size, len(truth)) for field in fields(DetectionScores)}
    found["threshold"].fill_(torch.inf)
    found["ap"] += positives / shown.clamp_min(1)
    # The token beyond the last, which padding points to, is left out for every concept.
    padded = torch.nn.functional.pad(truth, (0, 1), value=-1)
    for block in firings.blocks(len(truth)):
        longest = block.tokens.shape[1]
        for part in torch.arange(len(truth)).split(max(1, ROOM // block.tokens.numel())):
            known = padded[part][:, block.tokens.flatten()].view(len(part), -1, longest)
            cuts = None if thresholds is None else thresholds[block.features][:, part].T
            each = _scores(block, known, positives[part], shown[part], cuts)
            for name, values in each.items():
                found[name][block.features[:, None], part] = values.T
    return DetectionScores(**found)


def _scores(
    block: FiringBlock, known: Tensor, positives: Tensor, shown: Tensor, cuts: Float[Tensor, "concept feature"] | None
) -> dict[str, Float[Tensor, "concept feature"]]:
    is_positive = (known == 1).float()
    hits, fired = is_positive.cumsum(2), (known >= 0).float().cumsum(2)
    if (ends := block.ends()) is not None:  # of equal values none comes first: each stands where the last of them does
        ends = ends.expand_as(known)
        hits, fired = hits.gather(2, ends), fired.gather(2, ends)
    of, among = positives[:, None].float(), shown[:, None].float()
    retrieved = (is_positive * (hits / fired.clamp_min(1))).sum(2)
    silent = (of - hits[..., -1]) * of / among.clamp_min(1)
    iou = hits / (fired + of[..., None] - hits).clamp_min(1)
    best = iou.argmax(2, keepdim=True) if cuts is None else _last_above(block, cuts)
    at = lambda each: each.gather(2, best.clamp_min(0))[..., 0] * (best[..., 0] >= 0)  # noqa: E731 (five times the same)
    hit, fire = at(hits), at(fired)
    return {
        "ap": (retrieved + silent) / of.clamp_min(1),
        "iou": at(iou),
        "threshold": at(block.values.expand_as(iou)),
        "precision": hit / fire.clamp_min(1),
        "recall": hit / of.clamp_min(1),
    }


def _last_above(block: FiringBlock, cuts: Float[Tensor, "concept feature"]) -> Int[Tensor, "concept feature 1"]:
    """The place of each feature's last firing that is not under its cut; -1 where all are."""
    above = (block.values >= cuts[..., None]) & (block.values > 0)
    return above.sum(2, keepdim=True) - 1


@final
class TokenRanking:
    """One ranking of tokens by how strongly something says a concept is there; what is not in it comes last, tied."""

    def __init__(
        self,
        tokens: Int[Tensor, " firing"],
        values: Float[Tensor, " firing"],
        truth: Int8[Tensor, " token"],
        images: Int[Tensor, " token"],
        count: int,
    ) -> None:
        """The ranking of `tokens` by `values`, in any order; `images` are numbered up to `count`."""
        order = values.argsort(descending=True)
        tokens, self._images = tokens[order], images[tokens[order]]
        self._ends = FiringBlock(tokens[:0], tokens[None], values[order][None]).ends()
        self._is_positive, self._is_known = (truth[tokens] == 1).float(), (truth[tokens] >= 0).float()
        self._positives = torch.bincount(images, (truth == 1).float(), count)
        self._known = torch.bincount(images, (truth >= 0).float(), count)

    def average_precision(self, weights: Float[Tensor, "draw image"] | None = None) -> Float[Tensor, " draw"]:
        """The average precision where each image counts `weights` times, in each draw; NaN where none shows the concept."""
        weights = torch.ones(1, len(self._positives)) if weights is None else weights
        each = weights[:, self._images]
        positive = each * self._is_positive
        hits, fired = positive.cumsum(1), (each * self._is_known).cumsum(1)
        last = hits[:, -1] if hits.shape[1] else hits.new_zeros(len(hits))
        if self._ends is not None:
            hits, fired = hits[:, self._ends[0]], fired[:, self._ends[0]]
        retrieved = (positive * (hits / fired.clamp_min(1e-9))).sum(1)
        of, among = weights @ self._positives, weights @ self._known
        return (retrieved + (of - last) * of / among) / of
