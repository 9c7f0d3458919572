"""Explaining features by protocols: which images a VLM sees, what the book records, and that no question is paid twice."""

import json
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from changed_book import change_book
from image_views import MODEL, QUICK, Endpoints, code
from image_views import book as plain_features

from difflex.errors import BadInput, OutOfBudget, UnknownName
from difflex.explanation import CachedClient, ExplanationProtocol, RequestPolicy
from difflex.explanation.answers import AnswerCache
from difflex.explanation.backends import BackendReply, VLMBackend
from difflex.explanation.endpoint import ApiKey, EndpointBackend
from difflex.explanation.explaining import dry_run, explain
from difflex.explanation.protocol import UnsuitableFeature, has_enough_images, plan_feature
from difflex.explanation.questions import ImageView, Instruction, VLMAnswer, explain_instruction, judge_instruction
from difflex.explanation.studies import choose_features
from difflex.features import Book, ImageAlbum
from difflex.features.entries import TokenMap
from difflex.testing import RuleServer
from difflex.testing.vlm import answer_by_colour

OTHERS = dict.fromkeys(range(12), 20)
PAPER = ExplanationProtocol(name="paper")
FREQUENT = replace(PAPER, negatives="frequency")
FAULTS = ("hostile", "malformed", "refusal", "limited", "broken", "hanging", "truncated")


@pytest.fixture
def answers(tmp_path: Path) -> Iterator[AnswerCache]:
    cache = AnswerCache(tmp_path / "answers.sqlite")
    yield cache
    cache.close()


@pytest.fixture
def connect(answers: AnswerCache) -> Iterator[Endpoints]:
    endpoints = Endpoints(answers)
    yield endpoints
    endpoints.close()


@pytest.fixture
def sample(tmp_path: Path) -> Iterator[tuple[Book, ImageAlbum]]:
    book, album = plain_features(tmp_path, 12, shared=2)
    yield book, album
    book.close()


def test_heldout_judges_no_image_that_the_explainer_saw(sample: tuple[Book, ImageAlbum]):
    book, _ = sample
    plan = plan_feature(book, 3, OTHERS, ExplanationProtocol())
    shots = book.shots(example.shot for example in plan.examples)
    explained_prompts = {shots[example.shot].shot.prompt for example in plan.shown}
    judged_prompts = {shots[example.shot].shot.prompt for example in [*plan.positives, *plan.negatives]}
    assert len(plan.shown) == 5 and all(example.feature == 3 for example in plan.shown)
    assert not explained_prompts & judged_prompts
    own = plan.positives
    assert {example.split for example in own} == {"held-out"} and len(own) == 5
    peaks = [example.peak for example in own]
    assert peaks == sorted(peaks) and peaks[0] == min(example.peak for example in book.examples(3, split="held-out"))
    assert [example.feature == 3 for example in plan.lineup].index(False) == plan.odd


def test_half_of_the_judged_images_are_of_other_features_and_some_of_them_near_misses(sample: tuple[Book, ImageAlbum]):
    book, _ = sample
    plan = plan_feature(book, 3, OTHERS, ExplanationProtocol())
    others = plan.negatives
    assert len(others) == 5 and all(example.feature != 3 for example in others)
    own = {example.shot for example in plan.positives}
    assert [example.feature for example in others[3:]] == [5, 4], "the nearest decoder, and another feature in the same image"
    assert others[4].shot in own
    assert (
        plan == plan_feature(book, 3, OTHERS, ExplanationProtocol()) != plan_feature(book, 3, OTHERS, ExplanationProtocol(seed=1))
    )


def test_highlights_in_the_same_place_are_no_near_miss(tmp_path: Path):
    book, _ = plain_features(tmp_path, 12, shared=2)
    path = book.path
    book.close()
    change_book(path, "UPDATE examples SET map = ?", b"\0\0\xff\xff")  # now all features fire at the first token
    with Book.open(path) as changed:
        others = plan_feature(changed, 3, OTHERS, ExplanationProtocol()).negatives
    assert len(others) == 5 and others[4].feature == 5, "four random ones and one neighbour"


def test_the_published_protocol_judges_the_images_that_were_explained(sample: tuple[Book, ImageAlbum]):
    plan = plan_feature(sample[0], 3, OTHERS, ExplanationProtocol(name="paper"))
    assert plan.positives == plan.shown
    others = plan.negatives
    assert len({example.feature for example in others}) == 5 and all(example.rank == 0 for example in others)
    assert not plan.lineup


