"""Pursuits and growth against other code: signals per second, whole fits, what a new atom costs, and a dictionary too large.

Times are of the process's own CPU (`time.process_time`) on one thread, medians of interleaved rounds (whole fits once), so that
whatever else runs on the machine counts little. `--peer PYTHON` names the interpreter that has dictionary_learning; without one
that part is left out. `--only PART...` runs some parts: pursuits, sklearn, fits, growth, large.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from sklearn.linear_model import orthogonal_mp_gram
from torch import Tensor
from torch.nn import functional as F

from difflex.choices import PursuitName
from difflex.dictionaries.itda import GrowthConfig
from difflex.dictionaries.pursuit import CandidatePool, GramMatrix, PursuitPath, choose_backend, pursue
from difflex.distributed import Ranks
from difflex.records import ActivationBatch
from difflex.training.itda.grower import AtomGrower, PursuitBatch

torch.set_num_threads(1)
PEER = Path(__file__).parent.parent / ".venv-peers" / "bin" / "python"
SHAPES = {(4096, 16): 40, (4096, 64): 30, (16384, 64): 25}
"""Size and k: how many times as many signals per second as dictionary_learning."""
SKLEARN = 50
FITS = {(768, 512, 16, 0.3, 16_384): 8, (3072, 256, 32, 0.25, 4096): 20}
"""Width, batch, k, threshold and tokens: how many times as fast as the plain step."""
NEW_ATOMS = 0.02
"""What adding 64 atoms may cost, as a share of encoding a batch."""


FITTED: tuple[PursuitName, ...] = ("gradient", "orthogonal")


def mixtures(count: int, width: int, active: int, noise: float, seed: int = 0, truths: int = 512) -> Tensor:
    """Sparse mixtures of few directions with falling frequencies and some noise, of length one after centring."""
    directions = F.normalize(torch.randn(truths, width, generator=torch.Generator().manual_seed(1)), dim=1)
    frequency = torch.arange(1, truths + 1).float() ** -0.5
    generator = torch.Generator().manual_seed(seed + 2)
    parts = []
    for start in range(0, count, 1024):
        rows = min(1024, count - start)
        picks = torch.multinomial(frequency.expand(rows, -1), active, generator=generator)
        amounts = torch.rand(rows, active, generator=generator) + 0.5
        parts.append((amounts[:, :, None] * directions[picks]).sum(1))
    x = torch.cat(parts)
    x += noise * torch.randn(count, width, generator=generator) / width**0.5
    return F.normalize(x - x.mean(0), dim=1)


def world(size: int, count: int, width: int = 3072) -> tuple[Tensor, Tensor]:
    """Signals, and atoms that are other signals of the same kind."""
    x = mixtures(size + count, width, 12, 0.4, truths=1024)
    return x[:count].clone(), x[count:].clone()


def unexplained_of(signals: Tensor, path: PursuitPath) -> float:
    """The unexplained share of all `signals` together."""
    energy = signals.square().sum(1)
    return float((path.unexplained[: len(signals)] * energy).sum() / energy.sum())


def timed(work: Callable[[], object]) -> float:
    """CPU seconds."""
    began = time.process_time()
    work()
    return time.process_time() - began


@contextmanager
def peer(python: Path):
    """A function (file, count, k) -> CPU seconds and unexplained share, answered by dictionary_learning in its own process."""
    command = [str(python), str(Path(__file__).parent / "peers" / "gradient_pursuit.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        stdin, stdout = process.stdin, process.stdout
        assert stdout.readline().strip() == "ready", "the peer did not start: make peers"

        def ask(file: Path, count: int, k: int) -> tuple[float, float]:
            print(file, count, k, file=stdin, flush=True)
            seconds, left = map(float, stdout.readline().split())
            return seconds, left

        yield ask
        stdin.close()


def pursuits(python: Path, rounds: int = 2) -> list[str]:
    """Gradient pursuit against dictionary_learning's; the others of ours beside it."""
    missed = []
    with peer(python) as ask, tempfile.TemporaryDirectory() as folder:
        for (size, k), bar in SHAPES.items():
            many, few = (1024, 64) if size < 10_000 else (512, 32)
            signals, atoms = world(size, many)
            file = Path(folder) / f"{size}.pt"
            torch.save({"signals": signals[:few].clone(), "atoms": atoms}, file)
            gram, half = GramMatrix.of(atoms), GramMatrix.of(atoms, torch.float16)
            ours: dict[str, Callable[[], PursuitPath]] = {
                "gradient": lambda: pursue(signals, atoms, k, "gradient", gram=gram),  # noqa: B023
                "gradient, half": lambda: pursue(signals, atoms, k, "gradient", gram=half),  # noqa: B023
                "orthogonal": lambda: pursue(signals, atoms, k, "orthogonal", gram=gram),  # noqa: B023
                "matching": lambda: pursue(signals, atoms, k, "matching", gram=gram),  # noqa: B023
            }
            rates: dict[str, list[float]] = {name: [] for name in ours}
            paths: dict[str, PursuitPath] = {}
            theirs, their_left = [], 0.0
            for _ in range(rounds):
                seconds, their_left = ask(file, few, k)
                theirs.append(few / seconds)
                for name, work in ours.items():
                    began = time.process_time()
                    paths[name] = work()
                    rates[name].append(many / (time.process_time() - began) / theirs[-1])
            print(f"size {size}, k {k}: dictionary_learning {statistics.median(theirs):.1f} signals/s, FVU {their_left:.5f}")
            for name in ours:
                ratio = statistics.median(rates[name])
                left = unexplained_of(signals[:few], paths[name])
                print(f"  {name}: {ratio:.1f}x, FVU {left:.5f}" + (f" (bar {bar}x)" if name == "gradient" else ""))
                if name == "gradient" and (ratio < bar or abs(left / their_left - 1) > 0.01):
                    missed.append(f"gradient pursuit {ratio:.1f}x of {bar}x at size {size}, k {k}")
    return missed


