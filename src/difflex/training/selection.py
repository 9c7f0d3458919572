"""What fires: the pairs that each kind of autoencoder keeps from a batch, and what their values mean for the loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from difflex.dictionaries.scores import EncoderSearch
from difflex.dictionaries.sparse import SparsePairs
from difflex.training.config import JumpReLUConfig, TrainingConfig
from difflex.training.team import Team

__all__ = ["ActivePairs", "among_dead", "kept"]

SLOTS = 2
"""Times k: how many scores per token the first batch of a batch-wise kind looks at to find its threshold."""


class ActivePairs(NamedTuple):
    """The pairs that an update is about, token by token."""

    pairs: SparsePairs
    open: Bool[Tensor, " pair"] | None = None
    """Where a feature fires; None for everywhere. The rest is just under its floor."""
    slopes: Float[Tensor, " pair"] | None = None
    pushes: Float[Tensor, " pair"] | None = None
    threshold: float | None = None
    """The smallest value that a batch-wise kind kept."""


def kept(
    config: TrainingConfig,
    scores: EncoderSearch,
    z: Float[Tensor, "token width"],
    *,
    team: Team,
    floor: Float[Tensor, " size"] | None,
    threshold: float | None,
) -> ActivePairs:
    """The pairs of the batch `z` that fire; `threshold` is the last batch's, for kinds that have one."""
    if config.kind == "jumprelu":
        assert floor is not None
        return _over_floor(scores, z, floor, config.jump, config.k, team)
    if config.kind == "topk":
        return ActivePairs(_top(scores, z, config.k, config.relu, team))
    return _top_of_batch(scores, z, config.k, threshold, team)


def among_dead(
    scores: EncoderSearch, dead: Int[Tensor, " dead"], z: Float[Tensor, "token width"], k: int, relu: bool, team: Team
) -> SparsePairs:
    """The k largest scores of the dead features of every token."""
    bias = None if scores.bias is None else scores.bias[dead]
    if len(dead) == 0 and team.shards == 1:
        return SparsePairs(dead, dead, z.new_zeros(0))
    pairs = _top(EncoderSearch(scores.rows[dead], bias), z, k, relu, team)
    return pairs._replace(features=dead[pairs.features])


def _top(scores: EncoderSearch, z: Float[Tensor, "token width"], k: int, relu: bool, team: Team) -> SparsePairs:
    size = len(scores.rows)
    found = scores.top(z, min(k, size))
    values, features = found.values, found.indices
    if team.shards > 1 and values.shape[1] < k:  # all ranks bring k slots; those without a feature never win
        lacking = k - values.shape[1]
        values = torch.nn.functional.pad(values, (0, lacking), value=-torch.inf)
        features = torch.nn.functional.pad(features, (0, lacking))
    wanted = team.largest(values, k) & (values > (0 if relu else -torch.inf))
    tokens, slots = wanted.nonzero(as_tuple=True)
    return SparsePairs(tokens, features[tokens, slots], values[tokens, slots])


def _top_of_batch(
    scores: EncoderSearch, z: Float[Tensor, "token width"], k: int, threshold: float | None, team: Team
) -> ActivePairs:
    """As many of the largest positive scores as there are tokens times k, whichever token they belong to."""
    wanted = int(team.sum(torch.tensor([len(z) * k], device=z.device))) // team.shards
    if threshold is None:
        first = scores.top(z, min(SLOTS * k, len(scores.rows))).values.flatten()
        threshold = _smallest_of(team.gather(first), wanted)
    guess = max(0.0, threshold) * 0.95
    while True:
        pairs = scores.above(z, torch.full_like(scores.rows[:, 0], guess))
        values = team.gather(pairs.values)
        if len(values) >= wanted or guess == 0:
            break
        guess = guess / 2 if guess > 1e-6 else 0.0
    smallest = _smallest_of(values, wanted) if len(values) else 0.0
    enough = pairs.values >= smallest
    return ActivePairs(SparsePairs(*(part[enough] for part in pairs)), threshold=smallest)


def _smallest_of(values: Float[Tensor, " value"], count: int) -> float:
    """The smallest of the `count` largest values."""
    return float(values.kthvalue(max(1, len(values) - count + 1)).values)


def _over_floor(
    scores: EncoderSearch,
    z: Float[Tensor, "token width"],
    floor: Float[Tensor, " size"],
    jump: JumpReLUConfig,
    k: int,
    team: Team,
) -> ActivePairs:
    """What exceeds its floor, and what is near it: the step's derivative is a rectangle (Rajamanoharan et al. 2024)."""
    pairs = scores.above(z, floor - jump.bandwidth / 2)
    over = pairs.values - floor[pairs.features]
    fires, near = over > 0, (over < jump.bandwidth / 2).float() / jump.bandwidth
    count, tokens = team.sum(torch.tensor([float(fires.sum()), float(len(z))], device=z.device)).tolist()
    tokens /= team.shards
    # d/d floor of strength * (features per token / k - 1)^2, and of the step in value = score * [score > floor]
    push = -jump.strength * 2 * (count / tokens / k - 1) / k / tokens
    return ActivePairs(
        pairs._replace(values=pairs.values * fires), open=fires, slopes=-floor[pairs.features] * near, pushes=push * near
    )
