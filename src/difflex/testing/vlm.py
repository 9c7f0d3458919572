"""A VLM that answers by rule behind a real OpenAI-compatible address on this machine, with the faults of real ones on request.

`python -m difflex.testing.vlm --latency 0.2` serves until its standard input ends.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import random
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from typing import Any, NamedTuple, final
from urllib.parse import quote

from PIL import Image

BEHAVIOURS = ("good", "hostile", "echoing", "malformed", "refusal", "limited", "broken", "hanging", "dripping", "truncated")
"""A good answer; one full of HTML and terminal escapes; one, or in turn a refusal, words or an error, that repeats the API key;
JSON of another form or none; a refusal; 429 with Retry-After; 500; no answer for long; one that arrives as single blanks; one
that breaks off."""
HOSTILE = "<img src=x onerror=alert(1)>\x1b[31m\x1b]0;title\x07\u202e{}\x1b[2J\u200b</b>"
"""Put around the words of a hostile answer."""
MALFORMED = (
    "I see a nice image.",
    '{"score": "very",',
    '{"score": 7, "common_pattern": "", "image": 0}',
    '{"score": null, "pattern_descriptions": "one", "image": "the third"}',
    "[]",
    "",
)
FORMS = {"explanation": '"common_pattern"', "score": '"score"', "presence": '"shows"'}
"""Forms of an answer, and the key of each that the instruction contains; the form of any other is `choice`."""

Rule = Callable[[Sequence[Image.Image], str, str], dict[str, Any]]
"""From images, the text of the request and the name of the answer's form to the answer."""


class ServedCall(NamedTuple):
    """A call to the server."""

    request: str
    """The hash of model, images, instruction and form of the answer: the same for every repetition."""
    behaviour: str


def answer_by_colour(images: Sequence[Image.Image], text: str, form: str) -> dict[str, Any]:
    """Answer about the commonest colour of each image, written as in #0f8000."""
    colours = [_colour(image) for image in images]
    common = Counter(colours).most_common(1)[0][0]
    if form == "explanation":
        return {"pattern_descriptions": [f"an area in {colour}" for colour in colours], "common_pattern": f"areas in {common}"}
    if form == "score":
        return {"score": float(colours[0] in text)}
    if form == "presence":
        return {"shows": colours[-1] in text, "rest": True}
    return {"image": 1 + next((i for i, colour in enumerate(colours) if colour != common), 0)}


def _colour(image: Image.Image) -> str:
    counts = image.convert("RGB").getcolors(image.width * image.height)
    red, green, blue = max(counts or [(0, (0, 0, 0))])[1]  # pyright: ignore[reportGeneralTypeIssues]  # three bytes, as it is RGB
    return f"#{red:02x}{green:02x}{blue:02x}"


