"""How much slower a study gets beside busy processes that take half of the cores, as a browser does on a laptop.

Harvesting and training run as a user runs them, alone and beside the neighbours in alternating rounds.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

BAR = 1.5
ROUNDS = 3
TOKENS = "65536"
COMMANDS = [
    ["harvest", "mini-flux", "--prompts", "captions", "--site", "double.1", "--tokens", TOKENS, "--out", "study"],
    ["train", "study", "--site", "double.1", "--size", "2048", "--k", "32"],
]
SCRIPT = f"from difflex.cli import main\nfor words in {COMMANDS}:\n    assert main(words) == 0"


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Keep `count` processes busy during the block."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def seconds() -> float:
    """Return the wall time of the commands in a new folder."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", SCRIPT], cwd=folder, check=True, capture_output=True)
        return time.perf_counter() - began


def main() -> int:
    """Return 0 if the bar is met, else 1."""
    count = max(1, (os.cpu_count() or 1) // 2)
    quiet, busy = [], []
    seconds()  # warms the disk
    for _ in range(ROUNDS):
        quiet.append(seconds())
        with neighbours(count):
            busy.append(seconds())
    ratio = statistics.median(b / q for q, b in zip(quiet, busy, strict=True))
    alone, beside = statistics.median(quiet), statistics.median(busy)
    print(
        f"busy: harvest and training take {alone:.1f} s alone, {beside:.1f} s beside {count} busy process(es): {ratio:.2f}x "
        f"(bar {BAR}x): {'met' if ratio <= BAR else 'MISSED'}"
    )
    return ratio > BAR


if __name__ == "__main__":
    sys.exit(main())
