"""Control vectors as the neighbours themselves write and read them; runs in .venv-peers.

`write FOLDER` saves directions by the code of repeng, of llama.cpp's package gguf and of steering-vectors.
`read FOLDER` reads every file below FOLDER with them, and writes the directions that they hold, by layer, as NAME.read.
"""

import json
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

np.float_ = np.float64  # pyright: ignore[reportAttributeAccessIssue] (a name that repeng uses and NumPy no longer has)

from repeng import ControlVector  # (after the line above)
from steering_vectors import SteeringVector

DIRECTIONS = {layer: np.random.default_rng(layer).standard_normal(24).astype(np.float32) for layer in (3, 18)}
VERSIONS = {name: version(name) for name in ("repeng", "gguf", "steering-vectors")}


def keep(path: Path, directions: Mapping[int, np.ndarray | torch.Tensor]) -> None:
    """Write directions by layer."""
    save_file({str(layer): torch.as_tensor(np.array(each)).float() for layer, each in directions.items()}, path)


def write(root: Path) -> None:
    """Save the same directions as each of the tools does."""
    ControlVector(model_type="flux", directions=DIRECTIONS).export_gguf(root / "repeng.gguf")
    writer = gguf.GGUFWriter(root / "half.gguf", "controlvector")
    writer.add_string("controlvector.model_hint", "flux")
    writer.add_array("tags", ["a", "b"])
    writer.add_custom_alignment(64)
    for layer, direction in DIRECTIONS.items():
        writer.add_tensor(f"direction.{layer}", direction.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    vector = SteeringVector({layer: torch.from_numpy(each) for layer, each in DIRECTIONS.items()}, "decoder_block")
    torch.save(vector.layer_activations, root / "layers.pt")
    torch.save(vars(vector), root / "vector.pt")
    keep(root / "directions.safetensors", DIRECTIONS)
    (root / "versions.json").write_text(json.dumps(VERSIONS) + "\n")


def read(root: Path) -> None:
    """Read what difflex wrote; two readers of GGUF must agree."""
    for path in sorted(root.glob("*.gguf")):
        vector = ControlVector.import_gguf(path)
        tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
        assert tensors.keys() == {f"direction.{layer}" for layer in vector.directions}
        assert all(np.array_equal(tensors[f"direction.{layer}"], each) for layer, each in vector.directions.items())
        keep(path.with_name(f"{path.name}.read"), vector.directions)
    for path in sorted(root.glob("*.pt")):
        content = torch.load(path, weights_only=True)
        vector = SteeringVector(content["layer_activations"], content["layer_type"])
        keep(path.with_name(f"{path.name}.read"), vector.layer_activations)


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
