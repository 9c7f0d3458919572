"""How concepts and features stand to each other: unrelated concepts, split ones, absorbed ones, and few features together."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int8
from torch import Tensor

from difflex.evaluation.concepts.detection import DetectionScores, FeatureFirings, scores
from difflex.evaluation.concepts.labelled import Concept

__all__ = ["absorbers", "over_chance", "pieces", "together", "unrelated"]

CLEAN = 0.8
"""From this precision on, a feature fires for a concept and little else."""
HALF = 0.5
PART = 0.05
"""A share of a concept's tokens under this is no part worth telling of."""
CANDIDATES = 16
"""Features that are looked at together, for each concept."""


def unrelated(concepts: tuple[Concept, ...], truth: Int8[Tensor, "concept token"]) -> Bool[Tensor, "concept other"]:
    """Which concepts have nothing to do with each other: of different groups, or of one group and never at the same tokens.

    Of one group, concepts overlap where one is part of the other, as a wheel of a car: a feature may be true to both.
    """
    shown = (truth == 1).float()
    least = torch.minimum(shown.sum(1)[:, None], shown.sum(1)).clamp_min(1)
    overlap = shown @ shown.T > PART * least
    same_group = torch.tensor([[one.group == other.group for other in concepts] for one in concepts])
    return ~(overlap & same_group) & ~torch.eye(len(concepts), dtype=torch.bool)


def over_chance(ap: Tensor, chance: Tensor) -> Tensor:
    """Average precision with a ranking by chance at 0 and a perfect one at 1: so common and rare concepts compare."""
    return (ap - chance) / (1 - chance).clamp_min(1e-6)


def pieces(firings: FeatureFirings, truth: Int8[Tensor, " token"], found: DetectionScores, concept: int) -> tuple[int, ...]:
    """The features that share `concept` among them: feature splitting, as in Bricken et al. 2023. Empty where it is not split.

    Each is clean and fires at less than half of the concept's tokens, each adds some, together they have half of them; and
    no single clean feature has.
    """
    clean, recall = found.precision[:, concept] >= CLEAN, found.recall[:, concept]
    parts = (clean & (recall >= PART) & (recall < HALF)).nonzero()[:, 0]
    if bool((clean & (recall >= HALF)).any()) or len(parts) < 2:
        return ()
    covered, kept, count = torch.zeros_like(truth, dtype=torch.bool), [], int((truth == 1).sum())
    for feature in parts[recall[parts].argsort(descending=True)].tolist():
        mine = fires(firings, feature, found.threshold[feature, concept]) & (truth == 1)
        if int((mine & ~covered).sum()) >= PART * count:
            covered |= mine
            kept.append(feature)
    return tuple(kept) if len(kept) > 1 and int(covered.sum()) >= HALF * count else ()


def absorbers(
    firings: FeatureFirings, truth: Int8[Tensor, " token"], found: DetectionScores, concept: int, main: int
) -> tuple[int, ...]:
    """The features that take `concept` away from its feature `main`: feature absorption (Chanin et al., arXiv 2409.14507).

    There, a feature that tracks a concept is silent at some of its tokens, because a more specific feature fires that holds the
    concept's direction too. Here that is: `main` is clean and has half of the concept; the other is clean and has less of it;
    where the other fires, `main` is nearly always silent, and at the concept's other tokens it mostly is not.
    """
    if found.precision[main, concept] < CLEAN or found.recall[main, concept] < HALF:
        return ()
    recall = found.recall[:, concept]
    others = ((found.precision[:, concept] >= CLEAN) & (recall >= PART) & (recall < recall[main])).nonzero()[:, 0]
    shown, speaks = truth == 1, fires(firings, main, torch.tensor(0.0))
    taken = []
    for other in others.tolist():
        here = fires(firings, other, found.threshold[other, concept]) & shown
        if float(speaks[here].float().mean()) <= 1 - CLEAN and float(speaks[shown & ~here].float().mean()) >= HALF:
            taken.append(other)
    return tuple(taken)


def fires(firings: FeatureFirings, feature: int, cut: Tensor) -> Bool[Tensor, " token"]:
    """Where `feature` fires at `cut` or above."""
    tokens, values = firings.one(feature)
    return torch.zeros(firings.of, dtype=torch.bool).index_fill_(0, tokens[values >= cut], True)


def strengths(firings: FeatureFirings, features: Tensor, peaks: Float[Tensor, " size"]) -> Float[Tensor, "feature token"]:
    """How strongly some features fire at each token, in units of their peaks; a dense matrix of few rows."""
    made = torch.zeros(len(features), firings.of)
    for row, feature in zip(made, features.tolist(), strict=True):
        tokens, values = firings.one(feature)
        row[tokens] = values / peaks[feature].clamp_min(1e-30)
    return made


def together(
    firings: FeatureFirings, truth: Int8[Tensor, " token"], ap: Float[Tensor, " size"], peaks: Float[Tensor, " size"], most: int
) -> tuple[int, ...]:
    """Up to `most` features that detect a concept best together, the best single one first; each added one must help.

    Together they say at each token what the strongest of them says, in units of its peak: a concept is there where any of its
    features is, as where a dictionary has split it. Nothing is learned, so that few tokens suffice.
    """
    candidates = ap.argsort(descending=True)[:CANDIDATES]
    each = strengths(firings, candidates, peaks)
    chosen, current, reached = [0], each[0], float(ap[candidates[0]])
    while len(chosen) < most:
        joined = torch.maximum(each, current)
        rows, tokens = joined.nonzero(as_tuple=True)
        tried = FeatureFirings.sorted(tokens, rows, joined[rows, tokens], len(candidates), firings.of)
        gains = scores(tried, truth[None]).ap[:, 0]
        best = int(gains.argmax())
        if float(gains[best]) < reached + 0.005:
            break
        reached, current = float(gains[best]), joined[best]
        chosen.append(best)
    return tuple(candidates[chosen].tolist())
