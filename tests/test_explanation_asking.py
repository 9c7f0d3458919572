"""Asking a model that sees, over real HTTP, in every mood that one may meet."""

import sqlite3
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from image_views import MODEL, Endpoints, code, view

from difflex.errors import BadInput, BrokenFile, OutOfBudget
from difflex.explanation import (
    AnswerCache,
    ApiKey,
    CachedClient,
    DryRunClient,
    EndpointBackend,
    ExplanationAnswer,
    JudgementAnswer,
    NoAnswer,
    RequestPolicy,
    RetryPolicy,
    TokenPrice,
)
from difflex.explanation.questions import MalformedAnswer, TokenUsage, content_key, read, to_explain, to_judge
from difflex.testing import RuleServer

EXPLAIN = to_explain(2)
VIEWS = [view(3), view(3)]
SECRET = "sk-3f9a-do-not-tell"


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


def explained(by: CachedClient, keys: list[str] | None = None) -> ExplanationAnswer:
    return by.see(VIEWS, EXPLAIN, ExplanationAnswer, [] if keys is None else keys)


def outcomes(answers: AnswerCache) -> list[str]:
    with sqlite3.connect(answers.path) as file:
        return [outcome for [outcome] in file.execute("SELECT outcome FROM calls ORDER BY number")]


def test_images_are_seen_and_the_answer_is_of_the_form_asked_for(asker: Endpoints):
    with RuleServer() as server:
        by = asker(server.url)
        assert explained(by).common_pattern == f"areas in {code(3)}"
        assert by.see([view(3)], to_judge(f"areas in {code(3)}"), JudgementAnswer, []).score == 1
        assert by.see([view(4)], to_judge(f"areas in {code(3)}"), JudgementAnswer, []).score == 0


def test_what_is_answered_is_not_sent_again_and_the_server_knows_it_by_the_same_hash(asker: Endpoints):
    keys: list[str] = []
    with RuleServer() as server:
        first = explained(asker(server.url), keys)
        again = asker(server.url)
        assert explained(again, keys) == first and again.asked.found == 1
        assert [call.request for call in server.served] == keys[:1] == keys[1:]
        assert keys[0] == content_key(MODEL, VIEWS, EXPLAIN, ExplanationAnswer)


def test_many_who_ask_the_same_at_once_ask_it_once(asker: Endpoints):
    with RuleServer(latency=0.1) as server, ThreadPoolExecutor(8) as pool:
        by = asker(server.url)
        found = {each.common_pattern for each in pool.map(lambda _: explained(by), range(8))}
        assert len(found) == 1 and len(server.served) == 1


@pytest.mark.parametrize("mood", ["malformed", "refusal"])
def test_an_answer_that_is_none_is_asked_again_four_times_and_then_told(asker: Endpoints, answers: AnswerCache, mood: str):
    with RuleServer({mood: 1.0}) as server:
        with pytest.raises(NoAnswer, match=r"malformed|refused: I cannot help"):
            explained(asker(server.url))
        assert len(server.served) == 5 and len(set(server.served)) == 1
    assert answers.is_empty and len(outcomes(answers)) == 5


def test_what_was_wrong_is_told_when_asking_again(asker: Endpoints):
    told: list[str] = []

    def rule(_: object, text: str, form: str) -> dict[str, object]:
        told.append(text)
        return {"pattern_descriptions": ["a"], "common_pattern": "stars" if "could not be used" in text else "..."}

    with RuleServer(rule=rule) as server:
        assert explained(asker(server.url)).common_pattern == "stars"
    assert len(told) == 2 and "common_pattern: Value error, no words in it" in told[1]


@pytest.mark.parametrize("mood", ["limited", "broken", "truncated", "hanging", "dripping"])
def test_what_comes_to_nothing_on_its_way_is_sent_again(asker: Endpoints, answers: AnswerCache, mood: str):
    with RuleServer({mood: 0.6}, hangs=3.0, seed=5) as server:
        by = asker(server.url, timeout=1.0)
        assert explained(by).common_pattern == f"areas in {code(3)}"
        moods = [call.behaviour for call in server.served]
    assert moods[-1] == "good" and set(moods[:-1]) == {mood}
    assert [outcome.split(":")[0] for outcome in outcomes(answers)] == ["fault"] * (len(moods) - 1) + ["valid"]


