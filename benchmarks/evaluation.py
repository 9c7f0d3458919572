"""Speed of evaluation compared with training: tokens per second of processor time on one thread, in alternating rounds.

Training is the updates alone, without reading and logging; evaluation is all of `evaluate`, in both spaces and by timestep. Both
use the same dictionary and batches of 1,024 tokens, as their commands do.
"""

import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import torch

from difflex.dictionaries import SAE, DictionaryOrigin, Normalisation
from difflex.dictionaries.normalisation import VectorMoments
from difflex.evaluation import evaluate
from difflex.records import ActivationBatch, Shot, Site
from difflex.store.reading import SplitBatches
from difflex.testing import PlantedDictionary
from difflex.training import default
from difflex.training.checkpoint import trained_weights
from difflex.training.data import TrainingRanks
from difflex.training.fitting import learning_rate
from difflex.training.learner import Learner, initial_weights

torch.set_num_threads(1)
BATCH = 1024
TARGET = 1.0
"""Minimum number of tokens evaluated in the time that training takes for one."""
TIMESTEPS = (1000.0, 750.0, 500.0, 250.0)
SHOT = Shot(model="planted", pixels=(64, 64), steps=4, guidance=0.0, split="held-out")


class Shape(NamedTuple):
    """The shape of a dictionary, and the amount of work to measure."""

    width: int
    size: int
    k: int
    batches: int
    rounds: int


SHAPES = {
    "as on mini-flux": Shape(192, 2048, 32, batches=16, rounds=7),
    "as on a large model": Shape(1536, 8192, 64, batches=3, rounds=5),
}


def shot(number: int) -> Shot:
    return replace(SHOT, timestep=TIMESTEPS[number % len(TIMESTEPS)])


def held_out(batches: list[ActivationBatch]) -> Iterator[ActivationBatch]:
    """Return the same rows as a held-out split, with 64 tokens per shot."""
    return SplitBatches((rows._replace(shots=rows.shots // 64) for rows in batches), "held-out")


def compare(name: str, shape: Shape) -> float:
    """Return how many tokens are evaluated in the time that training takes for one, as the median over rounds."""
    planted = PlantedDictionary(width=shape.width, truths=shape.size // 2)
    batches = list(islice(planted.batches(BATCH), shape.batches))
    moments = VectorMoments(shape.width, covariance=False)
    for rows in batches * -(-10 * shape.width // (BATCH * shape.batches)):
        moments.add(rows.values)
    normalisation = moments.normalisation("standardise")
    training = default(width=shape.width, size=shape.size, k=shape.k)
    learner = Learner(training, initial_weights(training, normalisation.apply(batches[0].values)), TrainingRanks())

    def train() -> None:
        for rows in batches:
            learner.update(
                normalisation.apply(rows.values), learning_rate(training.optimiser, learner.updates, 0.1), measure=False
            )

    def measure() -> None:
        evaluate(dictionary(learner, normalisation, shape.k), held_out(batches), shot, device="cpu")

    tokens, times = BATCH * shape.batches, {train: [], measure: []}
    train()
    measure()
    for number in range(shape.rounds):
        for work in list(times)[:: 1 if number % 2 else -1]:
            start = time.process_time()
            work()
            times[work].append(time.process_time() - start)
    trained, measured = (tokens / statistics.median(times[work]) for work in (train, measure))
    print(f"  {name} ({shape.width} x {shape.size}, k {shape.k}): {trained:,.0f} tokens/s trained, {measured:,.0f} evaluated")
    return statistics.median(a / b for a, b in zip(times[train], times[measure], strict=True))


def dictionary(learner: Learner, normalisation: Normalisation, k: int) -> SAE:
    """Return the dictionary trained so far."""
    origin = DictionaryOrigin(site=Site("double.0"))
    return SAE(kind="topk", k=k, origin=origin, normalisation=normalisation, weights=trained_weights(learner))


def main() -> int:
    """Return 0 if the target is met at every shape, else 1."""
    speeds = {name: compare(name, shape) for name, shape in SHAPES.items()}
    success = all(speed >= TARGET for speed in speeds.values())
    text = ", ".join(f"{speed:.2f} {name}" for name, speed in speeds.items())
    print(f"evaluation: tokens evaluated per token trained on: {text} (target {TARGET}): {'met' if success else 'MISSED'}")
    return not success


if __name__ == "__main__":
    sys.exit(main())
