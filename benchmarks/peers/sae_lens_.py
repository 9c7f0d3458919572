"""SAELens: its TopKTrainingSAE and the update of its trainer, on given batches."""

import torch
from serving import Learner, serve
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig


class SaeLens(Learner):
    def __init__(self, *, width: int, size: int, k: int, updates: int, first: torch.Tensor, lr: float | None = None) -> None:
        self._sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=width, d_sae=size, k=k, device=str(first.device)))
        self._adam = torch.optim.Adam(self._sae.parameters(), lr=lr or 3e-4, betas=(0.9, 0.999))
        self._silence = torch.zeros(size, device=first.device)
        self._firings = torch.zeros(size, device=first.device)

    def parameters(self) -> int:
        return sum(weight.nbytes for weight in self._sae.parameters())

    def update(self, x: torch.Tensor) -> None:
        out = self._sae.training_forward_pass(
            step_input=TrainStepInput(
                sae_in=x,
                dead_neuron_mask=self._silence > 1000,
                coefficients={},
                n_training_steps=1,
                is_logging_step=False,
            )
        )
        with torch.no_grad():
            firing = out.feature_acts.bool().float()
            self._silence += 1
            self._silence[firing.sum(0).bool()] = 0
            self._firings += firing.sum(0)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(self._sae.parameters(), 1.0)
        self._adam.step()
        self._adam.zero_grad()

    def encode(self, x: torch.Tensor) -> object:
        return self._sae.encode(x)

    def decode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes = self._sae.encode(x)
        return self._sae.decode(codes), (codes > 0).any(0).nonzero()[:, 0]

    def decoder(self) -> torch.Tensor:
        return self._sae.W_dec


if __name__ == "__main__":
    serve(SaeLens)
