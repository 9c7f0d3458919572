"""overcomplete (KempnerInstitute/overcomplete): a `state_dict` that `torch.save` wrote, without a configuration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import final, get_args

import torch
from torch import Tensor

from difflex.choices import SAEKind
from difflex.dictionaries import SAE, Dictionary
from difflex.dictionaries.files import parse_choice
from difflex.errors import BadInput, BrokenFile
from difflex.interchange.base import (
    FittedDictionary,
    ForeignDictionary,
    WritableFormat,
    encoder_bias,
    foreign_sae,
    plain_sae,
    refuse_approximation,
)
from difflex.interchange.source import ForeignSource, ForeignTensors
from difflex.interchange.writing import write_plain_pickle

WEIGHTS = "state_dict.pt"
ENCODER = "encoder.final_block.0"
SMALLEST = 1e-30
"""What a threshold of 0 is written as: their logarithms are stored."""


@final
class OvercompleteFormat(WritableFormat):
    """The format of overcomplete 0.3: `TopKSAE` and `JumpSAE` with a linear encoder, also with an archetypal dictionary."""

    name, tool = "overcomplete", "overcomplete"

    def matches(self, source: ForeignSource) -> bool:
        return (source.file is not None and source.file.suffix in (".pt", ".pth")) or source.has(WEIGHTS)

    def read(self, source: ForeignSource) -> ForeignDictionary:
        tensors = source.tensors(source.file.name if source.file else WEIGHTS)
        _check_class(tensors)
        if others := sorted(name for name in tensors.names if name.startswith("encoder.") and not name.startswith(f"{ENCODER}.")):
            raise BadInput(f"{tensors.path}: its encoder is not linear ({', '.join(others)[:200]}), and cannot be read.")
        encoder, archetypal = tensors.matrix(f"{ENCODER}.weight"), "dictionary.C" in tensors.names
        size, width = encoder.shape
        rows = _archetypal_rows(tensors) if archetypal else _unit_rows(tensors)
        decoder = rows.mul_(torch.tensor(tensors.number("dictionary.multiplier")).exp())
        thresholds = tensors.vector("thresholds", size).exp() if "thresholds" in tensors.names else None
        make = foreign_sae(
            "topk" if thresholds is None else "jumprelu",
            encoder=encoder,
            decoder=decoder,
            bias=torch.zeros(width),
            encoder_bias=tensors.vector(f"{ENCODER}.bias", size),
            thresholds=thresholds,
        )
        return ForeignDictionary(
            make=make,
            k=None,
            fires_over_thresholds=thresholds is not None,
            model_class=f"{'RA' if archetypal else ''}{'TopKSAE' if thresholds is None else 'JumpSAE'}",
            config={},
        )

    def fit(self, dictionary: Dictionary, approximate: bool) -> FittedDictionary:
        fitted, left_out = plain_sae(dictionary, self, approximate)
        assert isinstance(fitted, SAE)
        reasons = []
        if bool((fitted.constant != 0).any()):
            reasons.append("overcomplete has no decoder bias, which this dictionary has.")
        norms = torch.linalg.vector_norm(fitted.weights.decoder, dim=1)
        if bool(((norms - norms.mean()).abs() > 1e-5 * norms.mean()).any()):
            reasons.append("overcomplete has decoder rows of one norm, and those of this dictionary differ in model space.")
        refuse_approximation(dictionary, reasons, approximate)
        if not reasons:
            return FittedDictionary(fitted, left_out)
        weights = fitted.weights
        weights = replace(
            weights,
            encoder_bias=encoder_bias(fitted) - weights.encoder @ weights.bias,
            bias=torch.zeros_like(weights.bias),
            decoder=weights.decoder * (norms.mean() / norms)[:, None],
        )
        kind = parse_choice("The kind of SAE", fitted.kind, get_args(SAEKind))
        plain = SAE(kind=kind, k=fitted.k, origin=fitted.origin, normalisation=fitted.normalisation, weights=weights)
        return FittedDictionary(plain, (*left_out, *reasons))

    def write(self, dictionary: Dictionary, folder: Path) -> list[Path]:
        assert isinstance(dictionary, SAE)
        weights = dictionary.weights
        norm = torch.linalg.vector_norm(weights.decoder, dim=1).mean()
        state = {
            f"{ENCODER}.weight": weights.encoder,
            f"{ENCODER}.bias": encoder_bias(dictionary),
            "dictionary._weights": weights.decoder,
            "dictionary.multiplier": norm.log(),
        }
        if weights.thresholds is not None:
            state["thresholds"] = weights.thresholds.clamp_min(SMALLEST).log()
        return [write_plain_pickle(folder / WEIGHTS, state)]


def _check_class(tensors: ForeignTensors) -> None:
    """Refuse the files of classes that no dictionary here computes as, by the tensors that only they have or lack."""
    names = tensors.names
    if "Q" in names:
        raise BadInput(f"{tensors.path} is of a QSAE, which rounds its codes to learned levels: no dictionary here does that.")
    if names == {"dictionary._weights", "dictionary.multiplier"}:
        raise BadInput(
            f"{tensors.path} is of an MpSAE or an OMPSAE. Both have the same file, which does not say by which pursuit codes are "
            "found. SAELens files of matching_pursuit say it, and are read."
        )
    if f"{ENCODER}.weight" not in names or not {"dictionary._weights", "dictionary.C"} & names:
        raise BadInput(
            f"{tensors.path} is not of a TopKSAE or JumpSAE with a linear encoder: it has {', '.join(sorted(names))[:300]}."
        )


def _unit_rows(tensors: ForeignTensors) -> Tensor:
    """Return the decoder rows at norm one: they are divided by it whenever they are used, with a small constant as there."""
    rows = tensors.matrix("dictionary._weights").float()
    return rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True) + 1e-8)


def _archetypal_rows(tensors: ForeignTensors) -> Tensor:
    """Return the decoder rows of a relaxed archetypal dictionary: means of points with weights, and a difference from them."""
    weights, points, rest = (tensors.matrix(f"dictionary.{name}").float() for name in ("W", "C", "Relax"))
    if weights.shape[1] != len(points) or rest.shape != (len(weights), points.shape[1]):
        shapes = f"W {[*weights.shape]}, C {[*points.shape]} and Relax {[*rest.shape]}"
        raise BrokenFile(f"{tensors.path}: the shapes of {shapes} do not fit together. Copy it again.")
    weights = weights.relu()
    return (weights / (weights.sum(1, keepdim=True) + 1e-8)) @ points + rest
