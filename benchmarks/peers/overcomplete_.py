"""overcomplete: its TopKSAE and the update of its `train_sae`, on given batches."""

import sys
from types import ModuleType

import matplotlib.pyplot
import torch
from serving import Learner, serve

# It asks for these when imported, for images: a name of torchvision, and one that matplotlib no longer has.
sys.modules["torchvision"] = ModuleType("torchvision")
sys.modules["torchvision"].transforms = ModuleType("transforms")  # pyright: ignore[reportAttributeAccessIssue]
if not hasattr(matplotlib.pyplot.cm, "get_cmap"):
    matplotlib.pyplot.cm.get_cmap = matplotlib.pyplot.get_cmap

from overcomplete.sae import TopKSAE  # noqa: E402 (after the lines above)


class Overcomplete(Learner):
    def __init__(self, *, width: int, size: int, k: int, updates: int, first: torch.Tensor, lr: float | None = None) -> None:
        self._sae = TopKSAE(width, size, top_k=k, device=str(first.device))
        self._adam = torch.optim.Adam(self._sae.parameters(), lr=lr or 5e-4)

    def parameters(self) -> int:
        return sum(weight.nbytes for weight in self._sae.parameters())

    def update(self, x: torch.Tensor) -> None:
        self._adam.zero_grad()
        _, _, y = self._sae(x)
        (x - y).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(self._sae.parameters(), 1.0)
        self._adam.step()

    def encode(self, x: torch.Tensor) -> object:
        return self._sae.encode(x)

    def decode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self._sae.eval()
        _, codes, y = self._sae(x)
        self._sae.train()
        return y, (codes > 0).any(0).nonzero()[:, 0]

    def decoder(self) -> torch.Tensor:
        return self._sae.get_dictionary()


if __name__ == "__main__":
    serve(Overcomplete)
