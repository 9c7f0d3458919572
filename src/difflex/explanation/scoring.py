"""What judgements say of an explanation: accuracy, AUROC, and how far both may lie by chance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from difflex.errors import BadInput
from difflex.features.explanations import ExplanationScore, Judgement

__all__ = ["MeanEstimate", "accuracy", "auroc", "estimate", "p_value", "scores"]

DRAWS = 2000
LEVEL = 0.95


class MeanEstimate(NamedTuple):
    """A mean, and where 95 % of the means lie when what it is of is drawn again."""

    value: float
    low: float
    high: float
    of: int
    """How many values."""


def accuracy(wanted: Bool[Tensor, "*draw judgement"], scores: Float[Tensor, "*draw judgement"]) -> Float[Tensor, "*draw"]:
    """The mean of the score where the feature's own images are judged, of 1 - score where others are: 0.5 is chance."""
    return torch.where(wanted, scores, 1 - scores).mean(-1)


def auroc(wanted: Bool[Tensor, "*draw judgement"], scores: Float[Tensor, "*draw judgement"]) -> Float[Tensor, "*draw"]:
    """The share of pairs of an own and another image in which the own scores higher, equal ones by half; NaN without pairs."""
    higher = (scores[..., :, None] > scores[..., None, :]).float() + (scores[..., :, None] == scores[..., None, :]) / 2
    pairs = (wanted[..., :, None] & ~wanted[..., None, :]).float()
    return (higher * pairs).sum((-2, -1)) / pairs.sum((-2, -1))


def scores(judgements: Sequence[Judgement], seed: int = 0) -> list[ExplanationScore]:
    """Accuracy and AUROC of one explanation; intervals from judgements drawn again, own and other ones each among themselves."""
    wanted = torch.tensor([each.fires for each in judgements], dtype=torch.bool)
    given = torch.tensor([each.score for each in judgements], dtype=torch.float64)
    if not wanted.any() or wanted.all():
        raise BadInput("An explanation was scored on images of one side alone. Judge some of the feature and some of others.")
    generator = torch.Generator().manual_seed(seed)
    sides = [side.nonzero()[:, 0] for side in (wanted, ~wanted)]
    drawn = torch.cat([side[torch.randint(len(side), (DRAWS, len(side)), generator=generator)] for side in sides], dim=1)
    measures: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"accuracy": accuracy, "auroc": auroc}
    found = []
    for name, measure in measures.items():
        low, high = _bounds(measure(wanted[drawn], given[drawn]))
        found.append(ExplanationScore(name, float(measure(wanted, given)), low, high, len(judgements)))
    return found


def estimate(values: Sequence[float], seed: int = 0) -> MeanEstimate:
    """The mean of `values`; its interval from values drawn again."""
    if not values:
        raise BadInput("A mean was asked of no values. Explain at least one feature.")
    each = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    means = torch.stack([each[torch.randint(len(each), (len(each),), generator=generator)].mean() for _ in range(DRAWS)])
    return MeanEstimate(float(each.mean()), *_bounds(means), len(values))


def p_value(one: Sequence[float], other: Sequence[float], seed: int = 0, draws: int = 10_000) -> float:
    """How often the means differ as much as those of `one` and `other` when values are shuffled between the two.

    A permutation test of two sides; never 0, as what was found is one of the shuffles.
    """
    values = torch.tensor([*one, *other], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    shuffles = (torch.randperm(len(values), generator=generator)[: len(one)] for _ in range(draws))
    sums = torch.stack([values[: len(one)].sum(), *(values[shuffle].sum() for shuffle in shuffles)])
    differences = (sums / len(one) - (values.sum() - sums) / len(other)).abs()
    return int((differences >= differences[0] - 1e-12).sum()) / (1 + draws)


def _bounds(draws: Float[Tensor, " draw"]) -> tuple[float, float]:
    low, high = draws.quantile(torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=draws.dtype)).tolist()
    return low, high
