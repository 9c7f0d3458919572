"""The resumable state of a growth: atoms are only ever added to it, and one small file says how far it is good.

`state.json` is replaced in one go; the files that it names are never touched again. What a kill leaves half written is not named
in it, and is written anew. Rows of the Gram matrix are kept as they were: computed again, they could differ in their last bits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from difflex.dictionary.files import Json, as_text, replace_file
from difflex.dictionary.itda.config import Growth
from difflex.dictionary.itda.curve import Moment
from difflex.dictionary.itda.grower import Grower
from difflex.dictionary.itda.search import Trial
from difflex.dictionary.normalisation import Normalisation
from difflex.errors import BrokenFile, StaleWork

__all__ = ["State", "clear", "read_normalisation", "read_state", "refill", "trials_of", "write_normalisation", "write_state"]

FORMAT = 1
STATE, NORMALISATION = "state.json", "normalisation.safetensors"
AGAIN = "Remove the folder to grow from the start."


@dataclass(frozen=True, kw_only=True)
class State:
    """`state.json`."""

    format: int = FORMAT
    growth: dict[str, Json]
    data: str
    """What the batches were made from; work on other data is not continued."""
    normalisation: dict[str, Json]
    trials: list[list[int | float]]
    """Finished passes of the search for the threshold."""
    threshold: float
    batches: int
    """Taken from the stream in this pass."""
    idle: int
    curve: list[list[int]]
    parts: list[str]
    """Files with the atoms so far, in order."""
    finished: bool


def read_state(folder: Path, growth: Growth, data: str) -> State | None:
    """The state in `folder`; None where nothing was saved; an error where it is of another growth."""
    path = folder / STATE
    if not path.exists():
        return None
    try:
        entries = json.loads(path.read_bytes())
    except ValueError as error:
        raise BrokenFile(f"{path} is not JSON ({error}). {AGAIN}") from error
    names = {field.name for field in fields(State)}
    if not isinstance(entries, dict) or entries.get("format") != FORMAT or entries.keys() != names:
        raise BrokenFile(f"{path} is not the state of a growth, format {FORMAT}. {AGAIN}")
    state = State(**entries)
    asked = growth.as_json()
    differing = {name: (state.growth.get(name), asked[name]) for name in asked if state.growth.get(name) != asked[name]}
    if state.data != data:
        differing["data"] = (state.data, data)
    if differing:
        told = ", ".join(f"{name} {found!r} instead of {wanted!r}" for name, (found, wanted) in differing.items())
        raise StaleWork(f"{path} belongs to another growth: {told}. Ask for the same to go on, or: {AGAIN}")
    return state


def write_state(folder: Path, state: State, grower: Grower) -> list[str]:
    """The names of all parts, after those of `state` one with the atoms that have come since; then `state.json` itself."""
    folder.mkdir(parents=True, exist_ok=True)
    start = int(state.parts[-1].split("-")[2].split(".")[0]) if state.parts else 0
    parts = list(state.parts)
    if grower.size > start and not state.finished:
        parts.append(f"atoms-{len(state.trials)}-{grower.size}.safetensors")
        replace_file(folder / parts[-1], save(grower.part(start)))
    replace_file(folder / STATE, as_text({**asdict(state), "parts": list[Json](parts)}).encode())
    return parts


def refill(folder: Path, state: State, grower: Grower) -> None:
    """Give `grower` back what `state` says that it had."""
    for name in state.parts:
        try:
            grower.refill(load_file(folder / name))
        except (FileNotFoundError, safetensors.SafetensorError) as error:
            raise BrokenFile(f"{folder / name}, a part of an unfinished growth, cannot be read: {error}. {AGAIN}") from error
    grower.curve = [Moment(*moment) for moment in state.curve]
    grower.idle = state.idle


def write_normalisation(folder: Path, normalisation: Normalisation) -> dict[str, Json]:
    """The settings of `normalisation`, whose tensors are now in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    packed = {name: tensor.cpu().contiguous() for name, tensor in normalisation.tensors().items()}
    replace_file(folder / NORMALISATION, save(packed))
    return dict(normalisation.settings())


def read_normalisation(folder: Path, settings: Mapping[str, Json], device: torch.device) -> Normalisation:
    """The normalisation that was written to `folder`."""
    try:
        tensors: dict[str, Tensor] = load_file(folder / NORMALISATION, device=str(device))
    except (FileNotFoundError, safetensors.SafetensorError) as error:
        raise BrokenFile(f"{folder / NORMALISATION} of an unfinished growth cannot be read: {error}. {AGAIN}") from error
    return Normalisation.of(settings, tensors)


def clear(folder: Path) -> None:
    """Remove the atoms of an unfinished growth: they are in the dictionary now, or in a pass that failed."""
    for path in folder.glob("atoms-*.safetensors"):
        path.unlink()


def trials_of(state: State) -> list[Trial]:
    """The finished passes."""
    return [Trial(threshold, int(size), share) for threshold, size, share in state.trials]