@final
class RuleServer:
    """A context manager: a server on this machine for the length of the block."""

    def __init__(
        self,
        behaviours: Mapping[str, float] | None = None,
        *,
        rule: Rule = answer_by_colour,
        seed: int = 0,
        latency: float = 0.0,
        retry_after: str = "0.05",
        hangs: float = 30.0,
        key: str = "",
        lacks: Collection[str] = (),
    ) -> None:
        """`behaviours`: the share of calls for each of `BEHAVIOURS`, drawn from the seed and the request; all others are good.

        `latency`: seconds until an answer; `hangs`: seconds for which a hanging answer keeps the connection open. `key`: the
        only API key that is accepted; `lacks`: parameters that are rejected, such as `temperature`.
        """
        unknown = (behaviours or {}).keys() - set(BEHAVIOURS)
        assert not unknown, f"no such behaviours: {unknown}"
        self.behaviours, self._rule, self._seed = dict(behaviours or {}), rule, seed
        self._latency, self._hangs, self.retry_after = latency, hangs, retry_after
        self._key, self._lacks = key, frozenset(lacks)
        self.served: list[ServedCall] = []
        """All calls in the order of their arrival."""
        self.headers: list[dict[str, str]] = []
        self._repetitions, self._lock, self._over = Counter[str](), Lock(), Event()
        self._server = _RuleHTTPServer(("127.0.0.1", 0), _RuleHandler)
        self._server.rules = self

    @property
    def url(self) -> str:
        """The address, as in http://127.0.0.1:4711/v1."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> RuleServer:
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()

    def answer(self, headers: dict[str, str], body: bytes) -> tuple[str, int, bytes]:
        """Return the behaviour for a call, and the status and the body of the answer."""
        request = json.loads(body)
        schema = request.get("response_format", {}).get("json_schema", {}).get("schema", {})
        if self._key and headers.get("authorization") != f"Bearer {self._key}":
            return "good", 401, _json({"error": {"message": f"wrong key: {headers.get('authorization')}"}})
        if lacking := sorted(self._lacks & request.keys()):
            return "good", 400, _json({"error": {"message": f"'{lacking[0]}' is not supported"}})
        texts, images = _parts(request)
        digest = _request_hash(request["model"], images, texts[0], schema)
        with self._lock:
            behaviour = self._behaviour(digest)
            self.served.append(ServedCall(digest, behaviour))
            self.headers.append(headers)
        self._over.wait(self._hangs if behaviour == "hanging" else self._latency)
        if behaviour == "echoing":
            return behaviour, *self._echo(digest, headers.get("authorization", ""), request["model"], texts, images)
        if behaviour == "limited":
            return behaviour, 429, _json({"error": {"message": "slower, please", "code": 429}})
        if behaviour == "broken":
            return behaviour, 500, _json({"error": {"message": f"broken by {headers.get('authorization', 'no key')}"}})
        return behaviour, 200, _json(self._completion(behaviour, digest, request["model"], texts, images))

    def drip(self, output: io.BufferedIOBase) -> None:
        """Write a blank now and then until the client closes the connection."""
        until = time.monotonic() + self._hangs
        while time.monotonic() < until and not self._over.wait(0.02):
            try:
                output.write(b" ")
            except OSError:
                return

    def _behaviour(self, digest: str) -> str:
        """Draw a behaviour that depends on the request and its repetition only, whichever thread comes first."""
        self._repetitions[digest] += 1
        chance = random.Random(f"{self._seed} {digest} {self._repetitions[digest]}").random()
        for behaviour, share in self.behaviours.items():
            chance -= share
            if chance < 0:
                return behaviour
        return "good"

    def _echo(
        self, digest: str, authorization: str, model: str, texts: Sequence[str], images: Sequence[bytes]
    ) -> tuple[int, bytes]:
        """Return an answer that repeats the key, plain and encoded, or in turn an error, a refusal or words that do."""
        turn = (int(digest, 16) + self._repetitions[digest]) % 4
        code = base64.b64encode(authorization.encode()).decode()
        echo = f"you sent {authorization}, {quote(authorization, safe='')}, {code}"
        if turn == 0:
            return 500, _json({"error": {"message": echo}})
        completion = self._completion("good", digest, model, texts, images)
        message = completion["choices"][0]["message"]
        if turn == 1:
            message |= {"refusal": echo, "content": None}
        else:
            answer = _altered(json.loads(message["content"]), f"{{}}; {echo}") | {"why": echo}
            message["content"] = echo if turn == 2 else json.dumps(answer)
        return 200, _json(completion | {"system_fingerprint": echo})

    def _completion(
        self, behaviour: str, digest: str, model: str, texts: Sequence[str], images: Sequence[bytes]
    ) -> dict[str, Any]:
        message: dict[str, str | None] = {"role": "assistant", "content": None, "refusal": None}
        if behaviour == "refusal":
            message["refusal"] = "I cannot help with that."
        elif behaviour == "malformed":
            message["content"] = MALFORMED[int(digest, 16) % len(MALFORMED)]
        else:
            form = next((name for name, key in FORMS.items() if key in texts[0]), "choice")
            answer = self._rule([Image.open(io.BytesIO(image)) for image in images], "\n".join(texts), form)
            message["content"] = json.dumps(_altered(answer, HOSTILE) if behaviour == "hostile" else answer)
        usage = {"prompt_tokens": len(texts[0]) // 4 + 258 * len(images), "completion_tokens": 20}
        usage["total_tokens"] = sum(usage.values())
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        return {"id": "rule", "object": "chat.completion", "created": 0, "model": model, "choices": [choice], "usage": usage}


def _altered(answer: Any, pattern: str) -> Any:
    """Return an answer with each of its texts put into `pattern`."""
    if isinstance(answer, str):
        return pattern.format(answer)
    if isinstance(answer, list):
        return [_altered(element, pattern) for element in answer]
    return {name: _altered(value, pattern) for name, value in answer.items()} if isinstance(answer, dict) else answer


def _parts(request: dict[str, Any]) -> tuple[list[str], list[bytes]]:
    content = request["messages"][-1]["content"]
    texts = [part["text"] for part in content if part["type"] == "text"]
    urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    return texts, [base64.b64decode(url.removeprefix("data:image/png;base64,")) for url in urls]


def _request_hash(model: str, images: Sequence[bytes], instruction: str, schema: object) -> str:
    hashes = [hashlib.sha256(image).hexdigest() for image in images]
    entries = {"model": model, "images": hashes, "instruction": instruction, "form": schema}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _json(entries: object) -> bytes:
    return json.dumps(entries).encode()


@final
class _RuleHTTPServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256
    rules: RuleServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report errors of the server, but not that a client is gone."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


@final
class _RuleHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        length = int(self.headers["content-length"])
        if len(body := self.rfile.read(length)) < length:
            self._close()  # the client was killed
            return
        assert isinstance(self.server, _RuleHTTPServer)
        rules = self.server.rules
        if not self.path.endswith("/v1/chat/completions"):
            self._send(404, _json({"error": {"message": f"nothing is at {self.path}"}}))
            return
        behaviour, status, answer = rules.answer({name.lower(): value for name, value in self.headers.items()}, body)
        if behaviour == "hanging":
            self._close()
        elif behaviour == "dripping":
            self._send(status, b"", {"Content-Length": "100000"})
            rules.drip(self.wfile)
            self._close()
        elif behaviour == "truncated":
            self._send(status, answer, length=len(answer) // 2)
            self._close()
        else:
            echo = {"X-You-Sent": self.headers.get("authorization", "")} if behaviour == "echoing" else {}
            self._send(status, answer, {"Retry-After": rules.retry_after} if behaviour == "limited" else echo)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None, length: int | None = None) -> None:
        """Send head and body in one packet: two small ones would wait for one another."""
        lines = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        try:
            self.wfile.write(f"HTTP/1.1 {status} .\r\n{head}\r\n".encode() + body[:length])
        except OSError:
            self.close_connection = True  # the client is gone

    def _close(self) -> None:
        self.close_connection = True
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


def main() -> None:
    """Serve until standard input ends; print the address first and the number of calls at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=0.0)
    with RuleServer(latency=parser.parse_args().latency) as server:
        print(server.url, flush=True)
        sys.stdin.read()
        print(len(server.served), flush=True)


if __name__ == "__main__":
    main()
