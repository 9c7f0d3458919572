"""Files that are complete or absent: written under a temporary name, flushed to the disk, renamed, checked by checksum."""

import errno
import hashlib
import json
import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from difflex._version import __version__
from difflex.errors import BadInput, BrokenFile, OutOfSpace

try:
    import fcntl
except ImportError:  # Windows: two processes that write in one folder are not detected
    fcntl = None

__all__ = [
    "AtomicFile",
    "Json",
    "file_sha256",
    "folder_lock",
    "parsing",
    "read_json",
    "replacing",
    "sweep",
    "write_file",
    "write_json",
]

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CHUNK = 2**22
AHEAD = 2
"""Contents that the writer of a file may be ahead of the disk."""
FLUSH = 2**25
"""Bytes after which a flush is started, so that little is left to flush at the end."""


@contextmanager
def replacing(path: Path, owner: int | None = None) -> Iterator[Path]:
    """Yield a temporary path to write to; at the end of the block it replaces `path`, after an error it is deleted.

    A reader, or a process that follows a kill, sees the old file or the new one, never a part. `owner` is the rank of a process
    that shares a folder with others; by default the process id.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path, owner)
    try:
        with _full_disk_explained(path):
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            _rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_file(path: Path, content: bytes, owner: int | None = None) -> str:
    """Write `content` to `path` atomically and return its SHA-256."""
    with replacing(path, owner) as temporary:
        temporary.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def write_json(path: Path, format: int, entries: Mapping[str, object], indent: int | None = 1) -> Path:
    """Write `entries` to `path` atomically, with the format and the version of the package; return `path`."""
    text = json.dumps({"format": format, "difflex": __version__, **entries}, indent=indent, allow_nan=False)
    write_file(path, (text + "\n").encode())
    return path


def read_json(path: Path, format: int, advice: str, *, header: bool = False) -> dict[str, Any]:
    """Return the entries of the JSON file at `path`, which must be of `format`; `advice` says what to do about a damaged one.

    With `header`, the format and the version that wrote the file are among the entries.
    """
    try:
        entries = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise BrokenFile(f"{path} is missing. {advice}") from error
    except (ValueError, RecursionError) as error:
        raise BrokenFile(f"{path} is not JSON ({error}): it is damaged. {advice}") from error
    actual = entries.get("format") if isinstance(entries, dict) else None
    if actual != format:
        raise BrokenFile(
            f"{path} is of format {actual!r}; this version of difflex reads format {format}. "
            "Use the version that wrote it, or make it again."
        )
    return entries if header else {name: value for name, value in entries.items() if name not in ("format", "difflex")}


@contextmanager
def parsing(path: Path, content: str, advice: str) -> Iterator[None]:
    """Turn the errors of reading `content` out of the entries of a file into one that names the file and says what to do."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise BrokenFile(f"{path} cannot be read as {content} ({error!r}): it is damaged. {advice}") from error


class AtomicFile:
    """A large file that is written piece by piece; it appears under its name at `commit`, and then survives a loss of power."""

    def __init__(self, path: Path, owner: int) -> None:
        self.path = path
        self._temporary = _temporary(path, owner)
        self._checksum = hashlib.sha256()
        # Hashing, copying and flushing each have a thread, so that none waits for the others.
        self._hasher, self._copier, self._flusher = (ThreadPoolExecutor(1, thread_name_prefix="writer") for _ in range(3))
        self._pending: deque[Future[None]] = deque()
        self._flushes: list[Future[None]] = []
        self._unflushed = 0
        with _full_disk_explained(path):
            self._file: BinaryIO = self._temporary.open("wb", buffering=0)

    def write(self, content: bytes | memoryview) -> None:
        """Append `content`, which must not change until it is written; wait while too much is pending."""
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

    def commit(self) -> str:
        """Give the file its name and return its SHA-256."""
        with self._or_discarded():
            self._wait()
            for flush in self._flushes:
                flush.result()  # what an early flush could not do, a later one does not report again
            self._end_workers()
            os.fsync(self._file.fileno())
            self._file.close()
            _rename(self._temporary, self.path)
        return self._checksum.hexdigest()

    def discard(self) -> None:
        """Delete what was written."""
        self._end_workers()
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _end_workers(self) -> None:
        for worker in (self._hasher, self._copier, self._flusher):
            worker.shutdown(cancel_futures=True)

    @contextmanager
    def _or_discarded(self) -> Iterator[None]:
        try:
            with _full_disk_explained(self.path):
                yield
        except BaseException:
            self.discard()
            raise


def sweep(folder: Path, rank: int, ranks: int) -> None:
    """Delete the temporary files that killed processes left in `folder`, as far as `rank` of `ranks` processes owns them."""
    for path in folder.glob(".*.tmp"):
        owner = path.name.split(".")[-2]
        if owner.isdecimal() and int(owner) % ranks == rank:
            path.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of the file at `path`."""
    checksum, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            checksum.update(buffer[:count])
    return checksum.hexdigest()


@contextmanager
def folder_lock(folder: Path, shared: bool = False) -> Iterator[None]:
    """Keep other processes from writing in `folder`, except for other ranks if `shared`; a killed process releases its lock."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadInput(f"Another process is writing in {folder}. Wait for it to end, or name another folder.") from error
        yield
    finally:
        os.close(handle)


def _temporary(path: Path, owner: int | None) -> Path:
    # The name says whose file it is: ranks write side by side, and what a killed one left is deleted by its successor.
    return path.with_name(f".{path.name}.{os.getpid() if owner is None else owner}.tmp")


def _rename(temporary: Path, path: Path) -> None:
    os.replace(temporary, path)
    if os.name == "nt":  # Windows cannot open a folder, and need not flush it to make a rename last
        return
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _full_disk_explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OutOfSpace(
            f"{path} cannot be written: {os.strerror(error.errno)}. What is finished is kept; free some space and run the same "
            "command again to continue."
        ) from error
