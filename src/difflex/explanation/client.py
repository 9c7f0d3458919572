"""`CachedClient`: questions to a backend under one policy: from what was answered before, within pace and budget, and with patience."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import NamedTuple, TypeVar, final

from difflex.errors import BadInput
from difflex.explanation.backends import RefusedAnswer, RejectedRequest, TransportFault, VLMBackend
from difflex.explanation.questions import ImageView, Instruction, MalformedAnswer, TokenUsage, VLMAnswer, content_key, read
from difflex.explanation.requests import AnswerCache, CallBudget, RateLimiter, RetryPolicy, Spending, TokenPrice, expected

__all__ = ["AnswerBatch", "CachedClient", "DryRunClient", "NoAnswer", "RequestPolicy", "VLMClient"]

HOPELESS = 8
"""Questions in a row, over all threads, that may come to nothing before the endpoint is held to be the reason."""
A = TypeVar("A", bound=VLMAnswer)


@dataclass(frozen=True, kw_only=True)
class RequestPolicy:
    """On what terms a backend is asked."""

    per_minute: float | None = None
    """Calls; None for no limit."""
    price: TokenPrice = field(default_factory=TokenPrice)
    """For endpoints that do not say what a call cost."""
    budget: float | None = None
    """What all calls to this backend may cost together, those of earlier runs that the same file of answers tells of included, so
    that a run that is killed does not begin with a fresh one; None for no limit."""
    image_tokens: int = 300
    """That an image is taken for, where an endpoint does not count, and before it does."""
    answer_tokens: int = 150
    """That an answer is taken for."""
    patience: RetryPolicy = field(default_factory=RetryPolicy)


class NoAnswer(Exception):
    """A question to which no valid answer came; its text says why."""


class AnswerBatch(NamedTuple):
    """What was asked, all questions together."""

    answers: int = 0
    """Valid ones."""
    found: int = 0
    """Of these, how many had been answered before."""
    spent: Spending = Spending()
    """By the calls of now."""


class VLMClient(ABC):
    """Who is asked."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Whose the answers are."""

    @abstractmethod
    def see(self, views: Sequence[ImageView], instruction: Instruction, schema: type[A], keys: list[str]) -> A:
        """The answer; `NoAnswer` where none came. What was asked is noted in `keys`, by its hash."""


