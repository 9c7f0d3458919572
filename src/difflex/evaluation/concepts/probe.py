"""Linear probes: logistic regressions of concepts on activations, the ceiling of what a direction can detect."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor
from torch.nn import functional as F

PROBE_TOKENS = 32_768
"""Maximum number of training tokens of a probe."""
PROBE_ITERATIONS = 40


class LinearProbe(NamedTuple):
    """One logistic regression per concept."""

    mean: Float[Tensor, " width"]
    weights: Float[Tensor, "width concept"]
    bias: Float[Tensor, " concept"]

    @classmethod
    def fit(cls, x: Float[Tensor, "token width"], truth: Int8[Tensor, "concept token"], ridge: float) -> LinearProbe:
        """Fit the regressions to activations and the concepts they show."""
        mean, axes = _whitening(x)
        weights, bias = _logistic_regression((x - mean) @ axes, truth.to(x.device), ridge)
        return cls(mean, axes @ weights, bias)

    def logits(self, x: Float[Tensor, "token width"]) -> Float[Tensor, "token concept"]:
        """Return the logits of all concepts at activations."""
        return (x - self.mean) @ self.weights + self.bias


def probe_tokens(train: Int[Tensor, " token"], seed: int) -> Int[Tensor, " token"]:
    """Return the tokens that a probe is fitted to, of the training tokens."""
    if len(train) <= PROBE_TOKENS:
        return train
    return train[torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:PROBE_TOKENS]]


def _whitening(x: Float[Tensor, "token width"]) -> tuple[Tensor, Tensor]:
    """Return the mean and axes in which `x` has unit variance in all directions: descent is fast, and ridge treats all alike."""
    mean = x.double().mean(0)
    variances, directions = torch.linalg.eigh((x.double() - mean).T @ (x.double() - mean) / len(x))
    floor = variances.max().clamp_min(1e-30) * 1e-6  # so that nearly constant directions are not amplified to noise
    return mean.float(), (directions / (variances.clamp_min(0) + floor).sqrt()).float()


def _logistic_regression(
    x: Float[Tensor, "token width"], truth: Int8[Tensor, "concept token"], ridge: float
) -> tuple[Tensor, Tensor]:
    """Return weights [width, concept] and bias of one logistic regression per concept, all trained at once."""
    labelled, target = (truth.T >= 0).float(), (truth.T == 1).float()
    share = labelled / labelled.sum(0).clamp_min(1)
    weights = torch.zeros(x.shape[1], len(truth), device=x.device, requires_grad=True)
    bias = torch.logit((target * share).sum(0).clamp(1e-4, 1 - 1e-4)).requires_grad_()
    optimiser = torch.optim.LBFGS([weights, bias], max_iter=PROBE_ITERATIONS, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        cross_entropy = F.binary_cross_entropy_with_logits(x @ weights + bias, target, weight=share, reduction="sum")
        loss = cross_entropy + ridge * weights.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimiser.step(closure)
    return weights.detach(), bias.detach()