def test_features_that_fire_often_are_drawn_more_often_as_negatives(sample: tuple[Book, ImageAlbum]):
    others = {feature: 30 if feature in (7, 8) else 1 for feature in range(12)}
    drawn = {
        choice: Counter(
            example.feature
            for seed in range(60)
            for example in plan_feature(sample[0], 3, others, replace(PAPER, negatives=choice, seed=seed)).negatives
        )
        for choice in ("uniform", "frequency")
    }
    assert all(drawn["frequency"][feature] > 50 for feature in (7, 8)), "each of 60 times but for a few"
    assert all(15 <= count <= 42 for count in drawn["uniform"].values()) and sum(drawn["frequency"].values()) == 300
    assert plan_feature(sample[0], 3, others, FREQUENT) == plan_feature(sample[0], 3, others, FREQUENT)
    same = [plan_feature(sample[0], 3, OTHERS, replace(PAPER, seed=seed)).negatives for seed in (0, 0, 1)]
    assert same[0] == same[1] != same[2]


def test_images_with_too_few_highlighted_patches_do_not_count(tmp_path: Path):
    book, _ = plain_features(tmp_path, 12, shared=2)
    path, protocol = book.path, replace(PAPER, min_patches=6)
    assert not has_enough_images(book, 3, protocol) and choose_features(book, 9, protocol) == []
    with pytest.raises(UnsuitableFeature, match="it has 0 top images with 6 highlighted patches, 5 are needed"):
        plan_feature(book, 3, OTHERS, protocol)
    book.close()
    wide = TokenMap(tuple(range(6)), (20.0,) * 6).packed()
    change_book(path, "UPDATE examples SET map = ? WHERE feature != 5", wide)
    change_book(path, "UPDATE examples SET map = ? WHERE feature = 3 AND kind = 'top' AND rank = 0", b"\0\0\xff\xff")
    with Book.open(path) as changed:
        plan = plan_feature(changed, 3, OTHERS, protocol)
        assert all(len(example.map.tokens) == 6 for example in plan.examples)
        assert sorted(choose_features(changed, 12, protocol)) == [feature for feature in range(12) if feature != 5]


def test_each_protocol_has_instructions_of_its_own():
    judges = [judge_instruction("x", "blue", name).text for name in ("heldout", "paper")]
    assert judges[0] == judge_instruction("x").text and "harshly" in judges[1] and "so general" in judges[1]
    explainers = [explain_instruction(5, "blue", name).text for name in ("heldout", "paper")]
    assert all("5 images" in text for text in explainers) and "position within the image" not in explainers[1]


def test_a_feature_with_too_few_images_is_unsuitable(tmp_path: Path):
    book, _ = plain_features(tmp_path, 3, tops=4)
    with book, pytest.raises(UnsuitableFeature, match="4 top images of the split 'train', 5 are needed"):
        plan_feature(book, 0, dict.fromkeys(range(3), 20), ExplanationProtocol())
    assert choose_features(Book.open(book.path), 9, ExplanationProtocol(shown=99)) == []


def test_a_larger_random_choice_includes_the_smaller_one(sample: tuple[Book, ImageAlbum]):
    few, many = (choose_features(sample[0], count, ExplanationProtocol(), seed=3) for count in (4, 9))
    assert many[:4] == few != sorted(few) and len(set(many)) == 9


def test_explanations_judgements_scores_and_usage_are_written_into_the_book(sample: tuple[Book, ImageAlbum], connect: Endpoints):
    book, album = sample
    with RuleServer() as server:
        result = explain(book, range(12), connect(server.url), album, connections=4, progress=False)
        calls = len(server.served)
        assert result.explained == tuple(range(12)) and not result.failed
        repeated = explain(book, range(12), connect(server.url), album, progress=False)
        assert repeated.skipped == tuple(range(12)) and len(server.served) == calls
    for row in book.explanations():
        assert row.text == f"areas in {code(row.feature)}" and len(row.descriptions) == 5 and row.protocol == "heldout"
        judgements = book.judgements(row.id)
        # The near miss in the feature's own image has the same colour.
        assert [(judgement.fires, judgement.score) for judgement in judgements] == [(True, 1)] * 5 + [(False, 0)] * 4 + [
            (False, 1)
        ]
        scores = {score.measure: score for score in book.scores(row.id)}
        assert scores["accuracy"].value == pytest.approx(0.9) and scores["auroc"].value == pytest.approx(0.9)
        assert scores["accuracy"].low == pytest.approx(0.7) and scores["accuracy"].high == 1
        assert scores["intruder"].value == 1
    usage = list(book.usage())
    assert sum(entry.calls for entry in usage) == calls and {entry.role for entry in usage} == {"explainer", "judge"}
    assert sum(entry.tokens_in for entry in usage) > 12 * 16 * 258


