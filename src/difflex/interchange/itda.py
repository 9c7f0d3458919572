"""ITDA dictionaries that others have published, in their two formats.

kisate/flux-saes-gpu (FLUX) writes `cfg.json` and `sae.safetensors`; Leask et al. (language models) write `metadata.yaml`,
`atoms.pt` and `atom_indices.pt`. Codes are found by the pursuit of their papers.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from difflex.choices import PursuitName
from difflex.dictionaries import ITDA, Dictionary, DictionaryOrigin, Normalisation
from difflex.dictionaries.itda import AtomProvenance
from difflex.errors import BadInput, BrokenFile, NonFinite
from difflex.files import Json, write_file
from difflex.interchange.base import FittedDictionary, ForeignDictionary, WritableFormat, refuse_approximation
from difflex.interchange.source import ForeignConfig, ForeignSource
from difflex.interchange.writing import ROUNDING, unit_atoms, write_config, write_plain_pickle
from difflex.tensors import write_plain_tensors

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
BLOCK = 1024
"""Atoms that are compared at a time."""
METADATA, ATOMS, INDICES = "metadata.yaml", "atoms.pt", "atom_indices.pt"


@final
class FluxITDAFormat(WritableFormat):
    """The format of flux-saes-gpu: inputs divided by `std_x`, then less `mean_x`; gradient pursuit with weights cut at zero.

    Their code removes an atom whose weight is cut from the support; ours keeps it, as Blumensath and Davies do.
    """

    name, tool = "itda-flux", "flux-saes-gpu"

    def matches(self, source: ForeignSource) -> bool:
        return source.has(CONFIG, WEIGHTS) and "target_l0" in source.json(CONFIG).entries

    def read(self, source: ForeignSource) -> ForeignDictionary:
        config, tensors = source.json(CONFIG), source.tensors(WEIGHTS)
        size, k = config.count("dictionary_size"), config.count("target_l0")
        atoms, partners = tensors.matrix("xs"), tensors.matrix("ys")
        if size > len(atoms):
            raise BrokenFile(f"{source.path}: cfg.json says {size} atoms, xs has {len(atoms)}. Copy both files again.")
        if partners.shape != atoms.shape:
            raise BrokenFile(f"{tensors.path}: the shapes of xs {[*atoms.shape]} and ys {[*partners.shape]} do not fit together.")
        width = atoms.shape[1]
        mean, mean_y, deviation, std_y = (tensors.vector(name, width) for name in ("mean_x", "mean_y", "std_x", "std_y"))
        atoms, partners = atoms[:size], partners[:size]  # later rows are memory that was never written
        same = all(torch.allclose(x, y, rtol=ROUNDING, atol=1e-4) for x, y in ((mean, mean_y), (deviation, std_y)))
        if config.flag("skip_connection", False) or not same or not _are_close(atoms, partners):
            raise BadInput(
                f"The outputs of the atoms in {source.path} (ys, mean_y, std_y, skip_connection) differ from the atoms (xs, "
                "mean_x, std_x): it predicts one site from another and is not a dictionary of a single site. Choose one that is."
            )
        if not torch.isfinite(mean).all():
            raise NonFinite(f"{tensors.path}: mean_x holds NaN or infinity. Copy it again.")
        if not (torch.isfinite(deviation) & (deviation > 0)).all():
            raise BrokenFile(f"{tensors.path}: std_x is not positive everywhere, so inputs cannot be normalised. Copy it again.")
        centre = mean * deviation if config.flag("subtract_mean", True) else torch.zeros_like(mean)
        make = partial(
            _itda,
            normalisation=Normalisation(method="standardise", mean=centre, scale=deviation),
            atoms=unit_atoms(atoms, tensors.path, "xs"),
            provenance=AtomProvenance.unknown(size),
            pursuit="gradient",
        )
        return ForeignDictionary(make=make, k=k, model_class="ITDA", config=config.entries)

    def fit(self, dictionary: Dictionary, approximate: bool) -> FittedDictionary:
        return _fit(self, dictionary, "gradient", ("none", "scale", "standardise"), approximate)

    def write(self, dictionary: Dictionary, folder: Path) -> list[Path]:
        assert isinstance(dictionary, ITDA)
        scale = dictionary.normalisation.scale
        mean = dictionary.normalisation.mean / scale
        tensors = {"xs": dictionary.atoms, "ys": dictionary.atoms, "mean_x": mean, "mean_y": mean}
        tensors |= {"std_x": scale, "std_y": scale, "weight": torch.zeros(dictionary.width, dictionary.width)}
        entries = {
            "d_model": dictionary.width,
            "target_l0": dictionary.k,
            "loss_threshold": None,
            "add_error": False,
            "subtract_mean": True,
            "fvu_loss": True,
            "start_size": 16,
            "error_k": None,
            "skip_connection": False,
            "preprocessing_steps": 1,
            "normalize": True,
            "max_add": None,
            "dictionary_size": dictionary.size,
            "steps": 0,
        }
        return [write_plain_tensors(folder / WEIGHTS, tensors), write_config(folder / CONFIG, entries)]


@final
class LeaskITDAFormat(WritableFormat):
    """The format of Leask et al.: no normalisation, signed matching pursuit; atoms know their sequence and token."""

    name, tool = "itda", "itda"

    def matches(self, source: ForeignSource) -> bool:
        return source.has(METADATA, ATOMS)

    def read(self, source: ForeignSource) -> ForeignDictionary:
        metadata = ForeignConfig(source.folder / METADATA, _flat_yaml(source))
        tensors = source.tensors(ATOMS)
        atoms, indices = tensors.matrix(""), source.tensors(INDICES).integers("")
        width = metadata.get("activation_dim", atoms.shape[1])
        if indices.shape != (len(atoms), 2) or width != atoms.shape[1]:
            raise BrokenFile(
                f"{source.path}: atoms {[*atoms.shape]}, atom_indices {[*indices.shape]} and activation_dim {str(width)[:60]} do "
                "not fit together. Copy all three files again."
            )
        make = partial(
            _itda,
            normalisation=Normalisation.identity(atoms.shape[1]),
            atoms=unit_atoms(atoms, tensors.path, "atoms"),
            provenance=AtomProvenance(shots=indices[:, 0].long(), tokens=indices[:, 1].long()),
            pursuit="matching",
        )
        return ForeignDictionary(make=make, k=metadata.count("k"), model_class="ITDA", config=metadata.entries)

    def fit(self, dictionary: Dictionary, approximate: bool) -> FittedDictionary:
        return _fit(self, dictionary, "matching", ("none",), approximate)

    def write(self, dictionary: Dictionary, folder: Path) -> list[Path]:
        assert isinstance(dictionary, ITDA)
        provenance = dictionary.provenance
        entries = {"activation_dim": dictionary.width, "k": dictionary.k, "lm_name": dictionary.origin.model}
        entries |= {"layer": str(dictionary.site), "max_dict_size": dictionary.size}
        lines = "".join(f"{name}: {json.dumps(value)}\n" for name, value in entries.items())
        write_file(folder / METADATA, lines.encode())
        indices = torch.stack([provenance.shots, provenance.tokens], dim=1)
        paths = [write_plain_pickle(folder / ATOMS, dictionary.atoms), write_plain_pickle(folder / INDICES, indices)]
        return [*paths, folder / METADATA]


def _fit(
    format: WritableFormat, dictionary: Dictionary, pursuit: PursuitName, methods: tuple[str, ...], approximate: bool
) -> FittedDictionary:
    """Return an ITDA dictionary with the pursuit and one of the normalisations of a format."""
    if not isinstance(dictionary, ITDA):
        raise BadInput(f"{dictionary.name} is no ITDA dictionary, and {format.tool} has no others. Choose a format of SAEs.")
    normalisation, left_out = dictionary.normalisation, []
    if dictionary.pursuit != pursuit:
        left_out.append(f"{format.tool} finds codes by the pursuit '{pursuit}', this dictionary by '{dictionary.pursuit}'.")
    if normalisation.method not in methods:
        left_out.append(f"{format.tool} cannot express the normalisation '{normalisation.method}'.")
    if normalisation.clip is not None:
        left_out.append(f"{format.tool} cannot clip its input, which this dictionary does at {normalisation.clip:g}.")
    refuse_approximation(dictionary, left_out, approximate)
    if not left_out:
        return FittedDictionary(dictionary)
    if normalisation.method in methods:
        plain, atoms = (
            Normalisation(method=normalisation.method, mean=normalisation.mean, scale=normalisation.scale),
            dictionary.atoms,
        )
    else:
        plain, atoms = Normalisation.identity(dictionary.width, dictionary.device), dictionary.directions
        if "standardise" in methods:
            plain = Normalisation(method="standardise", mean=normalisation.mean, scale=plain.scale)
    fitted = _itda(
        dictionary.origin, dictionary.k, normalisation=plain, atoms=atoms, provenance=dictionary.provenance, pursuit=pursuit
    )
    return FittedDictionary(fitted, tuple(left_out))


def _are_close(atoms: Tensor, partners: Tensor) -> bool:
    """Whether all numbers are the same but for rounding; compared some rows at a time, to take little memory."""
    pairs = zip(atoms.split(BLOCK), partners.split(BLOCK), strict=True)
    return all(torch.allclose(x.float(), y.float(), atol=ROUNDING) for x, y in pairs)


def _itda(origin: DictionaryOrigin, k: int, **parts: Any) -> ITDA:
    return ITDA(origin=origin, k=k, **parts)


def _flat_yaml(source: ForeignSource) -> dict[str, Json]:
    """Return the entries of a YAML file of plain `name: value` lines; this format writes no others."""
    entries: dict[str, Json] = {}
    for line in source.text(METADATA).splitlines():
        if not line.strip() or line.startswith(("#", "---")):
            continue
        name, colon, value = line.partition(":")
        if not colon or name != name.strip():
            raise BrokenFile(f"{source.path}/{METADATA} holds '{line[:80]}', which is not a plain `name: value`. Copy it again.")
        entries[name] = _scalar(value.strip())
    return entries


def _scalar(text: str) -> Json:
    try:
        return None if text in ("", "~") else json.loads(text)  # numbers, booleans, null
    except (ValueError, RecursionError):
        return text.strip("'\"")
