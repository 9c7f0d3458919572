"""Updates of TopK SAEs, interleaved with twenty lines of plain autograd; the loss curve; six dictionaries of one stream."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from difflex.dictionaries import SAEWeights
from difflex.training import TrainingConfig, default
from difflex.training.data import TrainingRanks
from difflex.training.gpu import UpdateEngine
from difflex.training.learner import Learner
from gpu_parts import Bar, PartResult, wait

ROUNDS, UPDATES, MEMBERS = 15, 200, 6
MEMORY, CURVE = 3.5, 0.5


class Shape(NamedTuple):
    """The sizes of a training, and the bar of its update."""

    width: int
    size: int
    k: int
    batch: int
    milliseconds: float

    @property
    def label(self) -> str:
        return f"width {self.width}, size {self.size:,}, k {self.k}, batch {self.batch:,}"

    def config(self) -> TrainingConfig:
        """Return our preset."""
        return default(width=self.width, size=self.size, k=self.k, updates=1000)

    def learner(self, device: torch.device, engine: UpdateEngine | None = None) -> Learner:
        """Return a new SAE in training."""
        rows = F.normalize(torch.randn(self.size, self.width, generator=torch.Generator(device).manual_seed(0), device=device))
        zeros = torch.zeros(self.size, device=device)
        weights = SAEWeights(encoder=rows.clone(), decoder=rows, bias=torch.zeros_like(rows[0]), encoder_bias=zeros)
        return Learner(self.config(), weights, TrainingRanks(), engine or UpdateEngine.of(device))

    def batches(self, device: torch.device, count: int) -> Iterator[Tensor]:
        """Yield sparse mixtures of planted directions, of which some are much more frequent than others."""
        generator = torch.Generator(device).manual_seed(1)
        planted = F.normalize(torch.randn(2 * self.width, self.width, generator=generator, device=device))
        often = self.k / 2 / torch.arange(1, 2 * self.width + 1, device=device)
        often = (often * self.k / often.sum()).clamp_max(0.9)
        for _ in range(count):
            fires = torch.rand(self.batch, 2 * self.width, generator=generator, device=device) < often
            amounts = fires * (1 + torch.rand(fires.shape, generator=generator, device=device))
            noise = 0.1 * torch.randn(self.batch, self.width, generator=generator, device=device)
            yield F.layer_norm(amounts @ planted + noise, (self.width,))


LARGE = Shape(3072, 65_536, 64, 4096, 11)
MIDDLE = Shape(3072, 16_384, 64, 4096, 3.5)
SMALL = Shape(768, 8192, 32, 4096, 0.9)
TINY = Shape(32, 256, 4, 64, 0)


def plain(shape: Shape, device: torch.device) -> Callable[[Tensor], None]:
    """Return the update that anybody would write: bf16 autocast, dense codes, fused Adam, and nothing else."""
    encoder = torch.nn.Parameter(torch.randn(shape.size, shape.width, device=device) / shape.width**0.5)
    decoder = torch.nn.Parameter(encoder.detach().clone())
    adam = torch.optim.Adam([encoder, decoder], lr=1e-4, fused=True)

    def update(x: Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            values, features = (x @ encoder.T).topk(shape.k, sorted=False)
            codes = torch.zeros(len(x), shape.size, device=device, dtype=values.dtype).scatter_(1, features, values.relu())
            y = codes @ decoder
        (y.float() - x).square().mean().backward()
        adam.step()
        adam.zero_grad(set_to_none=True)

    return update


def milliseconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the time of `work`, synchronised."""
    wait(device)
    began = time.perf_counter()
    work()
    wait(device)
    return 1000 * (time.perf_counter() - began)


