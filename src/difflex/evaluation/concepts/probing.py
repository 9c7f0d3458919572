"""What a linear probe finds in activations: the ceiling that single features are held against."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int8
from torch import Tensor
from torch.nn import functional as F

from difflex.evaluation.concepts.labelled import LabelledActivations

__all__ = ["probed"]

MOST = 32_768
"""Training tokens of a probe at most."""
ITERATIONS = 40


def probed(labelled: LabelledActivations, *, ridge: float = 1e-4, seed: int = 0) -> Float[Tensor, "concept token"]:
    """How strongly each token speaks for each concept: logits of logistic regressions learned from the images not held out."""
    train = (~labelled.held_out).nonzero()[:, 0]
    if len(train) > MOST:
        train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:MOST]]
    mean, axes = _isotropic(labelled.values[train])
    weights, bias = _regressed((labelled.values[train] - mean) @ axes, labelled.truth[:, train], ridge)
    return (((labelled.values - mean) @ (axes @ weights)) + bias).T


def _isotropic(x: Float[Tensor, "token width"]) -> tuple[Tensor, Tensor]:
    """Mean and axes in which `x` has variance 1 in all directions: descent is quick there, and ridge treats all alike."""
    mean = x.double().mean(0)
    variances, directions = torch.linalg.eigh((x.double() - mean).T @ (x.double() - mean) / len(x))
    floor = variances.max().clamp_min(1e-30) * 1e-6  # what hardly varies must not be blown up to noise
    return mean.float(), (directions / (variances.clamp_min(0) + floor).sqrt()).float()


def _regressed(x: Float[Tensor, "token width"], truth: Int8[Tensor, "concept token"], ridge: float) -> tuple[Tensor, Tensor]:
    """Weights [width, concept] and bias of one logistic regression for each concept, all at once."""
    known, target = (truth.T >= 0).float(), (truth.T == 1).float()
    share = known / known.sum(0).clamp_min(1)
    weights = torch.zeros(x.shape[1], len(truth), requires_grad=True)
    bias = torch.logit((target * share).sum(0).clamp(1e-4, 1 - 1e-4)).requires_grad_()
    optimiser = torch.optim.LBFGS([weights, bias], max_iter=ITERATIONS, history_size=10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        each = F.binary_cross_entropy_with_logits(x @ weights + bias, target, weight=share, reduction="sum")
        whole = each + ridge * weights.square().sum()
        whole.backward()
        return whole

    with torch.enable_grad():
        optimiser.step(loss)
    return weights.detach(), bias.detach()
