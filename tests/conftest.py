"""How every test runs: on one thread (tiny models are several times faster so) and without a network."""

import os

# Before any test imports a library that reads them.
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}

import torch

torch.set_num_threads(1)
