"""The cost of harvesting: hooks compared with none, the early stop, peak memory, and nnsight at the same site.

Times are CPU times of the process (`time.process_time`) on one thread, medians of interleaved rounds, so that other processes on
the machine matter little. `--peer PYTHON` names the interpreter that has nnsight, `.venv-peers/bin/python` by default.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import difflex
from difflex.pipeline import Pipeline, embedded
from difflex.pipeline.components import PLANS, ComponentPlan, build_untrained
from difflex.pipeline.engine import Engine
from difflex.pipeline.families import family_of
from difflex.pipeline.sources import read_defaults
from difflex.records import Shot

torch.set_num_threads(1)
SHAPES = ("stars", "rings")
FLUX = "black-forest-labs/FLUX.1-schnell"
PROMPTS = [f"{count} {colour} {shape} on grass" for count in ("two", "three") for colour in ("red", "blue") for shape in SHAPES]
ROUNDS = 9
BARS = {"reading": 1.03, "middle": 0.45, "double.18": 0.60, "double.0": 0.90, "memory": 1.0, "nnsight": 1.0, "sharing": 1.9}


def shrunk_flux() -> Pipeline:
    """FLUX.1's proportions, 19 double and 38 single blocks, at a width of 128 and with small text encoders."""
    transformer = {"attention_head_dim": 64, "num_attention_heads": 2, "axes_dims_rope": [8, 28, 28]}
    small = {
        "text_encoder": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
        "text_encoder_2": {"d_model": 64, "d_kv": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2},
        "transformer": {**transformer, "joint_attention_dim": 64, "pooled_projection_dim": 64},
        "vae": {"block_out_channels": [32, 32, 32, 32]},
    }
    parts = {
        name: ComponentPlan(part.library, part.kind, {**part.config, **small.get(name, {})} if part.config else None)
        for name, part in PLANS[FLUX].components.items()
    }
    plan, family = PLANS[FLUX]._replace(components=parts), family_of("FluxPipeline")
    pipeline = build_untrained(plan, 0, torch.float32, torch.device("cpu"))
    pipeline.set_progress_bar_config(disable=True)
    return Pipeline(Engine(pipeline, family, read_defaults(None, family, plan)), FLUX, None, "fp32")


def shots_of(pipe: Pipeline, count: int, pixels: tuple[int, int] | None = None) -> list[Shot]:
    return list(pipe.shots(PROMPTS[:count], steps=1, pixels=pixels, guidance=0.0))


class Stopwatch:
    """CPU seconds since the call of the denoiser."""

    def __init__(self, denoiser: nn.Module) -> None:
        denoiser.register_forward_pre_hook(self._start)
        self._since = 0.0

    def _start(self, *_: object) -> None:
        self._since = time.process_time()

    def of(self, work: Callable[[], object]) -> float:
        work()
        return time.process_time() - self._since