def test_all_wait_as_long_as_the_endpoint_asks(asker: Endpoints):
    with RuleServer({"limited": 1.0}, retry_after="0.3") as server:
        by = asker(server.url, terms=RequestPolicy(patience=RetryPolicy(sent_again=1, first=0.0)))
        with ThreadPoolExecutor(2) as pool:
            began = time.monotonic()
            first = pool.submit(by.see, [view(1)], EXPLAIN, ExplanationAnswer, [])
            while not by._pace._next:  # until the first was turned away
                time.sleep(0.005)
            second = pool.submit(by.see, [view(2)], EXPLAIN, ExplanationAnswer, [])  # was never turned away itself
            assert isinstance(first.exception(), BadInput) and time.monotonic() - began >= 0.3
            assert second.exception() and time.monotonic() - began >= 0.6


def test_who_asks_to_be_left_alone_for_hours_ends_the_work(asker: Endpoints):
    with RuleServer({"limited": 1.0}, retry_after="7200") as server, pytest.raises(BadInput, match="left alone for 7200 s"):
        explained(asker(server.url))


def test_a_date_in_retry_after_is_a_wait_until_then(asker: Endpoints):
    date = "Fri, 01 Jan 2100 00:00:00 GMT"
    with RuleServer({"limited": 1.0}, retry_after=date) as server, pytest.raises(BadInput, match="left alone for"):
        explained(asker(server.url))


def test_calls_keep_their_distance_in_a_minute(asker: Endpoints):
    with RuleServer() as server, ThreadPoolExecutor(4) as pool:
        by, began = asker(server.url, terms=RequestPolicy(per_minute=600)), time.monotonic()
        list(pool.map(lambda i: by.see([view(i)], EXPLAIN, ExplanationAnswer, []), range(5)))
        assert time.monotonic() - began >= 0.4


def test_an_endpoint_that_is_not_there_ends_the_work_instead_of_failing_every_feature(asker: Endpoints, answers: AnswerCache):
    with RuleServer() as server:
        url = server.url
    with pytest.raises(BadInput, match="'rule' answers nothing: the connection failed"):
        explained(asker(url))


def test_one_bad_question_does_not_end_the_work_but_eight_in_a_row_do(asker: Endpoints, answers: AnswerCache):
    with RuleServer({"broken": 1.0}) as server:
        by = asker(server.url, terms=RequestPolicy(patience=RetryPolicy(sent_again=0)))
        server.behaviours.clear()
        explained(by)
        server.behaviours["broken"] = 1.0
        for number in range(7):
            with pytest.raises(NoAnswer, match="broken by"):
                by.see([view(number)], EXPLAIN, ExplanationAnswer, [])
        with pytest.raises(BadInput, match="answers nothing"):
            by.see([view(7)], EXPLAIN, ExplanationAnswer, [])


def test_words_of_strangers_come_in_without_escapes_and_not_at_length(asker: Endpoints):
    with RuleServer({"hostile": 1.0}) as server:
        found = explained(asker(server.url))
    assert found.common_pattern == f"<img src=x onerror=alert(1)>areas in {code(3)}</b>"
    assert len(ExplanationAnswer(pattern_descriptions=["long " * 999], common_pattern="x").pattern_descriptions[0]) <= 300


def test_what_calls_cost_is_counted_and_a_budget_stops_before_it_is_passed(asker: Endpoints):
    price = TokenPrice(tokens_in=1e6, tokens_out=0)  # one for each token
    with RuleServer() as server:
        free = asker(server.url, terms=RequestPolicy(price=price))
        explained(free)
        each = free.asked.spent.cost
        assert each == free.asked.spent.tokens_in > 500
        # What a run before spent counts.
        with pytest.raises(OutOfBudget, match="give the same command with a larger --budget"):
            again = asker(server.url, terms=RequestPolicy(price=price, budget=1.5 * each))
            assert explained(again)
            again.see([view(1)], EXPLAIN, ExplanationAnswer, [])
        assert len(server.served) == 1


def test_what_an_endpoint_says_a_call_cost_is_believed():
    assert TokenPrice(tokens_in=5, tokens_out=10).of(TokenUsage(100, 20)) == pytest.approx(0.0007)
    assert TokenPrice(tokens_in=5, tokens_out=10).of(TokenUsage(100, 20, 0.25)) == 0.25


def test_a_rehearsal_counts_what_is_not_answered_yet_and_sends_nothing(asker: Endpoints, answers: AnswerCache):
    with RuleServer() as server:
        explained(asker(server.url))
        terms = RequestPolicy(price=TokenPrice(tokens_in=10, tokens_out=0), image_tokens=1000)
        endpoint = EndpointBackend(server.url, MODEL, ApiKey("", ""))
        endpoint.close()  # nothing is sent
        rehearsal = DryRunClient(endpoint, answers, terms)
        assert rehearsal.see(VIEWS, EXPLAIN, ExplanationAnswer, []).common_pattern == f"areas in {code(3)}"
        for number in (1, 2):
            rehearsal.see([view(number)], EXPLAIN, ExplanationAnswer, [])
        assert rehearsal.asked.answers == 3 and rehearsal.asked.found == 1
        assert rehearsal.asked.spent.calls == 2 and rehearsal.asked.spent.cost > 2 * 1000 * 10 / 1e6
        assert len(server.served) == 1


