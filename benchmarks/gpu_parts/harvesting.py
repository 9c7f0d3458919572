"""Harvesting FLUX.1 (12 B parameters, random weights): tokens per second by batch size, memory, share of the GPU's ceiling."""

import torch
from torch.utils.flop_counter import FlopCounterMode

import difflex
from difflex.errors import OutOfMemory
from gpu_parts import PartResult, peak_bytes, seconds

FLUX = ("black-forest-labs/FLUX.1-schnell", 0, "double.18", (256, 256), (1, 8, 32, 64), 8192)
TINY = ("mini-flux", None, "double.2", (64, 64), (1,), 256)


def ceiling(side: int, device: torch.device) -> float:
    """Return the operations per second of a plain bf16 product."""
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / seconds(lambda: left @ right, device)


def harvest(device: torch.device, precision: str) -> PartResult:
    """Return a row for each batch size, until the GPU is full."""
    model, untrained, site, pixels, batches, side = FLUX if device.type == "cuda" else TINY
    most = ceiling(side, device)
    pipe = difflex.load(model, precision=precision, device=device, untrained=untrained)
    result = PartResult(
        f"Harvest at {site} of {model}, {pixels[0]} pixels, 1 step, {precision} (a bf16 product: {most / 1e12:.3g} TFLOP/s):",
        ("batch", "tokens/s", "peak GiB", "of the ceiling"),
    )
    for batch in batches:
        prompts = [f"image number {number}" for number in range(batch)]
        shots = list(pipe.shots(prompts, steps=1, pixels=pixels, guidance=0.0))

        def work(shots: list[difflex.Shot] = shots, batch: int = batch) -> int:
            activations = pipe.harvest(shots, site, batch=batch, progress=False)
            return sum(each.values.shape[:2].numel() for each in activations)

        try:
            with FlopCounterMode(display=False) as counted:
                tokens = work()
            peak = peak_bytes(device, work) / 2**30
            took = seconds(work, device, rounds=1)
        except OutOfMemory:
            break
        result.add(batch, f"{tokens / took:,.0f}", f"{peak:.1f}", f"{counted.get_total_flops() / took / most:.0%}")
    return result


PARTS = {
    "harvest-bf16": lambda device: harvest(device, "bf16"),
    "harvest-nf4": lambda device: harvest(device, "nf4"),
}
