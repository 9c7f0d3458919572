"""Run a command in a forked process: it starts in milliseconds, since torch and difflex are imported already."""

import ctypes
import gc
import os
import resource
import select
import signal
import sqlite3
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

LIMIT = 20.0
"""Seconds after which a command hangs; more on a machine that is busy with other things."""
MEMORY = 8 * 2**30
"""Bytes that a command may add to its address space."""
PLAIN = (sys.executable, "-m", "difflex")


class Kill(NamedTuple):
    """Where a command kills itself with SIGKILL, as a power cut would."""

    event: Literal["rename", "commit"]
    number: int
    """The first is 0."""
    moment: Literal["before", "after"]


class Conditions(NamedTuple):
    """What a command meets, besides what is on the disk."""

    powerless: bool = False
    """Without the rights of root, so that the permissions of files count."""
    file_limit: int | None = None
    """The largest size of a file: what exceeds it fails as on a full disk."""
    kill: Kill | None = None
    kill_after: float | None = None
    """Seconds after which it is killed."""


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    """The exit code; negative: the signal that ended it."""
    output: str
    error: str
    seconds: float
    work: float
    """Seconds of a processor."""
    hung: bool
    events: dict[str, int]
    """Renames and commits that it made."""


class ForkedCommand:
    """A running command, a real process in a session of its own."""

    def __init__(self, words: Sequence[str], folder: Path, conditions: Conditions | None = None, plain: bool = False) -> None:
        """Start `words` in `folder`; `plain`: as a new Python process instead."""
        self._conditions = conditions or Conditions()
        self._start = time.monotonic()
        pipes = [os.pipe() for _ in range(3)]
        self._pid = os.fork()
        if not self._pid:
            _be_command(words, folder, self._conditions, plain, [write for _, write in pipes])
        for _, write in pipes:
            os.close(write)
        self._pipes = [read for read, _ in pipes]

    def end(self) -> Outcome:
        """Wait for its end, kill it when it hangs, and return how it ended."""
        limit = self._conditions.kill_after or LIMIT * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
        texts = {pipe: b"" for pipe in self._pipes}
        open_pipes = set(self._pipes)
        while open_pipes and (left := self._start + limit - time.monotonic()) > 0:
            for pipe in select.select(sorted(open_pipes), (), (), left)[0]:
                content = os.read(pipe, 2**16)
                texts[pipe] += content
                if not content:
                    open_pipes.remove(pipe)
        over = bool(open_pipes)
        if over:
            with suppress(ProcessLookupError):  # it has no group of its own yet
                os.killpg(self._pid, signal.SIGKILL)
            os.kill(self._pid, signal.SIGKILL)
        _, status, usage = os.wait4(self._pid, 0)
        for pipe in self._pipes:
            os.close(pipe)
        output, error, events = (texts[pipe].decode(errors="replace") for pipe in self._pipes)
        renames, _, commits = events.partition(" ")
        counts = {"rename": int(renames or 0), "commit": int(commits or 0)}
        code = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - self._start
        work = usage.ru_utime + usage.ru_stime
        return Outcome(code, output, error, seconds, work, over and self._conditions.kill_after is None, counts)


def run(words: Sequence[str], folder: Path, conditions: Conditions | None = None, plain: bool = False) -> Outcome:
    """Run a command to its end."""
    return ForkedCommand(words, folder, conditions, plain).end()


def _be_command(words: Sequence[str], folder: Path, conditions: Conditions, plain: bool, pipes: list[int]) -> None:
    """Become the command: this never returns."""
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for number, handle in enumerate((nothing, pipes[0], pipes[1])):
            os.dup2(handle, number)
        os.chdir(folder)
        os.environ["PWD"] = str(folder)
        if plain:
            os.environ["OMP_NUM_THREADS"] = "1"
            os.execv(PLAIN[0], [*PLAIN, *words])
        import torch

        torch.set_num_threads(1)  # makes the pool of threads, which a fork has lost, before several threads want it at once
        counts = _watch(conditions.kill)
        _limit(conditions)
        code = _main(list(words))
        os.write(pipes[2], f"{counts['rename']} {counts['commit']}".encode())
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def _main(words: list[str]) -> int:
    """Run a command as `python -m difflex` does: with its exit code, and waiting for its threads."""
    from difflex.cli import main

    sys.argv = ["difflex", *words]
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
    try:
        code = main(words)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    gc.collect()
    threading._shutdown()  # pyright: ignore  # what the interpreter does at its end
    return code


def _watch(kill: Kill | None) -> dict[str, int]:
    """Count renames and commits, and kill this process at one of them."""
    counts = {"rename": 0, "commit": 0}

    def reach(event: str, moment: str) -> None:
        if kill is not None and (event, counts[event], moment) == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        counts[event] += moment == "after"

    def watched(rename: Callable[..., None]) -> Callable[..., None]:
        def watch(*arguments: Any, **named: Any) -> None:
            reach("rename", "before")
            rename(*arguments, **named)
            reach("rename", "after")

        return watch

    def trace(statement: str) -> None:
        if statement.upper().startswith("COMMIT"):
            reach("commit", "before")
            counts["commit"] += 1

    def connect(*arguments: Any, **named: Any) -> sqlite3.Connection:
        connection = opened(*arguments, **named)
        connection.set_trace_callback(trace)
        return connection

    opened, sqlite3.connect = sqlite3.connect, connect
    os.replace, os.rename = watched(os.replace), watched(os.rename)
    return counts


def _limit(conditions: Conditions) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if sys.platform == "linux" else 0
    if used:
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if conditions.file_limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (conditions.file_limit, conditions.file_limit))
    if conditions.powerless:
        _drop_rights()


def _drop_rights() -> None:
    """Give up every capability of root: files then open only as their permissions allow."""
    if sys.platform != "linux":
        return
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    if ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()) != 0:
        raise OSError(ctypes.get_errno(), "capset")
