"""The errors of SQLite as sentences: only what is proven to be damaged is called so."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Never

from difflex.errors import BadInput, BrokenFile, DiskError, OutOfSpace

__all__ = ["sqlite_errors", "transaction"]

DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT)
FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE)
LOCKED = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
MOVED = (sqlite3.SQLITE_READONLY_DBMOVED,)
FORBIDDEN = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH, sqlite3.SQLITE_CANTOPEN)


@contextmanager
def sqlite_errors(path: Path, advice: str) -> Iterator[None]:
    """Turn the errors of SQLite about `path` in a block into errors of difflex; `advice` says what to do about a damaged file."""
    try:
        yield
    except sqlite3.Error as error:
        _explain(path, advice, error)
    except UnicodeDecodeError as error:  # in a message of SQLite about a damaged file
        raise BrokenFile(f"{path} is damaged (a text is not UTF-8). {advice}") from error


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """Write everything in the block or nothing; one writer at a time."""
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        yield connection


def _explain(path: Path, advice: str, error: sqlite3.Error) -> Never:
    """Raise the error of difflex that says what `error` means."""
    code, text = getattr(error, "sqlite_errorcode", None), str(error)
    codes = (code, code & 0xFF) if code is not None else ()  # the lower byte is the kind, the others refine it

    def is_any(kinds: tuple[int, ...]) -> bool:
        return any(known in kinds for known in codes)

    if is_any(DAMAGED) or "decode to UTF-8" in text:
        raise BrokenFile(f"{path} is damaged ({text}). {advice}") from error
    if codes and codes[1] == sqlite3.SQLITE_ERROR:  # such as a table or a column that is not there
        raise BrokenFile(f"{path} is not as this version of difflex writes it ({text}). {advice}") from error
    if is_any(FULL):
        raise OutOfSpace(
            f"{path} cannot be written: the disk is full. What is finished is kept; free some space and run the same command "
            "again to continue."
        ) from error
    if is_any(LOCKED):
        raise BadInput(f"Another process is writing in {path}. Wait for it to end.") from error
    if is_any(MOVED):
        raise BadInput(f"{path} was replaced by another process while it was in use. Run the same command again.") from error
    if is_any(FORBIDDEN):
        raise DiskError(
            f"{path} cannot be used ({text}): it, its folder or its disk may be read-only, or owned by another user. Ask for "
            "permission, or copy the study to a place that can be written."
        ) from error
    if codes and codes[1] == sqlite3.SQLITE_CONSTRAINT:
        raise BadInput(f"{path} does not accept this entry: {text}.") from error
    if "closed" in text:
        raise BadInput(f"{path} was closed and cannot be used any more. Open it again.") from error
    if not codes:
        raise error  # a mistake in the call, not in the file
    raise DiskError(f"{path} cannot be used ({text}). Check the disk, then run the same command again.") from error
