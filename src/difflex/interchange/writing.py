"""The files that exports consist of: written complete or not at all, with the same bytes for the same dictionary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from difflex.errors import BrokenFile
from difflex.files import write_file
from difflex.tensors import write_pickle

ROUNDING = 2e-2
"""How far rows that were saved in 16 bits may be from norm one, or from each other."""


def write_config(path: Path, entries: Mapping[str, object]) -> Path:
    """Write a configuration as JSON and return its path."""
    write_file(path, (json.dumps(entries, indent=1) + "\n").encode())
    return path


def write_plain_pickle(path: Path, content: Mapping[str, object] | Tensor) -> Path:
    """Write a tensor, or tensors by name, also nested, as `torch.save` does, and return the path."""
    return write_pickle(path, _plain(content))


def unit_atoms(atoms: Tensor, path: Path, name: str) -> Tensor:
    """Return `atoms` in float32 at norm one, without rounding errors, in place where they are float32; raise for other norms."""
    atoms = atoms.float()  # a tensor of the file itself, which may be changed in memory
    norms = torch.linalg.vector_norm(atoms, dim=1)
    wrong = ~((norms - 1).abs() <= ROUNDING)
    if wrong.any():
        first = int(wrong.nonzero()[0, 0])
        raise BrokenFile(f"{path}: row {first} of {name} has norm {float(norms[first]):.4g}, not one. Copy it again.")
    return atoms.div_(norms[:, None])


def _plain(content: object) -> object:
    """Return the content with tensors that hold nothing but their own numbers; only those that hold others are copied."""
    if isinstance(content, Mapping):
        return {name: _plain(inner) for name, inner in content.items()}
    if not isinstance(content, Tensor):
        return content
    tensor = content.detach().cpu()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
