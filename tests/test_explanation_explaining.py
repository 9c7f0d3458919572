"""Features explained and judged by protocols: what is shown to whom, what is written, what is never asked twice."""

import json
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from image_views import MODEL, QUICK, Endpoints, book, code

from difflex.errors import BadInput, OutOfBudget
from difflex.explanation import (
    AnswerCache,
    ApiKey,
    CachedClient,
    DryRunClient,
    EndpointBackend,
    ExplanationProtocol,
    ImageView,
    Instruction,
    RequestPolicy,
    RetryPolicy,
    TokenPrice,
    VLMBackend,
    chosen,
    explain,
    rehearse,
)
from difflex.explanation.backends import BackendReply
from difflex.explanation.protocol import UnsuitableFeature, plan
from difflex.explanation.questions import VLMAnswer
from difflex.features import Book, ImageAlbum
from difflex.testing import RuleServer

FAULTS = ("hostile", "malformed", "refusal", "limited", "broken", "hanging", "truncated")


@pytest.fixture
def answers(tmp_path: Path) -> Iterator[AnswerCache]:
    kept = AnswerCache(tmp_path / "answers.sqlite")
    yield kept
    kept.close()


@pytest.fixture
def asker(answers: AnswerCache) -> Iterator[Endpoints]:
    endpoints = Endpoints(answers)
    yield endpoints
    endpoints.close()


@pytest.fixture
def made(tmp_path: Path) -> Iterator[tuple[Book, ImageAlbum]]:
    written, album = book(tmp_path, 12, shared=2)
    yield written, album
    written.close()


def test_held_out_judging_shows_the_judge_nothing_that_the_explainer_saw(made: tuple[Book, ImageAlbum]):
    written, _ = made
    found = plan(written, 3, range(12), ExplanationProtocol())
    shots = written.shots(example.shot for example in found.examples)
    seen = {shots[example.shot].shot.prompt for example in found.shown}
    judged = {shots[trial.example.shot].shot.prompt for trial in found.trials}
    assert len(found.shown) == 5 and all(example.feature == 3 for example in found.shown)
    assert not seen & judged
    wanted = [trial.example for trial in found.trials if trial.wanted]
    assert {example.split for example in wanted} == {"held-out"} and len(wanted) == 5
    peaks = [example.peak for example in wanted]
    assert peaks == sorted(peaks) and peaks[0] == 0 + min(each.peak for each in written.examples(3, split="held-out"))
    assert found.lineup and [example.feature == 3 for example in found.lineup.examples].index(False) == found.lineup.odd


def test_half_of_what_is_judged_is_of_other_features_and_some_of_it_a_near_miss(made: tuple[Book, ImageAlbum]):
    written, _ = made
    found = plan(written, 3, range(12), ExplanationProtocol())
    others = [trial.example for trial in found.trials if not trial.wanted]
    assert len(others) == 5 and all(example.feature != 3 for example in others)
    own = {trial.example.shot for trial in found.trials if trial.wanted}
    assert [example.feature for example in others[3:]] == [5, 4], "the nearest decoder, and another feature in the same image"
    assert others[4].shot in own
    assert found == plan(written, 3, range(12), ExplanationProtocol()) != plan(written, 3, range(12), ExplanationProtocol(seed=1))


def test_what_another_feature_marks_in_the_same_place_is_no_near_miss(tmp_path: Path):
    written, _ = book(tmp_path, 12, shared=2)
    path = written.path
    written.close()
    with sqlite3.connect(path) as file:  # all features mark the first token now
        file.execute("UPDATE examples SET map = ?", (b"\0\0\xff\xff",))
    with Book.open(path) as again:
        others = [trial.example for trial in plan(again, 3, range(12), ExplanationProtocol()).trials if not trial.wanted]
    assert len(others) == 5 and others[4].feature == 5, "four by chance, one neighbour"


def test_the_published_protocol_judges_the_very_images_that_were_explained(made: tuple[Book, ImageAlbum]):
    found = plan(made[0], 3, range(12), ExplanationProtocol(name="paper"))
    assert [trial.example for trial in found.trials if trial.wanted] == list(found.shown)
    others = [trial.example for trial in found.trials if not trial.wanted]
    assert len({example.feature for example in others}) == 5 and all(example.rank == 0 for example in others)
    assert found.lineup is None


