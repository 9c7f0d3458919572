"""The miniature in training: its optimiser, and updates that a CUDA graph can hold."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from difflex.miniature.architecture import FlowModel
from difflex.miniature.flow import (
    SIZES,
    CaptionIds,
    FlowBatch,
    FlowRecipe,
    FlowSize,
    GuidanceTeacher,
    OneStepTeacher,
    Teacher,
    flow_loss,
)

AVERAGED_EVERY = 4
"""Updates between two changes of the running average."""


@final
class FlowOptimiser:
    """Muon for the matrices and kernels inside the denoiser's blocks, AdamW for all else; gradients are clipped to norm 1.

    It computes what `torch.optim.Muon` (with `match_rms_adamw`) and `torch.optim.AdamW` compute. Equal matrices are updated as
    one stack, and all that changes between updates is a tensor, so that a CUDA graph can hold an update.
    """

    MOMENTUM, BETAS, EPSILON, DECAY = 0.95, (0.9, 0.98), 1e-8, 0.01

    def __init__(self, model: FlowModel, size: FlowSize) -> None:
        named = [(name, x) for name, x in model.named_parameters() if x.requires_grad]
        is_matrix = [model.is_matrix(name, x) for name, x in named]
        self._parameters: list[Tensor] = [x for _, x in named]
        for x in self._parameters:
            x.grad = torch.zeros_like(x)  # not all losses reach all of them
        self._rest: list[Tensor] = [x for x, matrix in zip(self._parameters, is_matrix, strict=True) if not matrix]
        stacks: dict[torch.Size, list[Tensor]] = {}
        for x, matrix in zip(self._parameters, is_matrix, strict=True):
            if matrix:
                stacks.setdefault(x.shape, []).append(x)
        self._stacks = list(stacks.values())
        self._momenta = [torch.stack([torch.zeros_like(x) for x in stack]) for stack in self._stacks]
        self._first, self._second = ([torch.zeros_like(x) for x in self._rest] for _ in range(2))
        self._size, self._factor = size, torch.zeros((), device=self._rest[0].device)
        self._corrections = torch.ones(2, device=self._factor.device)
        self.updates = 0

    @property
    def state(self) -> list[Tensor]:
        """The moments, in a fixed order."""
        return [*self._momenta, *self._first, *self._second]

    def begin_update(self, factor: float) -> None:
        """Count an update, and set its factor of the learning rates."""
        self.updates += 1
        self._factor.fill_(factor)
        self._corrections[0].fill_(1 / (1 - self.BETAS[0] ** self.updates))
        self._corrections[1].fill_(1 / math.sqrt(1 - self.BETAS[1] ** self.updates))

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters by their gradients, and set these to zero."""
        gradients = [x.grad for x in self._parameters if x.grad is not None]
        norm = torch.stack(torch._foreach_norm(gradients)).norm()
        torch._foreach_mul_(gradients, (1 / (norm + 1e-6)).clamp(max=1.0))
        for stack, momentum in zip(self._stacks, self._momenta, strict=True):
            self._muon(stack, momentum, self._factor * self._size.muon_rate)
        self._adam(self._factor * self._size.adam_rate)
        torch._foreach_zero_(gradients)

    def _muon(self, stack: list[Tensor], momentum: Tensor, rate: Tensor) -> None:
        gradient = torch.stack([x.grad for x in stack if x.grad is not None])
        momentum.lerp_(gradient, 1 - self.MOMENTUM)
        # The kernel of a convolution is a matrix of its outputs by all of their inputs.
        change = orthogonalise(gradient.lerp(momentum, self.MOMENTUM).flatten(2))
        change = change.mul_(0.2 * math.sqrt(max(change.shape[1:]))).view_as(gradient)
        weights = torch.stack(stack).mul_(1 - rate * self.DECAY).sub_(change * rate)
        torch._foreach_copy_(stack, list(weights.unbind(0)))

    def _adam(self, rate: Tensor) -> None:
        gradients = [x.grad for x in self._rest if x.grad is not None]
        torch._foreach_lerp_(self._first, gradients, 1 - self.BETAS[0])
        torch._foreach_mul_(self._second, self.BETAS[1])
        torch._foreach_addcmul_(self._second, gradients, gradients, 1 - self.BETAS[1])
        scale = torch._foreach_sqrt(self._second)
        torch._foreach_mul_(scale, self._corrections[1])
        torch._foreach_add_(scale, self.EPSILON)
        change = torch._foreach_div(self._first, scale)
        torch._foreach_mul_(change, rate * self._corrections[0])
        torch._foreach_mul_(self._rest, 1 - rate * self.DECAY)
        torch._foreach_sub_(self._rest, change)


def orthogonalise(x: Float[Tensor, "matrix row column"]) -> Float[Tensor, "matrix row column"]:
    """Move the singular values of each matrix to about 1: five Newton-Schulz steps, as in `torch.optim.Muon`."""
    tall = x.shape[-2] > x.shape[-1]
    y = (x.mT if tall else x).to(torch.bfloat16 if x.is_cuda else torch.float32)
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        square = y @ y.mT
        y = 3.4445 * y + (-4.775 * square + 2.0315 * (square @ square)) @ y
    return (y.mT if tall else y).float()


