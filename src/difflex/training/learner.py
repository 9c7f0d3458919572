"""A learner: one dictionary in training, one update at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from difflex.dictionaries.sae import SAEWeights
from difflex.dictionaries.sparse import SparsePairs, sums
from difflex.errors import NonFinite
from difflex.training.config import TrainingConfig
from difflex.training.selection import ActivePairs, among_dead, kept
from difflex.training.team import Team
from difflex.training.update import SAEParameters, UpdateInputs

__all__ = ["Learner", "UpdateMetrics"]

DEAD_AFTER = 1_000_000
"""Tokens without firing after which a feature counts as dead where nothing revives it."""
FORGETTING = 0.01
"""Share of the learned inference threshold that an update replaces."""


@dataclass(frozen=True, kw_only=True)
class UpdateMetrics:
    """One update in numbers, over the batches of all ranks."""

    loss: float
    """Mean squared error in z."""
    fvu: float
    """Fraction of the batch's variance unexplained, in z."""
    active: float
    """Features per token."""
    dead: float
    """Share of features that have not fired for as long as `Revival.after` says."""
    gradient: float | None
    """Length of the whole gradient, before it was shortened; None where it was not asked for."""


class ReconstructionErrors(NamedTuple):
    """What is wrong with the reconstructions of the tokens that this rank encoded."""

    layers: list[Float[Tensor, "token width"]]
    """Derivatives of the loss: one by what each prefix adds, and, where features are dead, one by what these add."""
    bias: Float[Tensor, " width"]
    """The derivative by the bias, as far as it is part of the reconstructions."""
    square: Float[Tensor, ""]
    """The summed squared error."""


