"""Speed and memory of one GPU at real sizes, part by part; a part that fails leaves the others alone.

Every module of `gpu_parts` has a table PARTS, from a name to a function of the device; a part runs in a process of its own and
has 30 seconds on a GPU. `--part NAME` runs one; `--write` appends the figures with date and GPU to docs/performance.md. Without a
GPU everything runs at a tiny size on the CPU, which tests the script and measures nothing.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

import torch
from gpu_parts import PartResult

ROOT = Path(__file__).parent.parent
MODULES = sorted(path.stem for path in (Path(__file__).parent / "gpu_parts").glob("[!_]*.py"))
LIMIT = {"cuda": 30, "cpu": 60}
"""Seconds for a part, besides 25 for starting Python and importing torch."""
START = 25

Part = Callable[[torch.device], PartResult]


def parts() -> dict[str, Part]:
    """Return all parts by name."""
    return {name: part for module in MODULES for name, part in import_module(f"gpu_parts.{module}").PARTS.items()}


def run(name: str, device: str) -> PartResult | str:
    """Run a part in a process of its own; return what it measured, or why it failed."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--part", name, "--device", device, "--result", str(result)]
        try:
            process = subprocess.run(command, timeout=LIMIT[device] + START, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        except subprocess.TimeoutExpired:
            return f"did not end within {LIMIT[device] + START} seconds"
        if process.returncode or not result.exists():
            return f"ended with exit code {process.returncode}"
        return PartResult.from_json(result.read_text())


def write(results: list[PartResult], gpu: str) -> None:
    """Append the figures to docs/performance.md."""
    with (ROOT / "docs" / "performance.md").open("a") as file:
        file.write(f"\n## {gpu}, {datetime.now(UTC):%Y-%m-%d}, torch {torch.__version__}\n")
        file.writelines(result.markdown() + "\n" for result in results)


def main() -> int:
    """Run all parts, or one; the exit code says whether all ran and kept their bars."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if arguments.result is not None:
        arguments.result.write_text(parts()[arguments.part](torch.device(arguments.device)).as_json())
        return 0
    gpu = torch.cuda.get_device_name() if arguments.device == "cuda" else "no GPU: tiny sizes on the CPU"
    results, failures = [], []
    for name in [arguments.part] if arguments.part else parts():
        began = time.perf_counter()
        print(f"{name}:", flush=True)
        result = run(name, arguments.device)
        print(f"   {time.perf_counter() - began:.1f} s", flush=True)
        if isinstance(result, PartResult):
            results.append(result)
        else:
            failures.append(f"{name} {result}")
    missed = [str(bar) for result in results for bar in result.bars if not bar.kept]
    if arguments.write and arguments.device == "cuda":
        write(results, gpu)
    for line in (*failures, *missed):
        print(f"   {line}")
    print(f"gpu: {len(results)} parts ran, {len(failures)} failed, {len(missed)} bars missed ({gpu})")
    return 1 if failures or missed else 0


if __name__ == "__main__":
    sys.exit(main())
