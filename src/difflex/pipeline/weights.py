"""The weights of a model: how many there are, and the bytes they take in each precision."""

import re
from typing import NamedTuple

import torch
from torch import nn

from difflex.choices import Precision
from difflex.pipeline.components import PipelinePlan
from difflex.pipeline.families import Family

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
IN_BLOCK = re.compile(r"(^|\.)\d+(\.|$)")
NF4_BYTES = 0.5 + 4 / 64
"""Per weight in nf4: half a byte, and a float for each 64 weights."""


def compute_dtype(precision: Precision, device: torch.device | str) -> torch.dtype:
    """Return the dtype to compute in: that of all weights, or with nf4 that of all others."""
    return DTYPES.get(precision, torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)


def four_bit_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the layers to hold in nf4, by path: the linear layers of repeated blocks, except those the class keeps in fp32."""
    exact = getattr(model, "_keep_in_fp32_modules", None) or ()  # such as `wo` of T5
    layers = ((path, layer) for path, layer in model.named_modules() if isinstance(layer, nn.Linear) and IN_BLOCK.search(path))
    return {path: layer for path, layer in layers if not set(path.split(".")) & set(exact)}


class MemoryNeed(NamedTuple):
    """Numbers of weights of the components of a model."""

    quantised: dict[str, int]
    """Weights that nf4 quantises, by component."""
    dense: dict[str, int]
    """All other weights, by component."""

    def bytes(self, precision: Precision, device: torch.device | str) -> dict[str, int]:
        """Return the bytes of the weights on `device`, by component."""
        size = compute_dtype(precision, device).itemsize
        quantised = NF4_BYTES if precision == "nf4" else size
        return {name: round(self.quantised[name] * quantised) + self.dense[name] * size for name in self.dense}

    def peak(self, precision: Precision, device: torch.device | str) -> int:
        """Return the most bytes while loading: on a CPU a component is in memory as a whole before it is quantised."""
        sizes = self.bytes(precision, device)
        if precision != "nf4" or torch.device(device).type != "cpu":
            return sum(sizes.values())
        whole = self.bytes("fp32", device)
        return sum(sizes.values()) + max(whole[name] - sizes[name] for name in sizes)


def count_weights(plan: PipelinePlan, family: Family) -> MemoryNeed:
    """Count the weights of each component on the meta device, where nothing is allocated."""
    quantised, dense = {}, {}
    for name, component in plan.components.items():
        if (model := component.without_weights()) is not None:
            layers = four_bit_layers(model).values() if name in (family.denoiser, family.large_text) else ()
            quantised[name] = sum(layer.weight.numel() for layer in layers)
            dense[name] = sum(parameter.numel() for parameter in model.parameters()) - quantised[name]
    return MemoryNeed(quantised, dense)
