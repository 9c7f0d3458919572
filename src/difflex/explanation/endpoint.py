"""Any OpenAI-compatible endpoint as a backend: Gemini, OpenAI, OpenRouter, vLLM, Ollama and others offer one."""

from __future__ import annotations

import base64
import email.utils
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, final
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError

from difflex.errors import BadInput, MissingExtra
from difflex.explanation.backends import BackendReply, RefusedAnswer, RejectedRequest, TransportFault, VLMBackend
from difflex.explanation.questions import ImageView, Instruction, TokenUsage, VLMAnswer, cleaned, form


@final
class ApiKey:
    """A secret: it shows itself to nobody who does not ask for it by name."""

    def __init__(self, secret: str, told: str) -> None:
        """`told` says where it is from."""
        self._secret, self._told = secret, told

    @classmethod
    def found(cls, file: Path | None, variable: str, environment: Mapping[str, str] = os.environ) -> ApiKey:
        """The key in `file`, or else in the environment's `variable`; an empty one where there is none, as for local servers."""
        if file is None:
            return cls(environment.get(variable, "").strip(), f"${variable}")
        try:
            lines = file.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(
                f"The key file {file} cannot be read ({type(error).__name__}). Name a text file of one line."
            ) from None
        if len(lines) != 1:
            raise BadInput(f"The key file {file} holds {len(lines)} words. Write the key into it and nothing else.")
        return cls(lines[0], str(file))

    @property
    def is_empty(self) -> bool:
        """Whether there is none."""
        return not self._secret

    def reveal(self) -> str:
        """The secret itself."""
        return self._secret

    def hidden(self, text: str) -> str:
        """`text`, in which the secret is blotted out: an endpoint may well repeat what it was sent."""
        return text.replace(self._secret, "[key]") if self._secret else text

    def __repr__(self) -> str:
        return f"Key(from {self._told})"


if TYPE_CHECKING:
    import httpx2
    import openai


