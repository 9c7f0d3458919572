"""How every test runs: on one thread (tiny models are several times faster so) and without a network."""

import gc
import os

# Before any test imports a library that reads them.
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
gc.disable()  # until all is imported: millions of objects are made, and all are kept

import torch  # noqa: E402
from skips import pytest_terminal_summary  # noqa: E402, F401 (a hook)

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Collect garbage from now on, but never again look at what was imported."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """Let the interpreter collect all at its end: modules of C++ otherwise report what they leave."""
    gc.unfreeze()
