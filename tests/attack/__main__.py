"""Attack difflex with every command in every state, and print what was found."""

import argparse
import gc
import multiprocessing
import os
import pkgutil
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from multiprocessing.connection import Connection, wait
from pathlib import Path

from .cases import Case, make_cases
from .judging import Bench, CaseReport
from .subjects import differences, faults, make_subjects

SHORT = ("harvest", "train", "collect", "paid")
"""Commands of the short form."""
KINDS = ("traceback", "hang", "loss", "unclear")
SHOWN = 40


def main() -> int:
    """Run the attack and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.attack", description=__doc__)
    parser.add_argument("--cases", type=int, default=600, help="how many, besides kills and two at once")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--commands", default="", help="only these lines of the chain and what they need: harvest,train,collect")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of cases and of the damage")
    parser.add_argument("--short", action="store_true", help="a few commands, a few cases: for the tests")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    start = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the temporary folder is deleted then
    os.environ["HF_HUB_OFFLINE"] = "1"  # no case may depend on the network
    _import_everything()
    with _temporary_folder() as folder, _server() as url:
        names = SHORT if options.short else options.commands.split(",") if options.commands else ()
        subjects = make_subjects(folder / "stages", url, names)
        broken = [*faults(subjects), *differences(subjects, make_subjects(folder / "others", url, names))]
        for fault in broken:
            print(f"UNDISTURBED {fault}", flush=True)
        healthy = [subject for subject in subjects if not subject.outcome.code]
        if options.short:  # the same cases each time: their choice must not depend on the time that commands took
            healthy = [subject._replace(outcome=subject.outcome._replace(work=1.0)) for subject in healthy]
        cases = make_cases(healthy, options.seed, options.cases)
        if options.short:
            cases = _few(cases)
        cases = [case for case in cases if options.only in f"{case.group} {case.name}"]
        assert cases, f"no case is called {options.only}"
        print(f"{len(subjects)} commands undisturbed in {time.monotonic() - start:.0f} s; {len(cases)} cases", flush=True)
        reports = {}
        for number, report in _run_all(cases, folder, options.seed, options.workers):
            reports[number] = report
            _print_problems(cases[number], report)
            if len(reports) % 50 == 0:
                print(f"{len(reports)} of {len(cases)} after {time.monotonic() - start:.0f} s", flush=True)
        mounts = Bench(folder, 0).mounts.allowed  # this process ends here: it may leave its own file systems
    return _summary(cases, reports, len(broken), time.monotonic() - start, mounts)


def _few(cases: Sequence[Case]) -> list[Case]:
    """Return a few cases of every group."""
    limits, counts = {"damaged": 10, "arguments": 3, "killed": 4}, Counter[str]()
    chosen = []
    for case in cases:
        counts[case.group] += 1
        if counts[case.group] <= limits.get(case.group, 1) and not case.plain:
            chosen.append(case)
    return chosen


def _import_everything() -> None:
    """Import what commands import when they run, so that forked ones need not; no thread may be started."""
    import torch
    from tqdm import tqdm

    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is shared by forked processes: one that is killed with it would stop all others
    import difflex
    from difflex.testing import tiny_folder

    for module in pkgutil.walk_packages(difflex.__path__, "difflex."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    with tempfile.TemporaryDirectory() as folder:
        pipe = difflex.load(tiny_folder("flux", Path(folder)))
        pipe.generate(["sun"], steps=1)
    del pipe
    gc.collect()
    gc.freeze()  # forked processes need not look at all of it again


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """Yield a temporary folder, in memory where that is possible."""
    memory = Path("/dev/shm")
    where = memory if os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2**31 else None
    folder = Path(tempfile.mkdtemp(prefix="difflex-attack-", dir=where))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _server() -> Iterator[str]:
    """Yield the address of a VLM that answers by rule, in a process of its own."""
    from difflex.testing.vlm import RuleServer

    here, there = multiprocessing.Pipe()

    def serve() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # it complains when a client is killed
        with RuleServer() as server:
            there.send(server.url)
            there.recv()

    process = multiprocessing.get_context("fork").Process(target=serve, daemon=True)
    process.start()
    try:
        yield here.recv()
    finally:
        here.send(None)
        process.join()


def _run_all(cases: Sequence[Case], folder: Path, seed: int, workers: int) -> Iterator[tuple[int, CaseReport]]:
    """Yield the number and the report of each case, in the order in which they end."""
    context, connections = multiprocessing.get_context("fork"), []
    for _ in range(workers):
        here, there = context.Pipe()
        context.Process(target=_work, args=(cases, folder, seed, there), daemon=True).start()
        connections.append(here)
    numbers, running = iter(range(len(cases))), set[Connection]()
    for connection in connections:
        connection.send(next(numbers, None))
        running.add(connection)
    while running:
        for connection in wait(running):
            assert isinstance(connection, Connection)
            answer = connection.recv()
            following = next(numbers, None)
            if answer is not None:
                connection.send(following)
                yield answer
            else:
                running.remove(connection)


def _work(cases: Sequence[Case], folder: Path, seed: int, connection: Connection) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    bench = Bench(folder, seed)
    while (number := connection.recv()) is not None:
        connection.send((number, bench.run(cases[number])))
    connection.send(None)


def _print_problems(case: Case, report: CaseReport) -> None:
    for problem in report.problems:
        print(f"{problem.kind.upper()} {' '.join(case.words)[:160]}\n  {problem.text}", flush=True)
    if report.problems:
        print(f"  again: .venv/bin/python -m tests.attack --only {f'{case.group} {case.name}'!r}", flush=True)


def _summary(cases: Sequence[Case], reports: dict[int, CaseReport], broken: int, seconds: float, mounts: bool) -> int:
    rows: dict[str, Counter[str]] = defaultdict(Counter)
    for number, report in reports.items():
        sentences = report.code == 2
        found = {"cases": 1, "ended well": report.code == 0, "killed": report.code == -9, "sentences": sentences}
        found |= {kind: any(problem.kind == kind for problem in report.problems) for kind in KINDS}
        for group in (cases[number].group, "all"):
            rows[group].update({name: int(value) for name, value in found.items()})
    columns = ("cases", "ended well", "killed", "sentences", *KINDS)
    print(f"{'':<12}" + "".join(f"{column:>12}" for column in columns))
    for group in sorted(rows, key=lambda group: (group == "all", group)):
        print(f"{group:<12}" + "".join(f"{rows[group][column]:>12}" for column in columns))
    total = rows["all"]
    how = (
        "real small and read-only file systems" if mounts else "limits on files and permissions, as mounts are not permitted here"
    )
    counts = ", ".join(
        f"{total[kind]} {name}" for kind, name in zip(KINDS, ("tracebacks", "hangs", "losses", "unclear"), strict=True)
    )
    print(f"attack: {total['cases']} cases in {seconds:.0f} s, {total['sentences']} sentences, {counts}; {how}")
    return int(broken > 0 or any(total[kind] for kind in KINDS))


if __name__ == "__main__":
    sys.exit(main())
