"""`read FOLDER`: exported Parquet files as `datasets` reads them, without difflex; runs in .venv-peers.

The rows are written as `values.read`, their prompts as `prompts.read`.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from datasets import load_dataset
from safetensors.torch import save_file

if __name__ == "__main__":
    folder = Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as cache:
        rows = load_dataset(str(folder), split="train", cache_dir=cache)
        save_file({"values": torch.as_tensor(rows.with_format("torch")["values"][:]).float()}, folder / "values.read")
        (folder / "prompts.read").write_text(json.dumps(rows["prompt"][:]))
