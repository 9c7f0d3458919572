"""sparsify (EleutherAI) with Adam: the update of its trainer, on given batches."""

import torch
from serving import Learner, serve
from sparsify import SparseCoder, SparseCoderConfig


class Sparsify(Learner):
    def __init__(self, *, width: int, size: int, k: int, updates: int, first: torch.Tensor, lr: float | None = None) -> None:
        self._coder = SparseCoder(width, SparseCoderConfig(num_latents=size, k=k), device=first.device)
        self._coder.b_dec.data = first.mean(0)
        self._lr = lr or 2e-4 / (size / 2**14) ** 0.5
        self._adam = torch.optim.Adam(self._coder.parameters(), lr=self._lr)
        self._warmup = torch.optim.lr_scheduler.LambdaLR(self._adam, lambda update: min(1.0, (update + 1) / 100))
        self._silence = torch.zeros(size, dtype=torch.long, device=first.device)

    def parameters(self) -> int:
        return sum(weight.nbytes for weight in self._coder.parameters())

    def update(self, x: torch.Tensor) -> None:
        self._coder.set_decoder_norm_to_unit_norm()
        out = self._coder(x, dead_mask=self._silence > 10_000_000)
        (out.fvu + out.auxk_loss / 32).backward()
        self._silence += len(x)
        self._silence[out.latent_indices.flatten()] = 0
        self._coder.remove_gradient_parallel_to_decoder_directions()
        self._adam.step()
        self._adam.zero_grad()
        self._warmup.step()

    def encode(self, x: torch.Tensor) -> object:
        return self._coder.encode(x)

    def decode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self._coder(x)
        return out.sae_out, out.latent_indices[out.latent_acts > 0]

    def decoder(self) -> torch.Tensor:
        assert self._coder.W_dec is not None
        return self._coder.W_dec


if __name__ == "__main__":
    serve(Sparsify)
