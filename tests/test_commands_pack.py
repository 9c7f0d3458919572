"""`difflex pack`: a zip file that is a study again, without activations."""

import zipfile
from pathlib import Path

import pytest
from sample_study import full_study

from difflex.cli import main
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
    assert "without activations. Unzipped it is the study study" in capsys.readouterr().out
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
