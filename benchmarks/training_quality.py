"""Quality after the same data and number of updates, against the peers: planted directions recovered; mini-flux reconstructed.

Every library trains on the same standardised batches, in its own process, with its default settings. By default ours and one peer
train for a short time; `--full` runs all peers with 2 M planted tokens and 5 M tokens of mini-flux (its middle double block),
compares our preset with the published ones, and tests the claim of arXiv 2505.24360 that normalisation prevents dead features.
`--peer PYTHON` is the interpreter with the peers; missing ones are left out.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peers.clients import PEERS, start_learners

from difflex.choices import NormalisationMethod
from difflex.cli import main as command
from difflex.dictionaries import DictionaryOrigin
from difflex.records import ActivationBatch, Site
from difflex.store import Store
from difflex.training import FitConfig, TrainingConfig, default, fit, paper, unbox

torch.set_num_threads(1)
PYTHON = Path(__file__).parent.parent / ".venv-peers" / "bin" / "python"
SITE = Site("double.1")
Line = tuple[str, float, str, bool]
"""Name, value, bar and whether it is met."""


def train_all(names: list[str], python: Path, begin: dict[str, Any], updates: int) -> dict[str, dict[str, float]]:
    """Train one library after the other; return the quality of each after `updates`."""
    qualities = {}
    for name in names:
        with start_learners([name], python) as learners:
            started = time.perf_counter()
            learners[name].begin(**begin, updates=updates, **({"adam": "default"} if name == "ours" else {}))
            learners[name].update(count=updates)
            qualities[name] = learners[name].quality()
        values = ", ".join(f"{key} {value:.4f}" for key, value in qualities[name].items())
        print(f"  {name}: {values} ({updates} updates, {time.perf_counter() - started:.0f} s)", flush=True)
    return qualities


def planted(names: list[str], python: Path, tokens: int, full: bool) -> list[Line]:
    """Train on planted data: width 256, 12 of 1,024 directions fire, 16 axes stretched 8 times, 5 % noise; size 2,048, k 16."""
    print(f"  planted directions, {tokens:,} tokens")
    begin = {"world": {}, "width": 256, "size": 2048, "k": 16, "batch": 1024, "standardise": True}
    qualities = train_all(names, python, begin, tokens // 1024)
    ours, best = qualities.pop("ours"), max((quality["mean"] for quality in qualities.values()), default=0.0)
    lines = [("planted: mean best cosine over the best peer's", ours["mean"] - best, "at least 0", ours["mean"] >= best)]
    if full:
        lines.append(("planted: mean best cosine", ours["mean"], "at least 0.98", ours["mean"] >= 0.98))
        lines.append(("planted: over the rarest quarter", ours["rarest"], "at least 0.90", ours["rarest"] >= 0.90))
    return lines


def harvested(folder: Path, tokens: int) -> Path:
    """Harvest mini-flux on captions of its world, at all four steps."""
    words = ["harvest", "mini-flux", "--prompts", "captions", "--site", str(SITE), "--out", str(folder), "--steps", "4"]
    assert command([*words, "--tokens", str(tokens)]) == 0
    return folder / "activations" / SITE.folder


def mini(names: list[str], python: Path, store: Path, tokens: int) -> list[Line]:
    """Train on mini-flux: size 4,096, k 32."""
    print(f"  mini-flux, {tokens:,} tokens")
    begin = {"world": {"stores": [str(store)]}, "width": 192, "size": 4096, "k": 32, "batch": 1024, "standardise": True}
    qualities = train_all(names, python, begin, tokens // 1024)
    ours, best = qualities.pop("ours"), min((quality["fvu"] for quality in qualities.values()), default=1.0)
    return [
        ("mini-flux: FVU less the best peer's", ours["fvu"] - best, "at most 0", ours["fvu"] <= best),
        ("mini-flux: share of features dead on held-out tokens", ours["silent"], "under 0.05", ours["silent"] < 0.05),
    ]


def presets(store: Store, tokens: int) -> list[Line]:
    """Compare FVU in model space and dead features of our preset and the published ones, on the same tokens."""
    held_out = _held_out(store)
    trainings = {
        "default": default(width=192, size=4096, k=32, updates=tokens // 1024),
        "paper": paper(size=4096, k=32),
        "unbox": unbox(size=4096, k=32),
    }
    print("  | preset | FVU | dead |\n  |---|---|---|")
    fvus: dict[str, float] = {}
    for name, training in trainings.items():
        dead, fvus[name] = _quality(store, training, tokens, held_out)
        print(f"  | {name} | {fvus[name]:.4f} | {dead:.4f} |", flush=True)
    ours, best = fvus.pop("default"), min(fvus.values())
    return [("mini-flux: FVU less the best published preset's", ours - best, "at most 0", ours <= best)]


def normalisation(store: Store, tokens: int) -> None:
    """Measure dead features and FVU in model space by normalisation, without AuxK, with two initial biases."""
    held_out = _held_out(store)
    print("  | normalisation | dead, bias zero | FVU | dead, bias mean | FVU |\n  |---|---|---|---|---|")
    for method in get_args(NormalisationMethod):
        values = []
        for bias in get_args(Literal["zero", "mean"]):
            preset = default(width=192, size=4096, k=32, updates=tokens // 1024)
            training = replace(preset, normalisation=method, auxk=None, initialisation=replace(preset.initialisation, bias=bias))
            values += [f"{value:.4f}" for value in _quality(store, training, tokens, held_out)]
        print(f"  | {method} | {' | '.join(values)} |", flush=True)


def _held_out(store: Store) -> torch.Tensor:
    """Return held-out tokens."""
    return torch.cat([rows.values.float() for rows, _ in zip(store.batches(8192, split="held-out"), range(16), strict=False)])


def _quality(store: Store, training: TrainingConfig, tokens: int, held_out: torch.Tensor) -> tuple[float, float]:
    """Return the share of features that are dead on `held_out`, and the FVU there, after training on `tokens` of the store."""
    with tempfile.TemporaryDirectory() as work:
        config = FitConfig(tokens=tokens, progress=False, checkpoint_every=10**9)
        batches = partial(_endless, store)
        sae = fit({Path(work): training}, batches, origin=DictionaryOrigin(site=SITE), config=config)[Path(work)]
    fired, error = torch.zeros(training.size, dtype=torch.bool), 0.0
    for part in held_out.split(8192):
        codes = sae.encode(part)
        fired[codes.indices[codes.values > 0]] = True
        error += float((part - sae.decode(codes)).square().sum())
    return 1 - float(fired.float().mean()), error / float((held_out - held_out.mean(0)).square().sum())


def _endless(store: Store, start: int) -> Iterator[ActivationBatch]:
    return store.batches(1024, start=start, epochs=None)


def main() -> int:
    """Return 0 if no bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=Path, default=PYTHON)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--only", nargs="+", default=["planted", "mini", "presets", "normalisation"])
    arguments = parser.parse_args()
    peers = (PEERS if arguments.full else PEERS[:1]) if arguments.peer.exists() else ()
    if not peers:
        print(f"  the peers are left out: there is no {arguments.peer} (make peers)")
    lines: list[Line] = []
    if "planted" in arguments.only:
        lines += planted(["ours", *peers], arguments.peer, 2_000_000 if arguments.full else 500_000, arguments.full)
    if {*arguments.only} - {"planted"}:
        with tempfile.TemporaryDirectory() as folder:
            tokens = 5_000_000 if arguments.full else 300_000
            store = harvested(Path(folder), tokens)
            if "mini" in arguments.only:
                lines += mini(["ours", *peers], arguments.peer, store, tokens)
            if "presets" in arguments.only and arguments.full:
                lines += presets(Store.open(store), tokens)
            if "normalisation" in arguments.only and arguments.full:
                normalisation(Store.open(store), tokens)
    for name, value, bar, met in lines:
        print(f"  {name}: {value:.4f} ({bar}) {'met' if met else 'MISSED'}")
    met = sum(met for *_, met in lines)
    print(f"training_quality: {met} of {len(lines)} bars: {'met' if met == len(lines) else 'MISSED'}")
    return met != len(lines)


if __name__ == "__main__":
    sys.exit(main())
