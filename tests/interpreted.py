"""Runs the Triton kernels in Triton's interpreter, which replaces functions of Triton for good: in a process of its own.

`python tests/interpreted.py 200` compares 200 updates, which takes minutes.
"""

import json
import os
import sys
import warnings
from dataclasses import replace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
warnings.simplefilter("ignore")

import torch  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from difflex.training import fused  # noqa: E402
from difflex.training.config import AdamConfig, AuxKLoss, TrainingConfig  # noqa: E402
from difflex.training.data import TrainingRanks  # noqa: E402
from difflex.training.gpu import UpdateEngine  # noqa: E402
from difflex.training.learner import Learner, initial_weights  # noqa: E402
from difflex.training.operations import DeviceState  # noqa: E402
from difflex.training.update import SAEParameters  # noqa: E402

WIDTH, SIZE, K, BATCH = 16, 24, 2, 6
SEARCHED = 128
PLAIN = TrainingConfig(size=SIZE, k=K, normalisation="none", auxk=None, optimiser=AdamConfig(learning_rate=1e-2))
LAZY = AdamConfig(learning_rate=1e-2, beta1=0.0, beta2=0.99, ema=0.9, clip=0.05)
CASES = {
    "plain": replace(PLAIN, relu=False, encoder_bias=False),
    "lazy": replace(PLAIN, optimiser=LAZY, pre_bias=True, auxk=AuxKLoss(k=3, dead_after=BATCH)),
}
"""Without and with everything that the kernels know."""
fused.SEGMENT = 4  # so that features of a tiny batch are popular
fused.BLOCK = 4  # so that few features are many blocks


def batch(number: int, count: int = BATCH) -> torch.Tensor:
    """Return sparse mixtures of planted directions, other ones in every batch, of which the first is in all."""
    generator = torch.Generator().manual_seed(number)
    planted = F.normalize(torch.randn(3 * WIDTH, WIDTH, generator=torch.Generator().manual_seed(99)), dim=1)
    fires = torch.rand(count, 3 * WIDTH, generator=generator) < 0.04
    fires[:, 0] = True
    return (fires * (1 + torch.rand(fires.shape, generator=generator))) @ planted + 0.1 * torch.randn(
        count, WIDTH, generator=generator
    )


def updates(config: TrainingConfig, engine: UpdateEngine | None, count: int) -> tuple[Learner, list[float]]:
    """Return a learner after some updates, and its losses."""
    learner, losses = Learner(config, initial_weights(config, batch(0)), TrainingRanks(), engine), []
    for number in range(count):
        learner.update(batch(number), config.optimiser.learning_rate)
        assert learner.metrics is not None
        losses.append(learner.metrics.loss)
    learner.parameters.apply_skipped(learner.updates)
    return learner, losses


def against_cpu(name: str, count: int, copies: torch.dtype, size: int = SIZE) -> dict[str, float]:
    """Return the largest differences between the kernels and the CPU's update."""
    config = replace(CASES[name], size=size)
    (cpu, expected), (device, losses) = (updates(config, engine, count) for engine in (None, UpdateEngine(True, copies)))
    parameters = [learner.parameters.matrices for learner in (cpu, device)]
    weights = [(parameters[0][key].weight - parameters[1][key].weight).abs().max() for key in parameters[0]]
    averages = [
        (average - other).abs().max()
        for key, matrix in parameters[0].items()
        if (average := matrix.average) is not None and (other := parameters[1][key].average) is not None
    ]
    return {
        "loss": max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True)),
        "fall": expected[-1] / expected[0],
        "weights": float(torch.stack(weights).max()),
        "averages": float(torch.stack(averages).max()) if averages else 0.0,
        "firings": float((cpu.firings != device.firings).sum()),
        "dead": float(device.metrics.dead if device.metrics else -1),
    }


def operations(copies: torch.dtype) -> dict[str, float]:
    """Return the errors of single operations against float64 formulas, and how many of the selected features differ."""
    config = replace(PLAIN, size=SEARCHED, k=3)
    weights = initial_weights(config, batch(0))
    assert weights.encoder_bias is not None
    weights.encoder_bias.copy_(0.1 * torch.randn(SEARCHED, generator=torch.Generator().manual_seed(1)))
    state = DeviceState.of(config, SAEParameters(weights, config.optimiser, TrainingRanks().by_feature), copies)
    kernels, z = fused.FusedOperations(state), batch(1, 6)
    z[:, 3] *= 20  # an outlier coordinate
    pairs = kernels.top_k(z, z.to(copies), 3)
    scores = z.double() @ weights.encoder.double().T + weights.encoder_bias.double()
    top = scores.topk(3)
    errors, square = kernels.decode(pairs, z, -1.0)
    decoder = state.decoder.double()
    y = (decoder[pairs.features] * pairs.values.double()[..., None]).sum(1) - z.double()
    pulls = (decoder[pairs.features] * errors.double()[:, None]).sum(-1)
    rows = torch.randn(SEARCHED, generator=torch.Generator().manual_seed(2))
    return {
        "selected": float((pairs.features.long().sort(1).values != top.indices.sort(1).values).sum()),
        "values": float((pairs.values.double().sort(1).values - top.values.sort(1).values).abs().max() / top.values.abs().max()),
        "decoded": float((errors.double() - y).abs().max() / y.abs().max()),
        "square": abs(float(square / y.square().sum()) - 1),
        "pulls": float((kernels.pulls(pairs.features, errors).double() - pulls).abs().max() / pulls.abs().max()),
        "rows": float((kernels.weighted_rows(rows).double() - rows.double() @ state.encoder.double()).abs().max()),
    }


def main(count: int) -> dict[str, Any]:
    """Return all that is checked, with so many updates."""
    return {
        "plain": against_cpu("plain", max(2, count // 4), torch.float32, 2 * SIZE),
        "lazy": against_cpu("lazy", count, torch.float32),
        "bfloat16": against_cpu("lazy", max(2, count // 4), torch.bfloat16),
        "operations": operations(torch.bfloat16),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(int(sys.argv[1]))))
