"""Devices: the one to compute on, the GPU of this rank, and the memory that is free."""

import math
import os
import time
from collections.abc import MutableMapping
from pathlib import Path

import torch

from difflex.errors import BadInput

__all__ = ["cached_memory", "find_device", "free_memory", "machine_rate", "total_memory", "use_gpu_of_rank"]

CGROUP = Path("/sys/fs/cgroup")
"""Where Linux reports the memory limit of a container."""
MEMINFO = Path("/proc/meminfo")


def find_device(name: str | torch.device | None = None) -> torch.device:
    """Return the device `name`; by default the GPU if there is one, else the CPU."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise BadInput(f"The device '{name}' does not exist. Use cpu, cuda, or cuda:N for GPU number N.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadInput(
            f"The device '{name}' is not available: torch finds {torch.cuda.device_count()} GPUs. Leave it out or use cpu."
        )
    return device


def use_gpu_of_rank(environment: MutableMapping[str, str] = os.environ) -> None:
    """Make only the GPU of this torchrun process visible to it. Call this before torch initialises CUDA."""
    rank, visible = environment.get("LOCAL_RANK"), environment.get("CUDA_VISIBLE_DEVICES")
    if rank is not None and visible != "":
        gpus = visible.split(",") if visible else [rank]
        environment["CUDA_VISIBLE_DEVICES"] = gpus[int(rank) % len(gpus)]


def free_memory(device: torch.device | str) -> int:
    """Return the bytes that can be allocated on `device`; on a CPU within the memory limit of the container."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + cached_memory(device)
    if not MEMINFO.is_file():  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    entries = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    return int(min(int(entries["MemAvailable"].split()[0]) * 1024, _free_in_container()))


def cached_memory(device: torch.device | None = None) -> int:
    """Return the bytes of a GPU that torch keeps for new tensors."""
    return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def total_memory() -> int:
    """Return the bytes of memory of the machine, or of the container if it has fewer."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
    except OSError:  # no cgroup, or one without a limit
        return total
    return total if limit == "max" else min(total, int(limit))


def _free_in_container() -> float:
    """Return the bytes below the container's limit; the file cache counts as free, since the system gives it up when needed."""
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        file_cache = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())["inactive_file"]
    except OSError:  # no cgroup, or one without a limit
        return math.inf
    return math.inf if limit == "max" else max(0, int(limit) - int(used) + int(file_cache))


def machine_rate() -> float:
    """Measure the floating-point operations per second of a large matrix product, on the GPU or on all threads of the CPU.

    The best of several, each on one thread: what other processes do meanwhile is not part of the rate.
    """
    device, side = ("cuda", 4096) if torch.cuda.is_available() else ("cpu", 512)
    threads = torch.get_num_threads()
    x = torch.ones(side, side, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    best, end = float("inf"), time.perf_counter() + 0.2
    try:
        torch.set_num_threads(1)
        while time.perf_counter() < end:
            began = time.perf_counter()
            torch.mm(x, x)
            if device == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    return 2 * side**3 / best * (1 if device == "cuda" else threads)


def gather_rate(rows: int = 1 << 16, width: int = 3072) -> float:
    """Measure the bytes per second of gathering random rows and adding them to others, on the GPU if there is one."""
    device = find_device()
    table, sums = (torch.zeros(rows, width, dtype=torch.bfloat16, device=device) for _ in range(2))
    order, best = torch.randperm(rows, device=device), math.inf
    for _ in range(5):
        began = time.perf_counter()
        sums.add_(table[order])
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 3 * table.nbytes / best
