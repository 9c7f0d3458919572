"""Export and import of activations in the files of other tools: speed and peak memory, from a warm disk.

By default 100 MB of rows of width 3,072 in float16; `--full` takes 1 GB. Memory should not grow with the size.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

import torch

from difflex.activation_files import ActivationFormat, ImportOptions, export_activations, import_activations
from difflex.records import Activations, Shot, Site
from difflex.store import RecordingConfig, Store, record

WIDTH, TOKENS = 3_072, 256
SMALL, FULL = 64, 640
"""Images of 256 tokens: 1.6 MB each."""
MAX_MEMORY = 1e9
"""Bytes by which the peak of memory may rise, whatever the size of the files."""
SITE = Site("double.18")


def harvest(shots: Sequence[Shot], sites: Sequence[Site], batch: int) -> Iterator[Activations]:
    """Yield random activations."""
    for first in range(0, len(shots), 16):
        part = tuple(shots[first : first + 16])
        yield Activations(site=sites[0], values=torch.randn(len(part), TOKENS, WIDTH), shots=part, grid=(16, 16))


def make_store(folder: Path, images: int) -> None:
    """Write a store of random activations."""
    prompts = (f"image {number}" for number in range(images))
    shots = [
        Shot(model="benchmark", prompt=text, pixels=(256, 256), steps=1, guidance=0.0, split=Shot.split_of(text))
        for text in prompts
    ]
    record(folder, shots, SITE, harvest, RecordingConfig(dtype="fp16", progress=False))


def in_process(verb: str, kind: ActivationFormat, source: Path, out: Path) -> None:
    """Export or import and print seconds, processor seconds and the bytes by which the peak of memory rose."""
    torch.randn(8, 8).sum()
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    if verb == "export":
        [folder] = [path.parent for path in source.rglob("manifest.json")]
        export_activations(Store.open(folder), kind, out, progress=False)
    else:
        import_activations(source, out, ImportOptions(), lambda model, revision: None)
    seconds, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps([seconds, processor, 1024 * (after.ru_maxrss - before.ru_maxrss)]))


def main() -> int:
    """Print a line for each step, and return 1 if the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--store", nargs=2, metavar=("FOLDER", "IMAGES"), help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=4, metavar=("VERB", "KIND", "SOURCE", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.store:
        make_store(Path(arguments.store[0]), int(arguments.store[1]))
        return 0
    if arguments.measure:
        verb, kind, source, out = arguments.measure
        in_process(verb, kind, Path(source), Path(out))
        return 0
    images, missed, command = FULL if arguments.full else SMALL, 0, [sys.executable, __file__]
    size = 2 * images * TOKENS * WIDTH
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        root = Path(name)
        subprocess.run([*command, "--store", str(root / "store"), str(images)], check=True)
        for kind in get_args(ActivationFormat):
            for verb, source, out in (("export", root / "store", root / kind), ("import", root / kind, root / f"{kind}-back")):
                words = ["--measure", verb, kind, str(source), str(out)]
                run = subprocess.run([*command, *words], check=True, capture_output=True, text=True)
                seconds, processor, peak = json.loads(run.stdout.splitlines()[-1])
                missed += (late := peak > MAX_MEMORY)
                print(
                    f"{verb} {kind}, {size / 1e9:.2f} GB: {size / 1e6 / seconds:.0f} MB/s, {processor:.1f} s of processor, peak "
                    f"memory {peak / 1e6:.0f} MB (bar {MAX_MEMORY / 1e6:.0f}): {'MISSED' if late else 'passed'}",
                    flush=True,
                )
            for folder in (root / kind, root / f"{kind}-back"):
                shutil.rmtree(folder)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
