"""Files that are complete or absent: written under a temporary name, flushed to the disk, renamed, checked by checksum.

A writer locks its temporary file. An unlocked one was left by a killed process; the next process that writes in the folder
deletes it.
"""

import errno
import filecmp
import hashlib
import json
import os
import secrets
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal

from difflex._version import __version__
from difflex.errors import BadInput, BrokenFile, DiskError, OutOfSpace

try:
    import fcntl
except ImportError:  # Windows: two processes that write in one folder are not detected
    fcntl = None

__all__ = [
    "AtomicFile",
    "Json",
    "disk_errors",
    "file_sha256",
    "folder_lock",
    "parsing",
    "read_json",
    "replacing",
    "write_file",
    "write_json",
]

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ADVICE = {
    errno.EACCES: "Ask its owner for permission, or name another place.",
    errno.EPERM: "Ask its owner for permission, or name another place.",
    errno.EROFS: "Copy the study to a disk that can be written, or name another place.",
    errno.ENOTDIR: "A part of its path is a file where a folder is needed: move that away, or name another place.",
    errno.EISDIR: "There is a folder where a file is needed: move it away, or name another place.",
    errno.EEXIST: "There is a file where a folder is needed: move it away, or name another place.",
    errno.ENAMETOOLONG: "Use a shorter name.",
}
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
OTHER_ADVICE = "Check the disk, then run the same command again."
CHUNK = 2**22
HEADER = "difflex"
"""The only entry of the metadata of our tensor files: safetensors writes several in random order."""
AHEAD = 2
"""Contents that the writer of a file may be ahead of the disk."""
FLUSH = 2**25
"""Bytes after which a flush is started, so that little is left to flush at the end."""


@contextmanager
def replacing(path: Path, *, keep: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to; at the end of the block it replaces `path`, after an error it is deleted.

    A reader, or a process that follows a kill, sees the old file or the new one, never a part. `keep`: a file that exists stays,
    so that of several processes the first one wins.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, handle = _open_temporary(path)
        try:
            yield temporary
            os.fsync(handle)
            _rename(temporary, path, keep)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)


def write_file(path: Path, content: bytes) -> str:
    """Write `content` to `path` atomically and return its SHA-256."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def write_json(path: Path, format: int, entries: Mapping[str, object], indent: int | None = 1) -> Path:
    """Write `entries` to `path` atomically, with the format, the version of the package and a checksum; return `path`."""
    content = {"format": format, "difflex": __version__, **entries}
    # What is read back is summed: in JSON a tuple is a list, and the key 1 is "1".
    content["checksum"] = _checksum(json.loads(json.dumps(content, allow_nan=False)))
    write_file(path, (json.dumps(content, indent=indent) + "\n").encode())
    return path


def read_json(path: Path, format: int, advice: str, *, header: bool = False) -> dict[str, Any]:
    """Return the entries of the JSON file at `path`, which must be of `format`; `advice` says what to do about a damaged one.

    A file without a checksum, as one that was written by hand, is read as it is. With `header`, the format and the version that
    wrote the file are among the entries.
    """
    try:
        with disk_errors(path, "read"):
            entries = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise BrokenFile(f"{path} is missing. {advice}") from error
    except (ValueError, RecursionError) as error:
        raise BrokenFile(f"{path} is not JSON ({error}): it is damaged. {advice}") from error
    actual = entries.get("format") if isinstance(entries, dict) else None
    if actual != format:
        raise BrokenFile(
            f"{path} is of format {actual!r}; this version of difflex reads format {format}. "
            "Use the version that wrote it, or make it again under another name."
        )
    if entries.pop("checksum", None) not in (None, _checksum(entries)):
        raise BrokenFile(f"{path} does not match its checksum: it is damaged, or was changed by hand. {advice}")
    return entries if header else {name: value for name, value in entries.items() if name not in ("format", "difflex")}


def _checksum(entries: Mapping[str, Any]) -> str:
    content = {name: value for name, value in entries.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@contextmanager
def parsing(path: Path, content: str, advice: str) -> Iterator[None]:
    """Turn the errors of reading `content` out of the entries of a file into one that names the file and says what to do."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise BrokenFile(f"{path} cannot be read as {content} ({error!r}): it is damaged. {advice}") from error


class AtomicFile:
    """A large file that is written piece by piece; it appears under its name at `commit`, and then survives a loss of power."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._checksum = hashlib.sha256()
        # Hashing, copying and flushing each have a thread, so that none waits for the others.
        self._hasher, self._copier, self._flusher = (ThreadPoolExecutor(1, thread_name_prefix="writer") for _ in range(3))
        self._pending: deque[Future[None]] = deque()
        self._flushes: list[Future[None]] = []
        self._unflushed = 0
        with disk_errors(path):
            self._temporary, handle = _open_temporary(path)
            self._file: BinaryIO = os.fdopen(handle, "wb", buffering=0)

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
            _rename(self._temporary, self.path)
            self._file.close()
        return self._checksum.hexdigest()

    def discard(self) -> None:
        """Delete what was written."""
        self._end_workers()
        self._temporary.unlink(missing_ok=True)
        self._file.close()

    def _end_workers(self) -> None:
        for worker in (self._hasher, self._copier, self._flusher):
            worker.shutdown(cancel_futures=True)

    @contextmanager
    def _or_discarded(self) -> Iterator[None]:
        try:
            with disk_errors(self.path):
                yield
        except BaseException:
            self.discard()
            raise


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of the file at `path`."""
    checksum, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            checksum.update(buffer[:count])
    return checksum.hexdigest()