def test_highlights_are_in_units_of_the_peak_and_weak_ones_are_left_out(sample: tuple[Book, ImageAlbum], answers: AnswerCache):
    highlights: list[torch.Tensor] = []

    class RecordingBackend(VLMBackend):
        name = "recording"

        def reply(self, views: Sequence[ImageView], instruction: Instruction[VLMAnswer], objection: str = "") -> BackendReply:
            highlights.extend(view.highlight for view in views)
            return BackendReply(instruction.schema.EXAMPLE, None)

    explain(sample[0], [0], CachedClient(RecordingBackend(), answers), sample[1], ExplanationProtocol(), progress=False)
    assert max(float(highlight.max()) for highlight in highlights) == 1.0
    assert {int((highlight > 0).sum()) for highlight in highlights} == {1}, "a second token has a tenth of the peak"


def test_other_settings_make_other_explanations(sample: tuple[Book, ImageAlbum], connect: Endpoints):
    book, album = sample
    with RuleServer() as server:
        for protocol in (ExplanationProtocol(), PAPER, ExplanationProtocol(judged=6, lineup=0), FREQUENT):
            explain(book, [0], connect(server.url), album, protocol, progress=False)
    names = ["heldout", "paper", "heldout judged 6 lineup 0", "paper negatives frequency"]
    assert [row.protocol for row in book.explanations(0)] == names
    assert [len(book.judgements(row.id)) for row in book.explanations(0)] == [10, 10, 6, 10]


def test_a_failed_feature_has_a_reason_and_is_tried_again_by_the_next_run(sample: tuple[Book, ImageAlbum], connect: Endpoints):
    book, album = sample
    with RuleServer({"refusal": 1.0}) as server:
        result = explain(book, [2, 5], connect(server.url), album, progress=False)
        assert result.failed == dict.fromkeys((2, 5), "refused: I cannot help with that.") and not result.explained
        assert [(row.state, row.reason) for row in book.explanations(2)] == [("failed", "refused: I cannot help with that.")]
        assert sum(entry.calls for entry in book.usage()) == 10, "failed calls are recorded as well"
        server.behaviours.clear()
        assert explain(book, [2, 5], connect(server.url), album, progress=False).explained == (2, 5)
    assert [row.state for row in book.explanations(2)] == ["done"]
    assert sum(entry.calls for entry in book.usage()) == 10 + 2 * 12


def test_an_unsuitable_feature_fails_without_a_call(tmp_path: Path, connect: Endpoints):
    book, album = plain_features(tmp_path, 6, tops=4)
    with book, RuleServer() as server:
        result = explain(book, [0], connect(server.url), album, progress=False)
        assert "4 top images" in result.failed[0] and not server.served
        assert book.explanations(0)[0].state == "failed"


@pytest.mark.parametrize("features", [16, pytest.param(1000, marks=pytest.mark.slow)])
def test_all_features_are_explained_correctly_despite_faults_of_every_kind(tmp_path: Path, answers: AnswerCache, features: int):
    book, album = plain_features(tmp_path, features)
    policy = RequestPolicy(first_wait=0.005, longest_wait=0.05, send_retries=10)
    with book, RuleServer(dict.fromkeys(FAULTS, 0.05), retry_after="0.01", hangs=4.0) as server:
        endpoints = Endpoints(answers)
        result = explain(book, range(features), endpoints(server.url, policy=policy, timeout=2.0), album, progress=False)
        endpoints.close()
        assert len(result.explained) == features and not result.failed
        behaviours = [call.behaviour for call in server.served]
        assert {*behaviours} == {*FAULTS, "good"}
        assert repeated_keys(answers) == [], "a question with a valid answer is not sent again"
        for row in book.explanations():
            assert code(row.feature) in row.text and not any(ord(letter) < 32 for letter in row.text)
            assert all(judgement.score == judgement.fires for judgement in book.judgements(row.id))
        assert sum(entry.calls for entry in book.usage()) == len(behaviours)


