"""Activations that are handed to another thread: it waits for them, and the thread of the model does not."""

import pytest
import torch
from torch import Tensor

from difflex.store import handover
from difflex.store.handover import HandedOver, to_host


class FakeEvent:
    """An event that records what it is asked."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def record(self) -> None:
        self.calls.append("record")

    def wait(self) -> None:
        self.calls.append("wait")


class FakeStream:
    """A stream that is also the block of `torch.cuda.stream`."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def __enter__(self) -> None:
        self.calls.append("enter")

    def __exit__(self, *_: object) -> None:
        self.calls.append("leave")

    def synchronize(self) -> None:
        self.calls.append("synchronise")


def test_on_a_cpu_values_are_handed_over_as_they_are():
    values = torch.randn(2, 3, 4)
    with HandedOver(values).used() as used:
        assert used is values and to_host(used) is values


def test_on_a_gpu_the_other_thread_waits_in_its_own_stream_and_ends_when_its_work_is_done(monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []
    stream = FakeStream(calls)
    monkeypatch.setattr(torch.cuda, "Event", lambda: FakeEvent(calls))
    monkeypatch.setattr(torch.cuda, "device", lambda _: FakeStream([]))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(handover, "_second_stream", lambda _: stream)

    class OnGPU(Tensor):
        is_cuda = True  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    handed = HandedOver(torch.zeros(1, 2, 3).as_subclass(OnGPU))
    with handed.used():
        calls.append("use")
    assert calls == ["record", "enter", "wait", "use", "synchronise", "leave"]


@pytest.mark.gpu
def test_copies_from_a_gpu_are_complete_after_the_block():
    values = torch.randn(8, 256, 512, device="cuda")
    handed = HandedOver(values)
    with handed.used() as used:
        copy = to_host(used)
    assert copy.is_pinned() and torch.equal(copy, values.cpu())
