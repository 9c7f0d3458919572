"""OpenAI-compatible endpoints as a backend: Gemini, OpenAI, OpenRouter, vLLM, Ollama and others."""

from __future__ import annotations

import base64
import email.utils
import json
import math
import time
import warnings
from collections.abc import Sequence
from threading import Lock
from typing import TYPE_CHECKING, final
from urllib.parse import urlsplit

from pydantic import BaseModel, JsonValue, ValidationError

from difflex.errors import BadInput, MissingExtra
from difflex.explanation.backends import (
    BackendReply,
    RefusedAnswer,
    RejectedRequest,
    TransportFault,
    UnusableEndpoint,
    VLMBackend,
)
from difflex.explanation.keys import ApiKey
from difflex.explanation.questions import ImageView, Instruction, TokenUsage, VLMAnswer, answer_schema, clean_text

if TYPE_CHECKING:
    from difflex.explanation.transport import HttpAnswer, HttpTransport

__all__ = ["ApiKey", "EndpointBackend"]

MAX_REASON = 300
"""Characters of an endpoint's error that are shown."""
MAX_NAME = 200
"""Characters of the name of a model."""
MAX_TIMEOUT = 86_400.0
MAX_CONNECTIONS = 1000
MAX_COST, MAX_TOKENS = 1e4, 10**8
"""The most that a call is believed to have cost, and to have taken."""


