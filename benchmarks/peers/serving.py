"""How a learner is measured in a process of its own: requests come as lines of JSON, answers go back as lines of JSON.

Peers bring other versions of what we use, and one of them changes torch when it is imported; so each lives in its own process,
started by the environment that has it, and is given the very same batches.
"""

import ctypes
import json
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file

ANSWERS, sys.stdout = sys.stdout, sys.stderr  # what libraries print, some of them when imported, must not mix with the answers
sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from difflex.testing import PlantedDictionary  # noqa: E402 (found by the line above)
from difflex.records import ActivationBatch  # noqa: E402
from difflex.store import Store  # noqa: E402


class Learner(Protocol):
    """What is measured."""

    def parameters(self) -> int:
        """Bytes of all weights."""
        ...

    def update(self, x: torch.Tensor) -> None:
        """Learn from a batch."""
        ...

    def encode(self, x: torch.Tensor) -> object:
        """The codes of a batch, in the form that the library has for them."""
        ...

    def decode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The reconstruction of a batch, and the features that fired in it."""
        ...

    def decoder(self) -> torch.Tensor:
        """The rows of the decoder, in the space that it was trained in."""
        ...


Make = Callable[..., Learner]
UNSEEN = 16 * 8192


def status(name: str) -> int:
    """A figure of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


class Stored:
    """Activations of a study, as a world to learn: of one site, or of several of the same harvest, side by side."""

    def __init__(self, *folders: str) -> None:
        self._stores = [Store.open(folder) for folder in folders]

    def batches(self, size: int) -> Iterator[torch.Tensor]:
        """Endless batches of the training split."""
        return self._beside(*(store.batches(size, epochs=None) for store in self._stores))

    def unseen(self) -> Iterator[torch.Tensor]:
        """Tokens that were held out."""
        return islice(self._beside(*(store.batches(8192, split="held-out") for store in self._stores)), UNSEEN // 8192)

    @staticmethod
    def _beside(*streams: Iterator[ActivationBatch]) -> Iterator[torch.Tensor]:
        for batches in zip(*streams, strict=True):
            first, *others = batches
            assert all(torch.equal(first.shots, other.shots) and torch.equal(first.tokens, other.tokens) for other in others)
            yield torch.cat([rows.values.float() for rows in batches], dim=1)


class Server:
    """Answers requests about one learner."""

    def __init__(self, make: Make) -> None:
        self._make = make

    def begin(
        self, *, world: dict, width: int, size: int, k: int, batch: int, updates: int, device: str = "cpu", **more: object
    ) -> dict:
        """Make the learner. With `cycle`, few batches are made beforehand and used in turn, so that only learning is timed."""
        self._device = torch.device(device)
        self._world = Stored(*world["stores"]) if "stores" in world else PlantedDictionary(width=width, **world)
        self._batch, self._k, self._shift, self._scale = batch, k, 0.0, 1.0
        if more.pop("standardise", False):
            first = torch.cat([x for _, x in zip(range(10), self._fresh(), strict=False)])
            self._shift, self._scale = first.mean(0), first.std(0)
        cycle = more.pop("cycle", 0)
        made = [x for _, x in zip(range(int(str(cycle))), self._fresh(), strict=False)]
        self._stream = self._around(made) if made else self._fresh()
        ctypes.CDLL(None).malloc_trim(0)  # what making the data has left must not be there for learning to use
        self._before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forget the largest memory so far
        self._learner = self._make(width=width, size=size, k=k, updates=updates, first=next(self._fresh()), **more)
        return {"parameters": self._learner.parameters()}

    def update(self, count: int) -> dict:
        """Seconds of processor time of each of `count` updates."""
        return {"seconds": [self._timed(self._learner.update, next(self._stream)) for _ in range(count)]}

    def encode(self, count: int) -> dict:
        """Seconds of processor time of encoding each of `count` batches."""
        with torch.no_grad():
            return {"seconds": [self._timed(self._learner.encode, next(self._stream)) for _ in range(count)]}

    def dense(self, count: int) -> dict:
        """Seconds of the dense product alone that every encoder makes."""
        rows = self._learner.decoder().detach()
        return {"seconds": [self._timed(lambda x: torch.mm(x, rows.T), next(self._stream)) for _ in range(count)]}

    def peak(self) -> dict:
        """The largest memory that learning took, over the bytes of the weights."""
        return {"over": (status("VmHWM") - self._before) / self._learner.parameters()}

    def quality(self) -> dict:
        """How well planted directions were found; FVU on unseen data; share of features silent over `UNSEEN` unseen tokens."""
        with torch.no_grad():
            found = (
                self._world.recovery(self._learner.decoder() * self._scale)
                if isinstance(self._world, PlantedDictionary)
                else None
            )
            lost = total = 0.0
            fired = torch.zeros(len(self._learner.decoder()), dtype=torch.bool)
            for x in self._unseen():
                y, features = self._learner.decode((x - self._shift) / self._scale)
                lost += float((x - y * self._scale - self._shift).square().sum())
                total += float((x - x.mean(0)).square().sum())
                fired[features] = True
        recovery = {} if found is None else {"mean": found.mean, "rarest": found.rarest}
        return {**recovery, "fvu": lost / total, "silent": 1 - float(fired.float().mean())}

    def codes(self, tokens: str, path: str) -> dict:
        """Write the largest codes of each of the tokens of a file: `values` and `indices`."""
        parts = []
        with torch.no_grad():
            for x in load_file(tokens)["x"].split(8192):
                codes = self._learner.encode((x - self._shift) / self._scale)
                if not isinstance(
                    codes, torch.Tensor
                ):  # the largest ones and their features already, or what they come from first
                    codes = (codes.top_acts, codes.top_indices) if hasattr(codes, "top_acts") else codes[-1]
                parts.append(tuple(codes.topk(4 * self._k) if isinstance(codes, torch.Tensor) else codes))
        values, indices = (torch.cat(part).contiguous() for part in zip(*parts, strict=True))
        save_file({"values": values.float(), "indices": indices.long()}, path)
        return {}

    def save(self, path: str) -> dict:
        """Write the decoder to a file."""
        save_file({"decoder": self._learner.decoder().detach().contiguous()}, path)
        return {}

    def precision(self, to: str) -> dict:
        """Set how exactly float32 matrices are multiplied from now on."""
        torch.set_float32_matmul_precision(to)
        return {}

    def _fresh(self) -> Iterator[torch.Tensor]:
        world = self._world
        batches = world.batches(self._batch) if isinstance(world, Stored) else (x.values for x in world.batches(self._batch))
        return ((x.to(self._device, torch.float32) - self._shift) / self._scale for x in batches)

    def _unseen(self) -> Iterator[torch.Tensor]:
        if isinstance(self._world, PlantedDictionary):
            yield next(self._world.batches(8192, 10**7)).values
        else:
            yield from self._world.unseen()

    @staticmethod
    def _around(made: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        while True:
            yield from made

    def _timed(self, act: Callable[[torch.Tensor], object], x: torch.Tensor) -> float:
        """On a card the time until all is done, on a CPU what the process itself took."""
        if self._device.type != "cuda":
            began = time.process_time()
            act(x)
            return time.process_time() - began
        torch.cuda.synchronize()
        began = time.perf_counter()
        act(x)
        torch.cuda.synchronize()
        return time.perf_counter() - began


def serve(make: Make) -> None:
    """Answer until the requests end."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    server = Server(make)
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(server, request.pop("do"))(**request)
        print(json.dumps(answer), file=ANSWERS, flush=True)
