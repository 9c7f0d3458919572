"""Files that are whole or not there: written to a temporary name, flushed to the disk, renamed, their checksum known."""

import errno
import hashlib
import json
import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from difflex.errors import BadInput, BrokenFile, OutOfSpace

try:
    import fcntl
except ImportError:  # Windows: two harvests into one folder are not noticed there
    fcntl = None

__all__ = ["AtomicFile", "digest", "locked", "read_json", "sweep", "write_whole"]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CHUNK = 2**22
AHEAD = 2
"""Contents that the writer of a file may be ahead of the disk."""
FLUSH = 2**25
"""Bytes after which the disk is put to work, so that little is left for it to do at the end."""


class AtomicFile:
    """A file in the making: nobody sees it under its name until `keep`, after which it survives a loss of power."""

    def __init__(self, path: Path, rank: int) -> None:
        self.path = path
        # The name says whose it is: ranks write side by side, and what a killed one left is found by its successor.
        self._temporary = path.with_name(f".{path.name}.{rank}.tmp")
        self._checksum = hashlib.sha256()
        # Hashing and copying take a core each, and the disk its time: each goes on at its own pace.
        self._hasher, self._copier, self._flusher = (ThreadPoolExecutor(1, thread_name_prefix="writer") for _ in range(3))
        self._pending: deque[Future[None]] = deque()
        self._flushes: list[Future[None]] = []
        self._unflushed = 0
        with _full_disk_told(path):
            self._file: BinaryIO = self._temporary.open("wb", buffering=0)

    def write(self, content: bytes | memoryview) -> None:
        """Nothing; `content` will be appended, and must not change meanwhile. Waits while too much is left to do."""
        content = memoryview(content).cast("B")
        with self._or_discarded():
            self._pending.append(self._hasher.submit(self._checksum.update, content))
            self._pending.append(self._copier.submit(self._append, content))
            self._unflushed += len(content)
            if self._unflushed >= FLUSH:
                self._flushes.append(self._flusher.submit(os.fsync, self._file.fileno()))
                self._unflushed = 0
            self._wait(2 * AHEAD)

    def _append(self, content: memoryview) -> None:
        while content:
            content = content[self._file.write(content) :]

    def _wait(self, allowed: int = 0) -> None:
        while len(self._pending) > allowed:
            self._pending.popleft().result()

    def keep(self) -> str:
        """The SHA-256 of the file, which now has its name."""
        with self._or_discarded():
            self._wait()
            for flush in self._flushes:
                flush.result()  # what an early flush could not do, a later one does not report again
            self._end_workers()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self.path)
            _flush_folder(self.path.parent)
        return self._checksum.hexdigest()

    def discard(self) -> None:
        """Nothing; what was written is gone."""
        self._end_workers()
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _end_workers(self) -> None:
        for worker in (self._hasher, self._copier, self._flusher):
            worker.shutdown(cancel_futures=True)

    @contextmanager
    def _or_discarded(self) -> Iterator[None]:
        try:
            with _full_disk_told(self.path):
                yield
        except BaseException:
            self.discard()
            raise


def write_whole(path: Path, content: bytes, rank: int = 0) -> str:
    """The SHA-256 of the file at `path`, which now holds `content`."""
    whole = AtomicFile(path, rank)
    whole.write(content)
    return whole.keep()


def sweep(folder: Path, rank: int, of: int) -> None:
    """Nothing; what killed processes left half written in `folder` is gone, if `rank` of `of` has to answer for it."""
    for path in folder.glob(".*.tmp"):
        owner = path.name.split(".")[-2]
        if owner.isdecimal() and int(owner) % of == rank:
            path.unlink(missing_ok=True)


def digest(path: Path) -> str:
    """The SHA-256 of the file at `path`."""
    checksum, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            checksum.update(buffer[:count])
    return checksum.hexdigest()


def read_json(path: Path, form: int, advice: str) -> dict[str, object]:
    """What the JSON file at `path` says, checked to be of format `form`."""
    try:
        said = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise BrokenFile(f"{path} is missing. {advice}") from error
    except ValueError as error:
        raise BrokenFile(f"{path} is not JSON ({error}): it is damaged. {advice}") from error
    found = said.get("format") if isinstance(said, Mapping) else None
    if found != form:
        raise BrokenFile(f"{path} is of format {found!r}; this difflex reads format {form}. Use the difflex that wrote it.")
    return dict(said)


@contextmanager
def locked(folder: Path, shared: bool) -> Iterator[None]:
    """A block within which no other process writes in `folder`, but for other ranks if `shared`; a kill opens the lock."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise BadInput(f"Another process is writing in {folder}. Wait for it to end, or name another folder.") from error
    finally:
        os.close(handle)


@contextmanager
def _full_disk_told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OutOfSpace(
            f"{path} cannot be written: {os.strerror(error.errno)}. What is finished is kept; free some space and give the same "
            "command again to go on."
        ) from error


def _flush_folder(folder: Path) -> None:
    """Make a rename last; Windows cannot open a folder and does not need it."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
