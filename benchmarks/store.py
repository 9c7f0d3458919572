"""The store: kills, flipped bits, writing, shuffled reading, memory, sharing, and what several sites cost a model."""

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

TESTS = Path(__file__).parent.parent / "tests"
sys.path.insert(0, str(TESTS))

from fake_harvest import SITES, FakeHarvest, fake_shots  # noqa: E402 (found by the line above)  # pyright: ignore[reportMissingImports]

KILLS, FLIPS, WARM, ROUNDS = 30, 100, 4, 7
WIDTH, TOKENS, SHOTS = 3072, 256, 170
QUICK = RecordingConfig(batch=4, shard_bytes=0, progress=False)


class Result(NamedTuple):
    """A figure beside its bar."""

    name: str
    shown: str
    bar: str
    met: bool


def contents(folder: Path) -> dict[str, str]:
    """The checksum of every file under `folder`."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def script(folder: Path, *flags: str) -> list[str]:
    """The command of a process that records into `folder`."""
    return [sys.executable, str(TESTS / "fake_harvest.py"), str(folder), "--delay", "0.02", *flags]


def kills(root: Path) -> Result:
    """A recording killed at a random moment of its life, resumed, and compared with one that was not."""
    whole = root / "whole"
    with subprocess.Popen(script(whole), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"begins\n"
        start = time.perf_counter()
        process.wait()
    life, expected = time.perf_counter() - start, contents(whole)
    dice, same, killed, stages = random.Random(), 0, 0, set()
    while killed < KILLS:
        folder = root / f"kill-{killed}"
        with subprocess.Popen(script(folder), stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"begins\n"
            time.sleep(dice.uniform(0, life))
            process.send_signal(signal.SIGKILL)
            if process.wait() != -signal.SIGKILL:
                continue  # it had ended before the moment came: not a kill
        killed += 1
        stages.add(len(list(folder.rglob("shard*"))))
        record(folder, fake_shots(96), SITES, FakeHarvest(), QUICK)
        same += contents(folder) == expected
    shown = f"{same} of {killed} byte-identical, killed at {len(stages)} different stages"
    return Result("kill -9 and resume", shown, f"{KILLS} of {KILLS}", same == KILLS)


def flips(root: Path) -> Result:
    """Random bits of random shards flipped, one at a time."""
    stores = [Store.open(folder) for folder in sorted((root / "whole").iterdir())]
    dice, found = random.Random(), 0
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
                found += path.name in str(error)
            file.seek(place)
            file.write(bytes([byte]))
    return Result("flipped bits found", f"{found} of {FLIPS}", f"{FLIPS} of {FLIPS}", found == FLIPS)


def sharing(root: Path) -> Result:
    """Two processes at once against one."""
    ranks = [
        subprocess.Popen(script(root / "ranks", "--rank", str(rank), "--of", "2"), stdout=subprocess.DEVNULL) for rank in range(2)
    ]
    ended = [rank.wait() for rank in ranks] == [0, 0]
    same = ended and contents(root / "ranks") == contents(root / "whole")
    return Result("two processes against one", "the same bytes" if same else "OTHER bytes", "the same rows", same)


class Ready:
    """A harvest that costs nothing: the same activations for every batch."""

    def __init__(self) -> None:
        self.values = torch.randn(10, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()

    def __call__(self, shots: Sequence[Shot], sites: Sequence[Site], batch: int) -> Iterator[Activations]:
        for start in range(0, len(shots), len(self.values)):
            here = tuple(shots[start : start + len(self.values)])
            yield Activations(site=sites[0], values=self.values[: len(here)], shots=here, grid=(16, 16))


def writing(root: Path) -> Result:
    """A shard of 256 MiB recorded against the same tensor saved by safetensors, both brought to the disk.

    The first rounds do not count: in them the system looks for memory to hold what is on its way to the disk.
    """
    harvest, shots = Ready(), list(fake_shots(SHOTS + 10))
    tensor = harvest.values.flatten(0, 1).repeat(SHOTS // 10, 1)

    def plain() -> None:
        save_file({"values": tensor}, root / "plain.safetensors")
        handle = os.open(root / "plain.safetensors", os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)

    def ours() -> None:
        # The first of two processes: the second one would write the other shard and the statistics.
        start = time.perf_counter()
        record(root / "ours", shots, SITES[:1], harvest, RecordingConfig(batch=10, progress=False, rank=0, world_size=2))
        took.append(time.perf_counter() - start)
        shutil.rmtree(root / "ours")

    took: list[float] = []
    plainly: list[float] = []
    for _ in range(WARM + ROUNDS):
        start = time.perf_counter()
        plain()
        plainly.append(time.perf_counter() - start)
        ours()
    rates = [tensor.nbytes / statistics.median(times[WARM:]) / 1e6 for times in (plainly, took)]
    share = rates[1] / rates[0]
    return Result("writing", f"{rates[1]:.0f} MB/s, plain {rates[0]:.0f} MB/s: {share:.0%}", "70 %", share >= 0.7)


def reading(root: Path) -> Result:
    """Shuffled batches of 2048 rows of width 3072 from 16 shards that are in memory; the processor time of one core."""
    settings = RecordingConfig(batch=10, shard_bytes=2**26, progress=False)
    [store] = record(root / "read", fake_shots(16 * 40), SITES[:1], Ready(), settings)
    rates = []
    for epoch in range(ROUNDS + 1):
        start, clock = time.process_time(), time.perf_counter()
        rows = sum(len(batch.shots) for batch in store.batches(2048, seed=epoch))
        rates.append((rows / (time.process_time() - start) / 1e6, rows / (time.perf_counter() - clock) / 1e6))
    by_core, by_clock = (statistics.median(each) for each in zip(*rates[1:], strict=True))
    shown = f"{by_core:.2f} M tokens/s of a core ({by_clock:.2f} by the clock)"
    return Result("shuffled reading", shown, "1.5 M tokens/s", by_core >= 1.5)


def memory(root: Path) -> Result:
    """How much a reader grows on a store of 100 GB."""
    (root / "sparse").mkdir()
    command = [sys.executable, str(TESTS / "sparse_store.py"), str(root / "sparse")]
    said = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    shown = f"{said['grown'] / 2**20:.0f} MiB more after {said['read'] / 2**20:.0f} MiB of {said['stored'] / 1e9:.0f} GB"
    return Result("memory", shown, f"{said['allowed'] / 2**20:.0f} MiB", said["grown"] < said["allowed"])


def sites(root: Path) -> Result:
    """The model's time with several sites against that with the deepest of them alone."""
    pipe = difflex.load("mini-flux")
    rows = pipe.sites()
    names = [row.site for row in rows if row.site.stream == "image"]
    several, deepest = names[len(names) // 2 :: 2], names[-1:]
    several = [*several[:3], *deepest]
    shots = [
        replace(shot, split=Shot.split_of(shot.prompt)) for shot in pipe.shots([f"a red star {i}" for i in range(32)], steps=1)
    ]

    def seconds(asked: list[Site]) -> float:
        start = time.process_time()
        for _ in pipe.harvest(shots, asked, 32, progress=False):
            pass
        return time.process_time() - start

    seconds(several)
    times = [(seconds(deepest), seconds(several)) for _ in range(ROUNDS)]
    alone, together = (statistics.median(each) for each in zip(*times, strict=True))
    more = together / alone - 1
    return Result(f"{len(several)} sites instead of the deepest", f"{more:+.1%} of the model's time", "+10 %", more < 0.1)


def main() -> int:
    """0 if every bar is met, else 1."""
    torch.set_num_threads(1)
    measures: dict[str, Callable[[Path], Result]] = {
        each.__name__: each for each in (kills, flips, sharing, writing, reading, memory, sites)
    }
    asked = sys.argv[1:] or list(measures)
    with tempfile.TemporaryDirectory() as folder:
        results = []
        for name in asked:
            results.append(measures[name](Path(folder)))
            print(f"store: {results[-1].name}: {results[-1].shown} (bar {results[-1].bar})", flush=True)
    met = all(result.met for result in results)
    print(f"store: {sum(result.met for result in results)} of {len(results)} bars: {'met' if met else 'MISSED'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
