"""`difflex explain`: explanations, scores, costs and messages."""

import base64
import json
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from changed_book import change_book
from image_views import MODEL, book, code
from PIL import Image
from sample_study import write_matches

from difflex.cli import main
from difflex.commands.explain import ExplainCommand
from difflex.dictionaries import DictionaryOrigin, Neurons, fingerprint
from difflex.errors import BadInput
from difflex.evaluation.concepts import FIRST_SEED, drawn_concepts
from difflex.features import Book, BookInfo, BookWriter, ImageAlbum
from difflex.features.entries import Example, FeatureStats, ImageFile, TokenMap
from difflex.files import folder_lock
from difflex.miniature import draw
from difflex.records import Shot, Site
from difflex.study import Study
from difflex.testing import RuleServer
from difflex.testing.vlm import Rule, answer_by_colour

SITE = Site("double.1")
SECRET = "sk-secret"


def begin_study(folder: Path, label: str = "topk", features: int = 12) -> Study:
    """Make a study with a book of plain images."""
    study = Study.begin(folder, "m")
    scratch = folder / "scratch"
    scratch.mkdir()
    book(scratch, features, shared=2)[0].close()
    return add_book(study, label, scratch)


def add_book(study: Study, label: str, scratch: Path) -> Study:
    """Copy the book in `scratch` into the study, as the book of a dictionary, and return the study."""
    path, folder = study.book(SITE, label), study.dictionary(SITE, label)
    Neurons(width=8, k=2, origin=DictionaryOrigin(site=Site("double.1", "neurons"), model=study.model)).save(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(scratch / "book.sqlite", path)
    for name, value in (("dictionary", f"{SITE}/{label}"), ("fingerprint", fingerprint(folder))):
        change_book(path, "UPDATE about SET value = ? WHERE name = ?", json.dumps(value), name)
    shutil.copytree(scratch / "images", study.images, dirs_exist_ok=True)
    return study


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return begin_study(tmp_path / "study")


def test_a_book_of_older_weights_or_a_damaged_one_is_not_explained(study: Study, capsys: pytest.CaptureFixture[str]):
    folder, path = study.dictionary(SITE, "topk"), study.book(SITE, "topk")
    Neurons(width=9, k=2, origin=DictionaryOrigin(site=Site("double.1", "neurons"), model=study.model)).save(folder)
    assert main(["explain", str(study.folder)]) == 2
    assert "has changed since" in capsys.readouterr().err
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert main(["explain", str(study.folder)]) == 2
    assert "Run difflex collect" in capsys.readouterr().err


def explain_words(study: Study, server: RuleServer, *more: str) -> list[str]:
    return ["explain", str(study.folder), "--vlm", server.url, "--model", MODEL, *more]


def test_features_are_explained_and_scores_are_printed_and_saved(study: Study, capsys: pytest.CaptureFixture[str]):
    with RuleServer() as server:
        assert main(explain_words(study, server, "--random-features", "5")) == 0
        output, calls = capsys.readouterr().out, len(server.served)
        assert main(explain_words(study, server, "--random-features", "5")) == 0
        assert len(server.served) == calls and "0 explained, 5 skipped (explained before)" in capsys.readouterr().out
    assert (
        f"study/double.1/topk, protocol heldout, rule at {server.url}: 5 explained" in output
        and f"{calls} calls" in output
        and "0.900 (0.900 to 0.900)" in output
    )
    with Book.open(study.book(SITE, "topk")) as opened:
        rows = opened.explanations()
        assert [row.text for row in rows] == [f"areas in {code(row.feature)}" for row in rows]
        assert sum(entry.calls for entry in opened.usage()) == calls
    scores = json.loads((study.explanations / "scores.json").read_text())
    [method] = scores["methods"]
    assert method["accuracy"]["size"] == 5 and sum(method["histogram"]) == 5 == method["histogram"][18]
    assert method["biases"][0]["surface"] == "none" and method["backend"] == MODEL and method["protocol"] == "heldout"


def test_features_are_named_by_words_of_one_study_and_dictionary(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write_matches(study, f"{SITE}/topk", (0.9, 0.8, 0.7, 0.6))
    add_book(study, "itda", begin_study(tmp_path / "other").folder / "scratch")
    with RuleServer() as server:
        assert main(explain_words(study, server, "--feature", "red", "3,4")) == 0
        output = capsys.readouterr().out
        assert f"red: feature 1 of {SITE}/topk (detects red, AP 0.90)" in output and "itda" not in output
        assert f"feature 1 of {SITE}/topk: areas in {code(1)}" in output
        for more, message in (
            (["--feature", "rde"], "'rde' is unknown; nearest: red"),
            (["--feature", "red", "--dictionary", f"{SITE}/topk", f"{SITE}/itda"], "Name one of them with --dictionary"),
            (["--feature", "red", "--site", str(SITE)], "in each of 2 dictionaries"),
        ):
            assert main(explain_words(study, server, *more)) == 2
            assert message in capsys.readouterr().err
    assert main(["explain", str(study.folder), str(tmp_path / "other"), "--feature", "red"]) == 2
    assert "Words name features of one study" in capsys.readouterr().err
    with Book.open(study.book(SITE, "topk")) as opened:
        assert {row.feature for row in opened.explanations()} == {1, 3, 4}


def test_two_protocols_and_two_dictionaries_are_compared(study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    begin_study(tmp_path / "other")
    add_book(study, "itda", tmp_path / "other" / "scratch")
    with RuleServer() as server:
        assert main(explain_words(study, server, "--random-features", "4", "--protocol", "paper")) == 0
        assert main(explain_words(study, server, "--random-features", "4")) == 0
    output = capsys.readouterr().out
    assert "double.1/itda against study/double.1/topk (heldout): accuracy +0.000, p 1" in output
    assert "study/double.1/topk: accuracy falls by 0.100 (0.100 to 0.100)" in output
    scores = json.loads((study.explanations / "scores.json").read_text())
    assert len(scores["methods"]) == 4 and len(scores["differences"]) == 2 and len(scores["falls"]) == 2


def test_a_dry_run_sends_nothing_and_prints_calls_tokens_and_cost(study: Study, capsys: pytest.CaptureFixture[str]):
    with RuleServer() as server:
        assert (
            main(
                explain_words(study, server, "--random-features", "10", "--dry-run", "--price", "10,0", "--image-tokens", "1000")
            )
            == 0
        )
        output = capsys.readouterr().out
        assert (
            "Instruction of the explainer:" in output
            and "Instruction of the judge:" in output
            and "(what the explainer answered)" in output
        )
        assert f"Protocol heldout, rule at {server.url}" in output
        assert not server.served and "120 calls" in output and "0 answers are cached" in output
        assert "cost about 2." in output, "20 images of 1000 tokens for each feature, and some words"
        assert main(explain_words(study, server, "--random-features", "10", "--dry-run")) == 0
        assert "for the cost, give --price" in capsys.readouterr().out
    with Book.open(study.book(SITE, "topk")) as opened:
        assert opened.explanations() == []


def test_a_used_up_budget_exits_with_code_2_and_says_how_to_continue(study: Study, capsys: pytest.CaptureFixture[str]):
    with RuleServer() as server:
        budget = ["--price", "1,1", "--budget", "0.01", "--connections", "2"]
        assert main(explain_words(study, server, *budget)) == 2
        assert "larger --budget" in capsys.readouterr().err and 0 < len(server.served) < 40
        assert main(explain_words(study, server, "--price", "1,1", "--budget", "100")) == 0
        assert len(server.served) == 144


def test_a_key_is_in_no_output_and_no_file(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    (tmp_path / "key").write_text(SECRET)
    monkeypatch.setenv("OTHER", f"{SECRET}x")
    with RuleServer(key=SECRET) as server:
        assert main(explain_words(study, server, "--random-features", "2", "--key-file", str(tmp_path / "key"))) == 0
        valid = capfd.readouterr()
        assert main(explain_words(study, server, "--random-features", "2", "--protocol", "paper", "--key-variable", "OTHER")) == 2
        rejected = capfd.readouterr()
    assert "2 explained" in valid.out
    assert "with the API key from $OTHER" in rejected.err and "wrong key: Bearer [key]" in rejected.err
    files = b"".join(path.read_bytes() for path in study.folder.rglob("*") if path.is_file())
    assert SECRET not in valid.out + valid.err + rejected.out + rejected.err and SECRET.encode() not in files


def write_drawn_book(folder: Path, concepts: list[str], count: int = 120) -> None:
    """Write a book in which each feature fires exactly where a concept of the drawn world is."""
    names = [concept.name for concept in drawn_concepts()]
    seeds = range(FIRST_SEED, FIRST_SEED + count)
    scenes, album = draw(seeds), ImageAlbum(folder / "images")
    shares = scenes.shares(8, 8)[:, [names.index(concept) for concept in concepts]].flatten(2)
    image = album.add(Image.new("RGB", (64, 64)))[0]
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
        matches = [i for i in range(count) if (shares[i, feature] >= 0.5).any()]
        for rank, shot in enumerate(matches):
            tokens = tuple((shares[shot, feature] >= 0.5).nonzero()[:, 0].tolist())
            token_map = TokenMap(tokens, (1.0,) * len(tokens))
            split = "train" if rank < 6 else "held-out"
            examples.append(Example(feature=feature, kind="top", split=split, rank=rank, shot=shot, peak=1.0, map=token_map))
    shots = [Shot(model="mini-flux", image=f"drawn:{seed}", pixels=(64, 64), steps=1, guidance=0.0) for seed in seeds]
    with BookWriter.open(folder / "book.sqlite", about) as writer:
        writer.add_images([ImageFile(0, *image)])
        writer.add_shots((number, 0, shot) for number, shot in enumerate(shots))
        writer.add_features(
            FeatureStats(feature=feature, firings=count, shots=count, density=0.1, peak=1.0, mean=1.0)
            for feature in range(len(concepts))
        )
        writer.add_examples(examples)


def test_known_concepts_explain_and_judge_without_a_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    concepts = ["star", "circle", "red", "blue", "brick", "night"]
    (tmp_path / "scratch").mkdir()
    write_drawn_book(tmp_path / "scratch", concepts)
    study = add_book(Study.begin(tmp_path / "study", "mini-flux"), "topk", tmp_path / "scratch")
    assert main(["explain", str(study.folder), "--judged-images", "6"]) == 0
    assert "6 explained" in capsys.readouterr().out
    with Book.open(study.book(SITE, "topk")) as opened:
        rows = {concepts[row.feature]: row for row in opened.explanations()}
        assert {name: row.text for name, row in rows.items()} == {name: name for name in concepts}
        scores = [{score.measure: score.value for score in opened.scores(row.id)} for row in rows.values()]
    assert sum(values["accuracy"] for values in scores) / 6 > 0.9
    assert sum(values["intruder"] for values in scores) >= 5


def test_known_concepts_need_drawn_images(study: Study, capsys: pytest.CaptureFixture[str]):
    assert main(["explain", str(study.folder)]) == 2
    assert "difflex collect STUDY --drawn-world, or name a VLM with --vlm" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--site", "double.2"], "The site 'double.2' is unknown; nearest: double.1"),
        (["--dictionary", "double.1/topq"], "nearest: double.1/topk"),
        (["--vlm", "http://127.0.0.1:9/v1"], "--model NAME"),
        (["--vlm", "http://127.0.0.1:9/v1", "--model", "x", "--budget", "1"], "Give --price IN,OUT"),
        (["--judged-images", "5"], "judge an even number"),
        (["--vlm", "./nowhere", "--offline"], "cannot be loaded as a VLM"),
        (["--judged-images", "98"], "No feature of double.1/topk fires in 54 shots"),
    ],
)
def test_impossible_flags_are_explained(study: Study, flags: list[str], message: str, capsys):
    assert main(["explain", str(study.folder), *flags]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_study_without_books_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    Study.begin(tmp_path, "mini-flux")
    assert main(["explain", str(tmp_path)]) == 2
    assert "has no books. difflex collect makes them" in capsys.readouterr().err


def test_an_untrained_model_is_compared_with_the_trained_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trained, control = tmp_path / "study", tmp_path / "study" / "untrained"
    for study, untrained in ((trained, []), (control, ["--untrained", "0"])):
        flags = ["--prompts", "captions", "--site", "double.1", "--tokens", "3000", "--steps", "1", "--out", str(study)]
        assert main(["harvest", "mini-flux", *flags, *untrained]) == 0
        assert main(["train", str(study), "--site", "double.1", "--k", "4", "--size", "32", "--tokens", "2000"]) == 0
        assert main(["collect", str(study), "--drawn-world", "--images", "80", "--noise", "0.25"]) == 0
    # One of the named dictionaries exists only in the trained study.
    shutil.copytree(trained / "dictionaries" / "double.1" / "topk-32-k4", trained / "dictionaries" / "double.1" / "copy")
    shutil.copy(trained / "books" / "double.1" / "topk-32-k4.sqlite", trained / "books" / "double.1" / "copy.sqlite")
    capsys.readouterr()
    selection = ["--dictionary", "double.1/topk-32-k4", "double.1/copy", "--random-features", "3", "--judged-images", "4"]
    assert main(["explain", str(trained), str(control), *selection]) == 0
    output = capsys.readouterr().out
    assert (
        "study/double.1/topk-32-k4" in output
        and "untrained/double.1/topk-32-k4, protocol heldout judged 4, known concepts: 3 explained" in output
    )
    scores = {path: json.loads((path / "explanations" / "scores.json").read_text()) for path in (trained, control)}
    assert scores[trained] == scores[control]
    models = {(method["study"], method["model"]) for method in scores[trained]["methods"]}
    assert models == {("study", "mini-flux"), ("untrained", "mini-flux@untrained-0")}
    assert len({method["protocol"] for method in scores[trained]["methods"]}) == 1 and len(scores[trained]["differences"]) >= 1
    status = main(["report", str(trained)])
    rows = (trained / "report" / "explained.csv").read_text()
    assert status == 0 and "double.1/topk-32-k4, untrained model" in rows


def test_when_every_feature_fails_the_command_fails_and_says_why(study: Study, capsys: pytest.CaptureFixture[str]):
    with RuleServer({"refusal": 1.0}) as server:
        assert main(explain_words(study, server, "--random-features", "3")) == 2
        shown = capsys.readouterr()
        assert "No feature was explained: all 3 failed, 3 of them because: refused: I cannot help with that." in shown.err
        assert "0 explained, 0 skipped (explained before), 3 failed" in shown.out
        server.behaviours.clear()
        assert main(explain_words(study, server, "--random-features", "2")) == 0
        assert "2 explained" in capsys.readouterr().out
        server.behaviours["refusal"] = 1.0
        assert main(explain_words(study, server, "--random-features", "3")) == 0  # what was explained stays
        assert "0 explained, 2 skipped (explained before), 1 failed" in capsys.readouterr().out


def test_a_key_that_is_repeated_everywhere_is_nowhere(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    key = "sk-or+v1/Zq=do%not&tell"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with RuleServer({"echoing": 1.0}, key=key) as server:
        status = main(explain_words(study, server, "--random-features", "6"))
        monkeypatch.setenv("OPENAI_API_KEY", f"{key}x")
        assert main(explain_words(study, server, "--random-features", "7")) == 2
    shown = capfd.readouterr()
    with Book.open(study.book(SITE, "topk")) as opened:
        assert status == 0 and any("you sent Bearer [key]" in row.text for row in opened.explanations())
    files = b"".join(path.read_bytes() for path in study.folder.rglob("*") if path.is_file()).decode("latin-1")
    secrets = [key, quote(key, safe=""), json.dumps(key)[1:-1], base64.b64encode(f"Bearer {key}".encode()).decode()[12:-4]]
    for place in (shown.out, shown.err, files):
        assert not [secret for secret in secrets if secret in place]


@pytest.mark.parametrize("address", ["http://me:do-not-tell@127.0.0.1:9/v1", "https://x/v1?key=do-not-tell"])
def test_a_password_in_the_address_is_neither_printed_nor_logged(study: Study, address: str, capfd: pytest.CaptureFixture[str]):
    with pytest.raises(BadInput) as caught:  # so that no recipe logs it
        ExplainCommand(studies=(study.folder,), vlm=address)
    try:
        status = main(["explain", str(study.folder), "--vlm", address, "--model", "x"])
    except SystemExit as error:
        status = error.code
    shown = capfd.readouterr()
    assert status == 2 and "user name, a password or a query" in " ".join((shown.out + shown.err).replace("│", " ").split())
    assert "do-not-tell" not in shown.out + shown.err + str(caught.value)


def test_a_second_command_ends_at_once_and_nothing_is_asked(study: Study, capsys: pytest.CaptureFixture[str]):
    with RuleServer() as server, folder_lock(study.explanations):
        assert main(explain_words(study, server)) == 2
        assert "Another process is writing in" in capsys.readouterr().err and not server.served
        assert main(["explain", str(study.folder), "--vlm", "./no-model", "--offline"]) == 2  # not the missing model
        assert "Another process is writing in" in capsys.readouterr().err
    assert main(["explain", str(study.folder), str(study.folder / ".")]) == 2
    assert "A study is named twice" in capsys.readouterr().err


def test_a_book_that_cannot_be_written_ends_the_work_before_anything_is_asked(study: Study, capsys: pytest.CaptureFixture[str]):
    other = sqlite3.connect(study.book(SITE, "topk"), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with RuleServer() as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr("difflex.features.tables.LOCK_TIMEOUT", 0.1)
        assert main(explain_words(study, server)) == 2
        assert "Another process is writing" in capsys.readouterr().err and not server.served
    other.close()


def explained(study: Study) -> list[object]:
    """Everything that the command left, but for times."""
    with Book.open(study.book(SITE, "topk")) as opened:
        rows = [(row, opened.judgements(row.id), opened.scores(row.id)) for row in opened.explanations()]
        usage = [replace(entry, seconds=0.0) for entry in opened.usage()]
    return [rows, usage, (study.explanations / "scores.json").read_bytes()]


def delayed(turn: int) -> Rule:
    """Return a rule whose answers take a time that differs from call to call and from turn to turn."""
    delays = random.Random(turn)

    def rule(images: Sequence[Image.Image], text: str, form: str) -> dict[str, Any]:
        time.sleep(delays.uniform(0, 0.02))
        answer = answer_by_colour(images, text, form)
        return {"score": 0.25 + 0.25 * (len(text) % 3) * answer["score"]} if form == "score" else answer

    return rule


def test_equal_commands_leave_equal_results_whatever_the_threads_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    results = []
    for turn in range(2):
        study = begin_study(tmp_path / str(turn) / "study")
        with RuleServer({"malformed": 0.1}, rule=delayed(turn)) as server:
            assert main(explain_words(study, server, "--random-features", "8", "--price", "0.3,0.7")) == 0
        results.append([*explained(study), capsys.readouterr().out.replace(server.url, "URL")])
    assert results[0] == results[1]


@pytest.mark.slow
def test_a_command_that_was_killed_leaves_the_same_results_in_the_end(tmp_path: Path):
    results = []
    for kills in ((), (60, 120, 200)):
        study = begin_study(tmp_path / str(len(kills)) / "study", features=20)
        with RuleServer(rule=delayed(len(kills))) as server:
            command = [sys.executable, "-m", "difflex", *explain_words(study, server, "--random-features", "20")]
            for calls in kills:
                with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
                    while len(server.served) < calls:
                        time.sleep(0.005)
                    child.kill()
            subprocess.run(command, check=True, capture_output=True)
        results.append(explained(study))
    assert results[0] == results[1]