def sklearn(rounds: int = 3) -> list[str]:
    """Orthogonal pursuit against scikit-learn's, size 4096, k 16."""
    few, many = 64, 1024
    signals, atoms = world(4096, many)
    gram = GramMatrix.of(atoms)
    dense, ratios, weights = (atoms @ atoms.T).numpy(), [], None
    for _ in range(rounds):
        began = time.process_time()
        weights = orthogonal_mp_gram(dense, (atoms @ signals[:few].T).numpy(), n_nonzero_coefs=16)
        theirs = few / (time.process_time() - began)
        ratios.append(many / timed(lambda: pursue(signals, atoms, 16, "orthogonal", gram=gram)) / theirs)
    their_left = float((signals[:few] - torch.tensor(weights).T.float() @ atoms).square().sum() / signals[:few].square().sum())
    left, ratio = unexplained_of(signals[:few], pursue(signals, atoms, 16, "orthogonal", gram=gram)), statistics.median(ratios)
    print(f"scikit-learn: {ratio:.1f}x (bar {SKLEARN}x), FVU {left:.5f} against {their_left:.5f}")
    return (
        [] if ratio >= SKLEARN and round(left, 4) == round(their_left, 4) else [f"orthogonal pursuit {ratio:.1f}x of {SKLEARN}x"]
    )


def plain_fit(x: Tensor, batch: int, k: int, threshold: float) -> Tensor:
    """The atoms that the ITDA step of flux-saes-gpu adds, written plainly from its description.

    The mean is that of the first batch, which adds nothing. In each round of its gradient pursuit the support is what has weight
    and the best atom. A token is added when its squared error over the batch's mean squared length exceeds the threshold.
    """
    mean = x[:batch].mean(0)
    atoms = torch.zeros(0, x.shape[1])
    for start in range(batch, len(x), batch):
        z = x[start : start + batch] - mean
        explained = torch.zeros_like(z)
        if len(atoms):
            weights = torch.zeros(len(z), len(atoms))
            for _ in range(k):
                residual = z - weights @ atoms
                correlations = residual @ atoms.T
                support = weights != 0
                support[torch.arange(len(z)), correlations.argmax(1)] = True
                slope = correlations * support
                c = slope @ atoms
                step = (c * residual).sum(1) / (c * c).sum(1).clamp_min(1e-3)
                weights = (weights + step[:, None] * slope).clamp_min(0)
            explained = weights @ atoms
        loss = (z - explained).square().sum(1) / z.square().sum(1).mean()
        atoms = torch.cat([atoms, F.normalize(z[loss > threshold], dim=1)])
    return atoms


def our_fit(z: Tensor, growth: GrowthConfig, threshold: float) -> Tensor:
    """The atoms that growth adds."""
    grower = AtomGrower(growth, threshold, z.shape[1], torch.device("cpu"), Ranks())
    for part in z.split(growth.batch):
        nothing = torch.zeros(len(part), dtype=torch.long)
        grower.add_batch(ActivationBatch(part, nothing, nothing))
    return grower.atoms.rows