def test_a_used_up_budget_ends_the_work_cleanly_and_a_larger_one_continues(sample: tuple[Book, ImageAlbum], connect: Endpoints):
    book, album = sample
    price, features = (1.0, 1.0), list(range(12))
    total = 12 * (20 * 258 + 12 * 250) / 1e6
    half = RequestPolicy(price=price, budget=total / 2)
    with RuleServer() as server:
        with pytest.raises(OutOfBudget, match="run the same command with a larger --budget"):
            explain(book, features, connect(server.url, policy=half), album, connections=2, progress=False)
        paid, done = len(server.served), len(book.explanations())
        spent = sum(entry.cost or 0 for entry in book.usage())
        assert 0 < done < 12 and total / 4 < spent <= total / 2
        assert sum(entry.calls for entry in book.usage()) == paid, "the calls of interrupted features are in the book"
        with pytest.raises(OutOfBudget):  # the same budget pays for no more, but for what is cheaper than the call it ended at
            explain(book, features, connect(server.url, policy=half), album, progress=False)
        assert sum(entry.cost or 0 for entry in book.usage()) <= total / 2
        explain(book, features, connect(server.url, policy=RequestPolicy(price=price, budget=2 * total)), album, progress=False)
        assert len(book.explanations()) == 12 and len(server.served) == len({*server.served}) == 12 * 12


def test_a_dry_run_predicts_the_calls_and_the_cost(sample: tuple[Book, ImageAlbum], connect: Endpoints, answers: AnswerCache):
    book, album = sample
    policy = RequestPolicy(price=(1.0, 1.0), image_tokens=258, answer_tokens=20, first_wait=QUICK.first_wait)
    with RuleServer() as server:
        endpoint = EndpointBackend(server.url, MODEL, ApiKey("", ""))
        before = CachedClient(endpoint, answers, policy, dry_run=True)
        dry_run(book, range(12), before, album)
        client = connect(server.url, policy=policy)
        explain(book, range(6), client, album, progress=False)
        between = CachedClient(endpoint, answers, policy, dry_run=True)
        dry_run(book, range(12), between, album)
        explain(book, range(12), client, album, progress=False)
        endpoint.close()
        assert before.spending.calls == len(server.served) == 144 and between.spending.calls == 72
        assert before.spending.cost == pytest.approx(client.spending.cost, rel=0.05)


def repeated_keys(answers: AnswerCache) -> list[str]:
    """Return the keys of questions that were sent again after a valid answer."""
    with sqlite3.connect(answers.path) as file:
        query = (
            "SELECT key FROM calls AS later WHERE number > (SELECT number FROM calls WHERE key = later.key AND outcome = 'valid')"
        )
        return [key for [key] in file.execute(query)]


SCRIPT = """
import sys
from pathlib import Path
from difflex.explanation import CachedClient
from difflex.explanation.endpoint import ApiKey, EndpointBackend
from difflex.explanation.explaining import explain
from difflex.explanation.answers import AnswerCache
from difflex.features import Book, ImageAlbum
folder, url = Path(sys.argv[1]), sys.argv[2]
with Book.edit(folder / "book.sqlite") as book:
    client = CachedClient(EndpointBackend(url, "rule", ApiKey("", "")), AnswerCache(folder / "answers.sqlite"))
    explain(book, range(60), client, ImageAlbum(folder / "images"), connections=4, progress=False)
"""


def test_after_a_kill_at_any_moment_no_cached_question_is_paid_again(tmp_path: Path):
    plain_features(tmp_path, 60)[0].close()
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    with RuleServer(latency=0.005) as server:
        cached_keys: set[str] = set()
        for minimum in (100, 400):
            previous = len(server.served)
            child = subprocess.Popen([*command, server.url])
            while len(server.served) < minimum and child.poll() is None:
                time.sleep(0.002)
            child.send_signal(signal.SIGKILL)
            child.wait()
            assert not cached_keys & {call.request for call in server.served[previous:]}
            with sqlite3.connect(tmp_path / "answers.sqlite") as file:
                cached_keys = {key for [key] in file.execute("SELECT key FROM answers")}
            assert len(cached_keys) >= minimum - 25
        previous = len(server.served)
        subprocess.run([*command, server.url], check=True)
        assert not cached_keys & {call.request for call in server.served[previous:]}
        assert len(server.served) <= 60 * 12 + 2 * 4, "at most one call of each connection was lost with each kill"
    with Book.open(tmp_path / "book.sqlite") as after:
        rows = after.explanations()
        assert len(rows) == 60 and all(row.text == f"areas in {code(row.feature)}" for row in rows)
        assert all(len(after.judgements(row.id)) == 10 for row in rows)


def test_a_book_of_text_cannot_be_explained(tmp_path: Path, connect: Endpoints):
    book, album = plain_features(tmp_path, 6)
    path = book.path
    book.close()
    change_book(path, "UPDATE about SET value = 'null' WHERE name = 'grid'")
    with Book.edit(path) as text, RuleServer() as server, pytest.raises(BadInput, match="about text tokens"):
        explain(text, [0], connect(server.url), album, progress=False)


