"""ITDA: codes and growth at FLUX's width and the size of the paper's dictionary, and what a pursuit launches and moves."""

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from difflex.choices import PursuitName
from difflex.dictionaries.itda import GrowthConfig
from difflex.dictionaries.pursuit import RULES, AtomSet, GramMatrix, choose_backend, run_pursuit
from difflex.dictionaries.pursuit.algorithms import MAX_CHUNK, PursuitState, run_rounds
from difflex.distributed import Ranks
from difflex.records import ActivationBatch
from difflex.training.itda.grower import AtomGrower
from gpu_parts import Bar, PartResult, seconds, wait

PURSUITS: tuple[PursuitName, ...] = ("orthogonal", "gradient", "matching")
RATE, RATIO, GROWTH, FVU = 15_000, 30, 3_000, 1.03
"""Tokens per second of encoding, times the plain gradient pursuit, tokens per second of growth; FVU over that of exact picks."""
PIECE = 1024
BYTES_PER_SECOND, HALF_RATE, SINGLE_RATE = 3.0e12, 650e12, 50e12
"""What an H100 moves, and multiplies in half and single precision: for the floor of the counted work."""
NO_LAUNCH = {"empty", "empty_like", "new_empty", "empty_strided", "_local_scalar_dense"}


@dataclass(frozen=True, kw_only=True)
class PursuitShape:
    """The sizes of a pursuit."""

    width: int = 3072
    size: int = 65_536
    k: int = 64
    tokens: int = 16_384
    plain_tokens: int = 256

    @classmethod
    def on(cls, device: torch.device) -> "PursuitShape":
        """Return FLUX's on a GPU, and tiny ones on a CPU."""
        return cls() if device.type == "cuda" else cls(width=64, size=1024, k=8, tokens=256, plain_tokens=32)

    def rows(self, count: int, device: torch.device, seed: int) -> Tensor:
        """Return sparse mixtures of some directions with noise."""
        directions = F.normalize(torch.randn(1024, self.width, generator=torch.Generator(device).manual_seed(0), device=device))
        generator, parts = torch.Generator(device).manual_seed(seed), []
        for start in range(0, count, 8192):
            part = min(8192, count - start)
            scores = torch.rand(part, 1024, generator=generator, device=device) * torch.arange(1, 1025, device=device) ** -0.25
            picks = scores.topk(12).indices
            amounts = torch.rand(part, 12, generator=generator, device=device) + 0.5
            weights = torch.zeros_like(scores).scatter_(1, picks, amounts)
            noise = torch.randn(part, self.width, generator=generator, device=device) / self.width**0.5
            parts.append(F.normalize(weights @ directions + 0.4 * noise, dim=1))
        return torch.cat(parts)

    def __str__(self) -> str:
        return f"width {self.width}, {self.size:,} atoms, k {self.k}"


def plain_gradient_pursuit(signals: Tensor, atoms: Tensor, k: int) -> Tensor:
    """Return dense weights, by the algorithm of dictionary_learning: every round is three products with all atoms."""
    weights = signals.new_zeros(len(signals), len(atoms))
    tokens = torch.arange(len(signals), device=signals.device)
    for _ in range(k):
        residual = signals - weights @ atoms
        correlations = residual @ atoms.T
        selected = weights != 0
        selected[tokens, correlations.argmax(1)] = True
        gradient = selected * correlations
        c = gradient @ atoms
        step = (c * residual).sum(1) / (c * c).sum(1)
        weights = (weights + step[:, None] * gradient).clamp_min(0)
    return weights


def atom_set(atoms: Tensor, pursuit: PursuitName, k: int) -> AtomSet:
    """Return the atoms with what a dictionary on their device has."""
    size, width = atoms.shape
    backend = choose_backend(pursuit, size, width, k, atoms.device.type)
    gram = None if backend.gram is None else GramMatrix.of(atoms, backend.gram)
    return AtomSet(atoms, gram, backend.pool, AtomSet.half_rows(atoms) if backend.half else None)


def encode(device: torch.device) -> PartResult:
    """Return a row for each pursuit: its FVU beside exact picks in float64, and its speed."""
    shape = PursuitShape.on(device)
    atoms, signals = shape.rows(shape.size, device, 1), shape.rows(shape.tokens, device, 2)
    few = signals[: shape.plain_tokens]
    plain = plain_gradient_pursuit(few, atoms, shape.k)
    plain_fvu = float((few - plain @ atoms).square().sum() / few.square().sum())
    plain_rate = shape.plain_tokens / seconds(lambda: plain_gradient_pursuit(few, atoms, shape.k), device, rounds=1)
    columns = ("pursuit", "tokens/s", "of plain gradient pursuit", "FVU of exact picks", "of that")
    result = PartResult(f"Codes at {shape} (plain gradient pursuit: {plain_rate:,.0f} tokens/s, FVU {plain_fvu:.5f}):", columns)
    exact, sample = AtomSet(atoms.double()), signals[:32].double()
    for pursuit in PURSUITS:
        mine, rule = atom_set(atoms, pursuit, shape.k), RULES[pursuit]
        best = run_pursuit(exact, rule, sample, shape.k).unexplained.mean()
        path = run_pursuit(mine, rule, signals[:32], shape.k)
        explained = torch.einsum("tk,tkw->tw", path.weights.double(), exact.rows[path.support])
        ratio = float((sample - explained).square().sum(1).mean() / best)
        rate = shape.tokens / seconds(lambda: run_pursuit(mine, rule, signals, shape.k), device, rounds=2)  # noqa: B023
        result.add(pursuit, f"{rate:,.0f}", f"{rate / plain_rate:.1f}x", f"{float(best):.5f}", f"{ratio:.4f}")
        if device.type == "cuda":
            result.bars.append(Bar(f"FVU of {pursuit} pursuit, of exact picks", ratio, FVU))
            if pursuit != "matching":
                result.bars.append(Bar(f"tokens/s of {pursuit} pursuit", rate, RATE, at_least=True))
            if pursuit == "gradient":
                result.bars.append(Bar("gradient pursuit, times the plain one", rate / plain_rate, RATIO, at_least=True))
    return result