def test_a_key_goes_to_the_endpoint_and_nowhere_else(asker: Endpoints, answers: AnswerCache, capsys: pytest.CaptureFixture[str]):
    with RuleServer({"broken": 1.0}) as server:  # its errors repeat the key
        with pytest.raises(BadInput) as caught:
            explained(asker(server.url, SECRET, RequestPolicy(patience=RetryPolicy(sent_again=2, first=0.0))))
        assert server.headers[0]["authorization"] == f"Bearer {SECRET}"
    told = "".join(traceback.format_exception(caught.value)) + repr(ApiKey(SECRET, "$NAME"))
    out, err = capsys.readouterr()
    files = b"".join(path.read_bytes() for path in answers.path.parent.iterdir())
    assert "broken by Bearer [key]" in told
    assert SECRET not in told + out + err and SECRET.encode() not in files


def test_a_key_is_found_in_a_file_or_the_environment(tmp_path: Path):
    file = tmp_path / "key"
    file.write_text(f"{SECRET}\n")
    assert ApiKey.found(file, "NAME", {}).reveal() == SECRET == ApiKey.found(None, "NAME", {"NAME": SECRET}).reveal()
    assert ApiKey.found(None, "NAME", {}).is_empty
    file.write_text(f"export KEY={SECRET} more")
    with pytest.raises(BadInput, match="holds 3 words") as caught:
        ApiKey.found(file, "NAME", {})
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("url", ["ftp://x/v1", "localhost:8000", "https://me:secret@host/v1", "https://host/v1?key=secret"])
def test_an_address_that_cannot_be_or_tells_a_secret_is_refused_without_repeating_it(url: str):
    with pytest.raises(BadInput) as caught:
        EndpointBackend(url, MODEL, ApiKey("", ""))
    assert "secret" not in str(caught.value)


def test_a_key_over_plain_http_to_another_machine_is_warned_of():
    with pytest.warns(UserWarning, match="unencrypted"):
        EndpointBackend("http://example.invalid/v1", MODEL, ApiKey(SECRET, "")).close()


def test_a_damaged_file_of_answers_says_so(tmp_path: Path):
    (tmp_path / "answers.sqlite").write_bytes(b"no database" * 999)
    with pytest.raises(BrokenFile, match="Delete it"):
        AnswerCache(tmp_path / "answers.sqlite")


def test_who_waits_stops_when_the_work_is_called_off(asker: Endpoints):
    with RuleServer({"limited": 1.0}, retry_after="60") as server:
        by = asker(server.url)
        failed: list[BaseException] = []

        def ask() -> None:
            try:
                explained(by)
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        time.sleep(0.2)
        by.stop()
        thread.join(5)
    assert [type(error).__name__ for error in failed] == ["Stopped"]


@pytest.mark.parametrize("lacks", [["temperature"], ["response_format", "max_tokens"]])
def test_what_an_endpoint_does_not_know_is_not_asked_of_it_twice(asker: Endpoints, lacks: list[str]):
    with RuleServer(lacks=lacks) as server:
        by = asker(server.url)
        assert explained(by).common_pattern == f"areas in {code(3)}"
        assert by.see([view(4)], to_judge("x"), JudgementAnswer, []).score == 0
        assert len(server.served) == 2 and by.asked.spent.calls == 2


def test_a_wrong_key_ends_the_work_at_once_without_being_told(asker: Endpoints):
    with (
        RuleServer(key="right") as server,
        pytest.raises(BadInput, match=r"does not serve 'rule' to Key\(from a test\)") as caught,
    ):
        explained(asker(server.url, SECRET))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ['{"score": 0.5}', 'Sure!\n```json\n{"score": 0.5, "why": "it is"}\n```', ' {"score": "0.5"} '],
)
def test_an_answer_may_stand_among_other_words(text: str):
    assert read(text, JudgementAnswer).score == 0.5


@pytest.mark.parametrize(
    "text", ['{"score": NaN}', '{"score": 1.01}', '{"score": -0.1}', '{"score": [1]}', '{"s": 1}', "0.5", "{}"]
)
def test_a_score_that_is_none_is_told_apart(text: str):
    with pytest.raises(MalformedAnswer):
        read(text, JudgementAnswer)
