"""dictionary_learning: its TopKTrainer, on given batches."""

import torch
from serving import Learner, serve
from dictionary_learning.trainers.top_k import TopKTrainer


class DictionaryLearning(Learner):
    def __init__(self, *, width: int, size: int, k: int, updates: int, first: torch.Tensor, lr: float | None = None) -> None:
        warmup = min(1000, updates // 10)
        self._trainer = TopKTrainer(
            steps=max(updates, 1),
            activation_dim=width,
            dict_size=size,
            k=k,
            layer=0,
            lm_name="none",
            lr=lr,
            warmup_steps=warmup,
            decay_start=max(warmup + 1, int(updates * 0.8)) if updates > 100 else None,
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
        y, codes = self._trainer.ae(x, output_features=True)
        return y, (codes > 0).any(0).nonzero()[:, 0]

    def decoder(self) -> torch.Tensor:
        return self._trainer.ae.decoder.weight.T


if __name__ == "__main__":
    serve(DictionaryLearning)
