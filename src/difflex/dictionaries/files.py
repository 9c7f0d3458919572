"""A dictionary on disk: `config.json` and `dictionary.safetensors`, each written atomically.

The config holds the checksum of the tensors and has one itself, so it identifies the dictionary.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

from difflex.dictionary_config import ADVICE, CONFIG, FORMAT, TENSORS, DictionaryConfig, check_pair, read_config
from difflex.errors import BrokenFile, NonFinite, UnknownName
from difflex.files import Json, stored_checksum, write_json
from difflex.tensors import read_tensors, write_tensors

__all__ = ["ADVICE", "WeightsDtype", "parse_choice", "read_files", "stored_weights", "write_files"]

Choice = TypeVar("Choice")
WeightsDtype = Literal["fp32", "bf16"]
"""How an encoder and decoder are stored; they are computed with in fp32."""
DTYPES = {"provenance.shots": torch.int64, "provenance.tokens": torch.int64, "provenance.known": torch.uint8}
"""The dtypes of the tensors that are not float32."""
HALVED = ("encoder", "decoder")
"""The tensors that may be stored in bf16, and in fp16 if they were imported from it."""
HALVES = (torch.bfloat16, torch.float16)


def write_files(folder: Path, config: Mapping[str, Json], tensors: Mapping[str, Tensor], weights: WeightsDtype = "fp32") -> Path:
    """Write both files and return `folder`; the config comes last, so a folder with a config is complete.

    `weights` is how encoder and decoder are stored; `read_files` returns them as float32.
    """
    if weights == "bf16":
        tensors = {name: tensor.bfloat16() if name in HALVED else tensor for name, tensor in tensors.items()}
    _check_tensors(folder / TENSORS, tensors)
    path = write_tensors(folder / TENSORS, FORMAT, tensors)
    write_json(folder / CONFIG, FORMAT, {**config, "sha256": stored_checksum(path, ADVICE)}, indent=2)
    return folder


def read_files(folder: Path, device: str = "cpu") -> tuple[DictionaryConfig, dict[str, Tensor]]:
    """Return the config and the tensors in `folder`, which are float32 and finite but for the provenance of atoms."""
    config = read_config(folder)
    check_pair(folder, config)
    tensors = read_tensors(folder / TENSORS, FORMAT, ADVICE, device=device).tensors
    _check_tensors(folder / TENSORS, tensors)
    return config, {name: tensor.float() if tensor.dtype in HALVES else tensor for name, tensor in tensors.items()}


def stored_weights(folder: Path) -> WeightsDtype:
    """Return how the encoder and decoder of the SAE in `folder` are stored."""
    with safe_open(folder / TENSORS, "pt") as file:
        return "bf16" if file.get_slice("decoder").get_dtype() == "BF16" else "fp32"


def _check_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise an error for a tensor of another dtype than expected, or with NaN or infinity."""
    for name, tensor in tensors.items():
        expected = DTYPES.get(name, torch.float32)
        if tensor.dtype != expected and not (name in HALVED and tensor.dtype in HALVES):
            raise BrokenFile(f"In {path} the tensor '{name}' is {tensor.dtype}, expected is {expected}. {ADVICE}")
        # A sum of finite numbers may overflow, but one with NaN or infinity is never finite.
        if expected == torch.float32 and not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
            raise NonFinite(f"In {path} the tensor '{name}' holds NaN or infinity: no dictionary can be used so. {ADVICE}")


def parse_choice(what: str, name: object, choices: tuple[Choice, ...]) -> Choice:
    """Return the one of `choices` that a file calls `name`; raise if there is none."""
    for choice in choices:
        if choice == name:
            return choice
    raise UnknownName.among(what, str(name), map(str, choices))
