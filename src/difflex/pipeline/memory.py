"""How much memory a model needs, told from its plan before a weight is read."""

import math
import os
from pathlib import Path
from typing import NamedTuple

import torch

from difflex.errors import OutOfMemory
from difflex.pipeline.families import Family
from difflex.pipeline.loading import DTYPES, Precision
from difflex.pipeline.plans import PipelinePlan
from difflex.pipeline.quantisation import four_bit_layers

__all__ = ["MemoryNeed", "WeightPlacement", "check_fits", "dense_dtype", "estimate", "free_memory"]

NF4_BYTES = 0.5 + 4 / 64
"""Of a weight in nf4: half a byte, and a float for each 64 of them."""
GROUP = Path("/sys/fs/cgroup")
"""Where Linux says what a container may use."""
HEADROOM = 1.1
"""Activations, buffers and the allocator's own slack, beside the weights."""


class MemoryNeed(NamedTuple):
    """What the parts of a model take, as numbers of weights."""

    quantised: dict[str, int]
    """Weights that four bits would hold, by part."""
    dense: dict[str, int]
    """All others, by part."""

    def bytes(self, precision: Precision, place: torch.device) -> dict[str, int]:
        """Bytes of weights on `place`, by part."""
        if precision == "nf4":
            each = dense_dtype(place).itemsize
            return {part: round(self.quantised[part] * NF4_BYTES) + self.dense[part] * each for part in self.dense}
        return {part: (self.quantised[part] + self.dense[part]) * DTYPES[precision].itemsize for part in self.dense}

    def peak(self, precision: Precision, place: torch.device) -> int:
        """The most bytes at any moment of loading: on a CPU a part is whole before its layers are quantised one by one."""
        held = self.bytes(precision, place)
        if precision != "nf4" or place.type != "cpu":
            return sum(held.values())
        whole = self.bytes("fp32", place)
        return sum(held.values()) + max(whole[part] - held[part] for part in held)


class WeightPlacement(NamedTuple):
    """A way to hold the weights."""

    precision: Precision
    offload: bool
    ranks: int
    """How many cards share the denoiser."""


def estimate(plan: PipelinePlan, family: Family) -> MemoryNeed:
    """The weights of each part, counted on the meta device: nothing is allocated."""
    models = {name: model for name, part in plan.parts.items() if (model := part.weightless()) is not None}
    heavy = (family.denoiser, family.large_text)
    quantised = {
        name: sum(layer.weight.numel() for layer in four_bit_layers(model).values()) if name in heavy else 0
        for name, model in models.items()
    }
    whole = {name: sum(parameter.numel() for parameter in model.parameters()) for name, model in models.items()}
    return MemoryNeed(quantised, {name: whole[name] - quantised[name] for name in models})


def free_memory(place: torch.device) -> int:
    """Bytes that can be had on `place` now."""
    if place.type == "cuda":
        return torch.cuda.mem_get_info(place)[0]
    told = Path("/proc/meminfo")
    if not told.is_file():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = dict(line.split(":", 1) for line in told.read_text().splitlines())
    return int(min(int(lines["MemAvailable"].split()[0]) * 1024, _allowed(GROUP)))


def _allowed(group: Path) -> float:
    """Bytes that the container's limit leaves; what the system keeps of files for later use is given up when it is needed."""
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        kept = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["inactive_file"]
    except OSError:  # no such group, or one without a limit
        return math.inf
    return math.inf if limit == "max" else max(0, int(limit) - int(used) + int(kept))


def dense_dtype(place: torch.device) -> torch.dtype:
    """What is computed in where the weights are in four bits."""
    return torch.float32 if place.type == "cpu" else torch.bfloat16


def check_fits(name: str, plan: PipelinePlan, family: Family, place: torch.device, room: WeightPlacement) -> None:
    """Nothing; a model that cannot fit is an error that names the option that would."""
    free, need = free_memory(place), estimate(plan, family)
    if _needed(need, family, place, room) <= free:
        return
    sizes = need.bytes(room.precision, place)
    listed = ", ".join(f"{part} {_said(size)}" for part, size in sorted(sizes.items(), key=lambda entry: -entry[1]))
    raise OutOfMemory(
        f"The model '{name}' needs {_said(sum(sizes.values()))} in {room.precision} ({listed})"
        f"{_while_loading(need, place, room)}, and {place} has {_said(free)} free. {_advice(need, family, place, room, free)}"
    )


def _advice(need: MemoryNeed, family: Family, place: torch.device, room: WeightPlacement, free: int) -> str:
    """The first option under which the model fits."""
    options = {f"precision='{other}'": room._replace(precision=other) for other in ("bf16", "nf4") if other != room.precision}
    if place.type == "cuda":
        options |= {
            "offload=True": room._replace(offload=True),
            "precision='nf4', offload=True": WeightPlacement("nf4", True, room.ranks),
        }
    for said, other in options.items():
        if _needed(need, family, place, other) <= free:
            return f"It would fit with {said}."
    for ranks in (2, 4, 8, 16):
        if place.type == "cuda" and _needed(need, family, place, room._replace(ranks=ranks)) <= free:
            return f"It would fit on {ranks} such cards: torchrun --nproc-per-node {ranks}, with sharded=True."
    return "No option makes it fit: use a larger machine or a smaller model."


def _needed(need: MemoryNeed, family: Family, place: torch.device, room: WeightPlacement) -> int:
    """Bytes on one card at the worst moment: one part at a time if offloaded, a share of the denoiser if sharded."""
    sizes = need.bytes(room.precision, place)
    if room.offload:
        return round(HEADROOM * max(sizes.values()))
    shared = sizes.get(family.denoiser, 0) * (1 - 1 / room.ranks)
    return round(HEADROOM * (need.peak(room.precision, place) - shared))


def _while_loading(need: MemoryNeed, place: torch.device, room: WeightPlacement) -> str:
    peak = need.peak(room.precision, place)
    return f", {_said(peak)} while it is loaded" if peak > sum(need.bytes(room.precision, place).values()) else ""


def _said(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
