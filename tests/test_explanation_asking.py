"""Questions to a VLM over real HTTP, with every fault that endpoints show."""

import sqlite3
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from image_views import MODEL, Endpoints, code, view
from PIL import Image

from difflex.errors import BadInput, OutOfBudget
from difflex.explanation import CachedClient, PresenceQuestion, RequestPolicy, ask_presence
from difflex.explanation.answers import AnswerCache
from difflex.explanation.client import NoAnswer
from difflex.explanation.endpoint import ApiKey, EndpointBackend
from difflex.explanation.questions import (
    ExplanationAnswer,
    JudgementAnswer,
    MalformedAnswer,
    TokenUsage,
    content_key,
    explain_instruction,
    judge_instruction,
    parse_answer,
)
from difflex.testing import RuleServer

EXPLAIN = explain_instruction(2)
VIEWS = [view(3), view(3)]
SECRET = "sk-3f9a-do-not-tell"


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


def explained(client: CachedClient, keys: list[str] | None = None) -> ExplanationAnswer:
    return client.ask(VIEWS, EXPLAIN, keys)


def outcomes(answers: AnswerCache) -> list[str]:
    with sqlite3.connect(answers.path) as file:
        return [outcome for [outcome] in file.execute("SELECT outcome FROM calls ORDER BY number")]


def test_images_are_sent_and_answers_have_the_requested_form(connect: Endpoints):
    with RuleServer() as server:
        client = connect(server.url)
        assert explained(client).common_pattern == f"areas in {code(3)}"
        assert client.ask([view(3)], judge_instruction(f"areas in {code(3)}")).score == 1
        assert client.ask([view(4)], judge_instruction(f"areas in {code(3)}")).score == 0


def test_a_cached_question_is_not_sent_again_and_the_server_computes_the_same_key(connect: Endpoints):
    keys: list[str] = []
    with RuleServer() as server:
        first = explained(connect(server.url), keys)
        second = connect(server.url)
        assert explained(second, keys) == first and second.cached == 1
        assert [call.request for call in server.served] == keys[:1] == keys[1:]
        assert keys[0] == content_key(MODEL, VIEWS, EXPLAIN)


def test_threads_that_ask_the_same_question_at_once_send_it_once(connect: Endpoints):
    with RuleServer(latency=0.1) as server, ThreadPoolExecutor(8) as pool:
        client = connect(server.url)
        patterns = {answer.common_pattern for answer in pool.map(lambda _: explained(client), range(8))}
        assert len(patterns) == 1 and len(server.served) == 1


@pytest.mark.parametrize("behaviour", ["malformed", "refusal"])
def test_a_malformed_or_refused_answer_is_retried_four_times(connect: Endpoints, answers: AnswerCache, behaviour: str):
    with RuleServer({behaviour: 1.0}) as server:
        with pytest.raises(NoAnswer, match=r"malformed|refused: I cannot help"):
            explained(connect(server.url))
        assert len(server.served) == 5 and len(set(server.served)) == 1
    assert answers.is_empty and len(outcomes(answers)) == 5


def test_a_retry_says_what_was_wrong_with_the_answer(connect: Endpoints):
    texts: list[str] = []

    def rule(_: object, text: str, form: str) -> dict[str, object]:
        texts.append(text)
        return {"pattern_descriptions": ["a"], "common_pattern": "stars" if "could not be used" in text else "..."}

    with RuleServer(rule=rule) as server:
        assert explained(connect(server.url)).common_pattern == "stars"
    assert len(texts) == 2 and "common_pattern: Value error, no words in it" in texts[1]


@pytest.mark.parametrize("behaviour", ["limited", "broken", "truncated", "hanging", "dripping"])
def test_a_call_that_fails_on_its_way_is_sent_again(connect: Endpoints, answers: AnswerCache, behaviour: str):
    with RuleServer({behaviour: 0.6}, hangs=3.0, seed=5) as server:
        client = connect(server.url, timeout=1.0)
        assert explained(client).common_pattern == f"areas in {code(3)}"
        behaviours = [call.behaviour for call in server.served]
    assert behaviours[-1] == "good" and set(behaviours[:-1]) == {behaviour}
    assert [outcome.split(":")[0] for outcome in outcomes(answers)] == ["fault"] * (len(behaviours) - 1) + ["valid"]