def interleaved(watch: Stopwatch, works: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Measure the seconds of each function in each round, in alternating order, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name in list(works)[:: 1 if number % 2 else -1]:
            seconds = watch.of(works[name])
            if number:
                times[name].append(seconds)
    return times


def reading(pipe: Pipeline, site: str, count: int, pixels: tuple[int, int] | None, rounds: int) -> float:
    """Return the time of a forward pass that reads `site` relative to one without hooks."""
    shots = shots_of(pipe, count, pixels)

    def plain() -> None:
        pipe.engine.run(shots, output_type="latent")

    def read() -> None:
        activations: list[Tensor] = []
        with pipe.at(site, lambda x, context: activations.append(x.clone())):
            plain()

    times = interleaved(Stopwatch(pipe.engine.denoiser), {"plain": plain, "read": read}, rounds)
    return statistics.median(a / b for a, b in zip(times["read"], times["plain"], strict=True))


def stopping(pipe: Pipeline, sites: list[str], count: int, pixels: tuple[int, int] | None, rounds: int) -> dict[str, float]:
    """Return the share of the denoiser's time that stopping after each site saves."""
    shots = shots_of(pipe, count, pixels)
    works: dict[str, Callable[[], object]] = {"": lambda: pipe.engine.run(shots, output_type="latent")}
    for site in sites:
        works[site] = lambda site=site: list(pipe.harvest(shots, site, batch=count, progress=False))
    times = interleaved(Stopwatch(pipe.engine.denoiser), works, rounds)
    return {site: 1 - statistics.median(a / b for a, b in zip(times[site], times[""], strict=True)) for site in sites}


class Living(TorchDispatchMode):
    """Bytes of all tensors created and still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def most_alive(work: Callable[[], object]) -> int:
    with Living() as living:
        work()
    return living.most


def memory(pipe: Pipeline, sites: list[str], count: int) -> tuple[int, int]:
    """Return the peak bytes of a harvest above those of a plain pass, and the bytes of one batch of the sites."""
    shots = shots_of(pipe, count)
    harvested = list(pipe.harvest(shots, sites, batch=count, progress=False))
    size = sum(activations.values.nbytes for activations in harvested)
    del harvested
    plain = most_alive(lambda: pipe.engine.run(shots, output_type="latent"))
    return most_alive(lambda: list(pipe.harvest(shots, sites, batch=count, progress=False))) - plain, size


OURS = """
import difflex
pipe = difflex.load(model, device="cpu")
harvested = pipe.harvest(pipe.shots(prompts, steps=1), "double.1", batch=16, progress=False)
def work(number):
    return next(harvested).values.shape[:2].numel()
"""
NNSIGHT = """
from nnsight.modeling.diffusion import DiffusionModel
pipe = DiffusionModel(model, dispatch=True)
settings = dict(num_inference_steps=1, height=64, width=64, max_sequence_length=26, guidance_scale=0.0, output_type="latent")
def work(number):
    with pipe.generate(prompts[16 * number : 16 * number + 16], **settings) as tracer:
        x = pipe.transformer.transformer_blocks[1].output[1].save()
        tracer.stop()
    return x.shape[:2].numel()
"""
BEFORE = """
import itertools, json, sys, time
import torch
torch.set_num_threads(1)
model, prompts = sys.argv[1], json.loads(sys.argv[2])
"""
AFTER = """
for number, _ in enumerate(sys.stdin):
    start = time.process_time()
    tokens = work(number)
    print(f"rate {tokens / (time.process_time() - start)}", flush=True)
"""


def against_nnsight(peer: str, folder: Path, rounds: int = 40) -> dict[str, float]:
    """Measure tokens per CPU second: each takes a batch of 16 new prompts in turn and stops after the same block."""
    prompts = [f"{prompt} {number}" for number in range(2 * rounds + 4) for prompt in PROMPTS]
    rates: dict[str, list[float]] = {"ours": [], "nnsight": []}
    with tempfile.TemporaryDirectory() as scripts, ExitStack() as stack:
        running: dict[str, subprocess.Popen[str]] = {}
        for name, python, code in (("ours", sys.executable, OURS), ("nnsight", peer, NNSIGHT)):
            # In separate processes, as importing nnsight changes torch; in files, as it reads the source of its caller.
            script = Path(scripts) / f"harvest_by_{name}.py"
            script.write_text(BEFORE + code + AFTER)
            words = [python, str(script), str(folder), json.dumps(prompts)]
            running[name] = stack.enter_context(
                subprocess.Popen(words, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            )
        for number in range(rounds + 2):
            for name in list(running)[:: 1 if number % 2 else -1]:
                rate = _next_rate(running[name])
                rates[name] += [rate] if number > 1 else []
        for process in running.values():
            process.communicate()
    # The mean time, not the median: ours encodes the prompts of several batches in one of them.
    return {name: statistics.harmonic_mean(values) for name, values in rates.items()}


def _next_rate(process: "subprocess.Popen[str]") -> float:
    """Return the rate of the next batch."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("rate "):
            return float(line.split()[1])
    raise SystemExit("a process to compare with ended early; run it by hand to see why")


SHARE = """
import json, sys, time
from functools import partial
import torch
import difflex
from difflex.distributed import Ranks
from difflex.store import RecordingConfig, record
torch.set_num_threads(1)
ranks = Ranks.from_torchrun()
pipe = difflex.load("mini-flux", device="cpu")
shots = list(pipe.shots([f"{number} red stars on grass" for number in range(int(sys.argv[2]))], steps=1))
config = RecordingConfig(batch=16, shard_bytes=0, rank=ranks.rank, world_size=ranks.world_size, progress=False)
if ranks.world_size > 1:
    torch.distributed.init_process_group("gloo")
    torch.distributed.barrier()
clock, core = time.perf_counter(), time.process_time()
record(sys.argv[1], shots, ["double.1", "single.0"], partial(pipe.harvest, progress=False), config)
print("took", json.dumps([time.perf_counter() - clock, time.process_time() - core]), flush=True)
"""


def sharing(shots: int = 512, rounds: int = 3) -> tuple[float, float]:
    """Return how many times as fast two processes of torchrun are as one, by the clock and by the time of a core.

    All have one thread, and times are without loading the model. By the time of a core, other programs matter little.
    """
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    ratios: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "share.py"
        script.write_text(SHARE)
        for number in range(rounds):
            times: dict[int, list[list[float]]] = {}
            for processes in (1, 2) if number % 2 else (2, 1):
                words = [*launch, str(processes), str(script), f"{folder}/{number}-{processes}", str(shots)]
                output = subprocess.run(words, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
                times[processes] = [json.loads(line[5:]) for line in output.splitlines() if line.startswith("took ")]
                assert len(times[processes]) == processes
            one, two = ([max(each) for each in zip(*times[processes], strict=True)] for processes in (1, 2))
            ratios.append((one[0] / two[0], one[1] / two[1]))
    clock, core = (statistics.median(each) for each in zip(*ratios, strict=True))
    return clock, core


@contextmanager
def section(name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    print(f"  ({name}: {time.perf_counter() - start:.0f} s)")


def main() -> int:
    """Print all measurements; return 0 if every bar is met, else 1."""
    lines: list[tuple[str, float, float, bool]] = []
    peer = sys.argv[sys.argv.index("--peer") + 1] if "--peer" in sys.argv else ".venv-peers/bin/python"
    mini = difflex.load("mini-flux", device="cpu")
    names = list(mini.engine.sites.blocks)
    middle = names[len(names) // 2 - 1]  # the last block of the first half
    with section("mini-flux"):
        cost = reading(mini, middle, 8, None, ROUNDS)
        lines.append((f"mini-flux, reading {middle}: time over no hook", cost, BARS["reading"], cost <= BARS["reading"]))
        saved = stopping(mini, [middle], 8, None, ROUNDS)[middle]
        lines.append((f"mini-flux, stopping after {middle}: saved", saved, BARS["middle"], saved >= BARS["middle"]))
        # With the last block, so that the harvest does not stop early.
        extra, size = memory(mini, [middle, names[-1]], 8)
        lines.append(("mini-flux, peak memory over plain / one batch of two sites", extra / size, 1.0, extra <= size))
    with section("FLUX.1's proportions at width 128"):
        flux = shrunk_flux()
        cost = reading(flux, "double.18", 1, (256, 256), 5)
        lines.append(("FLUX.1 shrunk, reading double.18: time over no hook", cost, BARS["reading"], cost <= BARS["reading"]))
        for site, saved in stopping(flux, ["double.0", "double.18"], 1, (256, 256), 3).items():
            lines.append((f"FLUX.1 shrunk, stopping after {site}: saved", saved, BARS[site], saved >= BARS[site]))
    with section("two processes"):
        clock, core = sharing()
        print(f"  two processes over one: {clock:.2f} times as fast by the clock")
        lines.append(("two processes over one, by the time of a core", core, BARS["sharing"], core >= BARS["sharing"]))
    if Path(peer).exists():
        with section("nnsight"):
            rates = against_nnsight(peer, embedded()["mini-flux"])
            print(f"  tokens per second of one core at double.1: difflex {rates['ours']:.0f}, nnsight {rates['nnsight']:.0f}")
            ratio = rates["ours"] / rates["nnsight"]
            lines.append(("tokens per second over nnsight's", ratio, BARS["nnsight"], ratio >= BARS["nnsight"]))
    else:
        print(f"  nnsight is not compared: {peer} does not exist (make peers)")
    for name, value, bar, met in lines:
        print(f"  {name}: {value:.3f} (bar {bar}) {'met' if met else 'MISSED'}")
    met = all(met for *_, met in lines)
    print(f"harvest: {sum(met for *_, met in lines)} of {len(lines)} bars: {'met' if met else 'MISSED'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
