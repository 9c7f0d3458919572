"""ITDA dictionaries that others have published, read from their two formats.

kisate/flux-saes-gpu (FLUX): `cfg.json` + `sae.safetensors`. Leask et al. (language models): `metadata.yaml` + `atoms.pt` +
`atom_indices.pt`. Codes are found by the pursuit of their papers.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from difflex.dictionaries.base import DictionaryOrigin
from difflex.dictionaries.itda.dictionary import ITDA
from difflex.dictionaries.itda.provenance import AtomProvenance
from difflex.dictionaries.normalisation import Normalisation
from difflex.errors import BadInput, BrokenFile
from difflex.files import Json
from difflex.records import Site

__all__ = ["read_itda"]

ROUNDING = 2e-2
"""How far from length one, or from each other, rows may be that were saved in 16 bits."""


def read_itda(folder: Path | str, *, site: Site, model: str | None = None) -> ITDA:
    """The dictionary in `folder`, of either format; the files do not say which `site` of a model it is of in our words."""
    folder = Path(folder)
    if (folder / "cfg.json").is_file():
        return _read_flux(folder, site, model)
    if (folder / "metadata.yaml").is_file():
        return _read_leask(folder, site, model)
    raise BadInput(f"{folder} holds no ITDA dictionary: there is neither cfg.json nor metadata.yaml. Name the folder that does.")


def _read_flux(folder: Path, site: Site, model: str | None) -> ITDA:
    """flux-saes-gpu: inputs are divided by `std_x`, then `mean_x` is subtracted; gradient pursuit with weights cut at zero.

    Their code lets an atom whose weight is cut leave the support; ours keeps it, as Blumensath and Davies do.
    """
    config = _json(folder / "cfg.json")
    path = folder / "sae.safetensors"
    try:
        tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    except (FileNotFoundError, safetensors.SafetensorError) as error:
        raise BrokenFile(f"{path} cannot be read: {error}. Copy it again.") from error
    _need(path, tensors, ("xs", "ys", "mean_x", "mean_y", "std_x", "std_y"))
    size, k = _count(config, "dictionary_size", folder), _count(config, "target_l0", folder)
    if size > len(tensors["xs"]):
        raise BrokenFile(f"{folder}: cfg.json speaks of {size} atoms, xs has {len(tensors['xs'])}. Copy both files again.")
    # Rows after the first `size` are memory that was never written.
    atoms, partners = tensors["xs"][:size], tensors["ys"][:size]
    width = atoms.shape[1:]
    shapes = {name: tensors[name].shape for name in ("mean_x", "mean_y", "std_x", "std_y")}
    if partners.shape != atoms.shape or set(shapes.values()) != {width}:
        found = ", ".join(f"{name} {[*shape]}" for name, shape in {"xs": atoms.shape, "ys": partners.shape, **shapes}.items())
        raise BrokenFile(f"{path}: the shapes {found} do not belong together. Copy it again.")
    same = all(torch.allclose(tensors[f"{name}_x"], tensors[f"{name}_y"], rtol=ROUNDING, atol=1e-4) for name in ("mean", "std"))
    if config.get("skip_connection") or not same or not torch.allclose(atoms, partners, atol=ROUNDING):
        raise BadInput(
            f"The partners of the atoms in {folder} (ys, mean_y, std_y, skip_connection) differ from the atoms (xs, mean_x, "
            "std_x): it predicts one site from another and is no dictionary of a single site. Choose one that is."
        )
    deviation = tensors["std_x"]
    if not (torch.isfinite(deviation) & (deviation > 0)).all():
        raise BrokenFile(f"{path}: std_x is not positive everywhere, so inputs cannot be normalised. Set it, then save again.")
    mean = tensors["mean_x"] if config.get("subtract_mean", True) else torch.zeros_like(deviation)
    normalisation = Normalisation(method="standardise", mean=mean * deviation, scale=deviation)
    return ITDA(
        k=k,
        origin=DictionaryOrigin(site=site, model=model, training={"read_from": "flux-saes-gpu", "cfg": config}),
        normalisation=normalisation,
        atoms=_unit(atoms, path, "xs"),
        provenance=AtomProvenance.unknown(size),
        way="gradient",
    )


def _read_leask(folder: Path, site: Site, model: str | None) -> ITDA:
    """Leask et al.: no normalisation, signed matching pursuit; atoms know their sequence and token."""
    metadata = _flat_yaml(folder / "metadata.yaml")
    atoms, places = _tensor(folder / "atoms.pt"), _tensor(folder / "atom_indices.pt")
    width = metadata.get("activation_dim", atoms.shape[1])
    if places.shape != (len(atoms), 2) or width != atoms.shape[1]:
        raise BrokenFile(
            f"{folder}: atoms {[*atoms.shape]}, atom_indices {[*places.shape]} and activation_dim {width} do not belong "
            "together. Copy all three files again."
        )
    atoms = atoms.float()
    return ITDA(
        k=_count(metadata, "k", folder),
        origin=DictionaryOrigin(site=site, model=model, training={"read_from": "itda", "metadata": metadata}),
        normalisation=Normalisation.identity(atoms.shape[1]),
        atoms=_unit(atoms, folder / "atoms.pt", "atoms"),
        provenance=AtomProvenance(shots=places[:, 0].long(), tokens=places[:, 1].long()),
        way="matching",
    )


def _json(path: Path) -> dict[str, Json]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BrokenFile(f"{path} is not JSON ({error}). Copy it again.") from error
    if not isinstance(found, dict):
        raise BrokenFile(f"{path} is not a configuration. Copy it again.")
    return found


def _flat_yaml(path: Path) -> dict[str, Json]:
    """The entries of a YAML file of plain `name: value` lines, which is all that this format writes."""
    entries: dict[str, Json] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise BrokenFile(f"{path} is not text ({error}). Copy the file again.") from error
    for line in lines:
        if not line.strip() or line.startswith(("#", "---")):
            continue
        name, colon, value = line.partition(":")
        if not colon or name != name.strip():
            raise BrokenFile(f"{path} holds '{line}', which is not a plain `name: value`. Copy the file again.")
        entries[name] = _scalar(value.strip())
    return entries


def _scalar(text: str) -> Json:
    if text in ("", "null", "~"):
        return None
    if text in ("true", "false"):
        return text == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text.strip("'\"")


def _tensor(path: Path) -> Tensor:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise BrokenFile(f"{path} cannot be read as a tensor: {error}. Copy it again.") from error
    if not isinstance(found, Tensor) or found.ndim != 2:
        raise BrokenFile(f"{path} is not a tensor of two axes. Copy it again.")
    return found


def _count(entries: dict[str, Json], name: str, folder: Path) -> int:
    found = entries.get(name)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise BrokenFile(f"{folder}: the entry {name} is {found!r}, it should be a number of 1 or more. Copy the files again.")
    return found


def _need(path: Path, tensors: dict[str, Tensor], names: tuple[str, ...]) -> None:
    if missing := [name for name in names if name not in tensors]:
        raise BrokenFile(f"{path} lacks {', '.join(missing)}; it has {', '.join(sorted(tensors))}. Copy it again.")


def _unit(atoms: Tensor, path: Path, name: str) -> Tensor:
    """`atoms` at length one, freed of what rounding did."""
    lengths = torch.linalg.vector_norm(atoms, dim=1)
    wrong = ~((lengths - 1).abs() <= ROUNDING)
    if wrong.any():
        place = int(wrong.nonzero()[0, 0])
        raise BrokenFile(f"{path}: row {place} of {name} has length {float(lengths[place]):.4g}, not one. Copy it again.")
    return F.normalize(atoms, dim=1)
