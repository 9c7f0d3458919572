"""dictionary_learning (saprmarks/dictionary_learning): `ae.pt` and `config.json`, for seven classes."""

from __future__ import annotations

from pathlib import Path
from typing import final

import torch
from torch import Tensor

from difflex.choices import SAEKind
from difflex.dictionaries import SAE, Dictionary
from difflex.errors import BadInput
from difflex.interchange.base import (
    FittedDictionary,
    ForeignDictionary,
    WritableFormat,
    encoder_bias,
    foreign_sae,
    gate_as_thresholds,
    plain_sae,
    shared_threshold,
    with_unit_rows,
)
from difflex.interchange.source import ForeignConfig, ForeignSource, ForeignTensors
from difflex.interchange.writing import write_config, write_plain_pickle

CONFIG, WEIGHTS = "config.json", "ae.pt"
KINDS: dict[str, SAEKind] = {
    "AutoEncoder": "jumprelu",
    "AutoEncoderNew": "jumprelu",
    "GatedAutoEncoder": "jumprelu",
    "JumpReluAutoEncoder": "jumprelu",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batchtopk",
    "MatryoshkaBatchTopKSAE": "matryoshka",
}
CLASS_BY_TENSOR = {
    "group_sizes": "MatryoshkaBatchTopKSAE",
    "gate_bias": "GatedAutoEncoder",
    "W_enc": "JumpReluAutoEncoder",
    "decoder.bias": "AutoEncoderNew",
    "bias": "AutoEncoder",
}
"""The class by a tensor that only it has, for files without a configuration; the first that is there counts."""


@final
class DictionaryLearningFormat(WritableFormat):
    """The format of dictionary_learning 0.1."""

    name, tool = "dictionary-learning", "dictionary_learning"

    def matches(self, source: ForeignSource) -> bool:
        return source.has(WEIGHTS)

    def read(self, source: ForeignSource) -> ForeignDictionary:
        config, tensors = source.json(CONFIG), source.tensors(WEIGHTS)
        trainer = config.inner("trainer")
        model_class = _class(trainer, tensors)
        kind = KINDS[model_class]
        bias_name = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias", "GatedAutoEncoder": "decoder_bias"}
        upright = "encoder.weight" in tensors.names
        encoder = tensors.matrix("encoder.weight") if upright else tensors.matrix("W_enc").T
        decoder = tensors.matrix("decoder.weight").T if upright else tensors.matrix("W_dec")
        size, width = encoder.shape
        if model_class == "GatedAutoEncoder":
            vectors = (tensors.vector(name, size) for name in ("r_mag", "gate_bias", "mag_bias"))
            encoder, scores_bias, thresholds = gate_as_thresholds(encoder, *vectors)
        else:
            scores_bias = tensors.vector("encoder.bias" if upright else "b_enc", size)
            thresholds = _thresholds(model_class, tensors, size)
        if model_class == "AutoEncoder" and not _has_unit_rows(decoder):  # as it does itself when it loads one
            encoder, scores_bias, decoder = with_unit_rows(encoder, scores_bias, decoder)
        make = foreign_sae(
            kind,
            encoder=encoder,
            decoder=decoder,
            bias=tensors.vector(bias_name.get(model_class, "b_dec"), width),
            encoder_bias=scores_bias,
            thresholds=thresholds,
            centres_input=model_class not in ("AutoEncoderNew", "JumpReluAutoEncoder"),
        )
        k = None if kind == "jumprelu" else tensors.count("k")
        return ForeignDictionary(
            make=make, k=k, fires_over_thresholds=thresholds is not None, model_class=model_class, config=config.entries
        )

    def fit(self, dictionary: Dictionary, approximate: bool) -> FittedDictionary:
        return plain_sae(dictionary, self, approximate)

    def write(self, dictionary: Dictionary, folder: Path) -> list[Path]:
        assert isinstance(dictionary, SAE)
        model_class = self._class_for(dictionary)
        trainer = {
            "dict_class": model_class,
            "trainer_class": "difflex",
            "activation_dim": dictionary.width,
            "dict_size": dictionary.size,
            "k": dictionary.k,
            "layer": str(dictionary.site),
            "lm_name": dictionary.origin.model,
        }
        paths = [write_plain_pickle(folder / WEIGHTS, _state(dictionary, model_class))]
        return [*paths, write_config(folder / CONFIG, {"trainer": trainer, "buffer": {}})]

    def _class_for(self, sae: SAE) -> str:
        """Return the class that holds an SAE; batch top-k has one threshold for all features."""
        if sae.kind in ("batchtopk", "matryoshka") and shared_threshold(sae) is None:
            return "JumpReluAutoEncoder"
        return {
            "topk": "AutoEncoderTopK",
            "batchtopk": "BatchTopKSAE",
            "matryoshka": "MatryoshkaBatchTopKSAE",
            "jumprelu": "JumpReluAutoEncoder",
        }[sae.kind]


