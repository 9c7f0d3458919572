"""The update in closed form equals plain autograd on dense matrices, for every kind and option."""

from dataclasses import replace
from typing import final

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from difflex.dictionaries import SAEWeights
from difflex.training.config import AdamConfig, AuxKLoss, InitConfig, JumpReLUConfig, TrainingConfig
from difflex.training.data import TrainingRanks
from difflex.training.learner import Learner, UpdateMetrics, geometric_median, initial_weights

WIDTH, SIZE, K, BATCH = 24, 96, 5, 64
PLAIN = TrainingConfig(size=SIZE, k=K, normalisation="none", auxk=None, optimiser=AdamConfig(learning_rate=3e-3))
AUXK = AuxKLoss(k=6, dead_after=BATCH)
MATRYOSHKA = replace(PLAIN, kind="matryoshka", prefixes=(16, 48))
JUMP = replace(PLAIN, kind="jumprelu", jumprelu=JumpReLUConfig(bandwidth=0.8, coefficient=0.1))


def batch(number: int, width: int = WIDTH, count: int = BATCH) -> Tensor:
    """Return sparse mixtures of planted directions, other ones in every batch."""
    generator = torch.Generator().manual_seed(number)
    planted = F.normalize(torch.randn(3 * width, width, generator=torch.Generator().manual_seed(99)), dim=1)
    fires = torch.rand(count, 3 * width, generator=generator) < 0.06
    amounts = fires * (1 + 3 * torch.rand(count, 3 * width, generator=generator))
    return amounts @ planted + 0.1 * torch.randn(count, width, generator=generator) + 0.3


