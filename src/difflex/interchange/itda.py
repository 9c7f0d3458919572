"""ITDA dictionaries that others have published, in their two formats.

kisate/flux-saes-gpu (FLUX) writes `cfg.json` and `sae.safetensors`; Leask et al. (language models) write `metadata.yaml`,
`atoms.pt` and `atom_indices.pt`. Codes are found by the pursuit of their papers.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor
from torch.nn import functional as F

from difflex.dictionaries.base import DictionaryOrigin
from difflex.dictionaries.itda import ITDA, AtomProvenance
from difflex.dictionaries.normalisation import Normalisation
from difflex.errors import BadInput, BrokenFile, NonFinite
from difflex.files import Json
from difflex.records import Site

FLUX_TENSORS = ("xs", "ys", "mean_x", "mean_y", "std_x", "std_y")
MAX_TEXT = 2**20
UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    RuntimeError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    TypeError,
)
UNREADABLE += (pickle.UnpicklingError, safetensors.SafetensorError)
"""What reading a damaged file raises."""
ROUNDING = 2e-2
"""How far rows that were saved in 16 bits may be from norm one, or from each other."""


def read_itda(folder: Path | str, *, site: Site, model: str | None = None) -> ITDA:
    """Read the dictionary in `folder`, of either format; the files do not name the `site`, so it has to be given."""
    folder = Path(folder)
    if (folder / "cfg.json").is_file():
        return _read_flux(folder, site, model)
    if (folder / "metadata.yaml").is_file():
        return _read_leask(folder, site, model)
    raise BadInput(f"{folder} holds no ITDA dictionary: it has neither cfg.json nor metadata.yaml. Name the folder that does.")


def _read_flux(folder: Path, site: Site, model: str | None) -> ITDA:
    """Read the format of flux-saes-gpu: inputs divided by `std_x`, then less `mean_x`; gradient pursuit with weights cut at zero.

    Their code removes an atom whose weight is cut from the support; ours keeps it, as Blumensath and Davies do.
    """
    text = _read_text(folder / "cfg.json")
    with _reading(folder / "cfg.json", "JSON"):
        config = json.loads(text)
    if not isinstance(config, dict):
        raise BrokenFile(f"{folder}/cfg.json is not a configuration. Copy it again.")
    size, k = _count(config, "dictionary_size", folder), _count(config, "target_l0", folder)
    path = folder / "sae.safetensors"
    tensors = _read_flux_tensors(path, size)
    atoms, partners = tensors["xs"], tensors["ys"]
    _check_flux(folder, config, tensors, atoms, partners)
    deviation = tensors["std_x"]
    mean = tensors["mean_x"] if config.get("subtract_mean", True) else torch.zeros_like(deviation)
    return _itda(
        folder,
        k=k,
        origin=DictionaryOrigin(site=site, model=model, training={"read_from": "flux-saes-gpu", "cfg": config}),
        normalisation=Normalisation(method="standardise", mean=mean * deviation, scale=deviation),
        atoms=_unit(atoms, path, "xs"),
        provenance=AtomProvenance.unknown(size),
        pursuit="gradient",
    )


def _read_flux_tensors(path: Path, size: int) -> dict[str, Tensor]:
    """Return the tensors that we need, of atoms the first `size` rows: later ones are memory that was never written."""
    with _reading(path, "safetensors"), safetensors.safe_open(path, "pt") as file:
        names = list(file.keys())
        if missing := [name for name in FLUX_TENSORS if name not in names]:
            raise BrokenFile(f"{path} lacks {', '.join(missing)}; it has {', '.join(sorted(names))[:500]}. Copy it again.")
        slices = {name: file.get_slice(name) for name in FLUX_TENSORS}
        if integers := [name for name, part in slices.items() if not part.get_dtype().startswith(("F", "BF"))]:
            raise BrokenFile(f"{path}: {', '.join(integers)} are not of floating-point numbers. Copy it again.")
        if size > (rows := (slices["xs"].get_shape() or [0])[0]):
            raise BrokenFile(f"{path.parent}: cfg.json says {size} atoms, xs has {rows}. Copy both files again.")
        return {name: part[:size].float() if name in ("xs", "ys") else part[...].float() for name, part in slices.items()}


def _check_flux(folder: Path, config: dict[str, Json], tensors: dict[str, Tensor], atoms: Tensor, partners: Tensor) -> None:
    """Raise unless the tensors describe a dictionary of one site."""
    path = folder / "sae.safetensors"
    shapes = {name: tensors[name].shape for name in ("mean_x", "mean_y", "std_x", "std_y")}
    if partners.shape != atoms.shape or set(shapes.values()) != {atoms.shape[1:]}:
        listed = ", ".join(f"{name} {[*shape]}" for name, shape in {"xs": atoms.shape, "ys": partners.shape, **shapes}.items())
        raise BrokenFile(f"{path}: the shapes {listed} do not fit together. Copy it again.")
    same = all(torch.allclose(tensors[f"{name}_x"], tensors[f"{name}_y"], rtol=ROUNDING, atol=1e-4) for name in ("mean", "std"))
    if config.get("skip_connection") or not same or not torch.allclose(atoms, partners, atol=ROUNDING):
        raise BadInput(
            f"The outputs of the atoms in {folder} (ys, mean_y, std_y, skip_connection) differ from the atoms (xs, mean_x, "
            "std_x): it predicts one site from another and is not a dictionary of a single site. Choose one that is."
        )
    if not torch.isfinite(tensors["mean_x"]).all():
        raise NonFinite(f"{path}: mean_x holds NaN or infinity. Copy it again.")
    deviation = tensors["std_x"]
    if not (torch.isfinite(deviation) & (deviation > 0)).all():
        raise BrokenFile(f"{path}: std_x is not positive everywhere, so inputs cannot be normalised. Copy it again.")


def _read_leask(folder: Path, site: Site, model: str | None) -> ITDA:
    """Read the format of Leask et al.: no normalisation, signed matching pursuit; atoms know their sequence and token."""
    metadata = _read_flat_yaml(folder / "metadata.yaml")
    atoms, indices = _read_matrix(folder / "atoms.pt"), _read_matrix(folder / "atom_indices.pt")
    width = metadata.get("activation_dim", atoms.shape[1])
    if indices.shape != (len(atoms), 2) or width != atoms.shape[1]:
        raise BrokenFile(
            f"{folder}: atoms {[*atoms.shape]}, atom_indices {[*indices.shape]} and activation_dim {width} do not fit together. "
            "Copy all three files again."
        )
    if not atoms.is_floating_point() or indices.dtype not in (torch.int64, torch.int32):
        raise BrokenFile(f"{folder}: atoms are {atoms.dtype} and atom_indices {indices.dtype}. Copy all three files again.")
    atoms = atoms.float()
    return _itda(
        folder,
        k=_count(metadata, "k", folder),
        origin=DictionaryOrigin(site=site, model=model, training={"read_from": "itda", "metadata": metadata}),
        normalisation=Normalisation.identity(atoms.shape[1]),
        atoms=_unit(atoms, folder / "atoms.pt", "atoms"),
        provenance=AtomProvenance(shots=indices[:, 0].long(), tokens=indices[:, 1].long()),
        pursuit="matching",
    )


@contextmanager
def _reading(path: Path, content: str) -> Iterator[None]:
    """Turn any error of reading a file into one that names it."""
    try:
        yield
    except BrokenFile:
        raise
    except UNREADABLE as error:
        raise BrokenFile(f"{path} cannot be read as {content}: {error}. Copy it again.") from error


def _read_flat_yaml(path: Path) -> dict[str, Json]:
    """Return the entries of a YAML file of plain `name: value` lines; this format writes no others."""
    entries: dict[str, Json] = {}
    for line in _read_text(path).splitlines():
        if not line.strip() or line.startswith(("#", "---")):
            continue
        name, colon, value = line.partition(":")
        if not colon or name != name.strip():
            raise BrokenFile(f"{path} holds '{line}', which is not a plain `name: value`. Copy it again.")
        entries[name] = _scalar(value.strip())
    return entries


def _read_text(path: Path) -> str:
    with _reading(path, "text"):
        if path.stat().st_size > MAX_TEXT:
            raise BrokenFile(f"{path} has {path.stat().st_size} bytes, more than a configuration can. Copy it again.")
        return path.read_text(encoding="utf-8")


def _scalar(text: str) -> Json:
    try:
        return None if text in ("", "~") else json.loads(text)  # numbers, booleans, null
    except (ValueError, RecursionError):
        return text.strip("'\"")


def _read_matrix(path: Path) -> Tensor:
    with _reading(path, "a tensor"):
        tensor = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(tensor, Tensor) or tensor.ndim != 2:
        raise BrokenFile(f"{path} is not a tensor of two axes. Copy it again.")
    if not tensor.is_contiguous():  # a view of few numbers may claim any size
        raise BrokenFile(f"{path} holds {[*tensor.shape]} as a view of other numbers. Copy it again.")
    return tensor


def _itda(folder: Path, **parts: Any) -> ITDA:
    try:
        return ITDA(**parts)
    except BadInput as error:
        raise BrokenFile(f"{folder} cannot be used as a dictionary: {error}") from error


def _count(entries: dict[str, Json], name: str, folder: Path) -> int:
    count = entries.get(name)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise BrokenFile(f"{folder}: the entry {name} is {count!r}; it must be a number of 1 or more. Copy the files again.")
    return count


def _unit(atoms: Tensor, path: Path, name: str) -> Tensor:
    """Return `atoms` at norm one, without rounding errors; raise if a norm is too far from one."""
    norms = torch.linalg.vector_norm(atoms, dim=1)
    wrong = ~((norms - 1).abs() <= ROUNDING)
    if wrong.any():
        first = int(wrong.nonzero()[0, 0])
        raise BrokenFile(f"{path}: row {first} of {name} has norm {float(norms[first]):.4g}, not one. Copy it again.")
    return F.normalize(atoms, dim=1)