def _class(trainer: ForeignConfig, tensors: ForeignTensors) -> str:
    """Return the class that wrote the files."""
    by_tensor = next((CLASS_BY_TENSOR[name] for name in CLASS_BY_TENSOR if name in tensors.names), "")
    model_class = str(trainer.get("dict_class", by_tensor))
    if not model_class:
        raise BadInput(
            f"{tensors.path} is of AutoEncoderTopK or BatchTopKSAE, and config.json, which says which, is missing. Copy it too."
        )
    if model_class not in KINDS:
        raise BadInput(f"{trainer.path}: the class {model_class[:60]} cannot be read. These can: {', '.join(KINDS)}.")
    return model_class


def _thresholds(model_class: str, tensors: ForeignTensors, size: int) -> Tensor | None:
    if model_class == "AutoEncoderTopK":
        return None
    if model_class == "JumpReluAutoEncoder":
        return tensors.vector("threshold", size)
    return torch.full((size,), 0.0 if KINDS[model_class] == "jumprelu" else tensors.number("threshold"))


def _has_unit_rows(decoder: Tensor) -> bool:
    norms = torch.linalg.vector_norm(decoder, dim=1)
    return torch.allclose(norms, torch.ones_like(norms))


def _state(sae: SAE, model_class: str) -> dict[str, Tensor]:
    """Return the tensors of an SAE under the names of a class."""
    weights, biases = sae.weights, encoder_bias(sae)
    if model_class == "JumpReluAutoEncoder":  # its encoder does not subtract the bias
        biases = (biases.double() - weights.encoder.double() @ weights.bias.double()).float()
    turned = {"W_enc": weights.encoder.T, "b_enc": biases, "W_dec": weights.decoder, "b_dec": weights.bias}
    if model_class == "JumpReluAutoEncoder":
        assert weights.thresholds is not None
        return {**turned, "threshold": weights.thresholds}
    state = {"k": torch.tensor(sae.k, dtype=torch.int32), "threshold": torch.tensor(-1.0)}
    if (threshold := shared_threshold(sae)) is not None:
        state["threshold"] = torch.tensor(threshold)
    if model_class == "MatryoshkaBatchTopKSAE":
        return {**state, **turned, "group_sizes": torch.tensor(_groups(sae))}
    upright = {"encoder.weight": weights.encoder, "encoder.bias": biases}
    return {**state, **upright, "decoder.weight": weights.decoder.T, "b_dec": weights.bias}


def _groups(sae: SAE) -> list[int]:
    """Return how many features each prefix of a Matryoshka SAE adds to the one before; one group if that is unknown."""
    config = sae.origin.training.get("config")
    prefixes = config.get("prefixes") if isinstance(config, dict) else None
    numbers = [number for number in prefixes if isinstance(number, int)] if isinstance(prefixes, list) else []
    ends = sorted({*(number for number in numbers if 0 < number < sae.size), sae.size})
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
