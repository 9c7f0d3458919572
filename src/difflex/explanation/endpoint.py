"""OpenAI-compatible endpoints as a backend: Gemini, OpenAI, OpenRouter, vLLM, Ollama and others."""

from __future__ import annotations

import base64
import email.utils
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, final
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError

from difflex.errors import BadInput, MissingExtra
from difflex.explanation.backends import BackendReply, RefusedAnswer, RejectedRequest, TransportFault, VLMBackend
from difflex.explanation.questions import ImageView, Instruction, TokenUsage, VLMAnswer, answer_schema, clean_text

if TYPE_CHECKING:
    import httpx2
    import openai

__all__ = ["ApiKey", "EndpointBackend"]

MAX_BYTES = 2**20
"""Longest body of an answer."""
MAX_REASON = 300
"""Characters of an endpoint's error that are shown."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
CONNECT_TIMEOUT = 15.0
"""Seconds to connect to an endpoint; the rest of the timeout is for its answer."""


@final
@dataclass(frozen=True, repr=False)
class ApiKey:
    """An API key; its `repr` does not contain the secret."""

    secret: str
    """Empty for no key."""
    source: str

    @classmethod
    def read(cls, file: Path | None, variable: str, environment: Mapping[str, str] = os.environ) -> ApiKey:
        """Read the key from `file`, or else from an environment variable; it may be empty there, as for local servers."""
        if file is None:
            return cls(environment.get(variable, "").strip(), f"${variable}")
        try:
            words = file.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(
                f"The key file {file} cannot be read ({type(error).__name__}). Name a text file of one line."
            ) from None
        if len(words) != 1:
            raise BadInput(f"The key file {file} has {len(words)} words. Write only the key into it.")
        return cls(words[0], str(file))

    def redact(self, text: str) -> str:
        """Return `text` without the secret, as endpoints may repeat it in errors."""
        return text.replace(self.secret, "[key]") if self.secret else text

    def __repr__(self) -> str:
        return f"ApiKey(from {self.source})"


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
    """A model behind an OpenAI-compatible address; threads share it."""

    def __init__(
        self, url: str, model: str, key: ApiKey, *, timeout: float = 120.0, max_tokens: int = 2048, connections: int = 16
    ) -> None:
        """`timeout`: seconds for a whole call; `max_tokens`: longest answer, reasoning included."""
        _check_address(url, key)
        self.name = model  # the same at every address: a server that moves does not cost its answers again
        self._key, self._timeout, self._lock = key, timeout, Lock()
        self._client = _open_client(url, key, connections, timeout)
        # Not every endpoint knows these parameters: one that it complains about is not sent again.
        self._parameters: dict[str, object] = {"response_format": None, "temperature": 0, "max_tokens": max_tokens}

    def reply(self, views: Sequence[ImageView], instruction: Instruction[VLMAnswer], objection: str = "") -> BackendReply:
        """Return the model's reply."""
        import openai

        content = _content(views, instruction, objection)
        while True:
            parameters = self._parameters
            body = {"messages": [{"role": "user", "content": content}], **_with_schema(parameters, instruction.schema)}
            try:
                return self._parse(self._send(body))
            except openai.APIStatusError as error:
                if error.status_code == 400 and self._drop_parameter(parameters, str(error)):
                    continue
                raise self._failure(error) from None

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _send(self, request: dict[str, object]) -> bytes:
        """Send a request and return the body of the answer, complete and within the limits of time and size."""
        import httpx2
        import openai

        deadline = time.monotonic() + self._timeout
        send, body = self._client.chat.completions.with_streaming_response.create, bytearray()
        try:
            # As extra_body, because the client inspects every item of its named arguments, which is slow for images.
            with send(model=self.name, messages=[], extra_body=request) as response:
                for part in response.iter_bytes():
                    body += part
                    if time.monotonic() > deadline:  # some endpoints send blanks while they wait, so no single read times out
                        raise TransportFault(f"no complete answer within {self._timeout:g} s")
                    if len(body) > MAX_BYTES:
                        raise TransportFault(f"an answer of more than {MAX_BYTES} bytes")
        except (openai.APITimeoutError, httpx2.TimeoutException):
            raise TransportFault(f"no answer within {self._timeout:g} s") from None
        except (openai.APIConnectionError, httpx2.HTTPError) as error:
            raise TransportFault(self._redact(f"the connection failed: {error.__cause__ or error}")) from None
        return bytes(body)

    def _parse(self, body: bytes) -> BackendReply:
        try:
            completion = _ChatCompletion.model_validate_json(body)
        except ValidationError:
            raise TransportFault(self._redact(f"not a completion: {body.decode(errors='replace')}")) from None
        if not completion.choices:
            raise TransportFault(self._redact(f"a completion without choices: {body.decode(errors='replace')}"))
        usage = completion.usage and _token_usage(completion.usage)
        choice = completion.choices[0]
        if choice.message.refusal or choice.finish_reason == "content_filter":
            raise RefusedAnswer(self._redact(choice.message.refusal or "the content filter stopped the answer"), usage=usage)
        return BackendReply(choice.message.content or "", usage)

    def _drop_parameter(self, parameters: dict[str, object], complaint: str) -> bool:
        """Drop the parameter that a complaint names; return whether it names one."""
        unsupported = next((name for name in parameters if name in complaint), None)
        if unsupported is None:
            return False
        with self._lock:
            remaining = {name: value for name, value in self._parameters.items() if name != unsupported}
            if unsupported == "max_tokens":  # reasoning models of OpenAI use another name
                remaining["max_completion_tokens"] = parameters["max_tokens"]
            self._parameters = remaining
        return True

    def _failure(self, error: openai.APIStatusError) -> Exception:
        """Return the exception for an error status."""
        status, reason = error.status_code, self._redact(str(error))
        if status in (401, 402, 404) or "insufficient_quota" in reason:
            return BadInput(f"The endpoint does not serve '{self.name}' to {self._key}: {reason}. Fix that and run again.")
        if status in (408, 409, 425, 429) or status >= 500:
            return TransportFault(reason, retry_after=_retry_after(error.response.headers))
        return RejectedRequest(reason)

    def _redact(self, reason: str) -> str:
        return self._key.redact(clean_text(self._key.redact(reason), MAX_REASON))


