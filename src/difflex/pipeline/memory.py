"""How much memory a model needs, told from its plan before a weight is read."""

import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from difflex.errors import OutOfMemory
from difflex.pipeline.families import Family
from difflex.pipeline.loading import DTYPES, Precision
from difflex.pipeline.plans import Plan

__all__ = ["Need", "Room", "check_fits", "estimate", "free_memory"]

NF4_BYTES = 0.5 + 4 / 64
"""Of a weight in nf4: half a byte, and a float for each 64 of them."""
HEADROOM = 1.1
"""Activations, buffers and the allocator's own slack, beside the weights."""


class Need(NamedTuple):
    """What the parts of a model take, as numbers of weights."""

    quantised: dict[str, int]
    """Weights that four bits would hold, by part."""
    dense: dict[str, int]
    """All others, by part."""

    def bytes(self, precision: Precision) -> dict[str, int]:
        """Bytes of weights, by part."""
        if precision == "nf4":
            return {part: round(self.quantised[part] * NF4_BYTES) + self.dense[part] * 2 for part in self.dense}
        return {part: (self.quantised[part] + self.dense[part]) * DTYPES[precision].itemsize for part in self.dense}


class Room(NamedTuple):
    """A way to hold the weights."""

    precision: Precision
    offload: bool
    ranks: int
    """How many cards share the denoiser."""


def estimate(plan: Plan, family: Family) -> Need:
    """The weights of each part, counted on the meta device: nothing is allocated."""
    models = {name: model for name, part in plan.parts.items() if (model := part.weightless()) is not None}
    heavy = (family.denoiser, family.large_text)
    quantised = {name: _matrices(model) if name in heavy else 0 for name, model in models.items()}
    whole = {name: sum(parameter.numel() for parameter in model.parameters()) for name, model in models.items()}
    return Need(quantised, {name: whole[name] - quantised[name] for name in models})


def _matrices(model: nn.Module) -> int:
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))


def free_memory(place: torch.device) -> int:
    """Bytes that can be had on `place` now."""
    if place.type == "cuda":
        return torch.cuda.mem_get_info(place)[0]
    told = Path("/proc/meminfo")
    if told.is_file():
        lines = dict(line.split(":", 1) for line in told.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_fits(name: str, plan: Plan, family: Family, place: torch.device, room: Room) -> None:
    """Nothing; a model that cannot fit is an error that names the option that would."""
    free, need = free_memory(place), estimate(plan, family)
    if _resident(need, family, room) <= free:
        return
    sizes = need.bytes(room.precision)
    listed = ", ".join(f"{part} {_said(size)}" for part, size in sorted(sizes.items(), key=lambda entry: -entry[1]))
    raise OutOfMemory(
        f"The model '{name}' needs {_said(sum(sizes.values()))} in {room.precision} ({listed}), "
        f"and {place} has {_said(free)} free. {_advice(need, family, place, room, free)}"
    )


def _advice(need: Need, family: Family, place: torch.device, room: Room, free: int) -> str:
    """The first option under which the model fits."""
    options = {f"precision='{other}'": room._replace(precision=other) for other in ("bf16", "nf4") if other != room.precision}
    if place.type == "cuda":
        options |= {
            "offload=True": room._replace(offload=True),
            "precision='nf4', offload=True": Room("nf4", True, room.ranks),
        }
    for said, other in options.items():
        if _resident(need, family, other) <= free:
            return f"It would fit with {said}."
    for ranks in (2, 4, 8, 16):
        if place.type == "cuda" and _resident(need, family, room._replace(ranks=ranks)) <= free:
            return f"It would fit on {ranks} such cards: torchrun --nproc-per-node {ranks}, with sharded=True."
    return "No option makes it fit: use a larger machine or a smaller model."


def _resident(need: Need, family: Family, room: Room) -> int:
    """Bytes on one card: one part at a time if offloaded, a share of the denoiser if sharded."""
    sizes = need.bytes(room.precision)
    if room.offload:
        return round(HEADROOM * max(sizes.values()))
    denoiser = sizes.pop(family.denoiser, 0)
    return round(HEADROOM * (sum(sizes.values()) + denoiser / room.ranks))


def _said(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
