"""dictionary_learning: its GatedSAETrainer, on given batches."""

import torch
from dictionary_learning.trainers.gdm import GatedSAETrainer
from serving import Learner, serve

LEARNING_RATE = 3e-4
"""Its default, 5e-5, is for many times the updates of the leaderboard."""


class Gated(Learner):
    def __init__(self, *, width: int, size: int, k: int, updates: int, first: torch.Tensor, penalty: float = 1.0) -> None:
        """`penalty` decides how many features fire; there is no k."""
        warmup = min(1000, updates // 10)
        self._trainer = GatedSAETrainer(
            steps=max(updates, 1),
            activation_dim=width,
            dict_size=size,
            layer=0,
            lm_name="none",
            lr=LEARNING_RATE,
            l1_penalty=penalty,
            warmup_steps=warmup,
            sparsity_warmup_steps=warmup or None,
            seed=0,
            device=str(first.device),
        )
        self._done = 0

    def parameters(self) -> int:
        return sum(weight.nbytes for weight in self._trainer.ae.parameters())

    def update(self, x: torch.Tensor) -> None:
        self._trainer.update(self._done, x)
        self._done += 1

    def encode(self, x: torch.Tensor) -> object:
        return self._trainer.ae.encode(x)

    def decode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes = self._trainer.ae.encode(x)
        return self._trainer.ae.decode(codes), (codes > 0).any(0).nonzero()[:, 0]

    def decoder(self) -> torch.Tensor:
        return self._trainer.ae.decoder.weight.T


if __name__ == "__main__":
    serve(Gated)
