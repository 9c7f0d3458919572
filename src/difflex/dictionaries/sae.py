"""The sparse autoencoders: TopK, BatchTopK, JumpReLU and Matryoshka, which differ in what they keep, not in what they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal, final, get_args

from jaxtyping import Float
from torch import Tensor

from difflex.dictionaries.base import DictionaryOrigin, DictionaryState, NormalisedDictionary
from difflex.dictionaries.normalisation import Normalisation
from difflex.dictionaries.scores import EncoderSearch
from difflex.dictionaries.sparse import padded
from difflex.errors import BadInput, BrokenFile, UnknownName
from difflex.records import Codes

__all__ = ["KINDS", "SAE", "Kind", "SAEWeights", "kind_of"]

Kind = Literal["topk", "batchtopk", "jumprelu", "matryoshka"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, kw_only=True)
class SAEWeights:
    """The tensors of a sparse autoencoder, in its normalised space z: `a = (z - bias) encoder^T + encoder_bias`."""

    encoder: Float[Tensor, "size width"]
    decoder: Float[Tensor, "size width"]
    """Unit rows."""
    bias: Float[Tensor, " width"]
    encoder_bias: Float[Tensor, " size"] | None = None
    floor: Float[Tensor, " size"] | None = None
    """What a feature must exceed to fire; None where the k largest fire."""

    def named(self) -> dict[str, Tensor]:
        """The tensors there are, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> SAEWeights:
        """The weights among `tensors`, by the names that `named` gives."""
        if missing := [name for name in ("encoder", "decoder", "bias") if name not in tensors]:
            raise BrokenFile(f"An autoencoder's file lacks the tensors {', '.join(missing)}: train or copy it again.")
        size, width = tensors["encoder"].shape
        shapes = {"encoder": (size, width), "decoder": (size, width), "bias": (width,), "encoder_bias": (size,), "floor": (size,)}
        found = {field.name: tensors[field.name].float() for field in fields(cls) if field.name in tensors}
        if wrong := [name for name, tensor in found.items() if tensor.shape != shapes[name]]:
            raise BrokenFile(f"In an autoencoder's file {', '.join(wrong)} do not fit the encoder: train or copy it again.")
        return cls(**found)


@final
class SAE(NormalisedDictionary, kinds=KINDS):
    """A trained sparse autoencoder behind the interface of every dictionary."""

    def __init__(
        self,
        *,
        kind: Kind,
        k: int,
        origin: DictionaryOrigin,
        normalisation: Normalisation,
        weights: SAEWeights,
        relu: bool = True,
    ) -> None:
        """The dictionary that shares `weights`; without `relu`, negative scores among the k largest are kept as they are."""
        self.kind, self.k, self.origin = kind, k, origin
        self.normalisation, self.weights, self.relu = normalisation, weights, relu
        self.atoms, self.bias = weights.decoder, weights.bias
        if kind in ("batchtopk", "jumprelu", "matryoshka") and weights.floor is None:
            raise BadInput(f"A {kind} autoencoder needs the floors of its features; without them it would be a topk.")
        if not 0 < k <= self.size:
            raise BadInput(f"k {k} does not fit a dictionary of size {self.size}: choose k between 1 and the size.")

    @property
    def label(self) -> str:
        """`<kind>-<size>-k<k>`, and what else was asked of its training."""
        return f"{super().label}{self.origin.training.get('variant', '')}"

    def encode(self, x: Float[Tensor, "token width"]) -> Codes:
        z = self.normalisation.apply(self._checked(x)) - self.bias
        floor = self.weights.floor
        if floor is not None:
            rows = padded(self._scores.above(z, floor), len(z), empty=0.0)
            order = rows.values.argsort(dim=1, descending=True, stable=True)
            return Codes(rows.values.gather(1, order), rows.indices.gather(1, order))
        top = self._scores.top(z, self.k)
        return Codes(top.values.relu_(), top.indices) if self.relu else top

    def fold(self) -> SAE:
        """The same dictionary with its normalisation inside the weights: z is model space, decoder rows lose length one."""
        normal, weights = self.normalisation, self.weights
        if normal.clip is not None:
            raise BadInput(f"{self.name} clips its normalised input at {normal.clip}; a clip cannot become part of the weights.")
        if normal.method == "none":
            return self
        # z - bias = (x - mean) V / s - bias, so a row w of the encoder becomes (w / s) V^T around the restored bias.
        scaled = weights.encoder / normal.scale
        encoder = scaled if normal.basis is None else scaled @ normal.basis.T
        folded = SAEWeights(
            encoder=encoder,
            decoder=normal.spread(weights.decoder),
            bias=self.constant,
            encoder_bias=weights.encoder_bias,
            floor=weights.floor,
        )
        identity = Normalisation.identity(self.width, self.bias.device)
        return SAE(kind=kind_of(self.kind), k=self.k, origin=self.origin, normalisation=identity, weights=folded, relu=self.relu)

    def saved(self) -> DictionaryState:
        settings = {"relu": self.relu, "normalisation": self.normalisation.settings()}
        tensors = {**self.weights.named(), **self.normalisation.tensors()}
        return DictionaryState(kind=self.kind, k=self.k, origin=self.origin, settings=settings, tensors=tensors)

    @classmethod
    def restored(cls, saved: DictionaryState) -> SAE:
        stated = saved.settings.get("normalisation")
        return cls(
            kind=kind_of(saved.kind),
            k=saved.k,
            origin=saved.origin,
            normalisation=Normalisation.of(stated if isinstance(stated, dict) else {}, saved.tensors),
            weights=SAEWeights.of(saved.tensors),
            relu=saved.settings.get("relu") is not False,
        )

    @cached_property
    def _scores(self) -> EncoderSearch:
        """Built at the first `encode`: the search keeps a copy of the encoder."""
        return EncoderSearch(self.weights.encoder, self.weights.encoder_bias)


def kind_of(name: str) -> Kind:
    """The kind of that name; an error that lists the kinds where there is none."""
    for kind in KINDS:
        if kind == name:
            return kind
    raise UnknownName.among("The kind of autoencoder", name, KINDS)
