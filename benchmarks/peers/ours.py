"""difflex as a learner, measured like its peers."""

import torch
from serving import Learner, serve

from difflex.dictionaries import SAE, Normalisation, DictionaryOrigin
from difflex.records import Site
from difflex.training import AdamConfig, TrainingConfig, default
from difflex.training.checkpoint import trained_weights
from difflex.training.fitting import learning_rate
from difflex.training.learner import Learner as Trained
from difflex.training.learner import initial_weights
from difflex.training.data import TrainingRanks


class Ours(Learner):
    def __init__(self, *, width: int, size: int, k: int, updates: int, first: torch.Tensor, adam: str = "usual") -> None:
        """`adam`: `usual` has the same moments as the peers; `default` is our preset."""
        training = default(width=width, size=size, k=k, updates=updates)
        if adam == "usual":
            training = TrainingConfig(size=size, k=k, optimiser=AdamConfig(learning_rate=training.optimiser.learning_rate))
        self._training, self._updates = training, updates
        self._learner = Trained(training, initial_weights(training, first), TrainingRanks())
        self._width, self._dictionary = width, None

    def parameters(self) -> int:
        return sum(tensor.nbytes for tensor in self._learner.parameters.weights.tensors().values())

    def update(self, x: torch.Tensor) -> None:
        number = self._learner.updates
        self._learner.update(x, learning_rate(self._training.optimiser, number, number / self._updates), measure=False)

    def encode(self, x: torch.Tensor) -> object:
        if self._dictionary is None:
            self._dictionary = self._sae()
        return self._dictionary.encode(x)

    def decode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sae = self._sae()
        codes = sae.encode(x)
        return sae.decode(codes), codes.indices[codes.values > 0]

    def decoder(self) -> torch.Tensor:
        return self._learner.parameters.weights.decoder

    def _sae(self) -> SAE:
        return SAE(
            kind="topk",
            k=self._training.k,
            origin=DictionaryOrigin(site=Site("double.0")),
            normalisation=Normalisation.identity(self._width),
            weights=trained_weights(self._learner),
        )


if __name__ == "__main__":
    serve(Ours)