def update(device: torch.device, shape: Shape) -> PartResult:
    """Return the times of our update and of the plain one, and our peak memory."""
    shape = shape if device.type == "cuda" else TINY
    result = PartResult(f"TopK update, {shape.label}:", ("", "ms", "tokens/s", "peak memory over the parameters"))
    learner, batches = shape.learner(device), list(shape.batches(device, 3))
    parameters = sum(tensor.nbytes for tensor in learner.parameters.weights.tensors().values())
    for number in range(6):  # the first compile the kernels, the fourth captures the graph
        learner.update(batches[number % 3], 1e-4, measure=False)
    peak = torch.cuda.max_memory_allocated(device) / parameters if device.type == "cuda" else 0.0
    other, ours, theirs = plain(shape, device), [], []
    for x in batches:
        other(x)
    for number in range(ROUNDS if device.type == "cuda" else 3):
        x = batches[number % 3]
        ours.append(milliseconds(lambda x=x: learner.update(x, 1e-4, measure=False), device))
        theirs.append(milliseconds(lambda x=x: other(x), device))
    for name, times, memory in (("difflex", ours, f"{peak:.2f}x"), ("plain autograd", theirs, "")):
        took = statistics.median(times)
        result.add(name, f"{took:.2f}", f"{1000 * shape.batch / took:,.0f}", memory)
    if device.type == "cuda":
        result.bars = [Bar(f"ms of an update, {shape.label}", statistics.median(ours), shape.milliseconds)]
        result.bars += [Bar(f"peak memory over parameters, {shape.label}", peak, MEMORY)] if shape.width == LARGE.width else []
    return result


def curve(device: torch.device) -> PartResult:
    """Return how far the loss is from that of the same update in dense float32 products."""
    shape, updates = (SMALL, UPDATES) if device.type == "cuda" else (TINY, 20)
    result = PartResult(
        f"Loss over {updates} updates against dense float32 products, {shape.label}:", ("update", "loss", "off by")
    )
    ours, reference = shape.learner(device), shape.learner(device, UpdateEngine(kernels=False, copies=torch.float32))
    worst = 0.0
    for number, x in enumerate(shape.batches(device, updates), 1):
        losses = []
        for learner in (ours, reference):
            learner.update(x, 5e-4, measure=True)
            assert learner.metrics is not None
            losses.append(learner.metrics.loss)
        off = 100 * abs(losses[0] / losses[1] - 1)
        worst = max(worst, off)
        if number in (1, 10, 50, updates):
            result.add(number, f"{losses[0]:.4f}", f"{off:.3f} %")
    result.add("worst", "", f"{worst:.3f} %")
    if device.type == "cuda":
        result.bars = [Bar("% that the loss is off", worst, CURVE)]
    return result


def six(device: torch.device) -> PartResult:
    """Return the time of a batch for one dictionary and for six, from the host's memory to the updates."""
    shape = MIDDLE if device.type == "cuda" else TINY
    result = PartResult(f"Dictionaries of one stream, each with {shape.label}:", ("dictionaries", "ms a batch", "over one"))
    stream = [x.cpu() for x in shape.batches(device, 3)]
    stream = [x.pin_memory() for x in stream] if device.type == "cuda" else stream
    learners = [shape.learner(device) for _ in range(MEMBERS)]
    times: dict[int, list[float]] = {1: [], MEMBERS: []}

    def work(count: int, x: Tensor) -> None:
        z = F.layer_norm(x.to(device, non_blocking=True), (shape.width,))
        for learner in learners[:count]:
            learner.update(z, 1e-4, measure=False)

    for number in range(6 + (ROUNDS if device.type == "cuda" else 3)):
        for count, measured in times.items():
            took = milliseconds(lambda count=count, x=stream[number % 3]: work(count, x), device)
            measured += [took] if number >= 6 else []
    one, all_six = (statistics.median(measured) for measured in times.values())
    result.add(1, f"{one:.2f}", "")
    result.add(MEMBERS, f"{all_six:.2f}", f"{all_six / one:.2f}x")
    if device.type == "cuda":
        result.bars = [Bar("time of six dictionaries over one", all_six / one, float(MEMBERS))]
    return result


PARTS = {
    "train-65536": lambda device: update(device, LARGE),
    "train-16384": lambda device: update(device, MIDDLE),
    "train-8192": lambda device: update(device, SMALL),
    "train-curve": curve,
    "train-six": six,
}
