"""`difflex verify`: damage in any file of a study is found and named with the command that repairs it; nothing is changed."""

import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_collect import FEW, fake_source, targets
from fake_harvest import FakeHarvest, fake_shots

from difflex.cli import main
from difflex.dictionaries import Neurons
from difflex.dictionaries.base import DictionaryOrigin
from difflex.features import ImageAlbum
from difflex.features.collecting import collect
from difflex.files import write_json
from difflex.records import Site
from difflex.store import RecordingConfig, record
from difflex.study import Study
from difflex.tensors import write_tensors

SITE = Site("double.1")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with a file of every kind, and another study inside."""
    study = Study.begin(tmp_path_factory.mktemp("verify") / "study", "fake")
    record(study.activations, fake_shots(12), [SITE], FakeHarvest(), RecordingConfig(batch=4, shard_bytes=0, progress=False))
    folder = study.dictionary(SITE, "neurons-16-k2")
    Neurons(width=16, k=2, origin=DictionaryOrigin(site=Site(SITE.path, "neurons"))).save(folder)
    write_tensors(folder / "training" / "state.safetensors", 1, {"x": torch.ones(3)})
    (folder / "training" / "log.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    for path in (
        study.evaluation(SITE, "a"),
        study.concepts(SITE, "a"),
        study.anatomy,
        study.steering(SITE, "a"),
        study.findings(SITE),
        study.explanations / "comparison.json",
        study.growing_dictionary(SITE, "itda") / "training" / "state.json",
        study.folder / "run.json",
    ):
        write_json(path, 2, {"number": 1})
    for path in (
        study.scales(SITE, "a"),
        study.contrast("cat"),
        study.growing_dictionary(SITE, "itda") / "training" / "atoms-0-9.safetensors",
    ):
        write_tensors(path, 3, {"direction": torch.ones(4)}, {"made": "of cats"})
    [target, _] = targets(study.folder)
    books = [replace(target, book=study.book(SITE, "neurons-12-k12"))]
    album, checkpoint = ImageAlbum(study.images), study.folder / "checkpoint"
    collect(books, fake_source([*range(10)]), album, data="planted", checkpoint=checkpoint, config=FEW, progress=False)
    with closing(sqlite3.connect(study.explanations / "answers.sqlite")) as answers:
        answers.executescript("CREATE TABLE answers (key TEXT PRIMARY KEY); INSERT INTO answers VALUES ('a')")
    Study.begin(study.folder / "untrained", "fake", "untrained-0")
    return study.folder


@pytest.fixture
def study(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "study")


def contents(study: Path) -> dict[str, bytes]:
    return {str(path.relative_to(study)): path.read_bytes() for path in sorted(study.rglob("*")) if path.is_file()}


def test_an_intact_study_is_counted_and_left_alone(study: Path, capsys: pytest.CaptureFixture[str]):
    before = contents(study)
    assert main(["verify", str(study)]) == 0
    output = capsys.readouterr().out
    assert "double.1: 8 files, all intact\n" in output and "untrained/study.json: 1 file, all intact\n" in output
    counted = sum(int(line.split(": ")[1].split(" file")[0]) for line in output.splitlines())
    assert counted == len(before) and contents(study) == before


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.Random(str(path.name)).randrange(len(content))] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def test_damage_in_every_file_is_named_with_its_repair(whole: Path, study: Path, capsys: pytest.CaptureFixture[str]):
    names = [name for name in contents(whole) if name != "dictionaries/double.1/neurons-16-k2/training/log.jsonl"]
    for damage in (flip, truncate):
        for name in names:
            if damage is flip and name.endswith(".sqlite"):
                continue  # a flip in an unused part of a page is not noticed
            damage(study / name)
            damaged = contents(study)
            assert main(["verify", str(study)]) == 2, name
            output = capsys.readouterr()
            [line] = [line for line in output.out.splitlines() if str(study / name) in line]
            assert (
                any(word in line for word in ("again", "not affected", "measured again")) and "delete it" not in line.lower()
            ), line
            assert "1 DAMAGED" in output.out and "1 of" in output.err and "Nothing was changed" in output.err
            assert contents(study) == damaged
            shutil.copy(whole / name, study / name)
    assert main(["verify", str(study)]) == 0


@pytest.mark.parametrize("remove", ["activations/double.1/shard-00001.json", "activations/double.1/manifest.json", "images/*"])
def test_a_missing_file_is_named(study: Path, remove: str, capsys: pytest.CaptureFixture[str]):
    path = sorted(study.glob(remove))[0]
    path.unlink()
    assert main(["verify", str(study)]) == 2
    output = capsys.readouterr().out
    assert f"{path} is missing" in output and "again" in output


def test_a_line_of_a_log_that_is_no_json_is_named(study: Path, capsys: pytest.CaptureFixture[str]):
    path = next(study.rglob("log.jsonl"))
    path.write_text('{"a": 1}\n{"a": \n')
    assert main(["verify", str(study)]) == 2
    assert f"{path}, line 2, is not JSON" in capsys.readouterr().out


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.write_bytes(b"{" * 100_000)])
def test_odd_things_in_the_place_of_a_file_are_sentences(study: Path, make: Callable[[Path], object], capsys):
    for name in ("anatomy.json", "steering/contrasts/cat.safetensors", "activations/double.1/manifest.json"):
        (study / name).unlink()
        make(study / name)
    assert main(["verify", str(study)]) == 2
    assert "3 of" in capsys.readouterr().err


def test_a_store_that_is_not_finished_is_said_to_be(study: Path, capsys: pytest.CaptureFixture[str]):
    config = RecordingConfig(batch=4, shard_bytes=0, progress=False, world_size=2)
    record(study / "activations", fake_shots(12), ["single.0"], FakeHarvest(), config)
    assert main(["verify", str(study)]) == 0
    assert "single.0, not finished: 5 files, all intact" in capsys.readouterr().out


def test_verify_needs_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["verify", str(tmp_path)]) == 2
    assert "not a study" in capsys.readouterr().err