@final
class CachedClient(VLMClient):
    """Who asks a backend; threads share one."""

    def __init__(self, backend: VLMBackend, answers: AnswerCache, terms: RequestPolicy = RequestPolicy()) -> None:
        """`answers` are kept only of a backend that is worth it."""
        self._backend, self._terms = backend, terms
        self._answers = answers if backend.is_costly else None
        self._pace, self._budget = (
            RateLimiter(terms.per_minute, terms.patience),
            CallBudget(terms.budget, self._answers.cost(backend.name) if self._answers else 0.0),
        )
        self._lock, self._busy = Lock(), dict[str, Lock]()
        self._in_vain, self._has_answered = 0, False
        self.asked = AnswerBatch()

    @property
    def name(self) -> str:
        """The backend's."""
        return self._backend.name

    def stop(self) -> None:
        """Nothing; calls under way end, nobody waits, no further one is sent."""
        self._pace.stop()

    def spent(self, keys: Sequence[str]) -> Spending:
        """What the calls for `keys` took that is not booked yet."""
        return self._answers.spent(keys, unbooked=True) if self._answers else Spending()

    def book(self, keys: Sequence[str]) -> None:
        """Nothing; what the calls for `keys` took is told in a book."""
        if self._answers:
            self._answers.book(keys)

    def see(self, views: Sequence[ImageView], instruction: Instruction, schema: type[A], keys: list[str]) -> A:
        """The answer. What has a valid answer is not sent again, not even when two ask for the same at once."""
        if self._answers is None:
            return self._answer("", views, instruction, schema)
        key = content_key(self.name, views, instruction, schema)
        keys.append(key)
        with self._alone(key):
            found = self._answers.get(key)
            if found is None:
                return self._answer(key, views, instruction, schema)
            self._count(answers=1, found=1)
            return schema.model_validate_json(found)

    @contextmanager
    def _alone(self, key: str) -> Iterator[None]:
        with self._lock:
            busy = self._busy.setdefault(key, Lock())
        with busy:
            yield

    def _answer(self, key: str, views: Sequence[ImageView], instruction: Instruction, schema: type[A]) -> A:
        """An answer, asked again with what was wrong as long as it is none."""
        objection, wrong = "", ""
        for _ in range(1 + self._terms.patience.asked_again):
            try:
                return self._attempt(key, views, instruction, schema, objection)
            except (MalformedAnswer, RefusedAnswer) as error:
                wrong = f"{'refused' if isinstance(error, RefusedAnswer) else 'malformed'}: {error}"
            objection = f"Your last answer could not be used ({wrong}). Answer again, in JSON of the form asked for."
        raise NoAnswer(wrong)

    def _attempt(self, key: str, views: Sequence[ImageView], instruction: Instruction, schema: type[A], objection: str) -> A:
        """An answer, sent again as long as nothing comes back."""
        about = expected(views, instruction, self._terms.image_tokens, self._terms.answer_tokens)
        wrong, tries = "", 1 + self._terms.patience.sent_again
        for failures in range(1, tries + 1):
            self._pace.wait()
            try:
                return self._call(key, about, views, instruction, schema, objection)
            except RejectedRequest as error:
                raise self._vain(f"rejected: {error}", HOPELESS) from None
            except TransportFault as error:
                wrong = str(error)
                if failures < tries:
                    self._pace.after(wrong, failures, error.wait)
        raise self._vain(f"{wrong} ({tries} times)", HOPELESS if self._has_answered else 1)

    def _call(
        self, key: str, about: TokenUsage, views: Sequence[ImageView], instruction: Instruction, schema: type[A], objection: str
    ) -> A:
        """An answer to one call, which is charged and written down whatever comes of it."""
        reserved, began = self._terms.price.of(about), time.monotonic()
        self._budget.reserve(reserved)
        usage, outcome, told = None, "broken off", None
        try:
            reply = self._backend.see(views, instruction, schema, objection)
            usage, self._in_vain, self._has_answered = reply.usage or about, 0, True
            answer = read(reply.text, schema)
            outcome, told = "valid", answer.model_dump_json()
            return answer
        except RefusedAnswer as error:
            usage, outcome, self._in_vain, self._has_answered = error.usage or about, f"refused: {error}", 0, True
            raise
        except (MalformedAnswer, RejectedRequest, TransportFault) as error:
            outcome = f"{type(error).__name__.lower()}: {error}"
            raise
        finally:
            cost = self._terms.price.of(usage) if usage else 0.0
            self._budget.settle(reserved, cost)
            tokens = (usage.tokens_in, usage.tokens_out) if usage else (0, 0)
            spent = Spending(1, *tokens, cost, time.monotonic() - began)
            if self._answers is not None:
                self._answers.keep(key, self.name, outcome, spent, told)
            self._count(answers=int(told is not None), spent=spent)

    def _vain(self, reason: str, most: int) -> Exception:
        """What a question that came to nothing ends in: the whole work, if it is the last of `most` in a row."""
        self._in_vain += 1
        if self._in_vain < most:
            return NoAnswer(reason)
        return BadInput(f"'{self.name}' answers nothing: {reason}. Mend that and give the same command again to go on.")

    def _count(self, answers: int = 0, found: int = 0, spent: Spending = Spending()) -> None:  # noqa: B008 (a constant)
        with self._lock:
            self.asked = AnswerBatch(self.asked.answers + answers, self.asked.found + found, self.asked.spent.plus(spent))


@final
class DryRunClient(VLMClient):
    """Counts what would be asked, and sends nothing: what was answered before is answered, all else is imagined."""

    def __init__(self, backend: VLMBackend, answers: AnswerCache, terms: RequestPolicy = RequestPolicy()) -> None:
        self._name, self._terms, self._lock = backend.name, terms, Lock()
        # Images are drawn only where their hash may be known.
        self._answers = None if answers.is_empty else answers
        self.asked = AnswerBatch()

    @property
    def name(self) -> str:
        """The backend's."""
        return self._name

    def see(self, views: Sequence[ImageView], instruction: Instruction, schema: type[A], keys: list[str]) -> A:
        """An answer that was given before, or none that means anything."""
        found = self._answers and self._answers.get(content_key(self.name, views, instruction, schema))
        about = expected(views, instruction, self._terms.image_tokens, self._terms.answer_tokens)
        with self._lock:
            spent = Spending() if found else Spending(1, about.tokens_in, about.tokens_out, self._terms.price.of(about))
            self.asked = AnswerBatch(self.asked.answers + 1, self.asked.found + bool(found), self.asked.spent.plus(spent))
        return schema.model_validate_json(found or schema.imagined().model_dump_json())