def test_a_feature_with_too_few_images_is_told_apart(tmp_path: Path):
    written, _ = book(tmp_path, 3, tops=4)
    with written, pytest.raises(UnsuitableFeature, match="4 top images of the split 'train', 5 are needed"):
        plan(written, 0, range(3), ExplanationProtocol())
    assert chosen(Book.open(written.path), 9, ExplanationProtocol(shown=99)) == []


def test_more_features_are_the_same_ones_and_others(made: tuple[Book, ImageAlbum]):
    few, many = (chosen(made[0], count, ExplanationProtocol(), seed=3) for count in (4, 9))
    assert many[:4] == few != sorted(few) and len(set(many)) == 9


def test_what_is_explained_is_in_the_book_with_all_that_belongs_to_it(made: tuple[Book, ImageAlbum], asker: Endpoints):
    written, album = made
    with RuleServer() as server:
        work = explain(written, range(12), asker(server.url), album, connections=4, progress=False)
        calls = len(server.served)
        assert work.done == tuple(range(12)) and not work.failed
        again = explain(written, range(12), asker(server.url), album, progress=False)
        assert again.kept == tuple(range(12)) and len(server.served) == calls
    for found in written.explanations():
        assert found.text == f"areas in {code(found.feature)}" and len(found.descriptions) == 5 and found.protocol == "heldout"
        judged = written.judgements(found.id)
        # The one near miss that no colour tells apart is in the feature's own image.
        assert [(each.fires, each.score) for each in judged] == [(True, 1)] * 5 + [(False, 0)] * 4 + [(False, 1)]
        figures = {score.measure: score for score in written.scores(found.id)}
        assert figures["accuracy"].value == pytest.approx(0.9) and figures["auroc"].value == pytest.approx(0.9)
        assert figures["accuracy"].low == pytest.approx(0.7) and figures["accuracy"].high == 1
        assert figures["intruder"].value == 1
    usage = list(written.usage())
    assert sum(each.calls for each in usage) == calls and {each.role for each in usage} == {"explainer", "judge"}
    assert sum(each.tokens_in for each in usage) > 12 * 16 * 258


def test_highlights_are_in_units_of_the_peak_and_end_where_nobody_would_see_them(
    made: tuple[Book, ImageAlbum], answers: AnswerCache
):
    shown: list[torch.Tensor] = []

    class Looker(VLMBackend):
        @property
        def name(self) -> str:
            return "looker"

        def see(
            self, views: Sequence[ImageView], instruction: Instruction, schema: type[VLMAnswer], objection: str = ""
        ) -> BackendReply:
            shown.extend(view.highlight for view in views)
            return BackendReply(schema.imagined().model_dump_json(), None)

    explain(made[0], [0], CachedClient(Looker(), answers), made[1], ExplanationProtocol(), progress=False)
    assert max(float(highlight.max()) for highlight in shown) == 1.0
    assert {int((highlight > 0).sum()) for highlight in shown} == {1}, "a second token has a tenth of the peak"


def test_settings_that_differ_are_explanations_that_differ(made: tuple[Book, ImageAlbum], asker: Endpoints):
    written, album = made
    with RuleServer() as server:
        for protocol in (ExplanationProtocol(), ExplanationProtocol(name="paper"), ExplanationProtocol(judged=6, lineup=0)):
            explain(written, [0], asker(server.url), album, protocol, progress=False)
    assert [each.protocol for each in written.explanations(0)] == ["heldout", "paper", "heldout judged 6 lineup 0"]
    assert [len(written.judgements(each.id)) for each in written.explanations(0)] == [10, 10, 6]


