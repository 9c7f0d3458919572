"""A study in a zip file, as `difflex pack` writes it: unpacked once, into a folder beside the file."""

import hashlib
import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from difflex.errors import BadInput, BrokenFile, OutOfSpace
from difflex.files import disk_errors, folder_lock

STUDY_FILE = "study.json"
RATIO, SMALL = 100, 100_000_000
"""A file that would become larger than both, in times its size and in bytes, is no study."""
CHUNK = 2**20


class PackedFile(NamedTuple):
    """A file in a zip file."""

    info: zipfile.ZipInfo
    path: PurePosixPath
    """Its place in the folder of the study."""


def study_folder(path: Path) -> Path:
    """Return the folder of a study: `path` itself, or for a zip file the folder beside it in which it is unpacked, once.

    The name of that folder depends on the content, so that another file of the same name gets a folder of its own.
    """
    if path.suffix.lower() != ".zip" or not path.is_file():
        return path
    with _zip_errors(path), disk_errors(path, "read"), zipfile.ZipFile(path) as archive:
        files = _files(path, archive)
        content = "".join(f"{file.path} {file.info.CRC} {file.info.file_size}\n" for file in files)
        folder = path.with_name(f"{path.stem}-{hashlib.sha256(content.encode()).hexdigest()[:8]}")
        if not folder.is_dir():
            _unpack(archive, files, folder)
            print(f"{path}: unpacked to {folder}, where this and later commands work on it")
    return folder


def _files(path: Path, archive: zipfile.ZipFile) -> list[PackedFile]:
    """Return the files of the study in a zip file; raise an error if they could lie elsewhere, or are far too large."""
    infos = [info for info in archive.infolist() if not info.is_dir()]
    paths = [PurePosixPath(info.filename) for info in infos]
    tops = [place.parent for place in paths if place.name == STUDY_FILE and len(place.parts) <= 2]
    if not tops:
        raise BadInput(f"{path} is not a packed study: it has no {STUDY_FILE}. difflex pack STUDY makes one.")
    top = min(tops, key=lambda place: len(place.parts))
    files = []
    for info, place in zip(infos, paths, strict=True):
        unsafe = place.is_absolute() or ".." in place.parts or set(info.filename) & set("\\:\0")
        if unsafe or stat.S_ISLNK(info.external_attr >> 16):
            raise BrokenFile(f"{path} holds {info.filename!r}, which is no plain file of a study: nothing was unpacked.")
        if place.is_relative_to(top):
            files.append(PackedFile(info, place.relative_to(top)))
    size = sum(file.info.file_size for file in files)
    if size > max(SMALL, RATIO * path.stat().st_size):
        raise BrokenFile(f"{path} would become {size / 1e9:,.1f} GB large, which no study does: nothing was unpacked.")
    if size > (free := shutil.disk_usage(path.absolute().parent).free):
        raise OutOfSpace(f"{path} takes {size / 1e9:,.2f} GB unpacked, and the disk has {free / 1e9:,.2f} GB free beside it.")
    return files


def _unpack(archive: zipfile.ZipFile, files: list[PackedFile], folder: Path) -> None:
    """Unpack `files` into `folder`, which appears when all are there; what a killed process left is used again."""
    partial = folder.with_name(f".{folder.name}.partial")
    with folder_lock(partial):
        if folder.is_dir():  # another process has just finished
            return
        for file in files:
            target = partial / file.path
            with disk_errors(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(file.info) as source, target.open("wb") as out:
                    shutil.copyfileobj(source, out, CHUNK)
        with disk_errors(folder):
            partial.rename(folder)


@contextmanager
def _zip_errors(path: Path) -> Iterator[None]:
    """Turn what is wrong with a zip file into an error that says what to do."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise BrokenFile(f"{path} cannot be unpacked: {error}. Copy it again, or pack the study again.") from error
