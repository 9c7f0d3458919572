"""The resumable state of a growth: atoms are only ever added to it, and one small file says how far it is good.

`state.json` is replaced in one go; the files that it names are never touched again. What a kill leaves half written is not named
in it, and is written anew. Rows of the Gram matrix are kept as they were: computed again, they could differ in their last bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from difflex.dictionaries.itda import GrowthConfig
from difflex.dictionaries.normalisation import Normalisation
from difflex.dictionaries.pursuit.means import PursuitBackend
from difflex.errors import BrokenFile, StaleWork
from difflex.files import Json, write_file
from difflex.training.itda.curve import GrowthInterval
from difflex.training.itda.grower import AtomGrower
from difflex.training.itda.search import ThresholdTrial

__all__ = [
    "GrowthState",
    "clear",
    "means_of_state",
    "read_normalisation",
    "read_state",
    "refill",
    "trials_of",
    "write_normalisation",
    "write_state",
]

FORMAT = 2
STATE, NORMALISATION = "state.json", "normalisation.safetensors"
AGAIN = "Remove the folder to grow from the start."


@dataclass(frozen=True, kw_only=True)
class GrowthState:
    """`state.json`."""

    format: int = FORMAT
    growth: dict[str, Json]
    data: str
    """What the batches were made from; work on other data is not continued."""
    normalisation: dict[str, Json]
    """Its settings, and the digest of its file."""
    means: dict[str, Json]
    """What the pursuits work with: chosen anew, by the memory at hand, they might pick other atoms."""
    trials: list[list[int | float]]
    """Finished passes of the search for the threshold."""
    threshold: float
    batches: int
    """Taken from the stream in this pass."""
    idle: int
    curve: list[list[int]]
    parts: dict[str, str]
    """The digests of the files with the atoms so far, in order."""
    finished: bool


def read_state(folder: Path, growth: GrowthConfig, data: str) -> GrowthState | None:
    """The state in `folder`; None where nothing was saved; an error where it is of another growth."""
    path = folder / STATE
    if not path.exists():
        return None
    try:
        entries = json.loads(path.read_bytes())
    except ValueError as error:
        raise BrokenFile(f"{path} is not JSON ({error}). {AGAIN}") from error
    names = {field.name for field in fields(GrowthState)}
    if not isinstance(entries, dict) or entries.get("format") != FORMAT or entries.keys() != names:
        raise BrokenFile(f"{path} is not the state of a growth, format {FORMAT}. {AGAIN}")
    state = GrowthState(**entries)
    if not _whole(state):
        raise BrokenFile(f"{path} holds entries of the wrong kind. {AGAIN}")
    asked = growth.as_json()
    differing = {name: (state.growth.get(name), asked[name]) for name in asked if state.growth.get(name) != asked[name]}
    if state.data != data:
        differing["data"] = (state.data, data)
    if differing:
        told = ", ".join(f"{name} {found!r} instead of {wanted!r}" for name, (found, wanted) in differing.items())
        raise StaleWork(f"{path} belongs to another growth: {told}. Ask for the same to go on, or: {AGAIN}", path.parent)
    return state


def write_state(folder: Path, state: GrowthState, grower: AtomGrower) -> dict[str, str]:
    """All parts, after those of `state` one with the atoms that have come since; then `state.json` itself."""
    folder.mkdir(parents=True, exist_ok=True)
    start = int([*state.parts][-1].split("-")[2].split(".")[0]) if state.parts else 0
    parts = dict(state.parts)
    if grower.size > start and not state.finished:
        name = f"atoms-{len(state.trials)}-{grower.size}.safetensors"
        parts[name] = _write(folder / name, grower.part(start))
    write_file(folder / STATE, json.dumps({**asdict(state), "parts": parts}, indent=1).encode())
    return parts


def refill(folder: Path, state: GrowthState, grower: AtomGrower) -> None:
    """Give `grower` back what `state` says that it had."""
    for name, digest in state.parts.items():
        grower.refill(_read(folder / name, digest))
    grower.curve = [GrowthInterval(*moment) for moment in state.curve]
    grower.idle = state.idle
    if not grower.curve or grower.size != grower.curve[-1].size:
        raise BrokenFile(f"{folder / STATE} names parts with {grower.size} atoms, which is not what had grown. {AGAIN}")


def write_normalisation(folder: Path, normalisation: Normalisation) -> dict[str, Json]:
    """What `read_normalisation` needs beside the file with the tensors of `normalisation` that is now in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    packed = {name: tensor.cpu().contiguous() for name, tensor in normalisation.tensors().items()}
    return {**normalisation.settings(), "sha256": _write(folder / NORMALISATION, packed)}


def read_normalisation(folder: Path, settings: Mapping[str, Json], device: torch.device) -> Normalisation:
    """The normalisation that was written to `folder`."""
    tensors = _read(folder / NORMALISATION, str(settings.get("sha256")))
    return Normalisation.of(settings, tensors).to(device)


def _write(path: Path, tensors: dict[str, Tensor]) -> str:
    """The digest of the file that holds `tensors` now."""
    content = save(tensors)
    write_file(path, content)
    return hashlib.sha256(content).hexdigest()


def _read(path: Path, digest: str) -> dict[str, Tensor]:
    """The tensors of the file with this digest."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BrokenFile(f"{path}, a part of an unfinished growth, cannot be read: {error}. {AGAIN}") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise BrokenFile(f"{path}, a part of an unfinished growth, is not what was written. {AGAIN}")
    return load(content)


def clear(folder: Path) -> None:
    """Remove the atoms of an unfinished growth: they are in the dictionary now, or in a pass that failed."""
    for path in folder.glob("atoms-*.safetensors"):
        path.unlink()


def _whole(state: GrowthState) -> bool:
    """Whether the entries are what `write_state` writes."""
    wanted = {"growth": dict, "normalisation": dict, "means": dict, "parts": dict, "trials": list, "curve": list}
    numbers = (state.threshold, state.batches, state.idle)
    return (
        all(isinstance(getattr(state, name), kind) for name, kind in wanted.items())
        and all(isinstance(number, int | float) for number in numbers)
        and all(isinstance(moment, list) and len(moment) == len(GrowthInterval._fields) for moment in state.curve)
        and all(isinstance(trial, list) and len(trial) == len(ThresholdTrial._fields) for trial in state.trials)
    )


def means_of_state(folder: Path, state: GrowthState) -> PursuitBackend:
    """What the pursuits of this growth work with."""
    try:
        return PursuitBackend.of_json(state.means)
    except (KeyError, ValueError) as error:
        raise BrokenFile(f"{folder / STATE} does not say what the pursuits work with ({error}). {AGAIN}") from error


def trials_of(state: GrowthState) -> list[ThresholdTrial]:
    """The finished passes."""
    return [ThresholdTrial(threshold, int(size), share) for threshold, size, share in state.trials]
