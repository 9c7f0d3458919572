"""A client that asks a backend under a policy: with cached answers, retries, a rate limit and a budget."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Lock
from typing import NamedTuple, TypeVar, final

import torch
from PIL import Image

from difflex.errors import BadInput
from difflex.explanation.answers import AnswerCache
from difflex.explanation.backends import RefusedAnswer, RejectedRequest, TransportFault, UnusableEndpoint, VLMBackend
from difflex.explanation.questions import (
    FailedCall,
    ImageView,
    Instruction,
    MalformedAnswer,
    PresenceAnswer,
    TokenUsage,
    VLMAnswer,
    content_key,
    parse_answer,
    presence_instruction,
)
from difflex.explanation.requests import CallBudget, RateLimiter, RequestPolicy, Spending
from difflex.files import folder_lock
from difflex.records import Shot

MAX_FAILURES = 8
"""Questions in a row, over all threads, that may fail before the endpoint is blamed."""
MIN_SIDE = 256
"""Small images are enlarged until their shorter side has this many pixels."""
A = TypeVar("A", bound=VLMAnswer)


class NoAnswer(Exception):
    """A question without a valid answer; its text is the reason."""


@final
class CachedClient:
    """A client that asks a backend and caches its answers; threads share it."""

    def __init__(
        self,
        backend: VLMBackend,
        answers: AnswerCache,
        policy: RequestPolicy = RequestPolicy(),  # noqa: B008 (a constant)
        *,
        dry_run: bool = False,
    ) -> None:
        """A client with `dry_run` sends nothing: it counts calls and returns examples for answers that are not cached."""
        self.name = backend.name
        self._backend, self._policy, self._dry_run = backend, policy, dry_run
        # In a dry run images are drawn, which takes time, only if their answers may be cached.
        self._answers = answers if backend.is_costly and not (dry_run and answers.is_empty) else None
        self._limiter = RateLimiter(policy)
        self._budget = CallBudget(policy.budget, self._answers.cost(backend.name) if self._answers else 0.0)
        self._lock, self._key_locks = Lock(), dict[str, Lock]()
        self._failures, self._has_answered = 0, False
        self.cached = 0
        """Number of answers that came from the cache."""
        self.spending = Spending()
        """What the calls of this client took, or would take in a dry run."""

    def stop(self) -> None:
        """Send no further call; threads that wait raise an exception, calls on their way finish."""
        self._limiter.stop()

    def unrecorded(self, keys: Sequence[str]) -> Spending:
        """Return what the calls for `keys` took that is not recorded in a book yet."""
        return self._answers.unrecorded(keys) if self._answers else Spending()

    def mark_recorded(self, keys: Sequence[str]) -> None:
        """Mark the calls for `keys` as recorded in a book."""
        if self._answers:
            self._answers.mark_recorded(keys)

    def ask(self, views: Sequence[ImageView], instruction: Instruction[A], keys: list[str] | None = None) -> A:
        """Return the answer, or raise `NoAnswer`; append the question's content key to `keys`.

        A question with a valid answer is not sent again, even if several threads ask it at once.
        """
        if self._answers is None:
            return self._request("", views, instruction)
        key = content_key(self.name, views, instruction)
        if keys is not None:
            keys.append(key)
        with self._lock:
            key_lock = self._key_locks.setdefault(key, Lock())
        with key_lock:
            text = self._answers.get(key)
            if text is None:
                return self._request(key, views, instruction)
            with self._lock:
                self.cached += 1
            return instruction.schema.model_validate_json(text)

    def _request(self, key: str, views: Sequence[ImageView], instruction: Instruction[A]) -> A:
        """Ask until the answer is valid, each time with what was wrong with the last one."""
        if self._dry_run:
            usage = self._policy.estimate(len(views), instruction)
            self._spend(Spending(1, usage.tokens_in, usage.tokens_out, self._policy.cost(usage)))
            return instruction.schema.model_validate_json(instruction.schema.EXAMPLE)
        objection = reason = ""
        for _ in range(1 + self._policy.answer_retries):
            try:
                return self._send(key, views, instruction, objection)
            except (MalformedAnswer, RefusedAnswer) as error:
                reason = f"{error.outcome}: {error}"
            objection = f"Your last answer could not be used ({reason}). Answer again, as JSON of the requested form."
        raise NoAnswer(reason)

    def _send(self, key: str, views: Sequence[ImageView], instruction: Instruction[A], objection: str) -> A:
        """Send a call again until there is a reply."""
        reason, attempts = "", 1 + self._policy.send_retries
        for failures in range(1, attempts + 1):
            self._limiter.wait()
            try:
                return self._call(key, views, instruction, objection)
            except RejectedRequest as error:
                raise self._failure(f"rejected: {error}", MAX_FAILURES) from None
            except TransportFault as error:
                reason = str(error)
                if isinstance(error, UnusableEndpoint) and not self._has_answered:
                    raise self._failure(reason, 1) from None
                if failures < attempts:
                    self._limiter.back_off(reason, failures, error.retry_after)
        raise self._failure(f"{reason} ({attempts} times)", MAX_FAILURES if self._has_answered else 1)

    def _call(self, key: str, views: Sequence[ImageView], instruction: Instruction[A], objection: str) -> A:
        """Send one call; charge and record it, whatever its outcome."""
        estimate = self._policy.estimate(len(views), instruction)
        reserved, start = self._policy.cost(estimate), time.monotonic()
        if self._answers is not None:
            self._answers.check_space()
        self._budget.reserve(reserved)
        usage, outcome, text = TokenUsage(0, 0, 0.0), "interrupted", None
        try:
            reply = self._backend.reply(views, instruction, objection)
            usage, self._failures, self._has_answered = reply.usage or estimate, 0, True
            answer = parse_answer(self._backend.redact(reply.text), instruction.schema)
            # Once more, as a key may have appeared when invisible characters were taken out.
            text = self._backend.redact(answer.model_dump_json())
            outcome = "valid"
            return instruction.schema.model_validate_json(text)
        except FailedCall as error:
            error.args = (self._backend.redact(str(error)),)
            outcome = f"{error.outcome}: {error}"
            if isinstance(error, RefusedAnswer):
                usage, self._failures, self._has_answered = error.usage or estimate, 0, True
            raise
        finally:
            cost = self._policy.cost(usage)
            self._budget.settle(reserved, cost)
            spending = Spending(1, usage.tokens_in, usage.tokens_out, cost, time.monotonic() - start)
            if self._answers is not None:
                self._answers.add(key, self.name, outcome, spending, text)
            self._spend(spending)

    def _failure(self, reason: str, limit: int) -> Exception:
        """Return the exception for a failed question; the one after `limit` failures in a row ends the whole work."""
        self._failures += 1
        if self._failures < limit:
            return NoAnswer(reason)
        return BadInput(f"'{self.name}' does not answer: {reason}. Fix that and run the same command again to continue.")

    def _spend(self, spending: Spending) -> None:
        with self._lock:
            self.spending += spending


@contextmanager
def open_answers(folder: Path) -> Iterator[AnswerCache]:
    """Open the cache of answers in `folder`, after a check that it can be written; no other process can write meanwhile."""
    with folder_lock(folder), closing(AnswerCache(folder / "answers.sqlite")) as answers:
        yield answers


@contextmanager
def open_client(
    backend: VLMBackend,
    folder: Path,
    policy: RequestPolicy = RequestPolicy(),  # noqa: B008 (a constant)
    *,
    dry_run: bool = False,
) -> Iterator[CachedClient]:
    """Open a client whose answers are cached in `folder`; other processes cannot write there meanwhile."""
    with open_answers(folder) as answers:
        yield CachedClient(backend, answers, policy, dry_run=dry_run)


class PresenceQuestion(NamedTuple):
    """Whether an image shows a concept."""

    image: Image.Image
    part: Image.Image | None
    """The part of the image that should show the concept; None for the whole image."""
    concept: str
    rest: str
    """What the image shows apart from the concept."""


def ask_presence(client: CachedClient, questions: Sequence[PresenceQuestion], *, connections: int = 16) -> list[PresenceAnswer]:
    """Ask about several images at once; a question that gets no answer raises an error, and the client sends nothing more."""

    def ask(number: int) -> PresenceAnswer:
        question = questions[number]
        images = [image for image in (question.image, question.part) if image is not None]
        instruction = presence_instruction(question.concept, question.rest, question.part is not None)
        try:
            return client.ask([_plain_view(image) for image in images], instruction)
        except NoAnswer as error:
            raise BadInput(
                f"The VLM did not answer whether image {number + 1} of {len(questions)} shows '{question.concept}': {error}. "
                "Run the same command again; answers are cached."
            ) from None

    threads = ThreadPoolExecutor(connections, thread_name_prefix="asking")
    try:
        return list(threads.map(ask, range(len(questions))))
    except BaseException:
        client.stop()  # no further question is paid
        raise
    finally:
        threads.shutdown(cancel_futures=True)


def _plain_view(image: Image.Image) -> ImageView:
    times = max(1, -(-MIN_SIDE // min(image.size)))
    enlarged = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    shot = Shot(model="", pixels=(image.height, image.width), steps=1, guidance=0.0)
    return ImageView(draw=lambda: enlarged, shot=shot, highlight=torch.ones(1, 1))
