"""Training updates and encoding against the peers: CPU seconds on one thread, in interleaved rounds, and peak memory.

Every library trains on the same batches with the same Adam moments, in its own process; results are medians of the ratios of the
rounds. `ours` has the same moments as the others; `ours default` is our preset (no first moment). `--full` runs more rounds.
`--peer PYTHON` is the interpreter with the peers; missing ones are left out.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from peers.clients import PEERS, LearnerProcess, start_learners

PYTHON = Path(__file__).parent.parent / ".venv-peers" / "bin" / "python"
BEST = "sparsify"
WARM = 2


class Shape(NamedTuple):
    """A size of dictionary, and the bars there."""

    width: int
    size: int
    k: int
    batch: int
    rounds: int
    """Of updates and encodings of ours and the best peer; the others have one, or the same number with `--full`."""
    update: float
    same_setting: float
    """The update against the best peer with our float32 matmul setting."""
    others: float
    dense: float
    """The largest time of an update, in dense products."""
    encode: float
    memory: float


SHAPES = {
    "S1": Shape(768, 8192, 32, 2048, rounds=7, update=2.8, same_setting=1.6, others=8, dense=1.7, encode=2.0, memory=5.5),
    "S2": Shape(3072, 16384, 64, 1024, rounds=3, update=4.0, same_setting=2.4, others=10, dense=1.6, encode=2.0, memory=3.5),
}


def seconds(learner: LearnerProcess, request: str) -> float:
    """Return the CPU time of one `request`."""
    (time,) = getattr(learner, request)(count=1)["seconds"]
    return time


def measure(
    learners: dict[str, LearnerProcess], shape: Shape, full: bool
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return the seconds of every round: of updates, and of encodings and the dense product."""
    repeated = [name for name in learners if full or name.startswith(("ours", BEST))]
    updates: dict[str, list[float]] = {name: [] for name in learners}
    encodings: dict[str, list[float]] = {name: [] for name in [*repeated, "dense product"]}
    for number in range(shape.rounds):
        for name in list(learners)[:: 1 if number % 2 else -1]:
            if name in repeated or number == 0:
                updates[name].append(seconds(learners[name], "update"))
            if name in repeated:
                encodings[name].append(seconds(learners[name], "encode"))
        encodings["dense product"].append(seconds(learners["ours"], "dense"))
    return updates, encodings


def ratio(times: dict[str, list[float]], theirs: str, ours: str = "ours") -> float:
    """Return how many times as long `theirs` took: the median of the rounds in which both were measured."""
    return statistics.median(a / b for a, b in zip(times[theirs], times[ours], strict=False))


def compare(label: str, shape: Shape, python: Path, full: bool) -> list[tuple[str, float, float, bool]]:
    """Return name, value, bar and whether it is met, for each measurement."""
    begin = {
        "world": {},
        "width": shape.width,
        "size": shape.size,
        "k": shape.k,
        "batch": shape.batch,
        "updates": 1000,
        "cycle": 3,
    }
    names, same = ["ours", "ours default"], f"{BEST} medium"
    if python.exists():
        names += [*PEERS, same]
    with start_learners(names, python) as learners:
        for name, learner in learners.items():
            learner.begin(**begin, **({"adam": "default"} if name == "ours default" else {}))
        if same in learners:
            learners[same].precision(to="medium")
        for name, learner in learners.items():
            learner.update(count=WARM if full or name in names[:3] else 1)
        # Measured before encoding, which changes the memory of a learner.
        peaks = {name: learner.peak()["over"] for name, learner in learners.items()}
        updates, encodings = measure(learners, shape, full)
    for name in names:
        seconds_per_update, rate = statistics.median(updates[name]), ""
        if name in encodings:
            rate = f", encoding {shape.batch / statistics.median(encodings[name]) / 1000:.1f} k tokens/s"
        print(
            f"  {label} {name}: update {1000 * seconds_per_update:.0f} ms{rate}, peak memory {peaks[name]:.1f}x the parameters",
            flush=True,
        )
    return list(judge(label, shape, names, {**encodings, "update": updates["ours"]}, updates, peaks))


def judge(label, shape, names, encodings, updates, peaks):
    """Yield a line for each measured bar."""
    dense = ratio({"update": updates["ours"], "dense": encodings["dense product"]}, "update", "dense")
    yield f"{label} update over the dense product alone", dense, shape.dense, dense <= shape.dense
    yield f"{label} peak memory over the parameters", peaks["ours"], shape.memory, peaks["ours"] <= shape.memory
    for name in names[2:]:
        bar = {BEST: shape.update, f"{BEST} medium": shape.same_setting}.get(name, shape.others)
        value = ratio(updates, name)
        yield f"{label} update against {name}", value, bar, value >= bar
    if BEST in names:
        value = ratio(encodings, BEST)
        yield f"{label} encoding against {BEST}", value, shape.encode, value >= shape.encode
        print(f"  {label} our preset against {BEST}: {ratio(updates, BEST, 'ours default'):.1f}x")


def main() -> int:
    """Return 0 if no bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=Path, default=PYTHON)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--only", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    arguments = parser.parse_args()
    if not arguments.peer.exists():
        print(f"  the peers are left out: there is no {arguments.peer} (make peers)")
    lines = [line for name in arguments.only for line in compare(name, SHAPES[name], arguments.peer, arguments.full)]
    for name, value, bar, met in lines:
        print(f"  {name}: {value:.2f} (bar {bar}) {'met' if met else 'MISSED'}")
    met = sum(met for *_, met in lines)
    print(f"training: {met} of {len(lines)} bars: {'met' if met == len(lines) else 'MISSED'}")
    return met != len(lines)


if __name__ == "__main__":
    sys.exit(main())