def fits(rounds: int = 1) -> list[str]:
    """Whole fits against the plain step: gradient pursuit as there, and our default."""
    missed = []
    for (width, batch, k, threshold, tokens), bar in FITS.items():
        x = mixtures(batch + tokens + 2048, width, 4 if width < 1000 else 6, 0.3)
        x, mean = x[:-2048], x[:batch].mean(0)
        held = mixtures(2048, width, 4 if width < 1000 else 6, 0.3, seed=7) - mean
        ratios: dict[PursuitName, list[float]] = {pursuit: [] for pursuit in FITTED}
        sizes, lefts, plain = {}, {}, torch.empty(0)
        for _ in range(rounds):
            began = time.process_time()
            plain = plain_fit(x, batch, k, threshold)
            theirs = time.process_time() - began
            for pursuit in FITTED:
                growth = GrowthConfig(k=k, threshold=threshold, size=8192, batch=batch, pursuit=pursuit)
                began = time.process_time()
                atoms = our_fit(x[batch:] - mean, growth, threshold)
                ratios[pursuit].append(theirs / (time.process_time() - began))
                sizes[pursuit], lefts[pursuit] = len(atoms), unexplained_of(held, pursue(held, atoms, k, pursuit))
        their_left = unexplained_of(held, pursue(held, plain, k, "gradient"))
        print(f"fit, width {width}, batch {batch}, k {k}: plain step {len(plain)} atoms, FVU {their_left:.4f}")
        for pursuit, values in ratios.items():
            ratio = statistics.median(values)
            print(f"  {pursuit}: {ratio:.1f}x (bar {bar}x), {sizes[pursuit]} atoms, FVU {lefts[pursuit]:.4f}")
            if pursuit == "gradient" and (
                ratio < bar or abs(sizes[pursuit] / len(plain) - 1) > 0.05 or lefts[pursuit] > 1.02 * their_left
            ):
                missed.append(f"fit {ratio:.1f}x of {bar}x at width {width}")
    return missed


def growth_cost() -> list[str]:
    """What about 64 new atoms cost at size 16384, beside encoding the batch they came from: their rows alone, and all of it."""
    signals, atoms = world(16_384 - 64, 256)
    grower = AtomGrower(
        GrowthConfig(k=64, size=16_384, threshold=0.5, pursuit="gradient"), 0.5, 3072, torch.device("cpu"), Ranks()
    )
    nowhere = torch.zeros(len(atoms), dtype=torch.long)
    for start in range(0, len(atoms), 480):
        here = slice(start, start + 480)
        products = atoms[here] @ atoms[: start + len(atoms[here])].T
        grower.restore({"rows": atoms[here], "shots": nowhere[here], "tokens": nowhere[here], "gram": products})
    before, gram = grower.size, grower.atoms.gram
    assert gram is not None
    batch = PursuitBatch(signals, grower.atoms, grower.growth, 0.0, 256)
    grower.threshold = float(batch.unexplained.sort().values[-65])
    encoding = timed(lambda: PursuitBatch(signals, grower.atoms, grower.growth, grower.threshold, 256))
    new = signals[:64]
    _, cross = batch.new_atoms(torch.arange(64), grower.atoms, "point")
    own = new @ new.T
    adding = timed(lambda: gram.append(cross, own))
    gram.truncate(before)
    whole = timed(lambda: grower.add_batch(ActivationBatch(signals, nowhere[:256], nowhere[:256]))) - encoding
    print(f"64 rows of the Gram matrix at size 16384: {adding:.4f} s, {adding / encoding:.2%} of encoding the batch")
    print(f"all of growth beyond encoding, {grower.size - before} atoms: {whole:.4f} s, {whole / encoding:.1%}")
    return [] if adding <= NEW_ATOMS * encoding else [f"new atoms cost {adding / encoding:.1%}"]


def large() -> list[str]:
    """Size 65536 at width 3072 on a CPU: the backend that is chosen, and that it works."""
    backend = choose_backend("orthogonal", 65_536, 3072, 32)
    print(f"size 65536, width 3072: {backend.reason}")
    signals, atoms = world(65_536, 64)
    began = time.process_time()
    pooled = pursue(signals, atoms, 32, "orthogonal", pool=CandidatePool())
    seconds = time.process_time() - began
    exact = pursue(signals, atoms, 32, "orthogonal")
    ratio = unexplained_of(signals, pooled) / unexplained_of(signals, exact)
    print(f"  {len(signals) / seconds:.1f} signals/s, FVU {ratio:.4f} of that of exact picks")
    return [] if backend.pool is not None and backend.gram is None and ratio < 1.02 else ["size 65536 without a Gram matrix"]


def main() -> int:
    """0 if every bar measured is met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=Path, default=PEER)
    parser.add_argument("--only", nargs="+", default=["pursuits", "sklearn", "fits", "growth", "large"])
    arguments = parser.parse_args()
    missed = []
    for name in arguments.only:
        if name == "pursuits" and not arguments.peer.exists():
            print(f"pursuits: left out, as {arguments.peer} is not there (make peers)")
            continue
        parts = {
            "pursuits": lambda: pursuits(arguments.peer),
            "sklearn": sklearn,
            "fits": fits,
            "growth": growth_cost,
            "large": large,
        }
        missed += parts[name]()
    print("itda: " + ("every bar met" if not missed else f"{len(missed)} bars missed: " + "; ".join(missed)))
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
