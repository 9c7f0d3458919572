"""The store: kills, flipped bits, writing, shuffled reading, memory, several processes, and the cost of several sites."""

import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

import difflex
from difflex.errors import BrokenFile
from difflex.records import Activations, Shot, Site
from difflex.store import RecordingConfig, Store, record
from difflex.store.basis import BasisTally
from difflex.store.shard import pack, unpack

TESTS = Path(__file__).parent.parent / "tests"
sys.path.insert(0, str(TESTS))

from fake_harvest import SITES, FakeHarvest, fake_shots  # noqa: E402 (on the path set above)  # pyright: ignore[reportMissingImports]

KILLS, FLIPS, WARM, ROUNDS = 30, 100, 4, 7
WIDTH, TOKENS, SHOTS = 3072, 256, 170
QUICK = RecordingConfig(batch=4, shard_bytes=0, progress=False)


class Result(NamedTuple):
    """A measured value and its threshold."""

    name: str
    value: str
    threshold: str
    passed: bool


def contents(folder: Path) -> dict[str, str]:
    """Return the checksum of every file under `folder`."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def script(folder: Path, *flags: str) -> list[str]:
    """Return the command of a process that records into `folder`."""
    return [sys.executable, str(TESTS / "fake_harvest.py"), str(folder), "--delay", "0.02", *flags]


def kills(root: Path) -> Result:
    """Kill recordings at random times, resume them and compare them with an undisturbed one."""
    whole = root / "whole"
    with subprocess.Popen(script(whole), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"begins\n"
        start = time.perf_counter()
        process.wait()
    duration, expected = time.perf_counter() - start, contents(whole)
    dice, same, killed, stages = random.Random(), 0, 0, set()
    while killed < KILLS:
        folder = root / f"kill-{killed}"
        with subprocess.Popen(script(folder), stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"begins\n"
            time.sleep(dice.uniform(0, duration))
            process.send_signal(signal.SIGKILL)
            if process.wait() != -signal.SIGKILL:
                continue  # it ended before the kill
        killed += 1
        stages.add(len(list(folder.rglob("shard*"))))
        record(folder, fake_shots(96), SITES, FakeHarvest(), QUICK)
        same += contents(folder) == expected
    value = f"{same} of {killed} byte-identical, killed at {len(stages)} different stages"
    return Result("kill -9 and resume", value, f"{KILLS} of {KILLS}", same == KILLS)


def flips(root: Path) -> Result:
    """Flip random bits of random shards, one at a time, and verify."""
    stores = [Store.open(folder) for folder in sorted((root / "whole").iterdir())]
    dice, detected = random.Random(), 0
    for _ in range(FLIPS):
        store = dice.choice(stores)
        path = dice.choice(sorted(store.folder.glob("shard-*.safetensors")))
        with path.open("r+b") as file:
            place, bit = dice.randrange(path.stat().st_size), 1 << dice.randrange(8)
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ bit]))
            file.flush()
            try:
                store.verify()
            except BrokenFile as error:
                detected += path.name in str(error)
            file.seek(place)
            file.write(bytes([byte]))
    return Result("flipped bits found", f"{detected} of {FLIPS}", f"{FLIPS} of {FLIPS}", detected == FLIPS)


def sharing(root: Path) -> Result:
    """Compare the files of two processes with those of one."""
    ranks = [
        subprocess.Popen(script(root / "ranks", "--rank", str(rank), "--world-size", "2"), stdout=subprocess.DEVNULL)
        for rank in range(2)
    ]
    succeeded = [rank.wait() for rank in ranks] == [0, 0]
    same = succeeded and contents(root / "ranks") == contents(root / "whole")
    return Result("two processes against one", "the same bytes" if same else "OTHER bytes", "the same rows", same)


class ConstantHarvest:
    """A harvest without cost: the same activations for every batch."""

    def __init__(self) -> None:
        self.values = torch.randn(10, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()

    def __call__(self, shots: Sequence[Shot], sites: Sequence[Site], batch: int) -> Iterator[Activations]:
        for start in range(0, len(shots), len(self.values)):
            batch_shots = tuple(shots[start : start + len(self.values)])
            yield Activations(site=sites[0], values=self.values[: len(batch_shots)], shots=batch_shots, grid=(16, 16))


def writing(root: Path) -> Result:
    """Compare the recording of a shard of 256 MiB with saving the same tensor with safetensors, both flushed to the disk.

    The first rounds do not count: the system then still allocates memory for its write cache.
    """
    harvest, shots = ConstantHarvest(), list(fake_shots(SHOTS + 10))
    tensor = harvest.values.flatten(0, 1).repeat(SHOTS // 10, 1)

    def plain() -> None:
        save_file({"values": tensor}, root / "plain.safetensors")
        handle = os.open(root / "plain.safetensors", os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)

    def ours() -> None:
        # As the first of two processes, which does not write the second shard and the statistics.
        start = time.perf_counter()
        record(root / "ours", shots, SITES[:1], harvest, RecordingConfig(batch=10, progress=False, rank=0, world_size=2))
        our_times.append(time.perf_counter() - start)
        shutil.rmtree(root / "ours")

    our_times: list[float] = []
    plain_times: list[float] = []
    for _ in range(WARM + ROUNDS):
        start = time.perf_counter()
        plain()
        plain_times.append(time.perf_counter() - start)
        ours()
    rates = [tensor.nbytes / statistics.median(times[WARM:]) / 1e6 for times in (plain_times, our_times)]
    share = rates[1] / rates[0]
    return Result("writing", f"{rates[1]:.0f} MB/s, plain {rates[0]:.0f} MB/s: {share:.0%}", "70 %", share >= 0.7)


def reading(root: Path) -> Result:
    """Measure the CPU time of shuffled batches of 2048 rows of width 3072 from 16 shards in memory."""
    settings = RecordingConfig(batch=10, shard_bytes=2**26, progress=False)
    [store] = record(root / "read", fake_shots(16 * 40), SITES[:1], ConstantHarvest(), settings)
    rates = []
    for epoch in range(ROUNDS + 1):
        start, clock = time.process_time(), time.perf_counter()
        rows = sum(len(batch.shots) for batch in store.batches(2048, seed=epoch))
        rates.append((rows / (time.process_time() - start) / 1e6, rows / (time.perf_counter() - clock) / 1e6))
    by_core, by_clock = (statistics.median(each) for each in zip(*rates[1:], strict=True))
    first = f"{rates[0][0]:.2f} and {rates[0][1]:.2f} in the first epoch, which compares the shards with their checksums"
    value = f"{by_core:.2f} M tokens/s of a core ({by_clock:.2f} by the clock; {first})"
    return Result("shuffled reading", value, "1.5 M tokens/s", by_core >= 1.5)


def memory(root: Path) -> Result:
    """Measure the memory of a reader on a store of 100 GB."""
    (root / "sparse").mkdir()
    command = [sys.executable, str(TESTS / "sparse_store.py"), str(root / "sparse")]
    sizes = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    value = f"{sizes['growth'] / 2**20:.0f} MiB more after {sizes['read'] / 2**20:.0f} MiB of {sizes['stored'] / 1e9:.0f} GB"
    return Result("memory", value, f"{sizes['allowed'] / 2**20:.0f} MiB", sizes["growth"] < sizes["allowed"])


def noise(root: Path) -> Result:
    """Measure the noise of int8 on the principal axes of real activations in fp32, as they are and with an outlier coordinate.

    It is a share of the variance along each axis; that of bf16 and that with a scale for each row are printed beside it.
    """
    pipe = difflex.load("mini-flux", device="cpu", precision="fp32")
    prompts = [f"{number} {colour} stars on grass" for number in range(40) for colour in ("red", "blue")]
    harvested = pipe.harvest(pipe.shots(prompts, steps=4), "double.2", batch=16, progress=False)
    x = torch.cat([activations.values.flatten(0, 1) for activations in harvested])
    worst: dict[str, float] = {}
    for rows in (x, torch.cat([1000 * (x[:, :1] + x.std()), x[:, 1:]], dim=1)):
        variance, axes = torch.linalg.eigh(torch.cov(rows.double().T, correction=0))
        tally, scales = BasisTally(), rows.abs().amax(1, keepdim=True) / 127
        tally.add(rows[: len(rows) // 2])
        basis = tally.basis()
        kinds = {
            "int8": unpack(pack(rows, "int8", basis), basis),
            "bf16": rows.bfloat16(),
            "rows": (rows / scales).round() * scales,
        }
        for kind, stored in kinds.items():
            share = float((((stored.double() - rows.double()) @ axes).square().mean(0) / variance).max())
            worst[kind] = max(worst.get(kind, 0.0), share)
    value = f"{worst['int8']:.2%} of the variance of the worst axis (bf16 {worst['bf16']:.2%}, a scale a row {worst['rows']:.0%})"
    return Result("noise of int8", value, "1 %", worst["int8"] < 0.01)


def sites(root: Path) -> Result:
    """Compare the time of the model with several sites and with the deepest of them alone."""
    pipe = difflex.load("mini-flux")
    rows = pipe.sites()
    names = [row.site for row in rows if row.site.stream == "image"]
    several, deepest = names[len(names) // 2 :: 2], names[-1:]
    several = [*several[:3], *deepest]
    shots = [
        replace(shot, split=Shot.split_of(shot.prompt)) for shot in pipe.shots([f"a red star {i}" for i in range(32)], steps=1)
    ]

    def seconds(sites: list[Site]) -> float:
        start = time.process_time()
        for _ in pipe.harvest(shots, sites, 32, progress=False):
            pass
        return time.process_time() - start

    seconds(several)
    times = [(seconds(deepest), seconds(several)) for _ in range(ROUNDS)]
    alone, together = (statistics.median(each) for each in zip(*times, strict=True))
    more = together / alone - 1
    return Result(f"{len(several)} sites instead of the deepest", f"{more:+.1%} of the model's time", "+10 %", more < 0.1)


def main() -> int:
    """Run the benchmarks and return 0 if every threshold is met, else 1."""
    torch.set_num_threads(1)
    measures: dict[str, Callable[[Path], Result]] = {
        each.__name__: each for each in (kills, flips, sharing, writing, reading, memory, noise, sites)
    }
    names = sys.argv[1:] or list(measures)
    with tempfile.TemporaryDirectory() as folder:
        results = []
        for name in names:
            results.append(measures[name](Path(folder)))
            print(f"store: {results[-1].name}: {results[-1].value} (threshold {results[-1].threshold})", flush=True)
    passed = all(result.passed for result in results)
    print(f"store: {sum(result.passed for result in results)} of {len(results)} thresholds: {'met' if passed else 'MISSED'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
