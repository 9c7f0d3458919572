"""sparsify as a transcoder: sparse codes of one site from which the activations of the next are predicted, on given batches."""

import torch
from serving import Learner, serve
from sparsify import SparseCoder, SparseCoderConfig


class Transcoder(Learner):
    def __init__(self, *, width: int, size: int, k: int, updates: int, first: torch.Tensor) -> None:
        """Batches hold the activations of both sites side by side."""
        self._width = width
        self._coder = SparseCoder(width, SparseCoderConfig(num_latents=size, k=k, transcode=True), device=first.device)
        self._adam = torch.optim.Adam(self._coder.parameters(), lr=2e-4 / (size / 2**14) ** 0.5)
        self._warmup = torch.optim.lr_scheduler.LambdaLR(self._adam, lambda update: min(1.0, (update + 1) / 100))
        self._silence = torch.zeros(size, dtype=torch.long, device=first.device)

    def parameters(self) -> int:
        return sum(weight.nbytes for weight in self._coder.parameters())

    def update(self, x: torch.Tensor) -> None:
        here, there = x.split(self._width, dim=1)
        out = self._coder(here, there, dead_mask=self._silence > 10_000_000)
        (out.fvu + out.auxk_loss / 32).backward()
        self._silence += len(x)
        self._silence[out.latent_indices.flatten()] = 0
        self._adam.step()
        self._adam.zero_grad()
        self._warmup.step()

    def encode(self, x: torch.Tensor) -> object:
        return self._coder.encode(x[:, : self._width])

    def decode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        here, there = x.split(self._width, dim=1)
        out = self._coder(here, there)
        return torch.cat([here, out.sae_out], dim=1), out.latent_indices[out.latent_acts > 0]

    def decoder(self) -> torch.Tensor:
        assert self._coder.W_dec is not None
        return self._coder.W_dec


if __name__ == "__main__":
    serve(Transcoder)
