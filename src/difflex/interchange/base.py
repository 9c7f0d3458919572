"""What every foreign format has: how it is recognised, read and written, and how a dictionary is made to fit it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from difflex.choices import SAEKind
from difflex.dictionaries import SAE, CodeStatistics, Dictionary, DictionaryOrigin, Normalisation, SAEWeights
from difflex.dictionaries.files import parse_choice
from difflex.errors import BadInput, BrokenFile, NonFinite
from difflex.files import Json
from difflex.interchange.source import ForeignSource


@dataclass(frozen=True, kw_only=True)
class ForeignDictionary:
    """What was read from the files of another tool."""

    make: Callable[[DictionaryOrigin, int], Dictionary]
    """Makes the dictionary, from its origin and k."""
    k: int | None
    """None if the files do not say how many features fire."""
    fires_over_thresholds: bool = False
    """Whether k is an average, which activations can tell, instead of a setting."""
    model_class: str
    """The class or architecture, in the words of the tool."""
    version: str | None = None
    """The version of the tool, if the files say it."""
    config: Mapping[str, Json]
    """The configuration as it was read."""


class FittedDictionary(NamedTuple):
    """A dictionary as a format can hold it."""

    dictionary: Dictionary
    approximations: tuple[str, ...] = ()
    """What was left out, as sentences; none if it computes the same."""


class ForeignFormat(ABC):
    """A file format of another tool."""

    name: ClassVar[str]
    """Its name in commands."""
    tool: ClassVar[str]
    """The tool that writes it."""

    @abstractmethod
    def matches(self, source: ForeignSource) -> bool:
        """Whether the files are of this format, by their names and entries."""

    @abstractmethod
    def read(self, source: ForeignSource) -> ForeignDictionary:
        """Read the files."""

    def read_statistics(self, source: ForeignSource, size: int) -> CodeStatistics | None:
        """Read what the tool measured of the codes of the `size` features; None if that is not among the files."""
        return None


class WritableFormat(ForeignFormat):
    """A file format of another tool that is written as well."""

    @abstractmethod
    def fit(self, dictionary: Dictionary, approximate: bool) -> FittedDictionary:
        """Return the dictionary as this format can hold it; raise with the reason if that changes it, unless `approximate`."""

    @abstractmethod
    def write(self, dictionary: Dictionary, folder: Path) -> list[Path]:
        """Write a dictionary that fits, and return the files."""


def foreign_sae(
    kind: SAEKind,
    *,
    encoder: Float[Tensor, "size width"],
    decoder: Float[Tensor, "size width"],
    bias: Float[Tensor, " width"],
    encoder_bias: Float[Tensor, " size"] | None,
    thresholds: Float[Tensor, " size"] | None = None,
    centres_input: bool = True,
) -> Callable[[DictionaryOrigin, int], Dictionary]:
    """Return the maker of an SAE in model space; without `centres_input`, its encoder does not subtract the bias.

    A feature without a positive code never fires, so thresholds below 0 are as good as 0.
    """
    if encoder.shape != decoder.shape:
        raise BrokenFile(
            f"The encoder {[*encoder.shape]} and the decoder {[*decoder.shape]} do not fit together. Copy them again."
        )
    size, width = encoder.shape
    if {bias.shape, *(x.shape for x in (encoder_bias, thresholds) if x is not None)} - {(width,), (size,)}:
        raise BrokenFile(f"The biases or thresholds do not fit the encoder {[size, width]}. Copy the files again.")
    if thresholds is not None and torch.isnan(thresholds).any():
        raise NonFinite("The thresholds hold NaN. Copy the files again.")

    def make(origin: DictionaryOrigin, k: int) -> Dictionary:
        weights = SAEWeights(
            encoder=encoder,
            decoder=decoder,
            bias=bias,
            pre_bias=None if centres_input else bias,
            encoder_bias=encoder_bias,
            thresholds=None if thresholds is None else thresholds.clamp_min(0),
        )
        identity = Normalisation.identity(width)
        return SAE(kind=kind, k=k, origin=origin, normalisation=identity, weights=weights)

    return make


def with_unit_rows(
    encoder: Float[Tensor, "size width"], encoder_bias: Float[Tensor, " size"], decoder: Float[Tensor, "size width"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Move the norms of decoder rows into the codes, in place where the tensors are float32."""
    encoder, decoder = encoder.float(), decoder.float()
    norms = torch.linalg.vector_norm(decoder, dim=1)
    if not bool((norms > 0).all()):
        raise BrokenFile(f"{int((norms == 0).sum())} decoder rows are zero: these features have no direction.")
    return encoder.mul_(norms[:, None]), encoder_bias * norms, decoder.div_(norms[:, None])


def gate_as_thresholds(
    encoder: Float[Tensor, "size width"],
    log_scale: Float[Tensor, " size"],
    gate_bias: Float[Tensor, " size"],
    magnitude_bias: Float[Tensor, " size"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return encoder, bias and thresholds of the SAE with thresholds that a gated SAE is (arXiv 2407.14435, appendix).

    The gate opens where `s + gate_bias > 0` and the code is `exp(log_scale) s + magnitude_bias`: both are increasing in s.
    """
    scale = log_scale.exp()
    return encoder.float().mul_(scale[:, None]), magnitude_bias, magnitude_bias - scale * gate_bias


def plain_sae(dictionary: Dictionary, format: ForeignFormat, approximate: bool, thresholds: bool = True) -> FittedDictionary:
    """Return an SAE in model space, whose codes are never negative; without `thresholds` its k largest scores fire."""
    if not isinstance(dictionary, SAE):
        raise BadInput(f"{dictionary.name} is no SAE, and {format.tool} has no dictionary of the kind '{dictionary.kind}'.")
    left_out = []
    if (clip := dictionary.normalisation.clip) is not None:
        left_out.append(f"{format.tool} cannot clip its input, which this dictionary does at {clip:g} standard deviations.")
    if not dictionary.relu:
        left_out.append(f"{format.tool} has no negative codes, which this dictionary has.")
    if dictionary.weights.thresholds is not None and not thresholds:
        left_out.append(
            f"{format.tool} keeps the {dictionary.k} largest codes of each token; this dictionary keeps those over a threshold, "
            f"{dictionary.k} on average."
        )
    refuse_approximation(dictionary, left_out, approximate)
    sae = dictionary.fold(ignore_clip=True)
    weights = sae.weights if thresholds else replace(sae.weights, thresholds=None)
    kind = "topk" if weights.thresholds is None else parse_choice("The kind of SAE", sae.kind, get_args(SAEKind))
    fitted = SAE(kind=kind, k=sae.k, origin=sae.origin, normalisation=sae.normalisation, weights=weights)
    return FittedDictionary(fitted, tuple(left_out))


def refuse_approximation(dictionary: Dictionary, left_out: list[str], approximate: bool) -> None:
    """Raise an error that gives the reasons if something is `left_out`, unless an approximation is allowed."""
    if left_out and not approximate:
        raise BadInput(
            f"{dictionary.name} cannot be written exactly: {' '.join(left_out)} --approximate writes it all the same, and "
            "measures the difference on stored activations."
        )


def encoder_bias(sae: SAE) -> Float[Tensor, " size"]:
    """The encoder bias of an SAE; zeros if it has none."""
    bias = sae.weights.encoder_bias
    return torch.zeros(sae.size, device=sae.device) if bias is None else bias


def shared_threshold(sae: SAE) -> float | None:
    """Return the threshold that all features share; None if they differ or there are none."""
    thresholds = sae.weights.thresholds
    return None if thresholds is None or bool((thresholds != thresholds[0]).any()) else float(thresholds[0])