@final
class Reference:
    """The same training, written simply: dense codes, autograd, Adam on whole matrices."""

    def __init__(self, config: TrainingConfig, weights: SAEWeights) -> None:
        self.config = config
        self.weights = {name: tensor.clone().requires_grad_() for name, tensor in weights.tensors().items()}
        beta = (config.optimiser.beta1, config.optimiser.beta2)
        self.adam = torch.optim.Adam(self.weights.values(), betas=beta, eps=config.optimiser.eps)
        self.silence = torch.zeros(config.size, dtype=torch.long)
        self.average = {name: tensor.detach().clone() for name, tensor in self.weights.items()}

    def update(self, z: Tensor, lr: float) -> float:
        weights, settings = self.weights, self.config.optimiser
        loss, error = self._loss(z)
        self.adam.zero_grad()
        loss.backward()
        rows = weights["decoder"]
        assert rows.grad is not None
        rows.grad -= (rows.grad * rows.detach()).sum(1, keepdim=True) * rows.detach()
        if settings.clip is not None:
            gradients = [tensor.grad for tensor in weights.values() if tensor.grad is not None]
            length = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
            torch._foreach_mul_(gradients, min(1.0, settings.clip / length.item()))
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        with torch.no_grad():
            rows /= rows.norm(dim=1, keepdim=True)
            for name, tensor in weights.items():
                self.average[name].lerp_(tensor, 1 - (settings.ema or 0))
        return error

    def _loss(self, z: Tensor) -> tuple[Tensor, float]:
        config, weights = self.config, self.weights
        scores = (z - weights["bias"] + weights.get("pre_bias", 0)) @ weights["encoder"].T
        if "encoder_bias" in weights:
            scores = scores + weights["encoder_bias"]
        values, sparsity = self._values(scores)
        losses = []
        for size in (*config.prefixes, config.size):
            y = values[:, :size] @ weights["decoder"][:size] + weights["bias"]
            losses.append((y - z).square().mean())
        loss = torch.stack(losses).mean() + sparsity
        dead = self.silence > config.auxk.dead_after if config.auxk else self.silence < 0
        if config.auxk and dead.any():
            loss = loss + self._auxk(scores, values, z, dead, config.auxk)
        fired = (values > 0).any(0)
        self.silence = torch.where(fired, 0, self.silence + len(z))
        return loss, losses[-1].item()

    def _values(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        config, none = self.config, torch.zeros(())
        if config.kind == "jumprelu":
            values = Jump.apply(scores, self.weights["thresholds"], config.jumprelu.bandwidth)
            steps = Step.apply(scores, self.weights["thresholds"], config.jumprelu.bandwidth)
            return values, config.jumprelu.coefficient * (steps.sum(1).mean() / config.k - 1).square()
        if config.kind == "topk":
            top = scores.topk(config.k)
            selected = torch.zeros_like(scores).scatter(1, top.indices, top.values)
            return (selected.relu() if config.relu else selected), none
        smallest = scores.flatten().topk(config.k * len(scores)).values[-1]
        return scores * (scores >= smallest.clamp_min(1e-30)), none

    def _auxk(self, scores: Tensor, values: Tensor, z: Tensor, dead: Tensor, auxk: AuxKLoss) -> Tensor:
        of_dead = scores[:, dead]
        top = of_dead.topk(min(auxk.k, of_dead.shape[1]))
        selected = torch.zeros_like(of_dead).scatter(1, top.indices, top.values)
        output = (selected.relu() if self.config.relu else selected) @ self.weights["decoder"][dead]
        y = values @ self.weights["decoder"]
        if auxk.target == "reconstruction":
            return auxk.coefficient * (output - y).square().mean()
        residual = (z - self.weights["bias"] - y).detach()
        return auxk.coefficient * (output - residual).square().mean() / residual.square().mean()


class Jump(torch.autograd.Function):
    """`score * [score > threshold]`, with a rectangle as the derivative by the threshold."""

    @staticmethod
    def forward(ctx, scores, threshold, bandwidth):
        ctx.save_for_backward(scores, threshold)
        ctx.bandwidth = bandwidth
        return scores * (scores > threshold)

    @staticmethod
    def backward(ctx, *gradients):
        (gradient,) = gradients
        scores, threshold = ctx.saved_tensors
        near = ((scores - threshold).abs() < ctx.bandwidth / 2) / ctx.bandwidth
        return gradient * (scores > threshold), -(threshold * near * gradient).sum(0), None


class Step(torch.autograd.Function):
    """`[score > threshold]`, likewise, without a derivative by the score."""

    @staticmethod
    def forward(ctx, scores, threshold, bandwidth):
        ctx.save_for_backward(scores, threshold)
        ctx.bandwidth = bandwidth
        return (scores > threshold).to(scores.dtype)

    @staticmethod
    def backward(ctx, *gradients):
        (gradient,) = gradients
        scores, threshold = ctx.saved_tensors
        near = ((scores - threshold).abs() < ctx.bandwidth / 2) / ctx.bandwidth
        return None, -(near * gradient).sum(0), None


def measured(learner: Learner) -> UpdateMetrics:
    """Return the metrics of the last update."""
    assert learner.metrics is not None
    return learner.metrics


def both(config: TrainingConfig, updates: int = 40) -> tuple[Learner, Reference, list[UpdateMetrics]]:
    """Return the learner and the reference after the same updates, with equal losses, and the metrics."""
    weights = initial_weights(config, batch(0))
    # In float64, as Adam divides by the gradient's own size: in float32 the rounding of a tiny gradient moves a weight.
    learner = Learner(
        config, SAEWeights(**{name: tensor.double() for name, tensor in weights.tensors().items()}), TrainingRanks()
    )
    reference = Reference(config, learner.parameters.weights)
    metrics = []
    for number in range(updates):
        lr = config.optimiser.learning_rate * min(1, (number + 1) / 5)
        loss = reference.update(batch(number).double(), lr)
        learner.update(batch(number).double(), lr)
        metrics.append(measured(learner))
        assert metrics[-1].loss == pytest.approx(loss, rel=1e-9)
    learner.parameters.apply_skipped(learner.updates)
    return learner, reference, metrics


CASES = {
    "topk": PLAIN,
    "topk without relu": replace(PLAIN, relu=False, encoder_bias=False),
    "topk with pre-bias": replace(PLAIN, relu=False, encoder_bias=False, pre_bias=True),
    "topk auxk": replace(PLAIN, auxk=AUXK),
    "topk auxk reconstruction": replace(PLAIN, relu=False, auxk=replace(AUXK, target="reconstruction")),
    "topk clipped": replace(PLAIN, optimiser=AdamConfig(learning_rate=3e-3, clip=0.05)),
    "topk averaged": replace(PLAIN, optimiser=AdamConfig(learning_rate=3e-3, ema=0.9)),
    "lazy": replace(PLAIN, optimiser=AdamConfig(learning_rate=3e-3, beta1=0.0, beta2=0.99, eps=1e-10, ema=0.9, clip=0.3)),
    "lazy with pre-bias": replace(
        PLAIN, pre_bias=True, optimiser=AdamConfig(learning_rate=3e-3, beta1=0.0, beta2=0.99, ema=0.9, clip=0.05)
    ),
    "pre-bias auxk reconstruction": replace(PLAIN, pre_bias=True, relu=False, auxk=replace(AUXK, target="reconstruction")),
    "lazy auxk": replace(PLAIN, auxk=AUXK, optimiser=AdamConfig(learning_rate=3e-3, beta1=0.0)),
    "orthogonal": replace(PLAIN, initialisation=InitConfig(directions="orthogonal", gain=0.6, bias="median")),
    "batchtopk": replace(PLAIN, kind="batchtopk"),
    "batchtopk auxk": replace(PLAIN, kind="batchtopk", auxk=AUXK),
    "matryoshka": MATRYOSHKA,
    "matryoshka auxk": replace(MATRYOSHKA, auxk=AUXK),
    "matryoshka auxk reconstruction": replace(MATRYOSHKA, auxk=replace(AUXK, target="reconstruction")),
    "jumprelu": JUMP,
    "jumprelu auxk": replace(JUMP, auxk=AUXK),
}


@pytest.mark.parametrize("name", CASES)
def test_every_kind_gets_the_weights_of_plain_autograd(name: str):
    learner, reference, metrics = both(CASES[name])
    weights: SAEWeights = learner.parameters.weights
    for key, tensor in weights.tensors().items():
        torch.testing.assert_close(tensor, reference.weights[key].detach(), atol=1e-8, rtol=0)
        average = learner.parameters.matrices[key].average
        if average is not None:
            torch.testing.assert_close(average, reference.average[key], atol=1e-8, rtol=0)
    assert torch.equal(learner.silence, reference.silence)
    assert (max(entry.dead for entry in metrics) > 0) == ("auxk" in name)


def test_gradients_are_longer_than_the_clip_in_the_cases_that_clip():
    for name in ("topk clipped", "lazy", "lazy with pre-bias"):
        clip = CASES[name].optimiser.clip
        assert clip is not None
        assert all(entry.gradient is not None and entry.gradient > clip for entry in both(CASES[name], 3)[2])


def test_the_loss_follows_the_reference_for_200_updates():
    config = replace(PLAIN, size=2048, k=16, auxk=replace(AUXK, dead_after=2000))
    learner, reference = (
        Learner(config, initial_weights(config, batch(0, 64)), TrainingRanks()),
        Reference(config, initial_weights(config, batch(0, 64))),
    )
    loss = torch.inf
    for number in range(200):
        loss = reference.update(batch(number, 64, 256), 1e-3)
        learner.update(batch(number, 64, 256), 1e-3)
        assert measured(learner).loss == pytest.approx(loss, rel=5e-3)
    assert loss < 0.5 * batch(0, 64).var().item()


def test_decoder_rows_keep_length_one():
    learner, *_ = both(PLAIN)
    torch.testing.assert_close(learner.parameters.weights.decoder.norm(dim=1), torch.ones(SIZE, dtype=torch.float64))


def test_rows_that_do_not_fire_are_skipped_if_beta1_is_zero():
    config = replace(PLAIN, optimiser=AdamConfig(beta1=0.0), size=960)
    learner = Learner(config, initial_weights(config, batch(0)), TrainingRanks())
    before = learner.parameters.weights.encoder.clone()
    learner.update(batch(0)[:4], 1e-2)
    moved = (learner.parameters.weights.encoder != before).any(1)
    assert 0 < int(moved.sum()) <= 4 * K
    assert torch.equal(moved, learner.parameters.last_update == 1)


def test_batchtopk_keeps_k_per_token_on_average_but_not_each():
    config = replace(PLAIN, kind="batchtopk")
    learner = Learner(config, initial_weights(config, batch(0)), TrainingRanks())
    for number in range(5):
        learner.update(batch(number), 1e-3)
        assert measured(learner).l0 == K
    assert learner.inference_threshold is not None and learner.inference_threshold > 0


def test_the_geometric_median_ignores_an_outlier_and_has_the_least_distance():
    points = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    points[0] = 1e6
    median = geometric_median(points)
    assert median.norm() < 0.2 < points.mean(0).norm()
    distance = (points - median).norm(dim=1).sum()
    for shift in 0.05 * torch.eye(3):
        assert (points - median - shift).norm(dim=1).sum() > distance
