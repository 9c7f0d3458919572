"""`BookPool`: opened books, kept from one request to the next for as long as their files stay the same."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, final

from difflex.features import Book

IDLE = 0 if os.name == "nt" else 32
"""Most books that are kept open. Windows replaces no file that is open, and commands must be able to make a book again."""


class _FileState(NamedTuple):
    """Which file has a name, when it was last written, and how long it is."""

    device: int
    inode: int
    time: int
    size: int


_IdleBook = tuple[Path, _FileState | None, Book]


@final
class BookPool:
    """Opens books, and uses those again whose file was neither replaced nor written since."""

    def __init__(self) -> None:
        self._idle: list[_IdleBook] = []
        self._lock = threading.Lock()

    @contextmanager
    def open(self, path: Path) -> Iterator[Book]:
        """Open the book at `path` for the block, which alone uses it."""
        state = _state(path)  # from before it is opened: what is written meanwhile is noticed the next time
        book = self._take(path, state) or Book.open(path)
        try:
            yield book
        except BaseException:
            book.close()
            raise
        with self._lock:
            self._idle.append((path, state, book))
            surplus = [self._idle.pop(0) for _ in range(len(self._idle) - IDLE)]
        _close(surplus)

    def _take(self, path: Path, state: _FileState | None) -> Book | None:
        """Return an idle book of this file; close those of what the file was before."""
        with self._lock:
            former = [entry for entry in self._idle if entry[0] == path and entry[1] != state]
            self._idle = [entry for entry in self._idle if entry not in former]
            numbers = [number for number, entry in enumerate(self._idle) if entry[0] == path]
            book = self._idle.pop(numbers[-1])[2] if numbers else None
        _close(former)
        return book


def _close(entries: Iterable[_IdleBook]) -> None:
    for _, _, book in entries:
        book.close()


def _state(path: Path) -> _FileState | None:
    try:
        state = path.stat()
    except OSError:
        return None
    return _FileState(state.st_dev, state.st_ino, state.st_mtime_ns, state.st_size)
