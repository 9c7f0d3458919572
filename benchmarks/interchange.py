"""Import of a dictionary that another tool wrote: time and peak memory, from a warm disk.

By default a small file; `--full` measures the real size, 65,536 features of width 3,072 (1.6 GB, and as much again imported).
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from difflex.interchange.writing import write_config

SMALL, FULL = (16_384, 1_536), (65_536, 3_072)
MAX_SECONDS, MAX_MEMORY = 20.0, 1.2
"""Of a full file: the time, and the peak memory over what the process has before, as a share of the file."""
FORMATS = ("saelens", "sparsify", "dictionary-learning", "saelens-rescaled", "saelens-bf16")


def write(folder: Path, format: str, size: int, width: int) -> Path:
    """Write the files of an SAE with random weights, and return the large one."""
    torch.manual_seed(0)
    encoder, decoder = torch.randn(size, width), torch.randn(size, width) / width**0.5
    bias, biases = torch.zeros(width), torch.zeros(size)
    folder.mkdir()
    if format.startswith("saelens"):
        rescale, dtype = format == "saelens-rescaled", torch.bfloat16 if format == "saelens-bf16" else torch.float32
        entries = {"architecture": "topk", "k": 64, "rescale_acts_by_decoder_norm": rescale, "metadata": {}}
        write_config(folder / "cfg.json", entries)
        tensors = {"W_enc": encoder.T, "b_enc": biases, "W_dec": decoder, "b_dec": bias}
        path = folder / "sae_weights.safetensors"
        save_file({name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}, path)
    elif format == "sparsify":
        write_config(folder / "cfg.json", {"k": 64, "d_in": width})
        path = folder / "sae.safetensors"
        save_file({"encoder.weight": encoder, "encoder.bias": biases, "W_dec": decoder, "b_dec": bias}, path)
    else:
        write_config(folder / "config.json", {"trainer": {"dict_class": "AutoEncoderTopK"}})
        path = folder / "ae.pt"
        k, threshold = torch.tensor(64, dtype=torch.int32), torch.tensor(-1.0)
        state = {"encoder.weight": encoder, "encoder.bias": biases, "decoder.weight": decoder.T.contiguous(), "b_dec": bias}
        torch.save({**state, "k": k, "threshold": threshold}, path)
    return path


def imported(source: Path, out: Path) -> None:
    """Import a dictionary and print the seconds and the bytes by which the peak of memory rose; in a process of its own."""
    from difflex.interchange import read_dictionary

    torch.randn(8, 8).sum()
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    dictionary = read_dictionary(source, site="double.18", keep_halves=True)
    dictionary.save(out)
    seconds = time.monotonic() - start
    print(json.dumps([seconds, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)]))


def measure(format: str, size: int, width: int, root: Path) -> tuple[float, float]:
    """Return the seconds and the peak memory, as a share of the file, of an import; the file is read once before."""
    # Written by a process of its own too: the peak of memory of a process is inherited by those it starts.
    command = [sys.executable, __file__]
    with tempfile.TemporaryDirectory(dir=root) as folder:
        source, out = Path(folder) / "source", Path(folder) / "out"
        subprocess.run([*command, "--write", format, str(size), str(width), str(source)], check=True)
        path = max(source.iterdir(), key=lambda path: path.stat().st_size)
        subprocess.run(["cat", path], check=True, stdout=subprocess.DEVNULL)
        run = subprocess.run([*command, "--import", str(source), str(out)], check=True, capture_output=True, text=True)
        seconds, peak = json.loads(run.stdout)
        return seconds, peak / path.stat().st_size


def main() -> int:
    """Print a line for each format, and return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--formats", nargs="*", default=FORMATS)
    parser.add_argument("--write", nargs=4, metavar=("FORMAT", "SIZE", "WIDTH", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--import", nargs=2, metavar=("SOURCE", "OUT"), dest="imported", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        format, size, width, folder = arguments.write
        write(Path(folder), format, int(size), int(width))
        return 0
    if arguments.imported:
        imported(*map(Path, arguments.imported))
        return 0
    (size, width), missed = FULL if arguments.full else SMALL, 0
    for format in arguments.formats:
        seconds, memory = measure(format, size, width, arguments.folder)
        passed = seconds < MAX_SECONDS and memory <= MAX_MEMORY
        missed += not passed
        print(
            f"import {format} {size} x {width}: {seconds:.1f} s (bar {MAX_SECONDS:g} s), peak memory {memory:.2f} of the file "
            f"(bar {MAX_MEMORY:g}): {'passed' if passed else 'MISSED'}"
        )
    print(f"{len(arguments.formats) - missed} of {len(arguments.formats)} bars met")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