def test_all_threads_wait_as_long_as_the_endpoint_asks(connect: Endpoints):
    with RuleServer({"limited": 1.0}, retry_after="0.3") as server:
        client = connect(server.url, policy=RequestPolicy(send_retries=1, first_wait=0.0))
        with ThreadPoolExecutor(2) as pool:
            start = time.monotonic()
            first = pool.submit(client.ask, [view(1)], EXPLAIN)
            while not client._limiter._next:  # until the first was turned away
                time.sleep(0.005)
            second = pool.submit(client.ask, [view(2)], EXPLAIN)  # was never turned away itself
            assert isinstance(first.exception(), BadInput) and time.monotonic() - start >= 0.3
            assert second.exception() and time.monotonic() - start >= 0.6


def test_an_endpoint_that_asks_to_wait_for_hours_ends_the_work(connect: Endpoints):
    with RuleServer({"limited": 1.0}, retry_after="7200") as server, pytest.raises(BadInput, match="wait for 7200 s"):
        explained(connect(server.url))


def test_a_date_in_retry_after_means_a_wait_until_then(connect: Endpoints):
    date = "Fri, 01 Jan 2100 00:00:00 GMT"
    with RuleServer({"limited": 1.0}, retry_after=date) as server, pytest.raises(BadInput, match="asks to wait for"):
        explained(connect(server.url))


def test_calls_obey_the_limit_per_minute(connect: Endpoints):
    with RuleServer() as server, ThreadPoolExecutor(4) as pool:
        client, start = connect(server.url, policy=RequestPolicy(per_minute=600)), time.monotonic()
        list(pool.map(lambda i: client.ask([view(i)], EXPLAIN), range(5)))
        assert time.monotonic() - start >= 0.4


def test_an_unreachable_endpoint_ends_the_work_instead_of_failing_every_feature(connect: Endpoints, answers: AnswerCache):
    with RuleServer() as server:
        url = server.url
    with pytest.raises(
        BadInput, match=r"'rule' does not answer: 127\.0\.0\.1, port [0-9]+, does not accept a connection: Connection refused"
    ):
        explained(connect(url))


def test_a_failed_question_does_not_end_the_work_but_eight_in_a_row_do(connect: Endpoints, answers: AnswerCache):
    with RuleServer({"broken": 1.0}) as server:
        client = connect(server.url, policy=RequestPolicy(send_retries=0))
        server.behaviours.clear()
        explained(client)
        server.behaviours["broken"] = 1.0
        for number in range(7):
            with pytest.raises(NoAnswer, match="broken by"):
                client.ask([view(number)], EXPLAIN)
        with pytest.raises(BadInput, match="does not answer"):
            client.ask([view(7)], EXPLAIN)


def test_answers_are_stripped_of_escapes_and_cut_to_length(connect: Endpoints):
    with RuleServer({"hostile": 1.0}) as server:
        answer = explained(connect(server.url))
    assert answer.common_pattern == f"<img src=x onerror=alert(1)>areas in {code(3)}</b>"
    assert len(ExplanationAnswer(pattern_descriptions=["long " * 999], common_pattern="x").pattern_descriptions[0]) <= 300


def test_costs_are_counted_and_a_budget_is_never_exceeded(connect: Endpoints):
    price = (1e6, 0.0)  # one for each token
    with RuleServer() as server:
        unlimited = connect(server.url, policy=RequestPolicy(price=price))
        explained(unlimited)
        cost = unlimited.spending.cost
        assert cost == unlimited.spending.tokens_in > 500
        # The spending of an earlier run counts.
        with pytest.raises(OutOfBudget, match="run the same command with a larger --budget"):
            limited = connect(server.url, policy=RequestPolicy(price=price, budget=1.5 * cost))
            assert explained(limited)
            limited.ask([view(1)], EXPLAIN)
        assert len(server.served) == 1


def test_a_cost_reported_by_the_endpoint_replaces_the_price():
    assert RequestPolicy(price=(5.0, 10.0)).cost(TokenUsage(100, 20)) == pytest.approx(0.0007)
    assert RequestPolicy(price=(5.0, 10.0)).cost(TokenUsage(100, 20, 0.25)) == 0.25


