"""Writing files: what a killed writer left is deleted, a living one is left alone, and every error of a disk is a sentence."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from difflex import files
from difflex.errors import BrokenFile, DiskError, OutOfSpace
from difflex.files import folder_lock, read_json, replacing, write_file, write_json

KILLED = """
import os, signal, sys
from pathlib import Path
from difflex.files import replacing
with replacing(Path(sys.argv[1]) / "file") as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_next_process_that_writes_in_a_folder_deletes_what_a_killed_one_left(tmp_path: Path):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    [left] = tmp_path.iterdir()
    assert left.suffix == ".tmp"
    with replacing(tmp_path / "other") as temporary:
        temporary.write_text("whole")
        assert [*tmp_path.iterdir()] == [temporary]
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_what_a_living_process_writes_is_not_deleted(tmp_path: Path):
    with replacing(tmp_path / "file") as temporary:
        temporary.write_text("half")
        with folder_lock(tmp_path):
            assert temporary.exists()


def test_a_lock_removes_the_empty_folders_that_it_made_and_no_others(tmp_path: Path):
    (tmp_path / "old").mkdir()
    with folder_lock(tmp_path / "old"), folder_lock(tmp_path / "new" / "empty"), folder_lock(tmp_path / "new" / "full"):
        write_file(tmp_path / "new" / "full" / "file", b"content")
    assert sorted(tmp_path.rglob("*")) == [tmp_path / name for name in ("new", "new/full", "new/full/file", "old")]


def test_a_file_system_without_locks_can_be_written_and_nothing_on_it_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    left = tmp_path / ".file.0.tmp"
    left.write_text("perhaps another process is writing it")

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with folder_lock(tmp_path):
        write_file(tmp_path / "file", b"content")
    assert left.exists() and (tmp_path / "file").read_bytes() == b"content"


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (errno.ENOSPC, OutOfSpace, "No space left on device. What is finished is kept; free some space"),
        (errno.EROFS, DiskError, "Read-only file system. Copy the study to a disk that can be written"),
        (errno.EACCES, DiskError, "Permission denied. Ask its owner for permission"),
        (errno.EIO, DiskError, "Input/output error. Check the disk"),
    ],
)
def test_an_error_of_the_disk_says_what_to_do_and_the_old_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, error: type[Exception], message: str
):
    write_file(tmp_path / "file", b"old")

    def fsync(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(error, match=message):
        write_file(tmp_path / "file", b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_a_changed_record_is_refused_and_one_written_by_hand_is_read(tmp_path: Path):
    path = write_json(tmp_path / "record.json", 3, {"tokens": 64, "by step": {1: 0.5}, "names": ("a", "é")})
    assert read_json(path, 3, "") == {"tokens": 64, "by step": {"1": 0.5}, "names": ["a", "é"]}
    path.write_text(path.read_text().replace("64", "65"))
    with pytest.raises(BrokenFile, match="does not match its checksum: it is damaged, or was changed by hand"):
        read_json(path, 3, "Run it again.")
    path.write_text('{"format": 3, "tokens": 65}')
    assert read_json(path, 3, "") == {"tokens": 65}


def test_a_name_of_255_letters_can_be_written(tmp_path: Path):
    write_file(tmp_path / ("x" * 255), b"content")
    with pytest.raises(DiskError, match="File name too long"):
        write_file(tmp_path / ("x" * 256), b"content")