@final
class FlowLearner:
    """A model of one size in training."""

    def __init__(self, name: str, recipe: FlowRecipe, batch: FlowBatch) -> None:
        self.name, self._recipe, self._batch = name, recipe, batch
        self._device = batch.latents.device
        self.model = self._build()
        self._parameters: list[Tensor] = list(self.model.parameters())
        self.optimiser = FlowOptimiser(self.model, SIZES[name])
        self.average = [x.detach().clone() for x in self._parameters]
        self.base: list[Tensor] = []
        """The average from the beginning of guidance; empty before."""
        self.guided: list[Tensor] = []
        """The average from the beginning of learning to draw in one step; empty before."""
        self.loss = torch.zeros((), device=self._device)
        """Of the last update."""
        self._teacher: Teacher | None = None
        self._update: Callable[[], None] | None = None

    def _build(self) -> FlowModel:
        config = SIZES[self.name].config
        model = config.model(config.pipeline(self._recipe.seed)).to(self._device)
        for part in model.children():
            if isinstance(part, PreTrainedModel):
                part.tie_weights()  # a device with another kind of tensors parts them
        return model.train()

    def begin_guidance(self, empty: CaptionIds) -> None:
        """Fold guidance in from now on. A training that is restored goes on with its base."""
        if not self.base:
            self.base = [x.clone() for x in self.average]
            self._write(self.model, self.base)
        self._teacher, self._update = GuidanceTeacher(self._build_with(self.base), empty), None

    def begin_one_step(self) -> None:
        """Learn to draw in one step from now on. A training that is restored goes on with its teacher."""
        if not self.guided:
            self.guided = [x.clone() for x in self.average]
            self._write(self.model, self.guided)
        self._teacher, self._update = OneStepTeacher(self._build_with(self.guided)), None

    @property
    def is_guided(self) -> bool:
        """Whether guidance is folded in, or has been."""
        return self._teacher is not None

    @property
    def is_one_step(self) -> bool:
        """Whether it learns to draw in one step."""
        return isinstance(self._teacher, OneStepTeacher)

    def _build_with(self, weights: list[Tensor]) -> FlowModel:
        model = self._build()
        self._write(model, weights)
        return model

    @staticmethod
    @torch.no_grad()
    def _write(model: FlowModel, weights: list[Tensor]) -> None:
        for parameter, x in zip(model.parameters(), weights, strict=True):
            parameter.copy_(x)

    def prepare(self) -> str | None:
        """Choose how updates are computed, if that is open: the fastest way that works; return its name."""
        if self._update:
            return None
        self._update, chosen = self._eager_update, "eager"
        for way in ("compiled", "captured") if self._device.type == "cuda" else ():
            try:
                update = self._captured(compiled=way == "compiled")
            except Exception as error:
                torch.cuda.synchronize()
                tqdm.write(f"{self.name}: an update cannot be {way}: {error}")
            else:
                self._update, chosen = update, way
                break
        return chosen

    def _captured(self, compiled: bool) -> Callable[[], None]:
        """Return the update as a CUDA graph, after comparing its loss."""
        with self._unchanged():
            self._eager_update()
            expected = self.loss.item()
            for block in self.model.blocks:
                if not compiled:
                    block._compiled_call_impl = None
                elif block._compiled_call_impl is None:
                    block.compile(dynamic=False)
            update = capture(self._eager_update)
            update()
            if not abs(self.loss.item() - expected) < 0.05 * expected + 0.02:
                raise RuntimeError(f"its loss is {self.loss.item():.4f} instead of {expected:.4f}")
        return update

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Within the block, updates change nothing that is trained: their rates are zero, and the moments are restored."""
        updates, state = self.optimiser.updates, [x.clone() for x in self.optimiser.state]
        self.optimiser.begin_update(0.0)
        try:
            yield
        finally:
            self.optimiser.updates = updates
            torch._foreach_copy_(self.optimiser.state, state)
            self.model.zero_grad(set_to_none=False)

    def _eager_update(self) -> None:
        loss = flow_loss(self.model, self._batch, self._recipe, self._teacher)
        loss.backward()
        self.optimiser.step()
        self.loss.copy_(loss.detach())

    def update(self, factor: float) -> None:
        """Train on the batch, with this factor of the learning rates."""
        assert self._update
        self.optimiser.begin_update(factor)
        self._update()
        if self.optimiser.updates % AVERAGED_EVERY == 0:
            count = self.optimiser.updates
            keep = self._recipe.averaging[self.is_guided] ** AVERAGED_EVERY
            keep = min(keep, (count + 1) / (count + 10 * AVERAGED_EVERY))
            with torch.no_grad():
                torch._foreach_lerp_(self.average, self._parameters, 1 - keep)

    def state(self) -> dict[str, Tensor]:
        """Return all that a training goes on from."""
        groups = {"model": self._parameters, "average": self.average, "base": self.base, "guided": self.guided}
        groups["optimiser"] = self.optimiser.state
        return {f"{self.name}.{group}.{i}": x for group, tensors in groups.items() for i, x in enumerate(tensors)}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], updates: int) -> None:
        """Go on from a state after this number of updates."""
        if f"{self.name}.base.0" in tensors:
            self.base = [torch.empty_like(x) for x in self.average]
        if f"{self.name}.guided.0" in tensors:
            self.guided = [torch.empty_like(x) for x in self.average]
        self.optimiser.updates = updates
        for name, x in self.state().items():
            x.copy_(tensors[name])


def capture(update: Callable[[], None]) -> Callable[[], None]:
    """Return the replay of `update` as a CUDA graph; it is run three times before, on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            update()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update()
    return graph.replay
