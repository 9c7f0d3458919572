"""Storing and reading: what int8 costs on the device, how fast rows reach the disk beside a model, and come back."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

import torch

from difflex.records import Activations, Shot, Site
from difflex.store import RecordingConfig, Store, record
from difflex.store.basis import BasisTally
from difflex.store.shard import pack, unpack
from gpu_parts import PartResult, seconds

REAL, TINY = (3072, 256, 512, 4096), (192, 64, 64, 256)
"""Width, tokens of a shot, shots to record, rows of a batch."""
SITES = tuple(map(Site, ("double.9", "double.18", "single.9", "single.18")))


class DeviceHarvest:
    """A harvest without a model: random activations on the device, and a product that takes as long as a forward pass."""

    def __init__(self, device: torch.device, width: int, tokens: int, passes: int) -> None:
        self.values = torch.randn(32, tokens, width, device=device).bfloat16()
        self.weight = torch.randn(width, width, device=device).bfloat16()
        self.passes = passes

    def __call__(self, shots: Sequence[Shot], sites: Sequence[Site], batch: int) -> Iterator[Activations]:
        for start in range(0, len(shots), batch):
            part = tuple(shots[start : start + batch])
            for _ in range(self.passes):
                torch.matmul(self.values, self.weight)
            for site in sites:
                yield Activations(site=site, values=self.values[: len(part)].clone(), shots=part, grid=None)


def shots(count: int) -> list[Shot]:
    """Return shots of different prompts."""
    first = Shot(model="none", pixels=(256, 256), steps=1, guidance=0.0, timestep=1000.0)
    prompts = (f"image number {number}" for number in range(count))
    return [replace(first, prompt=prompt, split=Shot.split_of(prompt)) for prompt in prompts]


def packing(device: torch.device) -> PartResult:
    """Time int8 on the device: to its form on the disk and back."""
    width, _, _, rows = REAL if device.type == "cuda" else TINY
    x, tally = torch.randn(8 * width, width, device=device), BasisTally()
    tally.add(x)
    basis, x = tally.basis().to(device), x[:rows]
    packed = pack(x, "int8", basis)
    result = PartResult(f"int8 of {len(x)} rows of width {width}:", ("work", "ms", "M rows/s"))
    for name, work in (("pack", lambda: pack(x, "int8", basis)), ("unpack", lambda: unpack(packed, basis))):
        took = seconds(work, device)
        result.add(name, f"{1000 * took:.2f}", f"{len(x) / took / 1e6:.2f}")
    return result


def recording(device: torch.device) -> PartResult:
    """Time a recording of four sites beside a computation, in both forms, and its reading back to the device."""
    width, tokens, count, rows = REAL if device.type == "cuda" else TINY
    columns = ("dtype", "alone, s", "recorded, s", "M rows/s written", "M rows/s read")
    result = PartResult(f"{count} shots of {tokens} tokens of width {width} at four sites, in batches of 32:", columns)
    harvest, many = DeviceHarvest(device, width, tokens, 100 if device.type == "cuda" else 1), shots(count)
    alone = seconds(lambda: [None for _ in harvest(many, SITES, 32)], device, rounds=1)
    for dtype in ("bf16", "int8"):
        with tempfile.TemporaryDirectory() as folder:
            stores: list[Store] = []

            def write(folder: str = folder, stores: list[Store] = stores, dtype: str = dtype) -> None:
                config = RecordingConfig(dtype=dtype, batch=32, progress=False)  # pyright: ignore[reportArgumentType]
                stores[:] = record(f"{folder}/{len(stores)}", many, SITES, harvest, config)

            def read(stores: list[Store] = stores) -> int:
                return sum(len(each.values) for each in islice(stores[0].batches(rows, epochs=None, device=device), 16))

            written = seconds(write, device, rounds=1)
            took = seconds(read, device, rounds=1)
            result.add(
                dtype, f"{alone:.2f}", f"{written:.2f}", f"{4 * count * tokens / written / 1e6:.2f}", f"{read() / took / 1e6:.2f}"
            )
    return result


PARTS = {"store-int8": packing, "store-recording": recording}