def _check_address(url: str, key: ApiKey) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadInput(f"'{parts.scheme}:...' is not the address of an endpoint. Write it as in https://openrouter.ai/api/v1.")
    if parts.username or parts.password or parts.query:
        raise BadInput(
            f"The address of {parts.hostname} contains a user name, a password or a query, which logs and errors would show. "
            "Put the key into the environment or a key file."
        )
    if parts.scheme == "http" and parts.hostname not in LOOPBACK and key.secret:
        warnings.warn(f"The key goes to {parts.hostname} unencrypted, as its address begins with http.", stacklevel=3)


def _open_client(url: str, key: ApiKey, connections: int, timeout: float) -> openai.OpenAI:
    try:
        import httpx2
        import openai
    except ImportError as error:
        raise MissingExtra.of("openai", "vlm", "A VLM endpoint") from error
    times = httpx2.Timeout(timeout, connect=min(CONNECT_TIMEOUT, timeout))
    http = openai.DefaultHttpxClient(
        timeout=times, limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
    )
    # The retries of this client are off: CachedClient retries by one policy that obeys Retry-After and the budget.
    return openai.OpenAI(base_url=url, api_key=key.secret or "none", max_retries=0, timeout=times, http_client=http)


def _content(views: Sequence[ImageView], instruction: Instruction[VLMAnswer], objection: str) -> list[dict[str, object]]:
    content: list[dict[str, object]] = [{"type": "text", "text": instruction.text}]
    for number, view in enumerate(views, 1):
        url = f"data:image/png;base64,{base64.b64encode(view.png).decode()}"
        content += [{"type": "text", "text": f"Image {number}:"}, {"type": "image_url", "image_url": {"url": url}}]
    if objection:
        content.append({"type": "text", "text": objection})
    return content


def _with_schema(parameters: dict[str, object], schema: type[VLMAnswer]) -> dict[str, object]:
    description = {"name": schema.__name__.lower(), "strict": True, "schema": answer_schema(schema)}
    form = {"type": "json_schema", "json_schema": description}
    return {name: form if name == "response_format" else value for name, value in parameters.items()}


def _token_usage(usage: _ChatUsage) -> TokenUsage:
    cost = usage.cost if usage.cost is not None and usage.cost >= 0 else None
    return TokenUsage(max(0, usage.prompt_tokens), max(0, usage.completion_tokens), cost)


def _retry_after(headers: httpx2.Headers) -> float | None:
    """Return the seconds to wait in a Retry-After header, which is a number or a date."""
    value = headers.get("retry-after", "")
    if value.replace(".", "", 1).isdecimal():
        return float(value)
    date = email.utils.parsedate_tz(value)
    return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else None