def test_impossible_protocols_are_rejected():
    for create in (
        lambda: ExplanationProtocol(judged=5),
        lambda: ExplanationProtocol(shown=0),
        lambda: ExplanationProtocol(lineup=2),
    ):
        with pytest.raises(BadInput, match="A protocol cannot"):
            create()
    with pytest.raises(BadInput, match="shows nothing"):
        ExplanationProtocol(min_patches=0)
    with pytest.raises(UnknownName, match="nearest: frequency"):
        ExplanationProtocol(negatives="frequent")  # pyright: ignore[reportArgumentType]
    assert json.dumps(ExplanationProtocol(seed=2, style="outline").label) == '"heldout style outline seed 2"'


def test_examples_with_invisible_highlights_are_not_shown(tmp_path: Path):
    book, _ = plain_features(tmp_path, 12, shared=2)
    path = book.path
    book.close()
    change_book(path, "UPDATE examples SET peak = 3.9 WHERE split = 'held-out' AND rank > 3")
    change_book(path, "UPDATE examples SET peak = 3.9 WHERE feature = 4 AND kind = 'quantile' AND split = 'train'")
    with Book.open(path) as changed:
        plan = plan_feature(changed, 3, OTHERS, ExplanationProtocol())
    assert all(example.peak >= 4 for example in plan.examples), "a fifth of the peak of 20"
    assert [example.feature for example in plan.negatives].count(4) <= 1


def contents(book: Book) -> list[object]:
    """Everything that explaining wrote into a book, but for the seconds that calls took."""
    rows = book.explanations()
    judged: list[object] = [(row, book.judgements(row.id), book.scores(row.id)) for row in rows]
    return judged + [replace(entry, seconds=0.0) for entry in book.usage()]


def test_a_book_does_not_depend_on_which_thread_is_faster(tmp_path: Path):
    """Explain with delays that differ from call to call: the slowest feature is the first to be written."""
    written = []
    for turn in range(2):
        folder = tmp_path / str(turn)
        folder.mkdir()
        book, album = plain_features(folder, 30, shared=2)
        delays = random.Random(turn)

        def rule(*question: Any, delays: random.Random = delays) -> dict[str, Any]:
            time.sleep(delays.uniform(0, 0.02))
            return answer_by_colour(*question)

        with book, closing(AnswerCache(folder / "answers.sqlite")) as answers:
            endpoints = Endpoints(answers)
            with RuleServer({"malformed": 0.2, "refusal": 0.05}, rule=rule) as server:
                policy = RequestPolicy(price=(0.3, 0.7), answer_retries=1)
                explain(book, range(30), endpoints(server.url, policy=policy), album, connections=16, progress=False)
            endpoints.close()
            written.append(contents(book))
            assert [row.feature for row in book.explanations()] == [*range(30)]
            assert {row.state for row in book.explanations()} == {"done", "failed"}
    assert written[0] == written[1]


def test_a_slow_feature_delays_no_other(sample: tuple[Book, ImageAlbum], connect: Endpoints, answers: AnswerCache):
    book, album = sample
    slow = threading.Event()

    def rule(images: Sequence[Any], text: str, form: str) -> dict[str, Any]:
        answer = answer_by_colour(images, text, form)
        if form == "explanation" and answer["common_pattern"] == f"areas in {code(0)}":
            slow.wait(20)
        return answer

    with RuleServer(rule=rule) as server:
        client = connect(server.url, policy=RequestPolicy(send_retries=0), timeout=30)
        thread = threading.Thread(target=lambda: explain(book, range(12), client, album, connections=3, progress=False))
        thread.start()
        end = time.monotonic() + 20
        while len(server.served) < 1 + 11 * 12 and time.monotonic() < end:
            time.sleep(0.01)
        assert len(server.served) == 1 + 11 * 12, "eleven features are finished while the first one waits"
        assert not book.explanations() and not answers.is_empty
        slow.set()
        thread.join()
    assert [row.feature for row in book.explanations()] == [*range(12)]


def test_a_missing_image_fails_its_features_and_no_other(sample: tuple[Book, ImageAlbum], connect: Endpoints):
    book, album = sample
    [shown] = [row.image.file for row in book.shots([book.examples(3, "top", "train")[0].shot]).values()]
    (album.folder / shown).unlink()
    with RuleServer() as server:
        result = explain(book, range(12), connect(server.url), album, progress=False)
    assert "is missing" in result.failed[3] and len(result.explained) >= 4
    assert all("is missing" in reason for reason in result.failed.values())