LARGEST = 2**20
"""Bytes of an answer; who sends more is not answering."""
REASON = 300
"""Characters of a stranger's error that are told on."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
CONNECT = 15.0
"""Seconds to reach an endpoint; the rest of the time is for its answer."""


class _ChatMessage(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _ChatChoice(BaseModel):
    message: _ChatMessage
    finish_reason: str | None = None


class _ChatUsage(BaseModel):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None


class _ChatCompletion(BaseModel):
    choices: list[_ChatChoice] | None = None
    usage: _ChatUsage | None = None


@final
class EndpointBackend(VLMBackend):
    """A model behind an OpenAI-compatible address; threads share one."""

    def __init__(
        self, url: str, model: str, key: ApiKey, *, timeout: float = 120.0, longest: int = 2048, connections: int = 16
    ) -> None:
        """`timeout`: seconds that a whole call may take; `longest`: tokens that an answer may have, thoughts included."""
        self._model, self._key, self._timeout, self._lock = model, key, timeout, Lock()
        self._client = _client(_checked(url, key), key, connections, timeout)
        # What not every endpoint takes: left out for good once it complains.
        self._wishes: dict[str, object] = {"response_format": None, "temperature": 0, "max_tokens": longest}

    @property
    def name(self) -> str:
        """The model, whoever serves it: a server that has moved is not paid again."""
        return self._model

    def see(
        self, views: Sequence[ImageView], instruction: Instruction, schema: type[VLMAnswer], objection: str = ""
    ) -> BackendReply:
        """What the model answers."""
        import openai

        content = _content(views, instruction, objection)
        while True:
            wishes = self._wishes
            try:
                return self._reply(self._sent(content, _wished(wishes, schema)))
            except openai.APIStatusError as error:
                if error.status_code == 400 and self._forgone(wishes, str(error)):
                    continue
                raise self._judged(error) from None

    def close(self) -> None:
        """Nothing; its connections are closed."""
        self._client.close()

    def _sent(self, content: list[dict[str, object]], wishes: dict[str, object]) -> bytes:
        """The body of the answer, complete and within time and size."""
        import httpx2
        import openai

        until = time.monotonic() + self._timeout
        send, body = self._client.chat.completions.with_streaming_response.create, bytearray()
        try:
            # As a part of the body that the client leaves alone: it looks at every item of what it is given by name.
            body_too = {"messages": [{"role": "user", "content": content}], **wishes}
            with send(model=self._model, messages=[], extra_body=body_too) as response:
                for part in response.iter_bytes():
                    body += part
                    if time.monotonic() > until:  # some send blanks while they think: each in time, the whole for ever
                        raise TransportFault(f"no whole answer within {self._timeout:g} s")
                    if len(body) > LARGEST:
                        raise TransportFault(f"an answer of more than {LARGEST} bytes")
        except (openai.APITimeoutError, httpx2.TimeoutException):
            raise TransportFault(f"no answer within {self._timeout:g} s") from None
        except (openai.APIConnectionError, httpx2.HTTPError) as error:
            raise TransportFault(self._told(f"the connection failed: {error.__cause__ or error}")) from None
        return bytes(body)

    def _reply(self, body: bytes) -> BackendReply:
        try:
            completion = _ChatCompletion.model_validate_json(body)
        except ValidationError:
            raise TransportFault(self._told(f"the body is no completion: {body.decode(errors='replace')}")) from None
        usage = completion.usage and TokenUsage(
            max(0, completion.usage.prompt_tokens), max(0, completion.usage.completion_tokens), _cost(completion.usage)
        )
        if not completion.choices:
            raise TransportFault(self._told(f"no choice in the body: {body.decode(errors='replace')}"))
        choice = completion.choices[0]
        if choice.message.refusal or choice.finish_reason == "content_filter":
            raise RefusedAnswer(self._told(choice.message.refusal or "the content filter stopped the answer"), usage)
        return BackendReply(choice.message.content or "", usage)

    def _forgone(self, wishes: dict[str, object], complaint: str) -> bool:
        """Whether a wish that `complaint` speaks of is given up."""
        blamed = next((name for name in wishes if name in complaint), None)
        if blamed is None:
            return False
        with self._lock:
            left = {name: value for name, value in self._wishes.items() if name != blamed}
            if blamed == "max_tokens":  # as those that think before they answer call it
                left["max_completion_tokens"] = wishes[blamed]
            self._wishes = left
        return True

    def _judged(self, error: openai.APIStatusError) -> Exception:
        """What an error status means for the call."""
        status, told = error.status_code, self._told(str(error))
        if status in (401, 402, 404) or "insufficient_quota" in told:
            return BadInput(f"The endpoint does not serve '{self._model}' to {self._key}: {told}. Mend that and run again.")
        if status in (408, 409, 425, 429) or status >= 500:
            return TransportFault(told, _wait(error.response.headers))
        return RejectedRequest(told)

    def _told(self, reason: str) -> str:
        return self._key.hidden(cleaned(self._key.hidden(reason), REASON))


def _checked(url: str, key: ApiKey) -> str:
    """`url`, which a key may be sent to."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadInput(f"'{parts.scheme}:...' is no address of an endpoint. Write it as in https://openrouter.ai/api/v1.")
    if parts.username or parts.password or parts.query:
        raise BadInput(
            f"The address of {parts.hostname} carries a name, a password or a query, which would be seen in many places. Put the "
            "key into the environment or a key file."
        )
    if parts.scheme == "http" and parts.hostname not in LOOPBACK and not key.is_empty:
        warnings.warn(f"The key goes to {parts.hostname} unencrypted, as its address begins with http.", stacklevel=3)
    return url


def _client(url: str, key: ApiKey, connections: int, timeout: float) -> openai.OpenAI:
    try:
        import httpx2
        import openai
    except ImportError as error:
        raise MissingExtra.of("openai", "vlm", "Asking a model behind an address") from error
    times = httpx2.Timeout(timeout, connect=min(CONNECT, timeout))
    http = openai.DefaultHttpxClient(
        timeout=times, limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
    )
    # Its own repeats are off: ours are one policy, which waits as it is told, keeps count, and spends no more than it may.
    return openai.OpenAI(base_url=url, api_key=key.reveal() or "none", max_retries=0, timeout=times, http_client=http)


def _content(views: Sequence[ImageView], instruction: Instruction, objection: str) -> list[dict[str, object]]:
    content: list[dict[str, object]] = [{"type": "text", "text": instruction.text}]
    for number, view in enumerate(views, 1):
        address = f"data:image/png;base64,{base64.b64encode(view.png).decode()}"
        content += [{"type": "text", "text": f"Image {number}:"}, {"type": "image_url", "image_url": {"url": address}}]
    if objection:
        content.append({"type": "text", "text": objection})
    return content


def _wished(wishes: dict[str, object], schema: type[VLMAnswer]) -> dict[str, object]:
    said = {"type": "json_schema", "json_schema": {"name": schema.__name__.lower(), "strict": True, "schema": form(schema)}}
    return {name: said if name == "response_format" else value for name, value in wishes.items()}


def _cost(usage: _ChatUsage) -> float | None:
    return usage.cost if usage.cost is not None and usage.cost >= 0 else None


def _wait(headers: httpx2.Headers) -> float | None:
    """The seconds that an endpoint asks to be left alone: a number, or until a date."""
    said = headers.get("retry-after", "")
    if said.replace(".", "", 1).isdecimal():
        return float(said)
    date = email.utils.parsedate_tz(said)
    return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else None