def test_what_fails_is_marked_with_its_reason_and_tried_again_by_the_next_run(made: tuple[Book, ImageAlbum], asker: Endpoints):
    written, album = made
    with RuleServer({"refusal": 1.0}) as server:
        work = explain(written, [2, 5], asker(server.url), album, progress=False)
        assert work.failed == dict.fromkeys((2, 5), "refused: I cannot help with that.") and not work.done
        assert [(each.state, each.reason) for each in written.explanations(2)] == [
            ("failed", "refused: I cannot help with that.")
        ]
        assert sum(each.calls for each in written.usage()) == 10, "what was paid for nothing is told as well"
        server.behaviours.clear()
        assert explain(written, [2, 5], asker(server.url), album, progress=False).done == (2, 5)
    assert [each.state for each in written.explanations(2)] == ["done"]
    assert sum(each.calls for each in written.usage()) == 10 + 2 * 12


def test_a_feature_that_a_protocol_cannot_show_is_marked_without_a_call(tmp_path: Path, asker: Endpoints):
    written, album = book(tmp_path, 6, tops=4)
    with written, RuleServer() as server:
        work = explain(written, [0], asker(server.url), album, progress=False)
        assert "4 top images" in work.failed[0] and not server.served
        assert written.explanations(0)[0].state == "failed"


