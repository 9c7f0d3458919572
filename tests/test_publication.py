"""Push and pull: a repository of the hub holds what a study does, and a study gets it back, over a real socket."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_hub import TOKEN, FakeHub, fake_hub, use_hub
from PIL import Image
from sample_study import new_study, write_book, write_evaluation

from difflex.cli import main
from difflex.dictionaries import CodeStatistics, Dictionary, DictionaryOrigin, Neurons, fingerprint
from difflex.features import Book
from difflex.hub import read_hub_origin
from difflex.records import Site
from difflex.report.figures.gallery import FeatureRanking
from difflex.report.reading import read_facts
from difflex.study import Study
from difflex.web.catalogue import Catalogue
from difflex.web.firing import Firing

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the client of the hub
NAME = "acme/flux"
SITE, LABEL = "double.2:neurons", "neurons-8-k2"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """An empty hub."""
    with fake_hub() as hub:
        use_hub(hub, tmp_path / "cache", monkeypatch)
        yield hub


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """A study of two dictionaries, one of which has an evaluation and a book with explained features."""
    study = new_study(tmp_path / "study", "acme/tiny-flux")
    evaluation = write_evaluation(study, f"{SITE}/{LABEL}", fvu=0.25, data="made")
    for k in (2, 4):
        origin = DictionaryOrigin(
            site=Site.parse(SITE), model=study.model, training={"data": "1000 tokens of /home/me/data/a.csv"}
        )
        Neurons(width=8, k=k, origin=origin).save(study.dictionary(SITE, f"neurons-8-k{k}"))
    replace(evaluation, fingerprint=fingerprint(study.dictionary(SITE, LABEL))).save(study.evaluation(SITE, LABEL))
    write_book(study, f"{SITE}/{LABEL}", 8, {number: (f"stars {number}", 0.9) for number in range(8)})
    return study


def push(study: Study, *words: str) -> int:
    return main(["push", str(study.folder), NAME, *words])


def test_what_was_pushed_is_pulled_with_the_same_fingerprint(
    hub: FakeHub, study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    statistics = CodeStatistics(mean=torch.arange(8.0))
    statistics.save(study.dictionary(SITE, LABEL))
    assert push(study) == 0
    assert main(["pull", NAME, "--out", str(tmp_path / "other")]) == 0
    other = Study.open(tmp_path / "other")
    pulled = CodeStatistics.load(other.dictionary(SITE, LABEL))
    assert pulled is not None and torch.equal(pulled.mean, statistics.mean)
    assert other.model == study.model and other.dictionaries() == study.dictionaries()
    for ref in study.dictionaries():
        assert fingerprint(other.dictionary(*ref)) == fingerprint(study.dictionary(*ref))
    origin = read_hub_origin(other.dictionary(SITE, LABEL))
    assert origin is not None and origin == (NAME, hub.repositories[NAME].branches["main"])
    assert main(["verify", str(other.folder)]) == 0
    capsys.readouterr()
    assert main(["status", str(other.folder)]) == 0
    assert f"{SITE}/{LABEL}, pulled from {NAME} at {origin.commit[:12]}" in capsys.readouterr().out
    assert TOKEN not in "".join(capsys.readouterr()) and not [
        path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()
    ]


def test_excluded_features_are_not_among_the_best_nor_listed_in_an_image(tmp_path: Path):
    study, name = new_study(tmp_path / "study", "acme/tiny-flux"), f"{SITE}/{LABEL}"
    training = {"imported": {"tool": "sdxl-unbox", "source": "x", "excluded": [0, 3]}}
    Neurons(width=8, k=2, origin=DictionaryOrigin(site=Site.parse(SITE), model=study.model, training=training)).save(
        study.dictionary(SITE, LABEL)
    )
    write_book(study, name, 8)
    ref = study.find_dictionary(name)
    with Book.open(study.book(*ref)) as book:
        ranking = FeatureRanking(read_facts(study), book, ref)
        assert {feature.stats.feature for feature in ranking.features()} == {1, 2, 4, 5, 6, 7}
    numbers = np.arange(8, dtype=np.int32)
    firing = Firing((2, 2), np.zeros(8, np.int32), numbers, np.ones(8, np.float32))
    answer = firing.strongest(Catalogue(study), ref, "peak", also=3)
    assert {entry.tile.feature for entry in answer.features} == {1, 2, 4, 5, 6, 7, 3} and answer.total == 6


def test_the_card_says_what_was_measured_and_what_was_not(hub: FakeHub, study: Study):
    assert push(study, "--license", "apache-2.0") == 0
    files = hub.repositories[NAME].commits[hub.repositories[NAME].branches["main"]]
    card = files["README.md"].decode()
    for text in (
        "license: apache-2.0",
        "base_model:\n- acme/tiny-flux",
        "- difflex\n- sparse-autoencoder",
        "| `double.2:neurons` | [`neurons-8-k2`](#double2neuronsneurons-8-k2) | neurons | 8 | 2 | none | 0.2500 | 16.0 | 0.0% |",
        "| model | 0.2500 | 0.2500 | 0.8000 | 0.8000 | 0.9000 |",
        "Effect on the prediction at 4 shots: 0.1000 (mean activation 1.0000, zeros 2.0000)",
        "It was not evaluated.",
        "- trained on: 1000 tokens of a.csv",
        f'difflex.Dictionary.from_pretrained("{NAME}", "{SITE}", "{LABEL}")',
        "![features](double.2+neurons/neurons-8-k2/features.webp)",
        "sum of (x - y)^2 over the sum of (x - mean x)^2",
    ):
        assert text in card, text
    assert "/home/me" not in card
    assert f"{SITE.replace(':', '+')}/neurons-8-k4/features.webp" not in files


def test_a_second_push_adds_to_the_table_and_keeps_the_licence(hub: FakeHub, study: Study):
    assert push(study, "--dictionary", f"{SITE}/{LABEL}", "--license", "mit", "--private") == 0
    assert hub.repositories[NAME].private
    assert push(study, "--dictionary", f"{SITE}/neurons-8-k4") == 0
    files = hub.repositories[NAME].commits[hub.repositories[NAME].branches["main"]]
    card = files["README.md"].decode()
    assert (
        "license: mit" in card
        and "0.2500 | 16.0" in card
        and re.findall(r"^## double.*", card, re.MULTILINE) == [f"## {SITE}/{LABEL}", f"## {SITE}/neurons-8-k4"]
    )
    assert f"{SITE.replace(':', '+')}/{LABEL}/dictionary.safetensors" in files


def test_a_push_to_a_branch_leaves_main(hub: FakeHub, study: Study, tmp_path: Path):
    assert push(study, "--revision", "v2") == 0
    assert hub.repositories[NAME].commits[hub.repositories[NAME].branches["main"]].keys() == {".gitattributes"}
    assert main(["pull", NAME, "--out", str(tmp_path / "other"), "--revision", "v2"]) == 0


def test_a_dry_run_writes_what_would_be_pushed_and_asks_nobody(hub: FakeHub, study: Study, tmp_path: Path):
    out = tmp_path / "dry"
    assert push(study, "--dry-run", "--out", str(out)) == 0
    assert hub.requests == [] and "## double.2:neurons/neurons-8-k4" in (out / "README.md").read_text()
    assert Dictionary.load(out / SITE.replace(":", "+") / LABEL).size == 8
    with Image.open(out / SITE.replace(":", "+") / LABEL / "features.webp") as image:
        assert image.width > 5 * 128 and image.height > 8 * 128


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "x"], "--out is the folder of a dry run"),
        (["--license", "MIT licence"], "is not the identifier of a licence"),
        (["--dictionary", "double.2:neurons/neurons-8-k3"], "nearest: double.2:neurons/neurons-8-k"),
    ],
)
def test_a_push_that_cannot_be_is_refused(
    hub: FakeHub, study: Study, capsys: pytest.CaptureFixture[str], words: list[str], message: str
):
    assert push(study, *words) == 2
    assert message in capsys.readouterr().err
    assert hub.repositories.get(NAME) is None or hub.repositories[NAME].commits.keys() <= {
        hub.repositories[NAME].branches["main"]
    }


def test_a_wrong_token_is_refused_and_not_shown(
    hub: FakeHub, study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert push(study) == 2
    text = "".join(capsys.readouterr())
    assert "does not accept the token" in text and "hf_wrong" not in text and not hub.repositories


def test_a_pull_replaces_no_other_dictionary_and_keeps_nothing_of_a_broken_one(
    hub: FakeHub, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert push(study) == 0
    origin = DictionaryOrigin(site=Site.parse(SITE), model=study.model)
    other = Study.begin(tmp_path / "other", study.model)
    Neurons(width=8, k=2, origin=origin).save(other.dictionary(SITE, LABEL))
    before = fingerprint(other.dictionary(SITE, LABEL))
    assert main(["pull", NAME, "--out", str(other.folder)]) == 2
    assert "has another dictionary double.2:neurons/neurons-8-k2" in capsys.readouterr().err
    assert fingerprint(other.dictionary(SITE, LABEL)) == before
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "other-cache"))
    hub.damage = lambda path, content: bytes(len(content)) if path.endswith("k4/dictionary.safetensors") else content
    assert main(["pull", NAME, "--out", str(tmp_path / "third"), "--dictionary", f"{SITE}/neurons-8-k4"]) == 2
    assert not (tmp_path / "third").exists()


def test_a_pull_of_an_unknown_dictionary_names_the_nearest(
    hub: FakeHub, study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert push(study) == 0
    assert main(["pull", NAME, "--out", str(tmp_path / "x"), "--dictionary", f"{SITE}/neurons-8-k3"]) == 2
    assert "nearest: double.2:neurons/neurons-8-k" in capsys.readouterr().err and not (tmp_path / "x").exists()
