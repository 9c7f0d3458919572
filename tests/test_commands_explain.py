"""`difflex explain`: from books to words and figures."""

import json
import shutil
import sqlite3
from pathlib import Path

import pytest
from image_views import MODEL, book, code
from PIL import Image

from difflex.cli import main
from difflex.commands.drawn_world import FIRST_SEED, drawn_concepts
from difflex.features import Book, BookInfo, BookWriter, ImageAlbum
from difflex.features.entries import Example, FeatureStats, ImageFile, TokenMap
from difflex.miniature import draw
from difflex.records import Shot, Site
from difflex.study import Study
from difflex.testing import RuleServer

SITE = Site("double.1")
SECRET = "sk-nobody-sees-this"


def studied(folder: Path, label: str = "topk", features: int = 12) -> Study:
    """A study with a book of plain images."""
    study = Study.begin(folder, "m")
    scratch = folder / "scratch"
    scratch.mkdir()
    written, _ = book(scratch, features, shared=2)
    written.close()
    return placed(study, label, scratch)


def placed(study: Study, label: str, scratch: Path) -> Study:
    """The study, with the book in `scratch` as that of a dictionary."""
    for path in (study.book(SITE, label), study.dictionary(SITE, label) / "config.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(scratch / "book.sqlite", study.book(SITE, label))
    with sqlite3.connect(study.book(SITE, label)) as file:
        file.execute("UPDATE about SET value = ? WHERE name = 'dictionary'", (json.dumps(f"{SITE}/{label}"),))
    shutil.copytree(scratch / "images", study.images, dirs_exist_ok=True)
    (study.dictionary(SITE, label) / "config.json").write_text("{}")
    return study


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return studied(tmp_path / "study")


def words(study: Study, server: RuleServer, *more: str) -> list[str]:
    return ["explain", str(study.folder), "--vlm", server.url, "--model", MODEL, *more]


def test_features_are_explained_and_the_figures_are_printed_and_kept(study: Study, capsys: pytest.CaptureFixture[str]):
    with RuleServer() as server:
        assert main(words(study, server, "--random-features", "5")) == 0
        told, calls = capsys.readouterr().out, len(server.served)
        assert main(words(study, server, "--random-features", "5")) == 0
        assert len(server.served) == calls and "0 explained, 5 were before" in capsys.readouterr().out
    assert "study/double.1/topk: 5 explained" in told and f"{calls} calls" in told and "0.900 (0.900 to 0.900)" in told
    with Book.open(study.book(SITE, "topk")) as made:
        assert [each.text for each in made.explanations()] == [f"areas in {code(each.feature)}" for each in made.explanations()]
        assert sum(each.calls for each in made.usage()) == calls
    scores = json.loads((study.explanations / "scores.json").read_text())
    [method] = scores["methods"]
    assert method["accuracy"]["of"] == 5 and sum(method["histogram"]) == 5 == method["histogram"][18]
    assert method["biases"][0]["surface"] == "none" and method["backend"] == MODEL and method["protocol"] == "heldout"


def test_two_protocols_and_two_dictionaries_are_compared(study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    studied(tmp_path / "other")
    placed(study, "itda", tmp_path / "other" / "scratch")
    with RuleServer() as server:
        assert main(words(study, server, "--random-features", "4", "--protocol", "paper")) == 0
        assert main(words(study, server, "--random-features", "4")) == 0
    told = capsys.readouterr().out
    assert "double.1/itda against study/double.1/topk (heldout): accuracy +0.000, p 1" in told
    assert "study/double.1/topk: accuracy falls by 0.100 (0.100 to 0.100)" in told
    scores = json.loads((study.explanations / "scores.json").read_text())
    assert len(scores["methods"]) == 4 and len(scores["differences"]) == 2 and len(scores["falls"]) == 2


def test_a_dry_run_sends_nothing_and_tells_calls_tokens_and_money(study: Study, capsys: pytest.CaptureFixture[str]):
    with RuleServer() as server:
        assert main(words(study, server, "--random-features", "10", "--dry-run", "--price", "10,0", "--image-tokens", "1000")) == 0
        told = capsys.readouterr().out
        assert not server.served and "120 calls" in told and "0 answers are there already" in told
        assert "cost about 2." in told, "20 images of 1000 tokens for each feature, and some words"
        assert main(words(study, server, "--random-features", "10", "--dry-run")) == 0
        assert "for the cost, give --price" in capsys.readouterr().out
    with Book.open(study.book(SITE, "topk")) as made:
        assert made.explanations() == []


def test_a_budget_ends_with_code_2_and_says_how_to_go_on(study: Study, capsys: pytest.CaptureFixture[str]):
    with RuleServer() as server:
        money = ["--price", "1,1", "--budget", "0.01", "--connections", "2"]
        assert main(words(study, server, *money)) == 2
        assert "larger --budget" in capsys.readouterr().err and 0 < len(server.served) < 40
        assert main(words(study, server, "--price", "1,1", "--budget", "100")) == 0
        assert len(server.served) == 144


def test_a_key_is_in_no_output_and_no_file(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    (tmp_path / "key").write_text(SECRET)
    monkeypatch.setenv("OTHER", f"{SECRET}x")
    with RuleServer(key=SECRET) as server:
        assert main(words(study, server, "--random-features", "2", "--key-file", str(tmp_path / "key"))) == 0
        done = capfd.readouterr()
        assert main(words(study, server, "--random-features", "2", "--protocol", "paper", "--key-variable", "OTHER")) == 2
        turned = capfd.readouterr()
    assert "2 explained" in done.out
    assert "Key(from $OTHER)" in turned.err and "wrong key: Bearer [key]" in turned.err
    files = b"".join(path.read_bytes() for path in study.folder.rglob("*") if path.is_file())
    assert SECRET not in done.out + done.err + turned.out + turned.err and SECRET.encode() not in files


def drawn_book(folder: Path, concepts: list[str], count: int = 120) -> None:
    """A book whose every feature marks just where one concept of the drawn world is."""
    names = [concept.name for concept in drawn_concepts()]
    seeds = range(FIRST_SEED, FIRST_SEED + count)
    scenes, album = draw(seeds), ImageAlbum(folder / "images")
    shares = scenes.shares(8, 8)[:, [names.index(concept) for concept in concepts]].flatten(2)
    filed = album.add(Image.new("RGB", (64, 64)))[0]
    about = BookInfo(
        dictionary="double.1/topk",
        kind="topk",
        size=len(concepts),
        k=1,
        fingerprint="",
        model="mini-flux",
        data="drawn",
        grid=(8, 8),
        tokens=64 * count,
        shots={"train": count},
        images=1,
    )
    examples: list[Example] = []
    for feature in range(len(concepts)):
        there = [i for i in range(count) if (shares[i, feature] >= 0.5).any()]
        for rank, shot in enumerate(there):
            tokens = tuple((shares[shot, feature] >= 0.5).nonzero()[:, 0].tolist())
            where = TokenMap(tokens, (1.0,) * len(tokens))
            split = "train" if rank < 6 else "held-out"
            examples.append(Example(feature=feature, kind="top", split=split, rank=rank, shot=shot, peak=1.0, map=where))
    shots = [Shot(model="mini-flux", image=f"drawn:{seed}", pixels=(64, 64), steps=1, guidance=0.0) for seed in seeds]
    with BookWriter.open(folder / "book.sqlite", about) as writer:
        writer.add_images([ImageFile(0, *filed)])
        writer.add_shots((number, 0, shot) for number, shot in enumerate(shots))
        writer.add_features(
            FeatureStats(feature=feature, firings=count, shots=count, density=0.1, peak=1.0, mean=1.0)
            for feature in range(len(concepts))
        )
        writer.add_examples(examples)


def test_known_concepts_name_and_judge_by_truth_without_a_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    concepts = ["star", "circle", "red", "blue", "brick", "night"]
    (tmp_path / "scratch").mkdir()
    drawn_book(tmp_path / "scratch", concepts)
    study = placed(Study.begin(tmp_path / "study", "mini-flux"), "topk", tmp_path / "scratch")
    assert main(["explain", str(study.folder), "--judged-images", "6"]) == 0
    assert "6 explained" in capsys.readouterr().out
    with Book.open(study.book(SITE, "topk")) as made:
        found = {concepts[each.feature]: each for each in made.explanations()}
        assert {name: each.text for name, each in found.items()} == {name: name for name in concepts}
        figures = {name: {score.measure: score.value for score in made.scores(each.id)} for name, each in found.items()}
    assert sum(each["accuracy"] for each in figures.values()) / 6 > 0.9
    assert sum(each["intruder"] for each in figures.values()) >= 5


def test_known_concepts_need_images_that_are_known(study: Study, capsys: pytest.CaptureFixture[str]):
    assert main(["explain", str(study.folder)]) == 2
    assert "difflex collect STUDY --drawn-world, or name a model that looks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        (["--site", "double.2"], "The site 'double.2' is unknown; nearest: double.1"),
        (["--dictionary", "double.1/topq"], "nearest: double.1/topk"),
        (["--vlm", "http://127.0.0.1:9/v1"], "--model NAME"),
        (["--vlm", "http://127.0.0.1:9/v1", "--model", "x", "--budget", "1"], "Give --price IN,OUT"),
        (["--random-features", "0"], "explains nothing"),
        (["--judged-images", "5"], "judge an even number"),
        (["--vlm", "./nowhere", "--offline"], "cannot be opened as a model that sees"),
        (["--judged-images", "98"], "No feature of double.1/topk fires in 54 shots"),
    ],
)
def test_a_wish_that_cannot_be_met_is_answered_in_a_sentence(study: Study, flags: list[str], answer: str, capsys):
    assert main(["explain", str(study.folder), *flags]) == 2
    assert answer in " ".join(capsys.readouterr().err.split())


def test_a_study_without_books_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    Study.begin(tmp_path, "mini-flux")
    assert main(["explain", str(tmp_path)]) == 2
    assert "has no books. difflex collect makes them" in capsys.readouterr().err


def test_an_untrained_model_is_explained_beside_the_trained_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trained, control = tmp_path / "study", tmp_path / "study" / "untrained"
    for study, flags in ((trained, []), (control, ["--untrained", "0"])):
        small = ["--prompts", "captions", "--site", "double.1", "--tokens", "3000", "--steps", "1", "--out", str(study)]
        assert main(["harvest", "mini-flux", *small, *flags]) == 0
        assert main(["train", str(study), "--site", "double.1", "--k", "4", "--size", "32", "--tokens", "2000"]) == 0
        assert main(["collect", str(study), "--drawn-world", "--images", "80", "--noise", "0.25"]) == 0
    # A dictionary that the control has not is asked for, too.
    shutil.copytree(trained / "dictionaries" / "double.1" / "topk-32-k4", trained / "dictionaries" / "double.1" / "copy")
    shutil.copy(trained / "books" / "double.1" / "topk-32-k4.sqlite", trained / "books" / "double.1" / "copy.sqlite")
    capsys.readouterr()
    asked = ["--dictionary", "double.1/topk-32-k4", "double.1/copy", "--random-features", "3", "--judged-images", "4"]
    assert main(["explain", str(trained), str(control), *asked]) == 0
    told = capsys.readouterr().out
    assert "study/double.1/topk-32-k4" in told and "untrained/double.1/topk-32-k4: 3 explained" in told
    found = {path: json.loads((path / "explanations" / "scores.json").read_text()) for path in (trained, control)}
    assert found[trained] == found[control]
    models = {(method["study"], method["model"]) for method in found[trained]["methods"]}
    assert models == {("study", "mini-flux"), ("untrained", "mini-flux@untrained-0")}
    assert len({method["protocol"] for method in found[trained]["methods"]}) == 1 and len(found[trained]["differences"]) >= 1
    shown = main(["report", str(trained)])
    rows = (trained / "report" / "explained.csv").read_text()
    assert shown == 0 and "double.1/topk-32-k4, untrained model" in rows
