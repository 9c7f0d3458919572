"""Import and export of dictionaries in the formats of other tools: time and peak memory, from a warm disk.

By default small files; `--full` measures the real size, 65,536 features of width 3,072 (1.6 GB, and as much again written).
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from difflex.choices import SAEKind
from difflex.dictionaries import ITDA, SAE, Dictionary, DictionaryOrigin, Normalisation, SAEWeights
from difflex.dictionaries.itda import AtomProvenance
from difflex.interchange import read_dictionary, write_dictionary
from difflex.records import Site

SMALL, FULL = (16_384, 1_536), (65_536, 3_072)
MAX_SECONDS, MAX_MEMORY = 20.0, 1.2
"""Of a full file: the time of an import, and its peak memory over what the process has before, as a share of the file."""
FIXED = 16 * 2**20
"""Bytes that an import of the small files of the default may take besides: it takes them for a file of any size."""
CASES = {
    "saelens": "saelens",
    "saelens-rescaled": "saelens",
    "saelens-bf16": "saelens",
    "sparsify": "sparsify",
    "saeuron": "saeuron",
    "dictionary-learning": "dictionary-learning",
    "dictionary-learning-jumprelu": "dictionary-learning",
    "sdxl-unbox": "sdxl-unbox",
    "overcomplete": "overcomplete",
    "itda-flux": "itda-flux",
    "itda": "itda",
    "fae": "fae",
}
"""What is imported, with its format."""
EXPORTS = ("saelens", "saelens-whitened", "sparsify", "dictionary-learning", "sdxl-unbox", "overcomplete", "itda-flux", "itda")
ORIGIN = DictionaryOrigin(site=Site("double.18"), model="black-forest-labs/FLUX.1-schnell")


class Cost(NamedTuple):
    """What an import or export takes."""

    seconds: float
    processor_seconds: float
    peak: int
    """Bytes by which the peak of memory rose."""


def sae(size: int, width: int, kind: SAEKind = "topk", whitened: bool = False, one_norm: bool = False) -> SAE:
    """Return an SAE with random weights."""
    encoder, decoder = torch.randn(size, width), torch.randn(size, width)
    decoder = F.normalize(decoder, dim=1) if one_norm else decoder.div_(width**0.5)
    bias = torch.zeros(width) if one_norm else torch.randn(width)
    thresholds = torch.full((size,), 1.5) if kind == "jumprelu" else None
    weights = SAEWeights(encoder=encoder, decoder=decoder, bias=bias, encoder_bias=torch.randn(size), thresholds=thresholds)
    normalisation = Normalisation.identity(width)
    if whitened:
        basis = torch.linalg.qr(torch.randn(width, width)).Q
        normalisation = Normalisation(method="whiten", mean=torch.randn(width), scale=torch.rand(width) + 0.5, basis=basis)
    return SAE(kind=kind, k=64, origin=ORIGIN, normalisation=normalisation, weights=weights)


def itda(size: int, width: int, pursuit: str) -> ITDA:
    """Return an ITDA dictionary of random atoms."""
    return ITDA(
        k=64,
        origin=ORIGIN,
        normalisation=Normalisation.identity(width),
        atoms=F.normalize(torch.randn(size, width), dim=1),
        provenance=AtomProvenance.unknown(size),
        pursuit=pursuit,  # pyright: ignore[reportArgumentType]
    )


def made(case: str, size: int, width: int) -> Dictionary:
    """Return a dictionary for a case."""
    torch.manual_seed(0)
    if case.startswith("itda"):
        return itda(size, width, "gradient" if case == "itda-flux" else "matching")
    kind = "jumprelu" if case.endswith("jumprelu") else "topk"
    return sae(size, width, kind, whitened=case.endswith("whitened"), one_norm=case == "overcomplete")


def write(folder: Path, case: str, size: int, width: int) -> None:
    """Write the files of a case."""
    if case == "fae":
        write_fae(folder, size, width)
        return
    write_dictionary(made(case, size, width), CASES[case], folder)
    if case == "saelens-rescaled":
        entries = json.loads((folder / "cfg.json").read_text())
        (folder / "cfg.json").write_text(json.dumps({**entries, "rescale_acts_by_decoder_norm": True}))
    if case == "saelens-bf16":
        path = folder / "sae_weights.safetensors"
        save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)


def write_fae(folder: Path, size: int, width: int) -> None:
    """Write the flat file that docs/interchange.md makes of a checkpoint of fae."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    info = {"whitening_matrix": torch.linalg.qr(torch.randn(width, width)).Q, "feature_means": torch.randn(width)}
    info["feature_square_means"] = info["feature_means"].square() + 1
    weights = {"W_enc": torch.randn(width, size), "W_dec": torch.randn(size, width), "b_mid": torch.zeros(size)}
    weights |= {"b_pre": torch.zeros(width), "b_post": torch.zeros(width)}
    flat = {f"info.{name}": x for name, x in info.items()} | {f"sae_params.{name}": x for name, x in weights.items()}
    save_file({name: tensor.contiguous() for name, tensor in flat.items()}, folder / "fae.safetensors")