class _ChatMessage(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _ChatChoice(BaseModel):
    message: _ChatMessage
    finish_reason: str | None = None


class _ChatCompletion(BaseModel):
    choices: list[_ChatChoice] | None = None
    usage: JsonValue = None
    """Of any form: an answer that is paid is not dropped because its usage is odd."""


@final
class EndpointBackend(VLMBackend):
    """A model behind an OpenAI-compatible address; threads share it."""

    def __init__(
        self, url: str, model: str, key: ApiKey, *, timeout: float = 120.0, max_tokens: int = 2048, connections: int = 16
    ) -> None:
        """`timeout`: seconds for a whole call; `max_tokens`: longest answer, reasoning included."""
        if not (0 < timeout <= MAX_TIMEOUT and 1 <= connections <= MAX_CONNECTIONS and max_tokens >= 1):
            raise BadInput(
                f"A timeout of {timeout:g} s, {connections} connections and answers of {max_tokens} tokens allow no request. "
                f"Give a timeout above 0 and up to {MAX_TIMEOUT:g} s, 1 to {MAX_CONNECTIONS} connections and 1 or more tokens."
            )
        if not model.isprintable() or not 0 < len(model.strip()) <= MAX_NAME:
            raise BadInput(f"The name of a model has 1 to {MAX_NAME} printable characters, not {clean_text(ascii(model), 40)}.")
        self.name = model  # the same at every address: a server that moves does not cost its answers again
        self._url, self._key, self._lock = url, key, Lock()
        self._transport = _open_transport(url, key, timeout, connections)
        # Not every endpoint knows these parameters: one that it complains about is not sent again.
        self._parameters: dict[str, object] = {"response_format": None, "temperature": 0, "max_tokens": max_tokens}

    @property
    def description(self) -> str:
        return f"{self.name} at {self._url}"

    def reply(self, views: Sequence[ImageView], instruction: Instruction[VLMAnswer], objection: str = "") -> BackendReply:
        """Return the model's reply."""
        message = {"role": "user", "content": _content(views, instruction, objection)}
        while True:
            parameters = self._parameters
            request = {"model": self.name, "messages": [message], **_with_schema(parameters, instruction.schema)}
            try:
                answer = self._transport.post(json.dumps(request).encode())
            except TransportFault as error:
                raise type(error)(self._key.redact(str(error))) from None
            text = self._key.redact(answer.body.decode(errors="replace"))
            if 200 <= answer.status < 300:
                return self._parse(text)
            if answer.status != 400 or not self._drop_parameter(parameters, text):
                raise self._failure(answer, text)

    def redact(self, text: str) -> str:
        """Return `text` without the API key."""
        return self._key.redact(text)

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    def _parse(self, text: str) -> BackendReply:
        try:
            completion = _ChatCompletion.model_validate_json(text)
        except ValidationError:
            raise UnusableEndpoint(self._reason(f"not a completion: {text}")) from None
        if not completion.choices:
            raise TransportFault(self._reason(f"a completion without choices: {_message(text)}"))
        usage, choice = _token_usage(completion.usage), completion.choices[0]
        if choice.message.refusal or choice.finish_reason == "content_filter":
            reason = choice.message.refusal or "the content filter stopped the answer"
            raise RefusedAnswer(self._reason(reason), usage=usage)
        return BackendReply(choice.message.content or "", usage)

    def _reason(self, text: str) -> str:
        """Return `text` as a line to show; redacted again, as a key may have appeared when invisible letters were taken out."""
        return self._key.redact(clean_text(self._key.redact(text), MAX_REASON))

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

    def _failure(self, answer: HttpAnswer, text: str) -> Exception:
        """Return the exception for a status that is not a success, with the body `text`."""
        status, message = answer.status, _message(text)
        reason = self._reason(f"status {status}: {message}" if message.strip() else f"status {status}")
        if 300 <= status < 400:
            return BadInput(
                f"The endpoint sends requests on to {self._key.redact(_place(answer.headers.get('location', '')))}. Images are "
                "not sent to another address than the one you named. If you trust it, name it."
            )
        if status in (401, 402, 404, 405) or "insufficient_quota" in text:
            return BadInput(f"The endpoint does not serve '{self.name}' with {self._key}: {reason}. Fix that and run again.")
        if status in (408, 409, 425, 429) or status >= 500:
            return TransportFault(reason, retry_after=_retry_after(answer.headers.get("retry-after", "")))
        return RejectedRequest(reason)


def _open_transport(url: str, key: ApiKey, timeout: float, connections: int) -> HttpTransport:
    try:
        from difflex.explanation.transport import LOOPBACK, HttpTransport, split_address
    except ImportError as error:
        raise MissingExtra.of("httpcore2", "vlm", "A VLM endpoint") from error
    parts = split_address(url)
    if parts.scheme == "http" and parts.hostname not in LOOPBACK and key.secret:
        warnings.warn(f"The key goes to {parts.hostname} unencrypted, as its address begins with http.", stacklevel=3)
    headers = {"Authorization": f"Bearer {key.secret}"} if key.secret else {}
    return HttpTransport(url, headers, timeout=timeout, connections=connections)


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


def _token_usage(usage: JsonValue) -> TokenUsage | None:
    """Return the usage that an endpoint reports; None for one that cannot be true, which is then estimated."""
    if not isinstance(usage, dict):
        return None
    counts = (usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0))
    tokens_in, tokens_out = (int(n) if isinstance(n, int | float) and 0 <= n <= MAX_TOKENS else None for n in counts)
    cost = usage.get("cost")
    if not isinstance(cost, int | float) or not 0 <= cost <= MAX_COST:
        cost = None
    return None if tokens_in is None or tokens_out is None else TokenUsage(tokens_in, tokens_out, cost)


def _retry_after(value: str) -> float | None:
    """Return the seconds to wait in a Retry-After header, which is a number or a date; None for anything else."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = email.utils.parsedate_tz(value)
            seconds = email.utils.mktime_tz(date) - time.time() if date else math.nan
        except (ValueError, OverflowError):
            return None
        seconds = seconds if math.isnan(seconds) else max(0.0, seconds)
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def _message(text: str) -> str:
    """Return the message in the body of an error, or the whole body."""
    try:
        error = json.loads(text)["error"]
        message = error if isinstance(error, str) else error["message"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return text
    return message if isinstance(message, str) else text


def _place(location: str) -> str:
    """Return the address in a Location header without user name, password and query, as they may be secret."""
    try:
        parts = urlsplit(location)
        place = f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}" if parts.hostname else ""
    except ValueError:
        return "an address that cannot be read"
    return clean_text(f"{place}{parts.path}", MAX_REASON) or "an address that it does not name"
