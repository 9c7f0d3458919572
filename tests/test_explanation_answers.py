"""The cache of answers, which were paid: healthy files are never called damaged, and a damaged one is rescued."""

import ctypes
import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TextIO

import pytest

from difflex.errors import BadInput, BrokenFile, DifflexError, DiskError, OutOfSpace
from difflex.explanation.answers import AnswerCache
from difflex.explanation.requests import Spending

SPENT = Spending(1, 300, 20, 0.01, 0.5)


def text(number: int) -> str:
    return json.dumps({"common_pattern": f"pattern {number} " + "of words " * 20})


def fill(path: Path, count: int, first: int = 0) -> None:
    with closing(AnswerCache(path)) as answers:
        for number in range(first, first + count):
            answers.add(f"{number:064x}", "rule", "valid", SPENT, text(number))


def kept(path: Path, count: int) -> int:
    """Count the answers that are read as they were written; no other answer may be there."""
    with closing(AnswerCache(path)) as answers:
        read = [answers.get(f"{number:064x}") for number in range(count)]
    assert all(answer in (None, text(number)) for number, answer in enumerate(read))
    return sum(answer is not None for answer in read)


def test_what_can_be_read_of_a_damaged_cache_is_kept_and_the_file_is_moved_not_deleted(tmp_path: Path):
    path = tmp_path / "answers.sqlite"
    fill(path, 400)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2 // 4096 * 4096
    content[middle : middle + 4096] = random.Random(0).randbytes(4096)
    path.write_bytes(content)
    with pytest.warns(
        UserWarning, match=r"was damaged \(.*\)\. It is now answers\.damaged-1\.sqlite; 3\d\d answers that could be"
    ):
        AnswerCache(path).close()
    assert (tmp_path / "answers.damaged-1.sqlite").read_bytes() == content
    assert kept(path, 400) >= 370  # and a later process does not warn again
    with closing(AnswerCache(path)) as answers:
        assert answers.cost("rule") > 3 and answers.unrecorded([f"{0:064x}"]) == SPENT


@pytest.mark.parametrize("seed", range(6))
def test_flipped_bytes_never_change_an_answer(tmp_path: Path, seed: int):
    path, numbers = tmp_path / "answers.sqlite", random.Random(seed)
    fill(path, 100)
    content = bytearray(path.read_bytes())
    for _ in range(10):
        place = numbers.randrange(100, len(content) - 64)
        content[place : place + 64] = numbers.randbytes(64)
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="was damaged|does not match its checksum"):
        assert kept(path, 100) >= 10


@pytest.mark.parametrize("content", [b"no database" * 999, b"SQLite format 3\0" + b"\xff" * 9000])
def test_a_file_that_is_no_database_is_moved_aside(tmp_path: Path, content: bytes):
    (tmp_path / "answers.sqlite").write_bytes(content)
    with pytest.warns(UserWarning, match="0 answers that could be read"):
        AnswerCache(tmp_path / "answers.sqlite").close()
    fill(tmp_path / "answers.sqlite", 3)
    (tmp_path / "answers.sqlite").write_bytes(content)
    with pytest.warns(UserWarning, match=r"It is now answers\.damaged-2\.sqlite"):
        AnswerCache(tmp_path / "answers.sqlite").close()
    assert (tmp_path / "answers.damaged-1.sqlite").read_bytes() == content


def killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_kill_between_moving_and_copying_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "answers.sqlite"
    fill(path, 50)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2 // 4096 * 4096
    content[middle : middle + 2000] = bytes(2000)
    path.write_bytes(content)
    expected = tmp_path / "whole"
    expected.mkdir()
    shutil.copy(path, expected / "answers.sqlite")
    with pytest.warns(UserWarning):
        count = kept(expected / "answers.sqlite", 50)
    # Killed when the first of the old files is to be deleted, and when the rows are to be copied.
    for place in ("pathlib.Path.unlink", "difflex.explanation.answers._copy_rows"):
        with monkeypatch.context() as patch:
            patch.setattr(place, killed)
            with pytest.raises(KeyboardInterrupt):
                AnswerCache(path)
    with pytest.warns(UserWarning):
        assert kept(path, 50) == count > 25


def test_a_cache_of_the_first_format_is_brought_up_to_date(tmp_path: Path):
    path = tmp_path / "answers.sqlite"
    fill(path, 5)
    with sqlite3.connect(path) as file:
        file.execute("ALTER TABLE answers DROP COLUMN checksum")
        file.execute("DROP TABLE recovered")
        file.execute("PRAGMA user_version = 1")
    file.close()
    assert kept(path, 5) == 5


def test_files_of_others_and_of_newer_versions_are_refused_and_left_alone(tmp_path: Path):
    path = tmp_path / "answers.sqlite"
    for statement, version in (("CREATE TABLE mine (x)", 0), ("CREATE TABLE answers (x)", 9)):
        path.unlink(missing_ok=True)
        with sqlite3.connect(path) as file:
            file.execute(statement)
            file.execute(f"PRAGMA user_version = {version}")
        file.close()
        with pytest.raises(BrokenFile, match=rf"has format {version}.* move it away \(it is not deleted\)"):
            AnswerCache(path)
        assert path.stat().st_size > 0 and not list(tmp_path.glob("*damaged*"))


