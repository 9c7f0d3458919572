"""How long the package takes to be there: `import difflex` and `difflex --help`, as whole processes."""

import statistics
import subprocess
import sys
import time

ROUNDS = 7
BARS = {
    "import difflex": (["-c", "import difflex"], 0.3),
    "difflex --help": (["-m", "difflex", "--help"], 1.0),
}


def seconds(arguments: list[str]) -> float:
    """The median wall time of a fresh Python with `arguments`; one round more goes first and warms the disk."""
    times = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> int:
    """0 if every bar is met, else 1."""
    met, shown = True, []
    for name, (arguments, bar) in BARS.items():
        took = seconds(arguments)
        met &= took < bar
        shown.append(f"{name} {took:.3f} s (bar {bar} s)")
    print(f"startup: {', '.join(shown)}: {'met' if met else 'MISSED'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