def growth(device: torch.device) -> PartResult:
    """Return the speed of growing a dictionary that is nearly full, where it is slowest."""
    shape = PursuitShape.on(device)
    settings = GrowthConfig(k=shape.k, size=shape.size, batch=PIECE, pursuit="gradient")
    result = PartResult(f"Growth at {shape}, gradient pursuit:", ("atoms before", "new atoms", "tokens", "tokens/s"))
    for before in (shape.size // 4, shape.size - shape.size // 16):
        grower = AtomGrower(settings, 0.5, shape.width, device, Ranks())
        rows, places = shape.rows(before, device, 1), torch.zeros(before, dtype=torch.long)
        part: dict[str, Tensor] = {"rows": rows, "shots": places, "tokens": places}
        if grower.atoms.gram is not None:
            part["gram"] = rows @ rows.T
        grower.restore(part)
        pieces = shape.rows(4 * PIECE if device.type == "cuda" else 512, device, 3).split(PIECE if device.type == "cuda" else 256)
        unexplained = run_pursuit(grower.atoms, RULES["gradient"], pieces[0], shape.k).unexplained
        grower.threshold = float(unexplained.quantile(0.95))
        times = []
        for piece in pieces:
            nothing = torch.zeros(len(piece), dtype=torch.long, device=device)
            wait(device)
            began = time.perf_counter()
            grower.add_batch(ActivationBatch(piece, nothing, nothing))
            wait(device)
            times.append(time.perf_counter() - began)
        rate = len(pieces[0]) / statistics.median(times)
        result.add(f"{before:,}", f"{grower.size - before:,}", f"{sum(map(len, pieces)):,}", f"{rate:,.0f}")
        if device.type == "cuda":
            result.bars.append(Bar(f"tokens/s of growth after {before:,} atoms", rate, GROWTH, at_least=True))
    return result


class WorkCounter(TorchDispatchMode):
    """Counts the launches of a computation and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.bytes = Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and name not in NO_LAUNCH:
            self.launches[name] += 1
            tensors: list[Tensor] = []
            tree_map_only(Tensor, tensors.append, [args, kwargs, out])
            written = sum(_bytes(tensor) for tensor in ([out] if isinstance(out, Tensor) else out if out is not None else ()))
            # What is gathered is read once, however large the tensor is that it comes from.
            self.bytes[name] += 2 * written if name in ("index", "gather") else sum(map(_bytes, tensors))
        return out


def _bytes(tensor: Tensor) -> int:
    """Return the bytes of the entries in memory, of which an expanded tensor repeats some."""
    entries = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        entries *= length if stride else 1
    return entries * tensor.element_size()


def launches(device: torch.device) -> PartResult:
    """Count the work of one chunk at FLUX's size, on `meta`; nothing in it can wait for a GPU, as `meta` has no values."""
    shape, tokens = PursuitShape(), MAX_CHUNK["cuda"]
    meta = torch.device("meta")
    columns = ("pursuit", "launches for a chunk", "MB a token", "GFLOP a token, half", "single", "floor, us a token", "tokens/s")
    result = PartResult(
        f"Counted at {shape}, chunks of {tokens:,} tokens; floor of an H100 (3 TB/s, 650 and 50 TFLOP/s):", columns
    )
    for pursuit in PURSUITS:
        atoms = torch.empty(shape.size, shape.width, device=meta)
        backend = choose_backend(pursuit, shape.size, shape.width, shape.k, "cuda")
        mine = AtomSet(atoms, None, backend.pool, AtomSet.half_rows(atoms))
        signals = torch.empty(tokens, shape.width, device=meta)
        with WorkCounter() as work, FlopCounterMode(display=False) as flops:
            state = PursuitState.of(signals.square().sum(1), shape.k, RULES[pursuit], with_history=False)
            run_rounds(state, RULES[pursuit], mine.correlations(signals, shape.k), shape.k, 0.0)
        by_name = {str(name): count for name, count in flops.get_flop_counts()["Global"].items()}
        half = by_name.get("aten.mm", 0) / tokens
        single = sum(by_name.values()) / tokens - half
        moved = work.bytes.total() / tokens
        # Products in single precision read their operands while they multiply.
        products = max(work.bytes["bmm"] / tokens / BYTES_PER_SECOND, single / SINGLE_RATE)
        floor = (moved - work.bytes["bmm"] / tokens) / BYTES_PER_SECOND + products + half / HALF_RATE
        row = (f"{moved / 1e6:.1f}", f"{half / 1e9:.2f}", f"{single / 1e9:.2f}", f"{1e6 * floor:.1f}", f"{1 / floor:,.0f}")
        result.add(pursuit, f"{work.launches.total():,}", *row)
        print("      most:", *(f"{name} {count / tokens / 1e6:.1f} MB" for name, count in work.bytes.most_common(6)))
    return result


PARTS: dict[str, Callable[[torch.device], PartResult]] = {
    "itda-encode": encode,
    "itda-growth": growth,
    "itda-launches": launches,
}
