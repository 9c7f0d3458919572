"""The windows of a live harvest: their memory, and the thread that fills them ahead of their reader."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from queue import SimpleQueue
from typing import NamedTuple, final

import torch
from jaxtyping import Int
from torch import Tensor

from difflex.records import Site

WindowMemory = dict[Site, Tensor]
"""The memory of a window: [shot, token, width] at each site."""


class LiveWindow(NamedTuple):
    """Rows that are shuffled together."""

    memory: WindowMemory
    shots: Int[Tensor, " shot"]
    """The number of each shot."""
    order: Mapping[int, Int[Tensor, " row"]]
    """The rows in the order of reading, equally many for all sites, by the number of tokens per shot."""


class HarvestStopped(Exception):
    """Ends the thread of a harvest whose reader is gone."""


@final
class WindowPool:
    """The memory of one reader's windows, which goes back and forth between those that are harvested and those that are read."""

    def __init__(self, windows: int) -> None:
        self._unused: SimpleQueue[WindowMemory | None] = SimpleQueue()
        self._stopped = False
        for _ in range(windows):
            self._unused.put({})

    def take(self) -> WindowMemory:
        """Wait for memory that is unused."""
        memory = self._unused.get()
        self.check()
        assert memory is not None, "only `stop` puts None"
        return memory

    def give_back(self, memory: WindowMemory) -> None:
        """Let the memory of a window be used again."""
        self._unused.put(memory)

    def check(self) -> None:
        """Raise `HarvestStopped` after `stop`."""
        if self._stopped:
            raise HarvestStopped

    def stop(self) -> None:
        """End the harvest into this memory soon."""
        self._stopped = True
        self._unused.put(None)


@final
class HarvestThread:
    """A thread that harvests windows ahead of their reader, as long as there is unused memory."""

    def __init__(
        self,
        windows: Iterator[LiveWindow | None],
        pool: WindowPool,
        context: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._windows, self._pool, self._context = windows, pool, context
        self._ready: SimpleQueue[LiveWindow | BaseException | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="harvest", daemon=True)
        self._thread.start()

    def windows(self) -> Iterator[LiveWindow | None]:
        """Yield the windows as they become ready; an error of the harvest is raised here."""
        while not isinstance(item := self._ready.get(), StopIteration):
            if isinstance(item, BaseException):
                raise item
            yield item

    def stop(self) -> None:
        """End the thread after the batch that it harvests."""
        self._pool.stop()
        self._thread.join()

    def _run(self) -> None:
        try:
            with self._context():
                for window in self._windows:
                    self._ready.put(window)
            self._ready.put(StopIteration())
        except BaseException as error:
            self._ready.put(error)


def copy_rows(memory: Tensor, values: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
    """Copy the shots of a batch to their places, at once if these are neighbours."""
    if [row for row, _ in pairs] == [*range(len(values))] and [place - row for row, place in pairs] == [pairs[0][1]] * len(pairs):
        memory[pairs[0][1] : pairs[0][1] + len(values)].copy_(values)
    elif pairs:
        rows, places = torch.tensor(pairs).T
        memory.index_copy_(0, places, values[rows.to(values.device)].cpu())
