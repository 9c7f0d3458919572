"""The Triton kernels of a training update without a GPU: compiled for sm_80 and sm_90; what one update launches and moves.

The update runs on the `meta` device, where every launch is recorded, at the sizes of the table in docs/performance.md. Every
kernel is then compiled with the types and constants of its launches; registers, spills and shared memory are the assembler's.
Bytes are counted: of torch's operations, what goes in and out; of a kernel, what it reads and writes, with features that fire by
Zipf's law; rows that several programs gather count each time. The floor is the product at 700 TFLOP/s and, at 3 TB/s, what no
update in this form avoids. All times here are counts divided by these two numbers; none was measured.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from difflex.dictionaries import SAEWeights
from difflex.training import TrainingConfig, default, paper
from difflex.training.data import TrainingRanks
from difflex.training.gpu import DeadBound, UpdateEngine
from difflex.training.learner import Learner

BANDWIDTH, PRODUCT = 3e12, 700e12
BATCH = 4096
BYTES_BAR, LAUNCHES_BAR = 1.5, 140
ARCHITECTURES = (80, 90)
CANDIDATES, UNSURE = 1.3, 0.55
"""Features whose scores are compared, and those that are scored again, in parts of k: of 65,536 normal scores at width 3072."""
NO_KERNEL = ("view", "_unsafe_view", "slice", "select", "expand", "t.", "permute", "unbind", "detach", "unsqueeze", "empty")
"""Operations that launch nothing."""


class Launch(NamedTuple):
    """A recorded launch."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    warps: int
    constants: dict[str, Any]

    def tensor(self, name: str) -> torch.Tensor:
        """Return the argument of this name."""
        return self.arguments[self.kernel.arg_names.index(name)]


