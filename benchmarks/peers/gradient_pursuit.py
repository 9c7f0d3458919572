"""Times the gradient pursuit of dictionary_learning, for `benchmarks/itda.py`; runs in `.venv-peers` and imports nothing of ours.

A line `FILE COUNT K` on the input asks for the first COUNT signals of FILE, pursued with its atoms. The answer is the CPU seconds
and the unexplained share of all signals together.
"""

import importlib.util
import sys
import time
from pathlib import Path

import torch

torch.set_num_threads(1)


def load_pursuit():
    """Their function, from its own file: importing the whole package would load many others."""
    found = importlib.util.find_spec("dictionary_learning")
    assert found is not None and found.submodule_search_locations
    path = Path(found.submodule_search_locations[0]) / "grad_pursuit.py"
    spec = importlib.util.spec_from_file_location("grad_pursuit", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.grad_pursuit


def main() -> None:
    """Answer until the input ends."""
    pursue = load_pursuit()
    print("ready", flush=True)
    for line in sys.stdin:
        file, count, k = line.split()
        data = torch.load(file, weights_only=True)
        signals, atoms = data["signals"][: int(count)], data["atoms"]
        columns = atoms.T.contiguous()
        began = time.process_time()
        weights = pursue(signals, columns, int(k))
        seconds = time.process_time() - began
        left = (signals - weights @ atoms).square().sum() / signals.square().sum()
        print(seconds, float(left), flush=True)


if __name__ == "__main__":
    main()
