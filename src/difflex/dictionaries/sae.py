"""Sparse autoencoders (SAEs): TopK, BatchTopK, JumpReLU and Matryoshka, which differ in the features they keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import final, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from difflex.choices import SAEKind
from difflex.dictionaries.base import DictionaryOrigin, DictionaryState, NormalisedDictionary
from difflex.dictionaries.files import parse_choice
from difflex.dictionaries.normalisation import Normalisation
from difflex.dictionaries.sparse import EncoderSearch
from difflex.errors import BadInput, BrokenFile
from difflex.records import Codes

KINDS = get_args(SAEKind)
ROWS = 4096
"""Features that are folded at a time, so that little memory is needed besides the result."""


@dataclass(frozen=True, kw_only=True)
class SAEWeights:
    """The weights of an SAE in its normalised space z, with scores `(z - bias + pre_bias) encoder^T + encoder_bias`."""

    encoder: Float[Tensor, "size width"]
    decoder: Float[Tensor, "size width"]
    """Rows of norm one."""
    bias: Float[Tensor, " width"]
    pre_bias: Float[Tensor, " width"] | None = None
    """What the encoder adds to its input, so that it need not be centred where the decoder is (arXiv 2505.24360)."""
    encoder_bias: Float[Tensor, " size"] | None = None
    thresholds: Float[Tensor, " size"] | None = None
    """The score above which each feature fires; None if the k largest fire."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are not None, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> SAEWeights:
        """Return the weights among `tensors`, which may hold others."""
        if missing := [name for name in ("encoder", "decoder", "bias") if name not in tensors]:
            raise BrokenFile(f"The weights of an SAE lack {', '.join(missing)}.")
        size, width = tensors["encoder"].shape
        shapes = {"encoder": (size, width), "decoder": (size, width), "bias": (width,), "pre_bias": (width,)}
        weights = {field.name: tensors[field.name].float() for field in fields(cls) if field.name in tensors}
        if wrong := [name for name, tensor in weights.items() if tensor.shape != shapes.get(name, (size,))]:
            raise BrokenFile(f"In the weights of an SAE, {', '.join(wrong)} do not fit the encoder [{size}, {width}].")
        return cls(**weights)


@final
class SAE(NormalisedDictionary, kinds=KINDS):
    """A trained sparse autoencoder."""

    def __init__(
        self,
        *,
        kind: SAEKind,
        k: int,
        origin: DictionaryOrigin,
        normalisation: Normalisation,
        weights: SAEWeights,
        relu: bool = True,
    ) -> None:
        """Make an SAE that shares `weights`; without `relu`, negative scores among the k largest are kept."""
        self.kind, self.k, self.origin = kind, k, origin
        self.normalisation, self.weights, self.relu = normalisation, weights, relu
        self.atoms, self.bias = weights.decoder, weights.bias
        if kind != "topk" and weights.thresholds is None:
            raise BadInput(f"A {kind} SAE needs the thresholds of its features; without them it would be a topk SAE.")
        if not 0 < k <= self.size:
            raise BadInput(f"k {k} does not fit a dictionary of size {self.size}: choose k between 1 and the size.")
        if weights.thresholds is not None and bool((weights.thresholds < 0).any()):
            raise BadInput("The thresholds of an SAE are scores of features that fire: they cannot be negative.")
        if zero := int((torch.linalg.vector_norm(weights.decoder, dim=1) == 0).sum()):
            raise BadInput(f"{zero} of the {self.size} decoder rows are zero: these features have no direction.")

    @property
    def label(self) -> str:
        """`<kind>-<size>-k<k>`, followed by the variant of its training."""
        return f"{super().label}{self.origin.training.get('variant', '')}"

    def encode(self, x: Float[Tensor, "token width"]) -> Codes:
        # In one difference: a pre-bias may undo the bias exactly.
        offset = self.bias if self.weights.pre_bias is None else self.bias - self.weights.pre_bias
        z = self.normalisation.apply(self._validated(x)) - offset
        if self.weights.thresholds is not None:
            codes = self._search.above(z, self.weights.thresholds).to_codes(len(z), fill=0.0)
            order = codes.values.argsort(dim=1, descending=True, stable=True)
            return Codes(codes.values.gather(1, order), codes.indices.gather(1, order))
        top = self._search.top_k(z, self.k)
        return Codes(top.values.relu_(), top.indices) if self.relu else top

    @cached_property
    def _search(self) -> EncoderSearch:
        return EncoderSearch(self.weights.encoder, self.weights.encoder_bias)

    def fold(self, *, ignore_clip: bool = False) -> SAE:
        """Return the same SAE with its normalisation and its pre-bias folded into the weights, as other tools expect an SAE.

        z is then model space, and decoder rows have any norm. A clip has no place in the weights: with `ignore_clip`, the folded
        SAE encodes activations beyond it as they are, which is an approximation. `normalisation.clipped_share(x)` measures the
        share of values for which that makes a difference.
        """
        normalisation, weights = self.normalisation, self.weights
        if normalisation.clip is not None and not ignore_clip:
            raise BadInput(
                f"{self.name} clips its normalised input at {normalisation.clip:g}, which no weights can express. "
                "`fold(ignore_clip=True)` leaves it out; `normalisation.clipped_share(x)` says how many values it changes."
            )
        if normalisation.method == "none" and normalisation.clip is None and weights.pre_bias is None:
            return self
        encoder_bias = weights.encoder_bias
        if weights.pre_bias is not None:
            by_pre_bias = weights.encoder @ weights.pre_bias
            encoder_bias = by_pre_bias if encoder_bias is None else encoder_bias + by_pre_bias
        # z - bias = (x - mean) V / s - bias, so a row w of the encoder becomes (w / s) V^T around the restored bias.
        basis, encoder, decoder = normalisation.basis, torch.empty_like(weights.encoder), torch.empty_like(weights.decoder)
        for start in range(0, self.size, ROWS):
            rows = slice(start, start + ROWS)
            scaled = weights.encoder[rows] / normalisation.scale
            encoder[rows] = scaled if basis is None else scaled @ basis.T
            decoder[rows] = normalisation.restore_delta(weights.decoder[rows])
        folded = SAEWeights(
            encoder=encoder,
            decoder=decoder,
            bias=self.constant,
            encoder_bias=encoder_bias,
            thresholds=weights.thresholds,
        )
        identity = Normalisation.identity(self.width, self.bias.device)
        kind = parse_choice("The kind of SAE", self.kind, KINDS)
        return SAE(kind=kind, k=self.k, origin=self.origin, normalisation=identity, weights=folded, relu=self.relu)

    def state(self) -> DictionaryState:
        settings = {"relu": self.relu, "normalisation": self.normalisation.settings()}
        tensors = {**self.weights.tensors(), **self.normalisation.tensors()}
        return DictionaryState(kind=self.kind, k=self.k, origin=self.origin, settings=settings, tensors=tensors)

    @classmethod
    def from_state(cls, state: DictionaryState) -> SAE:
        return cls(
            kind=parse_choice("The kind of SAE", state.kind, KINDS),
            k=state.k,
            origin=state.origin,
            normalisation=Normalisation.from_saved(state.normalisation, state.tensors),
            weights=SAEWeights.from_tensors(state.tensors),
            relu=parse_choice("The setting relu", state.settings.get("relu"), (True, False)),
        )