def in_process(verb: str, case: str, source: Path, out: Path) -> None:
    """Import or export a dictionary and print the cost as JSON; in a process of its own."""
    torch.randn(8, 8).sum()
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    if verb == "import":
        k = 64 if case in ("overcomplete", "fae") or case.endswith("jumprelu") else None
        read_dictionary(source, site="double.18", k=k, keep_halves=True).save(out)
    else:
        write_dictionary(Dictionary.load(source), case.removesuffix("-whitened"), out)
    after, seconds = resource.getrusage(resource.RUSAGE_SELF), time.monotonic() - start
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps(Cost(seconds, processor, 1024 * (after.ru_maxrss - before.ru_maxrss))))


def measure(verb: str, case: str, size: int, width: int, root: Path) -> tuple[Cost, int]:
    """Return the cost and the bytes of the files of the other tool; what is read was read once before."""
    # Written by a process of its own too: the peak of memory of a process is inherited by those it starts.
    command = [sys.executable, __file__]
    with tempfile.TemporaryDirectory(dir=root) as folder:
        source, out = Path(folder) / "source", Path(folder) / "out"
        subprocess.run([*command, "--write", verb, case, str(size), str(width), str(source)], check=True)
        subprocess.run(["cat", *source.iterdir()], check=True, stdout=subprocess.DEVNULL)
        run = subprocess.run(
            [*command, "--measure", verb, case, str(source), str(out)], check=True, capture_output=True, text=True
        )
        foreign = source if verb == "import" else out
        return Cost(*json.loads(run.stdout)), sum(path.stat().st_size for path in foreign.iterdir())


def main() -> int:
    """Print a line for each case, and return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--imports", nargs="*", default=[*CASES], choices=CASES)
    parser.add_argument("--exports", nargs="*", default=EXPORTS)
    parser.add_argument("--write", nargs=5, metavar=("VERB", "CASE", "SIZE", "WIDTH", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=4, metavar=("VERB", "CASE", "SOURCE", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        verb, case, size, width, folder = arguments.write
        if verb == "import":
            write(Path(folder), case, int(size), int(width))
        else:
            made(case, int(size), int(width)).save(Path(folder))
        return 0
    if arguments.measure:
        verb, case, source, out = arguments.measure
        in_process(verb, case, Path(source), Path(out))
        return 0
    (size, width), fixed, missed = FULL if arguments.full else SMALL, 0 if arguments.full else FIXED, 0
    cases = [("import", case) for case in arguments.imports] + [("export", case) for case in arguments.exports]
    for verb, case in cases:
        cost, file = measure(verb, case, size, width, arguments.folder)
        passed = verb == "export" or (cost.seconds < MAX_SECONDS and cost.peak - fixed <= MAX_MEMORY * file)
        missed += not passed
        result = f" (bars {MAX_SECONDS:g} s, {MAX_MEMORY:g} and {fixed >> 20} MiB): {'passed' if passed else 'MISSED'}"
        print(
            f"{verb} {case} {size} x {width}, {file / 1e9:.2f} GB: {cost.seconds:.1f} s, {cost.processor_seconds:.1f} s of "
            f"processor, peak memory {cost.peak / file:.2f} of the file{result if verb == 'import' else ''}",
            flush=True,
        )
    print(f"{len(arguments.imports) - missed} of {len(arguments.imports)} bars met")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
