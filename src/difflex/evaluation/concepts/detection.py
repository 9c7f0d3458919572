"""How well features detect concepts: average precision and IoU of all pairs from sparse codes, and how features share concepts.

A feature ranks tokens by how strongly it fires. Tokens at which it does not fire are one tied block at the end of the ranking,
and equal values are tied too: the average precision is that of scikit-learn's `average_precision_score`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int, Int8
from torch import Tensor

from difflex.evaluation.concepts.results import Concept
from difflex.records import Codes

BLOCK = 1 << 22
"""Maximum number of (concept, feature, firing) entries in a block, so that it fits the processor's cache."""
CLEAN = 0.8
"""Precision from which a feature counts as clean: it fires for a concept and little else."""
HALF = 0.5
PART = 0.05
"""A smaller share of a concept's tokens is ignored."""
CANDIDATES = 16
"""Features considered for a combination, per concept."""


@final
class FeatureFirings:
    """Where each feature fires: pairs of token and value, feature after feature, the strongest first."""

    def __init__(
        self, tokens: Int[Tensor, " pair"], values: Float[Tensor, " pair"], counts: Int[Tensor, " size"], token_count: int
    ) -> None:
        """Take the firings of `len(counts)` features at `token_count` tokens; `counts` holds the number of pairs per feature."""
        self.tokens, self.values, self.counts, self.token_count = tokens, values, counts, token_count
        self.starts = counts.cumsum(0) - counts

    @classmethod
    def from_pairs(cls, tokens: Tensor, features: Tensor, values: Tensor, size: int, token_count: int) -> FeatureFirings:
        """Build the firings from pairs in any order."""
        order = values.argsort(descending=True)
        order = order[features[order].argsort(stable=True)]
        return cls(tokens[order], values[order], torch.bincount(features, minlength=size), token_count)

    @classmethod
    def from_dense(cls, strengths: Float[Tensor, "feature token"]) -> FeatureFirings:
        """Build the firings from the strength of each feature at every token; 0 is no firing."""
        features, tokens = strengths.nonzero(as_tuple=True)
        return cls.from_pairs(tokens, features, strengths[features, tokens], *strengths.shape)

    @property
    def size(self) -> int:
        """The number of features."""
        return len(self.counts)

    @property
    def peaks(self) -> Float[Tensor, " size"]:
        """The largest value of each feature; 0 if it never fires."""
        peaks = torch.zeros(self.size)
        peaks[self.counts > 0] = self.values[self.starts[self.counts > 0]]
        return peaks

    def of_feature(self, feature: int) -> tuple[Int[Tensor, " firing"], Float[Tensor, " firing"]]:
        """Return the tokens and values of one feature, the strongest first."""
        start, count = int(self.starts[feature]), int(self.counts[feature])
        return self.tokens[start : start + count], self.values[start : start + count]

    def fires(self, feature: int, threshold: Tensor) -> Bool[Tensor, " token"]:
        """Return the tokens at which `feature` fires at `threshold` or above."""
        tokens, values = self.of_feature(feature)
        return torch.zeros(self.token_count, dtype=torch.bool).index_fill_(0, tokens[values >= threshold].long(), True)

    def select(self, mask: Bool[Tensor, " token"]) -> FeatureFirings:
        """Return the firings at the tokens in `mask`, renumbered."""
        pairs = mask[self.tokens]
        features = torch.repeat_interleave(torch.arange(self.size), self.counts)[pairs]
        numbers = mask.cumsum(0) - 1
        counts = torch.bincount(features, minlength=self.size)
        return FeatureFirings(numbers[self.tokens[pairs]].to(self.tokens.dtype), self.values[pairs], counts, int(mask.sum()))

    def blocks(self, concepts: int) -> Iterator[FiringBlock]:
        """Yield the firings of all features that fire as rectangles: features of similar counts together, shorter ones padded."""
        order = self.counts.argsort(descending=True)
        order = order[self.counts[order] > 0]
        while len(order):
            longest = int(self.counts[order[0]])
            features, order = order.tensor_split([max(1, BLOCK // (longest * concepts))])
            positions = torch.arange(longest)
            valid = positions < self.counts[features, None]
            pairs = torch.where(valid, self.starts[features, None] + positions, 0)
            tokens = torch.where(valid, self.tokens[pairs], self.token_count)
            yield FiringBlock(features, tokens, torch.where(valid, self.values[pairs], 0.0))


@final
class FiringRecorder:
    """Records where the features of a method fire, at activations that come part by part."""

    def __init__(self, encode: Callable[[Tensor], Codes], size: int) -> None:
        self._encode, self._size = encode, size
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self._tokens = 0

    def add(self, x: Float[Tensor, "token width"]) -> None:
        """Add the firings at the next activations."""
        codes = self._encode(x)
        token, slot = (codes.values > 0).nonzero(as_tuple=True)
        features, values = codes.indices[token, slot].int(), codes.values[token, slot].float()
        self._parts.append((token.int().cpu() + self._tokens, features.cpu(), values.cpu()))
        self._tokens += len(x)

    def firings(self) -> FeatureFirings:
        """Return all firings; the recorder forgets them."""
        columns = [list(column) for column in zip(*self._parts, strict=True)]
        self._parts.clear()
        tokens, features, values = (torch.cat(columns.pop(0)) for _ in range(3))
        return FeatureFirings.from_pairs(tokens, features, values, self._size, self._tokens)


class FiringBlock(NamedTuple):
    """Firings of some features as a rectangle; padding has value 0 and a token beyond the last."""

    features: Int[Tensor, " feature"]
    tokens: Int[Tensor, "feature firing"]
    values: Float[Tensor, "feature firing"]

    def ends(self) -> Int[Tensor, "feature firing"] | None:
        """Return for each firing the last one of the same value; None if all values differ."""
        last = torch.ones_like(self.values, dtype=torch.bool)
        last[:, :-1] = self.values[:, :-1] > self.values[:, 1:]
        if bool((last | (self.values == 0)).all()):
            return None
        positions = torch.where(last, torch.arange(last.shape[1]), last.shape[1])
        return positions.flip(1).cummin(1).values.flip(1)


@dataclass(frozen=True, kw_only=True)
class DetectionScores:
    """How well each feature detects each concept."""

    ap: Float[Tensor, "size concept"]
    """Average precision; for a feature that never fires, the share of tokens that show the concept."""
    iou: Float[Tensor, "size concept"]
    """Intersection over union of the tokens that show the concept and those at which the feature reaches the threshold."""
    threshold: Float[Tensor, "size concept"]
    """The value of the feature with the best IoU, or the threshold passed in."""
    precision: Float[Tensor, "size concept"]
    """At the threshold."""
    recall: Float[Tensor, "size concept"]
    """At the threshold."""


def detection_scores(
    firings: FeatureFirings, truth: Int8[Tensor, "concept token"], thresholds: Float[Tensor, "size concept"] | None = None
) -> DetectionScores:
    """Score all pairs of feature and concept, at given `thresholds` or at those of the best IoU."""
    positives, labelled = (truth == 1).sum(1), (truth >= 0).sum(1)
    table = {field.name: torch.zeros(firings.size, len(truth)) for field in fields(DetectionScores)}
    table["threshold"].fill_(torch.inf)
    table["ap"] += positives / labelled.clamp_min(1)
    # Padding points to the token beyond the last, which is ignored for every concept.
    padded = torch.nn.functional.pad(truth, (0, 1), value=-1)
    for block in firings.blocks(len(truth)):
        longest = block.tokens.shape[1]
        for part in torch.arange(len(truth)).split(max(1, BLOCK // block.tokens.numel())):
            labels = padded[part][:, block.tokens.flatten()].view(len(part), -1, longest)
            cuts = None if thresholds is None else thresholds[block.features][:, part].T
            scores = _block_scores(block, labels, positives[part], labelled[part], cuts)
            for name, values in scores.items():
                table[name][block.features[:, None], part] = values.T
    return DetectionScores(**table)


def _block_scores(
    block: FiringBlock, labels: Tensor, positives: Tensor, labelled: Tensor, cuts: Float[Tensor, "concept feature"] | None
) -> dict[str, Float[Tensor, "concept feature"]]:
    is_positive = (labels == 1).float()
    hits, fired = is_positive.cumsum(2), (labels >= 0).float().cumsum(2)
    if (ends := block.ends()) is not None:  # tied values share the rank of the last of them
        ends = ends.expand_as(labels)
        hits, fired = hits.gather(2, ends), fired.gather(2, ends)
    total, of_labelled = positives[:, None].float(), labelled[:, None].float()
    retrieved = (is_positive * (hits / fired.clamp_min(1))).sum(2)
    silent = (total - hits[..., -1]) * total / of_labelled.clamp_min(1)
    iou = hits / (fired + total[..., None] - hits).clamp_min(1)
    if cuts is None:
        best = iou.argmax(2, keepdim=True)
    else:  # the last firing at the threshold or above; -1 if there is none
        best = ((block.values >= cuts[..., None]) & (block.values > 0)).sum(2, keepdim=True) - 1
    at_best = lambda table: table.gather(2, best.clamp_min(0))[..., 0] * (best[..., 0] >= 0)  # noqa: E731
    best_hits = at_best(hits)
    return {
        "ap": (retrieved + silent) / total.clamp_min(1),
        "iou": at_best(iou),
        "threshold": at_best(block.values.expand_as(iou)),
        "precision": best_hits / at_best(fired).clamp_min(1),
        "recall": best_hits / total.clamp_min(1),
    }


def average_precision(
    tokens: Int[Tensor, " firing"],
    values: Float[Tensor, " firing"],
    truth: Int8[Tensor, " token"],
    images: Int[Tensor, " token"],
    weights: Float[Tensor, "draw image"],
) -> Float[Tensor, " draw"]:
    """Return the average precision of one ranking of tokens for a concept, for each row of weights of the images.

    `tokens` are ranked by `values`; all others come last, tied. `images` holds the number of each token's image. The result is
    NaN if no image with a weight shows the concept.
    """
    order = values.argsort(descending=True)
    tokens, values = tokens[order], values[order]
    ends = FiringBlock(tokens[:0], tokens[None], values[None]).ends()
    by_token = weights[:, images[tokens]]
    positive = by_token * (truth[tokens] == 1).float()
    hits, fired = positive.cumsum(1), (by_token * (truth[tokens] >= 0).float()).cumsum(1)
    last = hits[:, -1] if hits.shape[1] else hits.new_zeros(len(hits))
    if ends is not None:
        hits, fired = hits[:, ends[0]], fired[:, ends[0]]
    retrieved = (positive * (hits / fired.clamp_min(1e-9))).sum(1)
    total, labelled = (weights @ torch.bincount(images, mask.float(), weights.shape[1]) for mask in (truth == 1, truth >= 0))
    return (retrieved + (total - last) * total / labelled) / total


def dense_average_precision(strengths: Float[Tensor, " token"], positive: Bool[Tensor, " token"]) -> Float[Tensor, ""]:
    """Return the average precision of a ranking from its strengths at all labelled tokens; equal ones are tied."""
    own, firing = strengths[positive].sort().values, strengths[strengths > 0]
    # For each token how many of `own` are not stronger; all silent tokens are alike.
    counts = torch.bincount(torch.searchsorted(own, firing, right=True), minlength=len(own) + 1)
    counts[int((own == 0).sum())] += len(strengths) - len(firing)
    hits, fired = len(own) - torch.searchsorted(own, own), len(strengths) - counts.cumsum(0)[:-1]
    return (hits / fired).sum() / max(1, len(own))


def above_chance(ap: Tensor, chance: Tensor) -> Tensor:
    """Rescale average precision to 0 for a random ranking and 1 for a perfect one: comparable for rare and common concepts."""
    return (ap - chance) / (1 - chance).clamp_min(1e-6)


def unrelated_concepts(concepts: tuple[Concept, ...], truth: Int8[Tensor, "concept token"]) -> Bool[Tensor, "concept other"]:
    """Return which concepts are unrelated: of different groups, or of one group and never at the same tokens.

    Concepts of one group overlap if one is part of the other, as a wheel of a car; one feature may detect both.
    """
    positive = (truth == 1).float()
    rarer = torch.minimum(positive.sum(1)[:, None], positive.sum(1)).clamp_min(1)
    overlap = positive @ positive.T > PART * rarer
    same_group = torch.tensor([[first.group == second.group for second in concepts] for first in concepts])
    return ~(overlap & same_group) & ~torch.eye(len(concepts), dtype=torch.bool)


def split_features(
    firings: FeatureFirings, truth: Int8[Tensor, " token"], scores: DetectionScores, concept: int
) -> tuple[int, ...]:
    """Return the features that a concept is split into (feature splitting, Bricken et al. 2023); empty if it is not split.

    Each is clean and fires at less than half of the concept's tokens, each adds some, together they cover half of them, and no
    single clean feature does.
    """
    clean, recall = scores.precision[:, concept] >= CLEAN, scores.recall[:, concept]
    candidates = (clean & (recall >= PART) & (recall < HALF)).nonzero()[:, 0]
    if bool((clean & (recall >= HALF)).any()) or len(candidates) < 2:
        return ()
    covered, parts, total = torch.zeros_like(truth, dtype=torch.bool), [], int((truth == 1).sum())
    for feature in candidates[recall[candidates].argsort(descending=True)].tolist():
        hits = firings.fires(feature, scores.threshold[feature, concept]) & (truth == 1)
        if int((hits & ~covered).sum()) >= PART * total:
            covered |= hits
            parts.append(feature)
    return tuple(parts) if len(parts) > 1 and int(covered.sum()) >= HALF * total else ()


def absorbing_features(
    firings: FeatureFirings, truth: Int8[Tensor, " token"], scores: DetectionScores, concept: int, main: int
) -> tuple[int, ...]:
    """Return the features that absorb `concept` from its feature `main` (feature absorption, Chanin et al., arXiv 2409.14507).

    There, a feature that tracks a concept is silent at some of its tokens, because a more specific feature fires that also
    contains the concept's direction. Here: `main` is clean and covers half of the concept; the other feature is clean and covers
    less; where it fires, `main` is almost always silent, and at the concept's other tokens `main` mostly fires.
    """
    if scores.precision[main, concept] < CLEAN or scores.recall[main, concept] < HALF:
        return ()
    recall = scores.recall[:, concept]
    candidates = ((scores.precision[:, concept] >= CLEAN) & (recall >= PART) & (recall < recall[main])).nonzero()[:, 0]
    positive, main_fires = truth == 1, firings.fires(main, torch.tensor(0.0))
    absorbing = []
    for feature in candidates.tolist():
        hits = firings.fires(feature, scores.threshold[feature, concept]) & positive
        if float(main_fires[hits].float().mean()) <= 1 - CLEAN and float(main_fires[positive & ~hits].float().mean()) >= HALF:
            absorbing.append(feature)
    return tuple(absorbing)


def relative_strengths(
    firings: FeatureFirings, features: Int[Tensor, " feature"], peaks: Float[Tensor, " size"]
) -> Float[Tensor, "feature token"]:
    """Return how strongly a few features fire at each token, relative to `peaks`, as a dense matrix."""
    strengths = torch.zeros(len(features), firings.token_count)
    for row, feature in zip(strengths, features.tolist(), strict=True):
        tokens, values = firings.of_feature(feature)
        row[tokens] = values / peaks[feature].clamp_min(1e-30)
    return strengths


def combine_features(
    firings: FeatureFirings, truth: Int8[Tensor, " token"], ap: Float[Tensor, " size"], max_features: int
) -> tuple[int, ...]:
    """Choose greedily up to `max_features` features that detect a concept best together, the best single one first.

    The combination fires at a token as strongly as its strongest feature does relative to its peak, so that a concept is detected
    where any of the features fires. Nothing is trained, so few tokens suffice.
    """
    candidates = ap.argsort(descending=True)[:CANDIDATES]
    strengths = relative_strengths(firings, candidates, firings.peaks)[:, truth >= 0]
    positive = truth[truth >= 0] == 1
    chosen, current, best_ap = [0], strengths[0], float(ap[candidates[0]])
    while len(chosen) < max_features:
        joined = torch.maximum(strengths, current)
        trial_ap = torch.stack([dense_average_precision(row, positive) for row in joined])
        best = int(trial_ap.argmax())
        if float(trial_ap[best]) < best_ap + 0.005:
            break
        best_ap, current = float(trial_ap[best]), joined[best]
        chosen.append(best)
    return tuple(candidates[chosen].tolist())
