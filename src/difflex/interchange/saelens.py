"""SAELens (decoderesearch/SAELens): `cfg.json` and `sae_weights.safetensors`."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, final

import torch
from torch import Tensor

from difflex.choices import SAEKind
from difflex.dictionaries import ITDA, SAE, Dictionary, DictionaryOrigin, Normalisation
from difflex.dictionaries.itda import AtomProvenance
from difflex.errors import BadInput
from difflex.interchange.base import (
    FittedDictionary,
    ForeignDictionary,
    WritableFormat,
    encoder_bias,
    foreign_sae,
    gate_as_thresholds,
    plain_sae,
    refuse_approximation,
    with_unit_rows,
)
from difflex.interchange.source import ForeignConfig, ForeignSource, ForeignTensors
from difflex.interchange.writing import unit_atoms, write_config
from difflex.tensors import write_plain_tensors

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
OLDEST = "6.0.0"
"""The version to name in files: without one, or with an older one, SAELens expects an older layout."""
NORMALISED_IN_WEIGHTS = ("none", "expected_average_only_in", "covariance_whitening", None, False, True)
"""The normalisations that SAELens has folded into the weights when it saves them; the last three before version 6."""
KINDS: dict[str, SAEKind] = {
    "topk": "topk",
    "batchtopk": "batchtopk",
    "matryoshka_batchtopk": "matryoshka",
    "jumprelu": "jumprelu",
    "standard": "jumprelu",
    "gated": "jumprelu",
}
"""By architecture. A standard SAE has thresholds of 0."""


class _Parts(NamedTuple):
    """The weights of an SAE, in our orientation."""

    encoder: Tensor
    encoder_bias: Tensor
    decoder: Tensor
    thresholds: Tensor | None


@final
class SAELensFormat(WritableFormat):
    """The format of SAELens 6, and configurations of older versions."""

    name, tool = "saelens", "SAELens"

    def matches(self, source: ForeignSource) -> bool:
        return source.has(CONFIG, WEIGHTS)

    def read(self, source: ForeignSource) -> ForeignDictionary:
        config, tensors = source.json(CONFIG), source.tensors(WEIGHTS)
        architecture = _architecture(config)
        _check_config(config)
        decoder = tensors.matrix("W_dec")
        size, width = decoder.shape
        bias = tensors.vector("b_dec", width)
        metadata = config.inner("metadata")
        version = metadata.get("sae_lens_version") or config.get("sae_lens_version")
        about = {"model_class": architecture, "version": version and str(version), "config": config.entries}
        if architecture == "matching_pursuit":
            atoms = unit_atoms(decoder, tensors.path, "W_dec")
            k = _iterations(config, width)
            centre = bias if config.flag("apply_b_dec_to_input", True) else torch.zeros(width)
            return ForeignDictionary(make=lambda origin, k: _pursuit(origin, k, atoms, centre), k=k, **about)
        parts = _weights(architecture, config, tensors, decoder, size)
        kind, settings = KINDS[architecture], config
        trained_as, details = str(metadata.get("training_architecture")), metadata.inner("training_architecture_details")
        if architecture == "jumprelu" and KINDS.get(trained_as) in ("batchtopk", "matryoshka") and "k" in details.entries:
            kind, settings = KINDS[trained_as], details
        make = foreign_sae(kind, **parts._asdict(), bias=bias, centres_input=config.flag("apply_b_dec_to_input", True))
        k = None if kind == "jumprelu" else round(_positive(settings, "k"))
        return ForeignDictionary(make=make, k=k, fires_over_thresholds=parts.thresholds is not None, **about)

    def fit(self, dictionary: Dictionary, approximate: bool) -> FittedDictionary:
        if isinstance(dictionary, ITDA):
            return fit_pursuit(dictionary, approximate)
        return plain_sae(dictionary, self, approximate)

    def write(self, dictionary: Dictionary, folder: Path) -> list[Path]:
        assert isinstance(dictionary, SAE | ITDA)
        entries = {
            "d_in": dictionary.width,
            "d_sae": dictionary.size,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": True,
            "normalize_activations": "none",
            "reshape_activations": "none",
        }
        metadata = {
            "sae_lens_version": OLDEST,
            "sae_lens_training_version": None,
            "model_name": dictionary.origin.model,
            "hook_name": str(dictionary.site),
            "training_architecture": {"matryoshka": "matryoshka_batchtopk"}.get(dictionary.kind, dictionary.kind),
            "training_architecture_details": {"k": dictionary.k},
        }
        tensors = {"W_dec": dictionary.atoms, "b_dec": dictionary.constant}  # of scale one, so that decoder rows are the atoms
        if isinstance(dictionary, SAE):
            tensors |= {"W_enc": dictionary.weights.encoder.T, "b_enc": encoder_bias(dictionary)}
            entries["architecture"] = "topk" if dictionary.weights.thresholds is None else "jumprelu"
            if dictionary.weights.thresholds is None:
                entries |= {"k": dictionary.k, "rescale_acts_by_decoder_norm": False}
            else:
                tensors["threshold"] = dictionary.weights.thresholds
        else:
            entries |= {"architecture": "matching_pursuit", "max_iterations": dictionary.k}
            entries |= {"residual_threshold": 0.0, "stop_on_duplicate_support": False}
            metadata["training_architecture"] = "matching_pursuit"
        paths = [write_plain_tensors(folder / WEIGHTS, tensors)]
        return [*paths, write_config(folder / CONFIG, {**entries, "metadata": metadata})]


def fit_pursuit(dictionary: ITDA, approximate: bool) -> FittedDictionary:
    """Return an ITDA dictionary as matching pursuit in model space: non-negative weights, an input that is only shifted."""
    normalisation, left_out = dictionary.normalisation, []
    if dictionary.pursuit != "positive-matching":
        left_out.append(
            "SAELens finds codes by matching pursuit with weights above 0, this dictionary by the pursuit "
            f"'{dictionary.pursuit}'."
        )
    if bool((normalisation.scale != 1).any()) or normalisation.basis is not None:
        left_out.append(
            f"The normalisation '{normalisation.method}' scales or turns the space in which the best atom is found, which no "
            "atoms can express."
        )
    if normalisation.clip is not None:
        left_out.append(f"SAELens cannot clip its input, which this dictionary does at {normalisation.clip:g}.")
    refuse_approximation(dictionary, left_out, approximate)
    if not left_out:
        return FittedDictionary(dictionary)
    fitted = _pursuit(dictionary.origin, dictionary.k, dictionary.directions, dictionary.constant, dictionary.provenance)
    return FittedDictionary(fitted, tuple(left_out))


def _pursuit(origin: DictionaryOrigin, k: int, atoms: Tensor, centre: Tensor, provenance: AtomProvenance | None = None) -> ITDA:
    plain = Normalisation(method="standardise", mean=centre, scale=torch.ones_like(centre))
    provenance = provenance or AtomProvenance.unknown(len(atoms))
    return ITDA(k=k, origin=origin, normalisation=plain, atoms=atoms, provenance=provenance, pursuit="positive-matching")


def _architecture(config: ForeignConfig) -> str:
    """Return the architecture; before version 6 a topk SAE was a standard one with another activation function."""
    activation = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    architecture = str(config.get("architecture", "standard"))
    if architecture == "standard" and activation == "topk":
        architecture = "topk"
    elif activation not in ("relu", "topk"):
        raise BadInput(f"{config.path}: the activation function {str(activation)[:60]} cannot be read. relu and topk can.")
    if architecture not in (*KINDS, "matching_pursuit"):
        known = ", ".join((*KINDS, "matching_pursuit"))
        raise BadInput(f"{config.path}: the architecture {architecture[:60]} cannot be read. These can: {known}.")
    return architecture


def _check_config(config: ForeignConfig) -> None:
    """Raise an error for a normalisation by each token itself, which no weights can express."""
    if (method := config.get("normalize_activations", "none")) not in NORMALISED_IN_WEIGHTS:
        raise BadInput(
            f"{config.path}: normalize_activations is {str(method)[:60]}, which depends on each token and cannot be read."
        )
    if config.get("reshape_activations", "none") != "none" or config.get("hook_head_index") is not None:
        raise BadInput(f"{config.path}: it reads the heads of an attention layer, which are no site of an image model.")
    if config.get("finetuning_scaling_factor"):
        raise BadInput(f"{config.path}: a finetuning_scaling_factor cannot be read. Fold it into the decoder with SAELens.")


def _weights(architecture: str, config: ForeignConfig, tensors: ForeignTensors, decoder: Tensor, size: int) -> _Parts:
    encoder = tensors.matrix("W_enc").T
    if architecture == "gated":
        vectors = (tensors.vector(name, size) for name in ("r_mag", "b_gate", "b_mag"))
        encoder, bias, thresholds = gate_as_thresholds(encoder, *vectors)
        return _Parts(encoder, bias, decoder, thresholds)
    bias, thresholds = tensors.vector("b_enc", size), None
    if architecture == "jumprelu":
        thresholds = tensors.vector("threshold", size)
    elif architecture != "topk":
        thresholds = torch.full((size,), 0.0 if architecture == "standard" else tensors.number("topk_threshold"))
    if config.flag("rescale_acts_by_decoder_norm", False):
        encoder, bias, decoder = with_unit_rows(encoder, bias, decoder)
    return _Parts(encoder, bias, decoder, thresholds)


def _iterations(config: ForeignConfig, width: int) -> int:
    """Return the rounds of a matching pursuit."""
    if config.get("residual_threshold", 0) or config.flag("stop_on_duplicate_support", False):
        raise BadInput(
            f"{config.path}: a matching pursuit that stops at a residual_threshold or a duplicate support cannot be read: "
            "here every token has the same number of rounds."
        )
    return width if config.get("max_iterations") is None else config.count("max_iterations")


def _positive(config: ForeignConfig, name: str) -> float:
    """Return an average number of features, which need not be whole."""
    number = config.get(name, config.inner("activation_fn_kwargs").get(name))
    if not isinstance(number, int | float) or isinstance(number, bool) or not 1 <= number < 1e9:
        raise BadInput(f"{config.path}: the entry {name} is {str(number)[:60]}; it must be a number of 1 or more.")
    return number