def test_a_dry_run_counts_questions_that_are_not_cached_and_sends_nothing(connect: Endpoints, answers: AnswerCache):
    with RuleServer() as server:
        explained(connect(server.url))
        policy = RequestPolicy(price=(10.0, 0.0), image_tokens=1000)
        endpoint = EndpointBackend(server.url, MODEL, ApiKey("", ""))
        endpoint.close()  # nothing is sent
        dry_client = CachedClient(endpoint, answers, policy, dry_run=True)
        assert dry_client.ask(VIEWS, EXPLAIN).common_pattern == f"areas in {code(3)}"
        for number in (1, 2):
            dry_client.ask([view(number)], EXPLAIN)
        assert dry_client.cached + dry_client.spending.calls == 3 and dry_client.cached == 1
        assert dry_client.spending.calls == 2 and dry_client.spending.cost > 2 * 1000 * 10 / 1e6
        assert len(server.served) == 1


def test_a_key_goes_to_the_endpoint_and_nowhere_else(
    connect: Endpoints, answers: AnswerCache, capsys: pytest.CaptureFixture[str]
):
    with RuleServer({"broken": 1.0}) as server:  # its errors repeat the key
        with pytest.raises(BadInput) as caught:
            explained(connect(server.url, SECRET, RequestPolicy(send_retries=2, first_wait=0.0)))
        assert server.headers[0]["authorization"] == f"Bearer {SECRET}"
    message = "".join(traceback.format_exception(caught.value)) + repr(ApiKey(SECRET, "$NAME"))
    out, err = capsys.readouterr()
    files = b"".join(path.read_bytes() for path in answers.path.parent.iterdir())
    assert "broken by Bearer [key]" in message
    assert SECRET not in message + out + err and SECRET.encode() not in files


def test_a_key_sent_over_plain_http_to_another_machine_causes_a_warning():
    with pytest.warns(UserWarning, match="unencrypted"):
        EndpointBackend("http://example.invalid/v1", MODEL, ApiKey(SECRET, "")).close()


def test_a_waiting_thread_stops_with_the_client(connect: Endpoints):
    with RuleServer({"limited": 1.0}, retry_after="60") as server:
        client = connect(server.url)
        errors: list[BaseException] = []

        def ask() -> None:
            try:
                explained(client)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        time.sleep(0.2)
        client.stop()
        thread.join(5)
    assert [type(error).__name__ for error in errors] == ["RequestsStopped"]


@pytest.mark.parametrize("lacks", [["temperature"], ["response_format", "max_tokens"]])
def test_a_parameter_that_an_endpoint_does_not_support_is_sent_only_once(connect: Endpoints, lacks: list[str]):
    with RuleServer(lacks=lacks) as server:
        client = connect(server.url)
        assert explained(client).common_pattern == f"areas in {code(3)}"
        assert client.ask([view(4)], judge_instruction("x")).score == 0
        assert len(server.served) == 2 and client.spending.calls == 2


def test_a_wrong_key_ends_the_work_at_once_and_is_not_printed(connect: Endpoints):
    with (
        RuleServer(key="right") as server,
        pytest.raises(BadInput, match="does not serve 'rule' with the API key from a test") as caught,
    ):
        explained(connect(server.url, SECRET))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ['{"score": 0.5}', 'Sure!\n```json\n{"score": 0.5, "why": "it is"}\n```', ' {"score": "0.5"} '],
)
def test_an_answer_is_found_among_other_words(text: str):
    assert parse_answer(text, JudgementAnswer).score == 0.5


@pytest.mark.parametrize(
    "text", ['{"score": NaN}', '{"score": 1.01}', '{"score": -0.1}', '{"score": [1]}', '{"s": 1}', "0.5", "{}"]
)
def test_an_invalid_score_is_rejected(text: str):
    with pytest.raises(MalformedAnswer):
        parse_answer(text, JudgementAnswer)


def test_a_question_about_presence_without_an_answer_ends_the_work_before_more_is_paid(connect: Endpoints):
    questions = [PresenceQuestion(Image.new("RGB", (8, 8), (i, 0, 0)), None, "red", "something") for i in range(60)]
    with RuleServer() as server:
        assert len(ask_presence(connect(server.url), questions[:5], connections=2)) == 5
        server.behaviours["refusal"] = 1.0
        client = connect(server.url, policy=RequestPolicy(answer_retries=0))
        with pytest.raises(BadInput, match="did not answer whether image 6 of 60 shows 'red': refused"):
            ask_presence(client, questions, connections=2)
        assert len(server.served) < 5 + 10
