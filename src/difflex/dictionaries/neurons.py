"""The identity dictionary: the neurons of an MLP as features, so that the baseline needs no special case anywhere."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from difflex.dictionaries.base import Dictionary, DictionaryOrigin, DictionaryState
from difflex.errors import BadInput
from difflex.records import Codes

__all__ = ["Neurons"]


@final
class Neurons(Dictionary, kinds=("neurons",)):
    """Every axis of a `:neurons` site is a feature; the k largest by absolute value are kept, with their signs."""

    kind = "neurons"

    def __init__(self, *, width: int, k: int, origin: DictionaryOrigin, device: torch.device | str = "cpu") -> None:
        """The dictionary of `width` neurons."""
        if origin.site.kind != "neurons":
            raise BadInput(
                f"{origin.site} has no neurons. Name the site of an MLP's activations, such as {origin.site.path}:neurons."
            )
        if not 0 < k <= width:
            raise BadInput(f"k {k} does not fit {width} neurons: choose k between 1 and {width}.")
        self.k, self.origin = k, origin
        self._constant = torch.zeros(width, device=device)

    @property
    def size(self) -> int:
        return len(self._constant)

    @property
    def width(self) -> int:
        return len(self._constant)

    @property
    def constant(self) -> Float[Tensor, " width"]:
        return self._constant

    def encode(self, x: Float[Tensor, "token width"]) -> Codes:
        x = self._checked(x)
        indices = x.abs().topk(self.k, dim=1).indices
        return Codes(x.gather(1, indices), indices)

    def delta(self, codes: Codes) -> Float[Tensor, "token width"]:
        made = codes.values.new_zeros(len(codes.values), self.width)
        return made.scatter_add_(1, codes.indices, codes.values)

    def decoder_of(self, features: Int[Tensor, " feature"]) -> Float[Tensor, "feature width"]:
        rows = self._constant.new_zeros(len(features), self.width)
        return rows.scatter_(1, features[:, None], 1.0)

    def saved(self) -> DictionaryState:
        return DictionaryState(kind=self.kind, k=self.k, origin=self.origin, settings={}, tensors={"constant": self._constant})

    @classmethod
    def restored(cls, saved: DictionaryState) -> Neurons:
        constant = saved.tensors["constant"]
        return cls(width=len(constant), k=saved.k, origin=saved.origin, device=constant.device)
