"""Training updates and encoding against the peers: seconds of processor time on one thread, interleaved, and peak memory.

Everyone learns from the same batches with the same Adam moments, each in a process of its own; medians of the ratios of the
rounds. `ours` has the moments that everyone has; `difflex default` is our preset (no first moment). `--full` takes more rounds.
`--peer PYTHON` names the interpreter that has the peers; those that are missing are left out.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from peers.asking import PEERS, Asked, asked

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
    """Of updates and encodings of ours and the best peer; the others have one, or as many with `--full`."""
    update: float
    same_setting: float
    """The update against the best peer where that has our float32 matmul setting."""
    others: float
    dense: float
    """At most as long as this many dense products."""
    encode: float
    memory: float


SHAPES = {
    "S1": Shape(768, 8192, 32, 2048, rounds=7, update=2.8, same_setting=1.6, others=8, dense=1.7, encode=2.0, memory=5.5),
    "S2": Shape(3072, 16384, 64, 1024, rounds=3, update=4.0, same_setting=2.4, others=10, dense=1.6, encode=2.0, memory=3.5),
}


def seconds(learner: Asked, request: str) -> float:
    """Processor time of one of what is requested."""
    (took,) = getattr(learner, request)(count=1)["seconds"]
    return took


def measured(learners: dict[str, Asked], shape: Shape, full: bool) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of every round: of updates, and of encodings and the dense product."""
    often = [name for name in learners if full or name.startswith(("ours", BEST))]
    updates: dict[str, list[float]] = {name: [] for name in learners}
    encodings: dict[str, list[float]] = {name: [] for name in [*often, "dense product"]}
    for number in range(shape.rounds):
        for name in list(learners)[:: 1 if number % 2 else -1]:
            if name in often or number == 0:
                updates[name].append(seconds(learners[name], "update"))
            if name in often:
                encodings[name].append(seconds(learners[name], "encode"))
        encodings["dense product"].append(seconds(learners["ours"], "dense"))
    return updates, encodings


def ratio(times: dict[str, list[float]], theirs: str, ours: str = "ours") -> float:
    """How many times as long `theirs` took, the median of the rounds in which both were measured."""
    return statistics.median(a / b for a, b in zip(times[theirs], times[ours], strict=False))


def compare(label: str, shape: Shape, python: Path, full: bool) -> list[tuple[str, float, float, bool]]:
    """Name, figure, bar and whether it is met."""
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
    with asked(names, python) as learners:
        for name, learner in learners.items():
            learner.begin(**begin, **({"adam": "default"} if name == "ours default" else {}))
        if same in learners:
            learners[same].precision(to="medium")
        for name, learner in learners.items():
            learner.update(count=WARM if full or name in names[:3] else 1)
        # Before anything is encoded: a learner that stops to encode keeps other memory.
        peaks = {name: learner.peak()["over"] for name, learner in learners.items()}
        updates, encodings = measured(learners, shape, full)
    for name in names:
        took, rate = statistics.median(updates[name]), ""
        if name in encodings:
            rate = f", encoding {shape.batch / statistics.median(encodings[name]) / 1000:.1f} k tokens/s"
        print(f"  {label} {name}: update {1000 * took:.0f} ms{rate}, peak memory {peaks[name]:.1f}x the parameters", flush=True)
    return list(judged(label, shape, names, {**encodings, "update": updates["ours"]}, updates, peaks))


def judged(label, shape, names, encodings, updates, peaks):
    """A line for each bar that was measured."""
    dense = ratio({"update": updates["ours"], "dense": encodings["dense product"]}, "update", "dense")
    yield f"{label} update over the dense product alone", dense, shape.dense, dense <= shape.dense
    yield f"{label} peak memory over the parameters", peaks["ours"], shape.memory, peaks["ours"] <= shape.memory
    for name in names[2:]:
        bar = {BEST: shape.update, f"{BEST} medium": shape.same_setting}.get(name, shape.others)
        found = ratio(updates, name)
        yield f"{label} update against {name}", found, bar, found >= bar
    if BEST in names:
        found = ratio(encodings, BEST)
        yield f"{label} encoding against {BEST}", found, shape.encode, found >= shape.encode
        print(f"  {label} our preset against {BEST}: {ratio(updates, BEST, 'ours default'):.1f}x")


def main() -> int:
    """0 if every bar measured is met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=Path, default=PYTHON)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--only", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    wanted = parser.parse_args()
    if not wanted.peer.exists():
        print(f"  the peers are left out: there is no {wanted.peer} (make peers)")
    lines = [line for name in wanted.only for line in compare(name, SHAPES[name], wanted.peer, wanted.full)]
    for name, found, bar, met in lines:
        print(f"  {name}: {found:.2f} (bar {bar}) {'met' if met else 'MISSED'}")
    met = sum(met for *_, met in lines)
    print(f"training: {met} of {len(lines)} bars: {'met' if met == len(lines) else 'MISSED'}")
    return met != len(lines)


if __name__ == "__main__":
    sys.exit(main())
