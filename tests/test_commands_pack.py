"""`difflex pack`: a zip file that is a study again, without activations."""

import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from sample_study import full_study, new_study

from difflex.cli import main
from difflex.errors import BadInput, BrokenFile, DiskError
from difflex.study import Study

BOOK = "double.1/topk-1024-k16"


def test_an_unpacked_study_is_searched_and_shown_and_has_no_activations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    study = full_study(tmp_path / "study")
    for left_out in ("activations/double.1/00000.safetensors", "dictionaries/double.1/growing-x/state", "old-1/books/x.sqlite"):
        path = study.folder / left_out
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    assert main(["pack", "study"]) == 0
    assert "without activations" in capsys.readouterr().out
    with zipfile.ZipFile("study.zip") as archive:
        archive.extractall(tmp_path / "colleague")
    unpacked = Study.open(tmp_path / "colleague" / "study")
    assert {path.name for path in unpacked.folder.iterdir()} >= {"study.json", "books", "dictionaries", "concepts", "evaluation"}
    assert not [path for path in unpacked.folder.rglob("*") if path.name.startswith(("activations", "growing-", "old-"))]
    assert unpacked.dictionaries() == study.dictionaries()
    assert main(["search", str(unpacked.folder), "red", "--dictionary", BOOK]) == 0
    assert main(["show", str(unpacked.folder), "3", "--dictionary", BOOK, "--out", "3.png"]) == 0


def test_the_file_is_a_zip_file_and_the_folder_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    full = full_study(tmp_path / "study").folder
    assert main(["pack", str(full), "--out", str(tmp_path / "x.tar")]) == 2
    assert "does not name a zip file" in capsys.readouterr().err
    assert main(["pack", str(tmp_path)]) == 2


@pytest.fixture(scope="module")
def shared_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    assert main(["pack", str(full_study(folder / "study").folder), "--out", str(folder / "file.zip")]) == 0
    return folder / "file.zip"


@pytest.fixture
def file(shared_file: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(shared_file, tmp_path / "file.zip"))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_packed_study_is_opened_by_its_file_and_unpacked_once(file: Path, capsys: pytest.CaptureFixture[str]):
    capsys.readouterr()
    study = Study.open(file)
    assert capsys.readouterr().out == f"{file}: unpacked to {study.folder}, where this and later commands work on it\n"
    assert study.folder.parent == file.parent and study.folder.name.startswith("file-")
    written = {path: path.stat().st_mtime_ns for path in study.folder.rglob("*")}
    for words in (["verify"], ["status"], ["search", "red"], ["features", "--dictionary", BOOK]):
        assert main([words[0], str(file), *words[1:]]) == 0
    assert "unpacked" not in capsys.readouterr().out
    assert written == {path: path.stat().st_mtime_ns for path in study.folder.rglob("*")}
    assert names(file.parent) == {"file.zip", study.folder.name}


def test_another_file_of_the_same_name_gets_a_folder_of_its_own(file: Path):
    first = Study.open(file).folder
    with zipfile.ZipFile(file, "w") as archive:
        archive.write(new_study(file.parent / "new").folder / "study.json", "study.json")
    assert Study.open(file).folder != first and first.is_dir()


def pack_by_hand(path: Path, *names: str, symlink: bool = False, content: bytes = b"{}") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = (0o120777 if symlink and "study.json" not in name else 0o100644) << 16
            archive.writestr(info, content)
    return path


@pytest.mark.parametrize("name", ["../evil", "x/../../evil", "/tmp/evil", "x/a\\..\\..\\evil", "C:/evil"])
def test_a_file_that_would_lie_elsewhere_is_refused(tmp_path: Path, name: str):
    path = pack_by_hand(tmp_path / "bad.zip", "x/study.json", name)
    with pytest.raises(BrokenFile, match="no plain file of a study: nothing was unpacked"):
        Study.open(path)
    assert names(tmp_path) == {"bad.zip"}


def test_links_bombs_and_what_is_no_study_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(BrokenFile, match="no plain file"):
        Study.open(pack_by_hand(tmp_path / "link.zip", "x/study.json", "x/link", symlink=True))
    monkeypatch.setattr("difflex.study.packed.SMALL", 100_000)
    with pytest.raises(BrokenFile, match="would become"):
        Study.open(pack_by_hand(tmp_path / "bomb.zip", "x/study.json", "x/a", content=bytes(1_000_000)))
    with pytest.raises(BadInput, match=r"no study.json. difflex pack STUDY makes one"):
        Study.open(pack_by_hand(tmp_path / "other.zip", "x/y/study.json"))
    (tmp_path / "text.zip").write_text("no zip")
    with pytest.raises(BrokenFile, match="cannot be unpacked"):
        Study.open(tmp_path / "text.zip")
    assert {path.suffix for path in tmp_path.iterdir()} == {".zip"}


def test_a_damaged_file_leaves_no_study(file: Path):
    with zipfile.ZipFile(file) as packed:
        member = max(packed.infolist(), key=lambda each: each.compress_size)
    content = bytearray(file.read_bytes())
    content[member.header_offset + 30 + len(member.filename) + member.compress_size // 2] ^= 255  # within its data
    file.write_bytes(content)
    with pytest.raises(BrokenFile, match="cannot be unpacked"):
        Study.open(file)
    assert not [path for path in file.parent.iterdir() if path.is_dir() and not path.name.startswith(".")]


def test_a_kill_leaves_nothing_half_made_and_the_next_use_ends_it(file: Path):
    slow = "import shutil, sys, time; from difflex.study import Study; copy = shutil.copyfileobj\n"
    slow += "shutil.copyfileobj = lambda *a: (copy(*a), time.sleep(0.05))\nStudy.open(sys.argv[1])"
    process = subprocess.Popen([sys.executable, "-c", slow, str(file)])
    while not list(file.parent.glob(".file-*/**/*.json")):
        time.sleep(0.02)
    with pytest.raises(BadInput, match="Another process"):
        Study.open(file)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not list(file.parent.glob("file-*"))
    folder = Study.open(file).folder
    assert names(file.parent) == {"file.zip", folder.name} and main(["verify", str(folder)]) == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_beside_a_file_on_a_read_only_disk_there_is_no_room(file: Path):
    file.parent.chmod(0o500)
    with pytest.raises(DiskError, match="name another place"):
        Study.open(file)