class Recorder(TorchDispatchMode):
    """Counts the kernels that torch launches, and the bytes that they read and write; products apart."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.bytes = self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func).removeprefix("aten.")
        if name.startswith(NO_KERNEL):
            return result
        tensors = [each for each in tree_leaves((args, kwargs, result)) if isinstance(each, torch.Tensor)]
        self.operations[name] += 1
        if name.startswith(("mm", "addmm")):
            left, right = [each for each in tensors if each.ndim == 2][:2]
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
            tensors = tensors[-1:]  # the scores, written; the factors are in the time of the product
        self.bytes += sum(each.nbytes for each in tensors)
        return result


@dataclass(frozen=True)
class Workload:
    """A training and which features fire in a batch."""

    label: str
    config: TrainingConfig
    width: int

    def firing(self) -> tuple[int, int]:
        """Return how many features fire, and how many whole segments of a popular feature's pairs there are."""
        from difflex.training.fused import SEGMENT

        rank = torch.arange(1, self.config.size + 1, dtype=torch.float64)
        weight = 1 / (rank + self.config.k)
        share = (weight / weight.sum() * self.config.k).clamp_max(1)
        fired = 1 - (1 - share) ** BATCH
        return int(fired.sum()), int((share * BATCH // SEGMENT).sum())

    def recorded(self) -> tuple[list[Launch], Recorder]:
        """Return what one update launches."""
        from difflex.training import fused

        launches: list[Launch] = []

        def record(kernel: Any, grid: Any, *arguments: Any, warps: int = 4, **constants: Any) -> None:
            launches.append(Launch(kernel, tuple(grid), arguments, warps, constants))

        size, config = self.config.size, self.config
        tensors = {
            "encoder": torch.empty(size, self.width, device="meta"),
            "decoder": torch.empty(size, self.width, device="meta"),
        }
        tensors |= {"bias": torch.empty(self.width, device="meta")}
        tensors |= {"pre_bias": torch.empty(self.width, device="meta")} if config.pre_bias else {}
        tensors |= {"encoder_bias": torch.empty(size, device="meta")} if config.encoder_bias else {}
        learner = Learner(config, SAEWeights.from_tensors(tensors), TrainingRanks(), UpdateEngine(kernels=True))
        with Recorder() as recorder, patch.object(fused, "launch", record), patch.object(DeadBound, "room", return_value=0):
            learner.update(torch.empty(BATCH, self.width, device="meta"), 1e-3, measure=False)
        return launches, recorder

    def floor(self) -> tuple[float, float]:
        """Return the bytes that no update in this form avoids, and the operations of the product."""
        size, width, k = self.config.size, self.width, self.config.k
        scores = 2 * 2 * BATCH * size  # written and read in two bytes
        gathers = 4 * 2 * BATCH * k * width  # decoder rows twice, inputs and errors
        parts = 2 + (self.config.optimiser.beta1 > 0) + (self.config.optimiser.ema is not None)
        state = 2 * self.firing()[0] * width * (parts * 8 + 2)
        return scores + gathers + state, 2.0 * BATCH * size * width


def moved(launch: Launch, work: Workload) -> float:
    """Return the bytes that a kernel reads and writes."""
    config, width = work.config, work.width
    pairs, (firing, segments) = BATCH * config.k, work.firing()
    wide = pairs * width
    match launch.kernel.__name__:
        case "block_maxima":
            return launch.tensor("scores").nbytes + launch.tensor("maxima").nbytes
        case "choose_blocks":
            return launch.tensor("maxima").nbytes + launch.tensor("chosen").nbytes
        case "choose_candidates":
            return launch.grid[0] * config.k * CANDIDATES * (32 * 2 + 12)
        case "pair_dots":
            matrix, numbered = launch.tensor("matrix"), launch.constants["NUMBERED"]
            return wide * matrix.element_size() * (UNSURE if numbered else 1) + launch.tensor("products").nbytes
        case "decode_errors":
            return wide * launch.tensor("matrix").element_size() + launch.tensor("base").nbytes + launch.tensor("errors").nbytes
        case "weighted_rows":
            return firing * width * launch.tensor("matrix").element_size() + launch.tensor("sums").nbytes
        case "sum_segments":
            return segments * (launch.constants["SEGMENT"] * 2 + 4) * width
        case "measure_rows":
            return 0  # the bound is under the clip
        case "update_rows":
            parts = 2 + launch.constants["MOMENT"] + launch.constants["AVERAGE"]
            single = pairs - segments * launch.constants["SEGMENT"]
            return single * 2 * width + segments * 4 * width + firing * width * (parts * 8 + 2 + 4 * launch.constants["UNIT"])
        case "update_vector":
            return launch.tensor("weight").nbytes * 5
        case name:
            raise AssertionError(name)


def type_of(argument: Any) -> str:
    """Return an argument's type in a kernel's signature."""
    if isinstance(argument, torch.Tensor):
        names = {"float32": "fp32", "bfloat16": "bf16", "int32": "i32", "int64": "i64", "bool": "i1"}
        return "*" + names[str(argument.dtype).removeprefix("torch.")]
    return "fp32" if isinstance(argument, float) else "i32"


def resources(launch: Launch, architecture: int) -> tuple[int, int, int]:
    """Compile a kernel; return its registers, spilled bytes and shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    signature = {name: type_of(argument) for name, argument in zip(names, launch.arguments, strict=False)}
    signature |= dict.fromkeys(launch.constants, "constexpr")
    # Triton assumes at a launch that pointers and most sizes are multiples of 16, as they are here.
    aligned = {
        (number,): [["tt.divisibility", 16]]
        for number, argument in enumerate(launch.arguments)
        if isinstance(argument, torch.Tensor) or (isinstance(argument, int) and argument % 16 == 0)
    }
    constants = {(names.index(name),): value for name, value in launch.constants.items()}
    source = ASTSource(launch.kernel, signature={name: signature[name] for name in names}, constexprs=constants, attrs=aligned)
    options = {"num_warps": launch.warps, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", report))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"]), compiled.metadata.shared


def compiled_kernels(work: Workload, launches: list[Launch]) -> int:
    """Print the resources of every kernel that is launched; return the bytes spilled by all."""
    spills, known = 0, set()
    for launch in launches:
        key = (launch.kernel.__name__, *map(type_of, launch.arguments), *launch.constants.values(), launch.warps)
        if key in known:
            continue
        known.add(key)
        found = {architecture: resources(launch, architecture) for architecture in ARCHITECTURES}
        spills += sum(spilled for _, spilled, _ in found.values())
        text = ", ".join(
            f"sm_{architecture}: {registers} registers, {spilled} bytes spilled, {shared / 1024:.1f} KiB shared"
            for architecture, (registers, spilled, shared) in found.items()
        )
        print(f"   {work.label} {launch.kernel.__name__} ({launch.warps} warps): {text}", flush=True)
    return spills


def main() -> int:
    """Return 0 if no bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--verbose", action="store_true", help="print the bytes of every launch")
    arguments = parser.parse_args()
    if find_spec("triton") is None:
        print("kernels: Triton is not installed (pip install triton), so nothing was compiled or counted")
        return 0
    trainings = [
        Workload("3072/65536/64", default(width=3072, size=65_536, k=64), 3072),
        Workload("3072/16384/64", default(width=3072, size=16_384, k=64), 3072),
        Workload("768/8192/32", default(width=768, size=8192, k=32), 768),
        Workload("paper", paper(), 3072),
    ]
    missed, spills = [], 0
    for work in trainings:
        launches, recorder = work.recorded()
        spills += compiled_kernels(work, launches)
        count = len(launches) + recorder.operations.total()
        kernels = [(launch, moved(launch, work)) for launch in launches]
        total = sum(size for _, size in kernels) + recorder.bytes
        floor, flops = work.floor()
        ours = total / BANDWIDTH + recorder.flops / PRODUCT
        least = floor / BANDWIDTH + flops / PRODUCT
        if arguments.verbose:
            for launch, size in kernels:
                print(f"      {launch.kernel.__name__} {launch.grid}: {size / 1e6:.0f} MB")
            print(f"      torch: {recorder.bytes / 1e6:.0f} MB in {dict(recorder.operations)}")
        print(
            f"   {work.label}: {count} launches, {total / 1e9:.2f} GB ({recorder.bytes / 1e9:.2f} by torch), "
            f"floor {floor / 1e9:.2f} GB; "
            f"at 3 TB/s and 700 TFLOP/s {1e3 * ours:.2f} ms, floor {1e3 * least:.2f} ms",
            flush=True,
        )
        missed += [f"{work.label}: {total / floor:.2f}x the floor's bytes"] if total > BYTES_BAR * floor else []
        missed += [f"{work.label}: {count} launches"] if count > LAUNCHES_BAR else []
    missed += [f"{spills} bytes spilled"] if spills else []
    print(
        f"kernels: bytes within {BYTES_BAR}x the floor, at most {LAUNCHES_BAR} launches, no spills: {'; '.join(missed) or 'met'}"
    )
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