@final
class Learner:
    """The state of one dictionary in training; `update` moves it by one batch."""

    def __init__(self, config: TrainingConfig, weights: SAEWeights, team: Team) -> None:
        """The state before the first update; `weights` are this rank's, and are moved in place."""
        self.config, self.team = config, team
        self.parameters = SAEParameters(weights, config.optimiser, total=team.total)
        size, device = len(weights.encoder), weights.encoder.device
        self.updates = self.tokens = 0
        self.silence = torch.zeros(size, dtype=torch.long, device=device)
        """Tokens since each feature last fired."""
        self.firings = torch.zeros(size, dtype=torch.long, device=device)
        """Tokens at which each feature has fired."""
        self.threshold: float | None = None
        """The smallest value kept from the last batch, where that is chosen over the batch."""
        self.floor: float | None = None
        """Its running average: the floor at inference."""
        self.last: UpdateMetrics | None = None
        self._prefixes = torch.tensor(config.prefixes, dtype=torch.long, device=device)
        self._first_feature = team.rows(config.size).start

    def update(self, z: Float[Tensor, "token width"], lr: float, *, measured: bool = True) -> UpdateMetrics:
        """Learn from the batch whose share of this rank is `z`; the measures are of the whole batch."""
        z = self.team.seen(z)
        sums_of_z = self.team.over_tokens(torch.cat([z.new_tensor([len(z)]), _square(z)[None], z.sum(0)]).double())
        count, variance = int(sums_of_z[0]), float(sums_of_z[1] - _square(sums_of_z[2:]) / sums_of_z[0])
        centred = z - self.parameters.weights.bias
        found = self._found(centred)
        errors, revived = self._errors(found.pairs, centred, count)
        square = float(self.team.over_tokens(errors.square))
        if not math.isfinite(square):
            raise NonFinite(f"The loss became {square}; the weights were not moved.")
        length = self.parameters.update(
            self._work(found, revived, errors, centred), number=self.updates + 1, lr=lr, measured=measured
        )
        fired = self._take_note(found, count)
        self.last = UpdateMetrics(
            loss=square / count / z.shape[1],
            fvu=square / max(variance, 1e-30),
            active=fired / count,
            dead=float(self.team.total(self._dead().sum())) / self.config.size,
            gradient=length,
        )
        return self.last

    def _found(self, centred: Float[Tensor, "token width"]) -> ActivePairs:
        """What fires at the tokens that this rank encodes."""
        parameters = self.parameters
        return kept(
            self.config,
            parameters.scores,
            centred,
            team=self.team,
            floor=parameters.weights.floor,
            threshold=self.threshold,
        )

    def _errors(
        self, pairs: SparsePairs, centred: Float[Tensor, "token width"], count: int
    ) -> tuple[ReconstructionErrors, SparsePairs | None]:
        """The errors in the batch of `count` tokens on all ranks, and what dead features say, where any are dead."""
        decoder, layer_of = self.parameters.weights.decoder, self._layer_of(pairs)
        y, layers = torch.zeros_like(centred), []
        for layer in range(len(self._prefixes) + 1):
            inside = SparsePairs(*(part[layer_of == layer] for part in pairs)) if len(self._prefixes) else pairs
            y += self.team.total(_reconstructed(inside, decoder, len(centred)))
            layers.append(y - centred)
        square = _square(layers[-1])
        revived, asked = self._revived(centred, y, layers[-1], square, count)
        # A feature is part of its own prefix and of every longer one, so it answers for the sum of their errors.
        scale = 2 / (count * centred.shape[1] * len(layers))
        bias = torch.stack([layer.sum(0) for layer in layers]).sum(0) * scale
        for layer in layers:
            layer.mul_(scale)
        for layer in reversed(range(len(layers) - 1)):
            layers[layer] += layers[layer + 1]
        if asked is not None:
            layers.append(asked)
            if self.config.revival is not None and self.config.revival.target == "reconstruction":
                for layer in layers[:-1]:  # all features answer for the whole reconstruction
                    layer -= asked
        return ReconstructionErrors(layers, bias, square), revived

    def _revived(
        self, centred: Float[Tensor, "token width"], y: Tensor, error: Tensor, square: Tensor, count: int
    ) -> tuple[SparsePairs | None, Float[Tensor, "token width"] | None]:
        """What dead features say of their target, and the derivative of the second loss by it; nothing where none are dead."""
        revival, team = self.config.revival, self.team
        dead = self._dead().nonzero()[:, 0]
        if revival is None or int(total := team.total(torch.tensor(len(dead), device=dead.device))) == 0:
            return None, None
        slots = min(revival.k, int(total))
        pairs = among_dead(self.parameters.scores, dead, centred, slots, self.config.relu, team)
        said = team.total(_reconstructed(pairs, self.parameters.weights.decoder, len(centred)))
        if revival.target == "reconstruction":
            return pairs, (said - y).mul_(revival.coefficient * 2 / (count * centred.shape[1]))
        # (said - residual)^2 / residual^2, and the residual is minus the error
        whole = float(team.over_tokens(square))
        return pairs, (said + error).mul_(revival.coefficient * 2 / max(whole, 1e-30))

    def _work(
        self, found: ActivePairs, revived: SparsePairs | None, errors: ReconstructionErrors, centred: Float[Tensor, "token width"]
    ) -> UpdateInputs:
        """All that the update needs, from all ranks that encoded other tokens, in the order of features."""
        pairs, layers = found.pairs, self._layer_of(found.pairs)
        open_, slopes, pushes = found.open, found.slopes, found.pushes
        if revived is not None:
            pairs = SparsePairs(*(torch.cat(both) for both in zip(pairs, revived, strict=True)))
            layers = torch.cat([layers, torch.full_like(revived.features, len(errors.layers) - 1)])
            if open_ is not None and slopes is not None and pushes is not None:
                none = torch.zeros_like(revived.values)
                open_, slopes, pushes = torch.cat([open_, none == 0]), torch.cat([slopes, none]), torch.cat([pushes, none])
        pooled = self.team.pooled
        tokens = pooled(pairs.tokens + self.team.first_token(len(centred)))
        features, order = torch.sort(pooled(pairs.features), stable=True)
        stacked = errors.layers[0] if len(errors.layers) == 1 else torch.stack(errors.layers, dim=1).flatten(0, 1)
        return UpdateInputs(
            features=features,
            tokens=tokens[order],
            rows=(tokens * len(errors.layers) + pooled(layers))[order],
            values=pooled(pairs.values)[order],
            open=None if open_ is None else pooled(open_)[order],
            slopes=None if slopes is None else pooled(slopes)[order],
            pushes=None if pushes is None else pooled(pushes)[order],
            z=pooled(centred),
            errors=pooled(stacked),
            bias=self.team.over_tokens(errors.bias),
        )

    def _take_note(self, found: ActivePairs, count: int) -> float:
        """Count the update and who fired in it; how many pairs fired in all."""
        fired = torch.bincount(found.pairs.features[found.pairs.values > 0], minlength=len(self.silence))
        fired = self.team.over_tokens(fired)
        self.silence = torch.where(fired > 0, 0, self.silence + count)
        self.firings += fired
        self.updates, self.tokens = self.updates + 1, self.tokens + count
        if found.threshold is not None:
            self.threshold = found.threshold
            self.floor = found.threshold if self.floor is None else self.floor + FORGETTING * (found.threshold - self.floor)
        return float(self.team.total(fired.sum()))

    def _dead(self) -> Bool[Tensor, " size"]:
        """Which features of this rank are dead."""
        revival = self.config.revival
        return self.silence > (revival.after if revival is not None else DEAD_AFTER)

    def _layer_of(self, pairs: SparsePairs) -> Int[Tensor, " pair"]:
        """The prefix that each pair's feature belongs to."""
        if not len(self._prefixes):
            return torch.zeros_like(pairs.features)
        return torch.bucketize(pairs.features + self._first_feature, self._prefixes, right=True)


def _reconstructed(pairs: SparsePairs, decoder: Float[Tensor, "size width"], count: int) -> Float[Tensor, "token width"]:
    """`sum value * decoder[feature]` for each of `count` tokens, from pairs that come token by token."""
    starts = torch.searchsorted(pairs.tokens, torch.arange(count, device=decoder.device))
    return sums(decoder, pairs.features, pairs.values, starts)


def _square(x: Tensor) -> Float[Tensor, ""]:
    """The summed squares."""
    return torch.linalg.vector_norm(x).square()