@pytest.mark.parametrize("features", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_with_faults_of_every_kind_all_features_end_complete_and_correct(tmp_path: Path, answers: AnswerCache, features: int):
    written, album = book(tmp_path, features)
    terms = RequestPolicy(patience=RetryPolicy(first=0.005, longest=0.05, sent_again=10))
    with written, RuleServer(dict.fromkeys(FAULTS, 0.05), retry_after="0.01", hangs=4.0) as server:
        endpoints = Endpoints(answers)
        work = explain(written, range(features), endpoints(server.url, terms=terms, timeout=2.0), album, progress=False)
        endpoints.close()
        assert len(work.done) == features and not work.failed
        met = [call.behaviour for call in server.served]
        assert {*met} == {*FAULTS, "good"}
        assert after_valid(answers) == [], "what was answered is not sent again"
        for found in written.explanations():
            assert code(found.feature) in found.text and not any(ord(letter) < 32 for letter in found.text)
            assert all(each.score == each.fires for each in written.judgements(found.id))
        assert sum(each.calls for each in written.usage()) == len(met)


def test_a_budget_ends_the_work_in_order_and_more_of_it_goes_on(made: tuple[Book, ImageAlbum], asker: Endpoints):
    written, album = made
    price, features = TokenPrice(tokens_in=1.0, tokens_out=1.0), list(range(12))
    whole = 12 * (20 * 258 + 12 * 250) / 1e6
    half = RequestPolicy(price=price, budget=whole / 2)
    with RuleServer() as server:
        with pytest.raises(OutOfBudget, match="give the same command with a larger --budget"):
            explain(written, features, asker(server.url, terms=half), album, connections=2, progress=False)
        paid, done = len(server.served), len(written.explanations())
        spent = sum(each.cost or 0 for each in written.usage())
        assert 0 < done < 12 and whole / 4 < spent <= whole / 2
        assert sum(each.calls for each in written.usage()) == paid, "the calls of features that were broken off are in the book"
        with pytest.raises(OutOfBudget):  # the same again pays nothing
            explain(written, features, asker(server.url, terms=half), album, progress=False)
        assert len(server.served) == paid
        explain(written, features, asker(server.url, terms=RequestPolicy(price=price, budget=2 * whole)), album, progress=False)
        assert len(written.explanations()) == 12 and len(server.served) == len({*server.served}) == 12 * 12


def test_a_rehearsal_of_all_counts_what_the_work_then_takes(
    made: tuple[Book, ImageAlbum], asker: Endpoints, answers: AnswerCache
):
    written, album = made
    terms = RequestPolicy(price=TokenPrice(tokens_in=1.0, tokens_out=1.0), image_tokens=258, answer_tokens=20, patience=QUICK)
    with RuleServer() as server:
        endpoint = EndpointBackend(server.url, MODEL, ApiKey("", ""))
        before = DryRunClient(endpoint, answers, terms)
        rehearse(written, range(12), before, album)
        by = asker(server.url, terms=terms)
        explain(written, range(6), by, album, progress=False)
        between = DryRunClient(endpoint, answers, terms)
        rehearse(written, range(12), between, album)
        explain(written, range(12), by, album, progress=False)
        endpoint.close()
        assert before.asked.spent.calls == len(server.served) == 144 and between.asked.spent.calls == 72
        assert before.asked.spent.cost == pytest.approx(by.asked.spent.cost, rel=0.05)


def after_valid(answers: AnswerCache) -> list[str]:
    """Questions for which there was a call after the one that was answered."""
    with sqlite3.connect(answers.path) as file:
        late = (
            "SELECT key FROM calls AS later WHERE number > (SELECT number FROM calls WHERE key = later.key AND outcome = 'valid')"
        )
        return [key for [key] in file.execute(late)]


KILLED = """
import sys
from pathlib import Path
from difflex.explanation import AnswerCache, ApiKey, CachedClient, EndpointBackend, explain
from difflex.features import Book, ImageAlbum
folder, url = Path(sys.argv[1]), sys.argv[2]
with Book.edit(folder / "book.sqlite") as book:
    asker = CachedClient(EndpointBackend(url, "rule", ApiKey("", "")), AnswerCache(folder / "answers.sqlite"))
    explain(book, range(60), asker, ImageAlbum(folder / "images"), connections=4, progress=False)
"""


def test_killed_at_any_moment_and_run_again_nothing_in_the_cache_is_paid_twice(tmp_path: Path):
    book(tmp_path, 60)[0].close()
    words = [sys.executable, "-c", KILLED, str(tmp_path)]
    with RuleServer(latency=0.005) as server:
        in_cache: set[str] = set()
        for least in (100, 400):
            begun = len(server.served)
            child = subprocess.Popen([*words, server.url])
            while len(server.served) < least and child.poll() is None:
                time.sleep(0.002)
            child.send_signal(signal.SIGKILL)
            child.wait()
            assert not in_cache & {call.request for call in server.served[begun:]}
            with sqlite3.connect(tmp_path / "answers.sqlite") as file:
                in_cache = {key for [key] in file.execute("SELECT key FROM answers")}
            assert len(in_cache) >= least - 25
        begun = len(server.served)
        subprocess.run([*words, server.url], check=True)
        assert not in_cache & {call.request for call in server.served[begun:]}
        assert len(server.served) <= 60 * 12 + 2 * 4, "at most one call of each connection was lost with each kill"
    with Book.open(tmp_path / "book.sqlite") as after:
        found = after.explanations()
        assert len(found) == 60 and all(each.text == f"areas in {code(each.feature)}" for each in found)
        assert all(len(after.judgements(each.id)) == 10 for each in found)


def test_a_book_of_text_cannot_be_explained(tmp_path: Path, asker: Endpoints):
    written, album = book(tmp_path, 6)
    path = written.path
    written.close()
    with sqlite3.connect(path) as file:
        file.execute("UPDATE about SET value = 'null' WHERE name = 'grid'")
    with Book.edit(path) as text, RuleServer() as server, pytest.raises(BadInput, match="tokens of text"):
        explain(text, [0], asker(server.url), album, progress=False)


def test_protocols_that_cannot_be_are_told():
    for make in (
        lambda: ExplanationProtocol(judged=5),
        lambda: ExplanationProtocol(shown=0),
        lambda: ExplanationProtocol(lineup=2),
    ):
        with pytest.raises(BadInput, match="A protocol cannot"):
            make()
    assert json.dumps(ExplanationProtocol(seed=2, style="outline").label) == '"heldout style outline seed 2"'


def test_what_is_marked_too_weakly_to_be_seen_is_not_shown(tmp_path: Path):
    written, _ = book(tmp_path, 12, shared=2)
    path = written.path
    written.close()
    with sqlite3.connect(path) as file:
        file.execute("UPDATE examples SET peak = 3.9 WHERE split = 'held-out' AND rank > 3")
        file.execute("UPDATE examples SET peak = 3.9 WHERE feature = 4 AND kind = 'quantile' AND split = 'train'")
    with Book.open(path) as again:
        found = plan(again, 3, range(12), ExplanationProtocol())
    assert all(example.peak >= 4 for example in found.examples), "a fifth of the peak of 20"
    assert [trial.example.feature for trial in found.trials].count(4) <= 1
