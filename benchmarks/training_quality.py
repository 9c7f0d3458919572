"""What is learned from the same data in as many updates, against the peers: planted directions found; mini-flux explained.

All learn from the same standardised batches, each in a process of its own, at its own default settings. By default ours and one
peer learn for a while; `--full` takes every peer, 2 M planted tokens and 5 M tokens of mini-flux (its middle double block),
compares our preset with the published ones, and measures the claim of arXiv 2505.24360 that normalisation keeps features alive.
`--peer PYTHON` names the interpreter that has the peers; those that are missing are left out.
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
from peers.asking import PEERS, asked

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
"""Name, figure, bar and whether it is met."""


def learned(names: list[str], python: Path, begin: dict[str, Any], updates: int) -> dict[str, dict[str, float]]:
    """The qualities of every learner after `updates`, one after the other."""
    found = {}
    for name in names:
        with asked([name], python) as learners:
            started = time.perf_counter()
            learners[name].begin(**begin, updates=updates, **({"adam": "default"} if name == "ours" else {}))
            learners[name].update(count=updates)
            found[name] = learners[name].quality()
        shown = ", ".join(f"{key} {value:.4f}" for key, value in found[name].items())
        print(f"  {name}: {shown} ({updates} updates, {time.perf_counter() - started:.0f} s)", flush=True)
    return found


def planted(names: list[str], python: Path, tokens: int, judged: bool) -> list[Line]:
    """Width 256, 1,024 directions of which 12 fire, 16 axes stretched 8 times, 5 % noise; size 2,048, k 16."""
    print(f"  planted directions, {tokens:,} tokens")
    begin = {"world": {}, "width": 256, "size": 2048, "k": 16, "batch": 1024, "standardise": True}
    found = learned(names, python, begin, tokens // 1024)
    ours, best = found.pop("ours"), max((each["mean"] for each in found.values()), default=0.0)
    lines = [("planted: mean best cosine over the best peer's", ours["mean"] - best, "at least 0", ours["mean"] >= best)]
    if judged:
        lines.append(("planted: mean best cosine", ours["mean"], "at least 0.98", ours["mean"] >= 0.98))
        lines.append(("planted: over the rarest quarter", ours["rarest"], "at least 0.90", ours["rarest"] >= 0.90))
    return lines


def harvested(folder: Path, tokens: int) -> Path:
    """Activations of mini-flux on captions of its world, at all four steps."""
    words = ["harvest", "mini-flux", "--prompts", "captions", "--site", str(SITE), "--out", str(folder), "--steps", "4"]
    assert command([*words, "--tokens", str(tokens)]) == 0
    return folder / "activations" / SITE.folder


def mini(names: list[str], python: Path, store: Path, tokens: int) -> list[Line]:
    """Size 4,096, k 32."""
    print(f"  mini-flux, {tokens:,} tokens")
    begin = {"world": {"store": str(store)}, "width": 192, "size": 4096, "k": 32, "batch": 1024, "standardise": True}
    found = learned(names, python, begin, tokens // 1024)
    ours, best = found.pop("ours"), min((each["fvu"] for each in found.values()), default=1.0)
    return [
        ("mini-flux: FVU less the best peer's", ours["fvu"] - best, "at most 0", ours["fvu"] <= best),
        ("mini-flux: share of features silent on unseen tokens", ours["silent"], "under 0.05", ours["silent"] < 0.05),
    ]


def presets(store: Store, tokens: int) -> list[Line]:
    """FVU in model space and silent features of our preset and the published ones, on the same tokens."""
    unseen = _unseen(store)
    ways = {
        "default": default(width=192, size=4096, k=32, updates=tokens // 1024),
        "paper": paper(size=4096, k=32),
        "unbox": unbox(size=4096, k=32),
    }
    print("  | preset | FVU | silent |\n  |---|---|---|")
    left: dict[str, float] = {}
    for name, training in ways.items():
        silent, left[name] = _explained(store, training, tokens, unseen)
        print(f"  | {name} | {left[name]:.4f} | {silent:.4f} |", flush=True)
    ours, best = left.pop("default"), min(left.values())
    return [("mini-flux: FVU less the best published preset's", ours - best, "at most 0", ours <= best)]


def normalisation(store: Store, tokens: int) -> None:
    """Silent features and FVU in model space by normalisation, with nothing that revives features, from two first biases."""
    unseen = _unseen(store)
    print("  | normalisation | silent, from bias 0 | FVU | silent, from the mean | FVU |\n  |---|---|---|---|---|")
    for method in get_args(NormalisationMethod):
        shown = []
        for bias in get_args(Literal["zero", "mean"]):
            preset = default(width=192, size=4096, k=32, updates=tokens // 1024)
            training = replace(preset, normalisation=method, auxk=None, initialisation=replace(preset.initialisation, bias=bias))
            shown += [f"{figure:.4f}" for figure in _explained(store, training, tokens, unseen)]
        print(f"  | {method} | {' | '.join(shown)} |", flush=True)


def _unseen(store: Store) -> torch.Tensor:
    """Tokens that were held out."""
    return torch.cat([rows.values.float() for rows, _ in zip(store.batches(8192, split="held-out"), range(16), strict=False)])


def _explained(store: Store, training: TrainingConfig, tokens: int, unseen: torch.Tensor) -> tuple[float, float]:
    """The share of features that are silent on `unseen`, and the FVU there, after training on `tokens` of the store."""
    with tempfile.TemporaryDirectory() as work:
        config = FitConfig(tokens=tokens, progress=False, checkpoint_every=10**9)
        batches = partial(_endless, store)
        made = fit({Path(work): training}, batches, origin=DictionaryOrigin(site=SITE), config=config)[Path(work)]
    fired, left = torch.zeros(training.size, dtype=torch.bool), 0.0
    for part in unseen.split(8192):
        codes = made.encode(part)
        fired[codes.indices[codes.values > 0]] = True
        left += float((part - made.decode(codes)).square().sum())
    return 1 - float(fired.float().mean()), left / float((unseen - unseen.mean(0)).square().sum())


def _endless(store: Store, start: int) -> Iterator[ActivationBatch]:
    return store.batches(1024, start=start, epochs=None)


def main() -> int:
    """0 if every bar measured is met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=Path, default=PYTHON)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--only", nargs="+", default=["planted", "mini", "presets", "normalisation"])
    wanted = parser.parse_args()
    peers = (PEERS if wanted.full else PEERS[:1]) if wanted.peer.exists() else ()
    if not peers:
        print(f"  the peers are left out: there is no {wanted.peer} (make peers)")
    lines: list[Line] = []
    if "planted" in wanted.only:
        lines += planted(["ours", *peers], wanted.peer, 2_000_000 if wanted.full else 500_000, wanted.full)
    if {*wanted.only} - {"planted"}:
        with tempfile.TemporaryDirectory() as folder:
            tokens = 5_000_000 if wanted.full else 300_000
            store = harvested(Path(folder), tokens)
            if "mini" in wanted.only:
                lines += mini(["ours", *peers], wanted.peer, store, tokens)
            if "presets" in wanted.only and wanted.full:
                lines += presets(Store.open(store), tokens)
            if "normalisation" in wanted.only and wanted.full:
                normalisation(Store.open(store), tokens)
    for name, found, bar, met in lines:
        print(f"  {name}: {found:.4f} ({bar}) {'met' if met else 'MISSED'}")
    met = sum(met for *_, met in lines)
    print(f"training_quality: {met} of {len(lines)} bars: {'met' if met == len(lines) else 'MISSED'}")
    return met != len(lines)


if __name__ == "__main__":
    sys.exit(main())