def stored_checksum(path: Path, advice: str) -> str:
    """Return the checksum that the tensor file at `path` claims to have, without reading its tensors."""
    try:
        with disk_errors(path, "read"), path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            head = json.loads(file.read(min(length, path.stat().st_size)))
        return str(json.loads(head["__metadata__"][HEADER])["sha256"])
    except FileNotFoundError as error:
        raise BrokenFile(f"{path} is missing. {advice}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BrokenFile(f"{path} has no header of difflex: it is damaged. {advice}") from error


@contextmanager
def folder_lock(folder: Path, shared: bool = False) -> Iterator[None]:
    """Make `folder`, check that it can be written, and keep other processes from writing in it, except for ranks if `shared`.

    A killed process releases its lock, and what it left half written is deleted. Folders that were made here and stay empty are
    removed at the end.
    """
    made = [] if shared else [path for path in (folder, *folder.parents) if not path.exists()]
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _check_writable(folder)
        _sweep(folder)
        handle = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if handle is not None and not _locked(handle, shared):
            raise BadInput(f"Another process is writing in {folder}. Wait for it to end, or name another folder.")
        yield
    finally:
        if handle is not None:
            os.close(handle)
        with suppress(OSError):
            for path in made:
                path.rmdir()


def write_together(folder: Path, write: Callable[[Path], Sequence[Path]]) -> list[Path]:
    """Let `write` make files in an empty folder, move them to `folder` in the order in which it returns them, and return them.

    `folder` must be empty, or hold some of the same files, as after a run that was killed while they moved.
    """
    partial = folder / ".partial"
    with folder_lock(folder), disk_errors(folder):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            paths = write(partial)
            made = {path.name: path for path in paths}
            other = [
                path.name
                for path in folder.iterdir()
                if path != partial and not (path.name in made and filecmp.cmp(made[path.name], path, shallow=False))
            ]
            if other:
                raise BadInput(f"{folder} is not empty: it has {', '.join(sorted(other)[:5])}. Name a new folder.")
            return [path.replace(folder / path.name) for path in paths]
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def disk_errors(path: Path, verb: Literal["read", "written"] = "written") -> Iterator[None]:
    """Turn what the operating system says about `path` in a block into an error that says what to do."""
    try:
        yield
    except FileNotFoundError:
        if verb == "read":
            raise
        raise DiskError(f"{path} cannot be written: a folder of its path is missing. Run the same command again.") from None
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        if error.errno in FULL:
            raise OutOfSpace(
                f"{path} cannot be written: {reason}. What is finished is kept; free some space and run the same command "
                "again to continue."
            ) from error
        raise DiskError(f"{path} cannot be {verb}: {reason}. {ADVICE.get(error.errno or 0, OTHER_ADVICE)}") from error


def _check_writable(folder: Path) -> None:
    """Raise the error that writing in `folder` would raise, before any work is done."""
    temporary, handle = _open_temporary(folder / "write-test")
    temporary.unlink()
    os.close(handle)


def _open_temporary(path: Path) -> tuple[Path, int]:
    """Make a temporary file next to `path`, locked for as long as it is open; its name is short enough for any file system."""
    if path.parent not in _swept:
        _swept.add(path.parent)
        _sweep(path.parent)
    while True:
        temporary = path.with_name(f".{path.name[:48]}.{secrets.token_hex(6)}.tmp")
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        # Another process may have deleted it as a leftover just before it was locked.
        if not fcntl or (_locked(handle) and os.fstat(handle).st_nlink):
            return temporary, handle
        os.close(handle)


_swept: set[Path] = set()
"""Folders in which this process has deleted the leftovers of killed ones."""


def _sweep(folder: Path) -> None:
    """Delete the temporary files that killed processes left in `folder`: those without a lock."""
    for path in folder.glob(".*.tmp") if fcntl else ():
        try:
            handle = os.open(path, os.O_RDONLY)
        except OSError:
            continue
        try:
            if _locked(handle, without_locks=False):
                path.unlink(missing_ok=True)
        except OSError:  # on a read-only disk they stay
            pass
        finally:
            os.close(handle)


def _locked(handle: int, shared: bool = False, without_locks: bool = True) -> bool:
    """Lock an open file or folder until it is closed; return whether that was possible.

    `without_locks` is the answer on a file system that knows no locks, as some of clusters do.
    """
    assert fcntl is not None
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return without_locks
    return True


def _rename(temporary: Path, path: Path, keep: bool = False) -> None:
    if keep and _linked(temporary, path):
        temporary.unlink()
    else:
        os.replace(temporary, path)
    if os.name == "nt":  # Windows cannot open a folder, and need not flush it to make a rename last
        return
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _linked(temporary: Path, path: Path) -> bool:
    """Give `temporary` the name `path` unless that exists; return whether the file system can do that."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:
        return False
    return True