def test_a_closed_or_locked_cache_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "answers.sqlite"
    fill(path, 1)
    answers = AnswerCache(path)
    answers.close()
    with pytest.raises(BadInput, match="was closed"):
        answers.get("x")
    monkeypatch.setattr("difflex.explanation.answers.LOCK_TIMEOUT", 0.1)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(BadInput, match="Another process is writing"):
        AnswerCache(path)
    other.close()
    assert kept(path, 1) == 1


def test_a_folder_where_the_file_belongs_and_a_file_where_the_folder_belongs(tmp_path: Path):
    (tmp_path / "answers.sqlite").mkdir()
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "answers.sqlite", tmp_path / "file" / "answers.sqlite"):
        with pytest.raises(DiskError):
            AnswerCache(path)


def test_no_question_is_sent_when_its_answer_might_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with closing(AnswerCache(tmp_path / "answers.sqlite")) as answers:
        answers.check_space()
        monkeypatch.setattr("difflex.explanation.answers.SPACE", 2**60)
        with pytest.raises(OutOfSpace, match="No question is sent whose answer might not be saved"):
            answers.check_space()


def write_until_it_ends(path: Path, first: int, report: Callable[[str], object]) -> None:
    """Write answers and report each once it is written, then the error that ends it."""
    try:
        with closing(AnswerCache(path)) as answers:
            for number in range(first, 100_000):
                answers.add(f"{number:064x}", "rule", "valid", SPENT, text(number))
                report(f"{number}\n")
    except DifflexError as error:
        report(f"{type(error).__name__} {error}\n")


@contextmanager
def another_process(work: Callable[[Callable[[str], object]], object]) -> Iterator[tuple[int, TextIO]]:
    """Call `work` in another process with a function to report lines; yield the number of the process and its reports."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        with suppress(BaseException):
            work(lambda line: os.write(writer, line.encode()))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as reports:
        yield child, reports
    os.waitpid(child, 0)


def test_every_answer_before_a_file_size_limit_is_kept_and_more_space_continues(tmp_path: Path):
    path = tmp_path / "answers.sqlite"

    def work(report: Callable[[str], object]) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
        write_until_it_ends(path, 0, report)

    with another_process(work) as (_, reports):
        *numbers, message = reports
    count = len(numbers)
    assert count > 20 and "damaged" not in message and message.startswith(("OutOfSpace", "DiskError")), message
    assert kept(path, count) == count
    fill(path, 10, count)
    assert kept(path, count + 10) == count + 10


def small_disk(disk: Path, readonly: bool = False) -> None:
    """Mount a disk of 600 kB that only this process sees, or make it read-only."""
    libc, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    if readonly:
        assert not libc.mount(None, bytes(disk), None, 0x21, None)  # MS_REMOUNT | MS_RDONLY
        return
    assert not libc.unshare(0x10020000), os.strerror(ctypes.get_errno())  # CLONE_NEWUSER | CLONE_NEWNS
    for name, content in (("uid_map", f"0 {user} 1"), ("setgroups", "deny"), ("gid_map", f"0 {group} 1")):
        Path("/proc/self", name).write_text(content)
    assert not libc.mount(b"none", bytes(disk), b"tmpfs", 0, b"size=600k"), os.strerror(ctypes.get_errno())


@pytest.mark.skipif(sys.platform != "linux", reason="it mounts a small disk")
def test_every_answer_before_a_full_disk_is_kept_and_a_read_only_one_is_named(tmp_path: Path):
    disk, saved, path = tmp_path / "disk", tmp_path / "saved", tmp_path / "disk" / "answers.sqlite"
    disk.mkdir()

    def work(report: Callable[[str], object]) -> None:
        small_disk(disk)
        write_until_it_ends(path, 0, report)
        shutil.copytree(disk, saved)
        small_disk(disk, readonly=True)
        write_until_it_ends(path, 0, report)

    with another_process(work) as (_, reports):
        lines = [*reports]
    if not lines:
        pytest.skip("no disk can be mounted here")
    *numbers, full, readonly = lines
    assert len(numbers) > 20 and full.startswith("OutOfSpace") and "the disk is full" in full
    assert readonly.startswith("DiskError") and "read-only" in readonly and "damaged" not in readonly
    assert kept(saved / "answers.sqlite", len(numbers)) == len(numbers)


def test_every_answer_that_was_reported_survives_a_kill(tmp_path: Path):
    path, written = tmp_path / "answers.sqlite", 0
    for seed in range(4):
        with another_process(partial(write_until_it_ends, path, written)) as (child, reports):
            for _ in range(random.Random(seed).randrange(20, 200)):
                written = 1 + int(reports.readline())
            os.kill(child, signal.SIGKILL)
        assert kept(path, written) == written


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_file_without_permission_is_not_called_damaged(tmp_path: Path):
    path = tmp_path / "answers.sqlite"
    fill(path, 1)
    path.chmod(0)
    with pytest.raises(DifflexError) as caught:
        AnswerCache(path)
    assert "damaged" not in str(caught.value)
    path.chmod(0o600)
    assert kept(path, 1) == 1


def test_checking_a_large_cache_takes_no_time_to_speak_of(tmp_path: Path):
    path = tmp_path / "answers.sqlite"
    fill(path, 1)
    with sqlite3.connect(path) as file:
        rows = ((f"{number:064x}", "rule", text(number), "") for number in range(1, 20_000))
        file.executemany("INSERT INTO answers VALUES (?, ?, ?, ?)", rows)
    file.close()
    start = time.monotonic()
    AnswerCache(path).close()
    assert time.monotonic() - start < 2
