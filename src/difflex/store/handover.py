"""Activations that pass from the thread of the model to a thread that writes, while the GPU computes the next ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Protocol, final

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


class Moment(Protocol):
    """A point in the work of a device, as `torch.cuda.Event`."""

    def record(self) -> None:
        """Place it behind all work so far of the current stream."""
        ...

    def wait(self) -> None:
        """Let later work of the current stream wait for it."""
        ...


@final
class HandedOver:
    """Activations for another thread.

    On a GPU what that thread does with them, and the copy to the CPU, runs in a stream of its own: the stream of the model never
    waits for it, and it waits for nothing that the model does after these activations.
    """

    def __init__(self, values: Float[Tensor, "shot token width"]) -> None:
        """Hand over `values`, which must not change any more."""
        self._values = values
        self._computed: Moment | None = torch.cuda.Event() if values.is_cuda else None
        if self._computed is not None:
            with torch.cuda.device(values.device):
                self._computed.record()

    @contextmanager
    def used(self) -> Iterator[Float[Tensor, "shot token width"]]:
        """Yield the values; at the end of the block all work on them is done, and copies by `to_host` are complete."""
        if self._computed is None:
            yield self._values
            return
        with torch.cuda.stream(stream := _second_stream(self._values.device)):
            self._computed.wait()
            yield self._values
            stream.synchronize()


@cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def to_host(tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """Return `tensor` in memory of the CPU: of a GPU, in pinned memory, complete once the current stream is synchronised."""
    if not tensor.is_cuda:
        return tensor.cpu()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
