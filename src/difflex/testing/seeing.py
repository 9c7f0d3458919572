"""A seeing model that answers by rule behind a real OpenAI-compatible address on this machine, in any mood one may meet.

`python -m difflex.testing.seeing --latency 0.2` serves until its standard input ends.
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

from PIL import Image

__all__ = ["MOODS", "RuleServer", "ServedCall", "by_colour"]

MOODS = ("good", "hostile", "malformed", "refusal", "limited", "broken", "hanging", "dripping", "truncated")
"""A good answer; one full of HTML and terminal escapes; JSON of another form or none; a refusal; 429 with Retry-After; 500; no
answer for long; one that comes by single blanks; one that breaks off."""
HOSTILE = "<img src=x onerror=alert(1)>\x1b[31m\x1b]0;title\x07\u202e{}\x1b[2J\u200b</b>"
"""What stands around words of a hostile answer."""
MALFORMED = (
    "I see a nice image.",
    '{"score": "very",',
    '{"score": 7, "common_pattern": "", "image": 0}',
    '{"score": null, "pattern_descriptions": "one", "image": "the third"}',
    "[]",
    "",
)

Rule = Callable[[Sequence[Image.Image], str, str], dict[str, Any]]
"""From images, all that was told about them, and the name of the form of the answer to that answer."""


class ServedCall(NamedTuple):
    """A call that was answered, or not."""

    question: str
    """The hash of what was asked, the same however often: model, images, instruction and form of the answer."""
    mood: str


def by_colour(images: Sequence[Image.Image], told: str, form: str) -> dict[str, Any]:
    """An answer about the commonest colour of each image, written as in #0f8000."""
    colours = [_colour(image) for image in images]
    common = Counter(colours).most_common(1)[0][0]
    if form == "explained":
        return {"pattern_descriptions": [f"an area in {colour}" for colour in colours], "common_pattern": f"areas in {common}"}
    if form == "judged":
        return {"score": float(colours[0] in told)}
    if form == "seen":
        return {"shows": colours[-1] in told, "rest": True}
    return {"image": 1 + next((i for i, colour in enumerate(colours) if colour != common), 0)}


def _colour(image: Image.Image) -> str:
    counts = image.convert("RGB").getcolors(image.width * image.height)
    red, green, blue = max(counts or [(0, (0, 0, 0))])[1]  # pyright: ignore[reportGeneralTypeIssues]  # three bytes, as it is RGB
    return f"#{red:02x}{green:02x}{blue:02x}"


@final
class RuleServer:
    """A server on this machine, from the block's beginning to its end."""

    def __init__(
        self,
        moods: Mapping[str, float] | None = None,
        *,
        rule: Rule = by_colour,
        seed: int = 0,
        latency: float = 0.0,
        retry_after: str = "0.05",
        hangs: float = 30.0,
        key: str = "",
        lacks: Collection[str] = (),
    ) -> None:
        """`moods`: the share of calls that each is met in, all others are good; by chance that the seed and the question decide.

        `latency`: seconds until an answer; `hangs`: seconds for which a hanging one keeps the connection.
        `key`: who comes with another one is turned away; `lacks`: what no call may ask for, as `temperature`.
        """
        unknown = (moods or {}).keys() - set(MOODS)
        assert not unknown, f"no such moods: {unknown}"
        self._moods, self._rule, self._seed = dict(moods or {}), rule, seed
        self._latency, self._hangs, self.retry_after = latency, hangs, retry_after
        self._key, self._lacks = key, frozenset(lacks)
        self.served: list[ServedCall] = []
        """All calls, in the order in which they came."""
        self.headers: list[dict[str, str]] = []
        self._seen, self._lock, self._over = Counter[str](), Lock(), Event()
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
        """The mood that a call is met in, the status and the body of the answer."""
        said = json.loads(body)
        form = said.get("response_format", {}).get("json_schema", {}).get("schema", {})
        if self._key and headers.get("authorization") != f"Bearer {self._key}":
            return "good", 401, _json({"error": {"message": f"wrong key: {headers.get('authorization')}"}})
        if lacking := sorted(self._lacks & said.keys()):
            return "good", 400, _json({"error": {"message": f"'{lacking[0]}' is not supported"}})
        texts, images = _parts(said)
        question = _question(said["model"], images, texts[0], form)
        with self._lock:
            mood = self._mood(question)
            self.served.append(ServedCall(question, mood))
            self.headers.append(headers)
        self._over.wait(self._hangs if mood == "hanging" else self._latency)
        if mood == "limited":
            return mood, 429, _json({"error": {"message": "slower, please", "code": 429}})
        if mood == "broken":
            return mood, 500, _json({"error": {"message": f"broken by {headers.get('authorization', 'nobody')}"}})
        return mood, 200, _json(self._completion(mood, question, said["model"], texts, images))

    def drip(self, into: io.BufferedIOBase) -> None:
        """Nothing, after a blank now and then until who reads them has had enough."""
        until = time.monotonic() + self._hangs
        while time.monotonic() < until and not self._over.wait(0.02):
            try:
                into.write(b" ")
            except OSError:
                return

    def _mood(self, question: str) -> str:
        """By chance, but for the same question at the same try always the same, whichever thread comes first."""
        self._seen[question] += 1
        chance = random.Random(f"{self._seed} {question} {self._seen[question]}").random()
        for mood, share in self._moods.items():
            chance -= share
            if chance < 0:
                return mood
        return "good"

    def _completion(self, mood: str, question: str, model: str, texts: Sequence[str], images: Sequence[bytes]) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
        if mood == "refusal":
            message["refusal"] = "I cannot help with that."
        elif mood == "malformed":
            message["content"] = MALFORMED[int(question, 16) % len(MALFORMED)]
        else:
            opened = [Image.open(io.BytesIO(image)) for image in images]
            given = self._rule(opened, "\n".join(texts), _form(texts[0]))
            message["content"] = json.dumps(_hostile(given) if mood == "hostile" else given)
        usage = {"prompt_tokens": len(texts[0]) // 4 + 258 * len(images), "completion_tokens": 20}
        usage["total_tokens"] = sum(usage.values())
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        return {"id": "rule", "object": "chat.completion", "created": 0, "model": model, "choices": [choice], "usage": usage}


def _hostile(given: object) -> object:
    if isinstance(given, str):
        return HOSTILE.format(given)
    if isinstance(given, list):
        return [_hostile(each) for each in given]
    return {name: _hostile(value) for name, value in given.items()} if isinstance(given, dict) else given


def _parts(said: dict[str, Any]) -> tuple[list[str], list[bytes]]:
    content = said["messages"][-1]["content"]
    texts = [part["text"] for part in content if part["type"] == "text"]
    addresses = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    return texts, [base64.b64decode(address.removeprefix("data:image/png;base64,")) for address in addresses]


def _form(instruction: str) -> str:
    """What is asked for: instructions end in the form of the answer."""
    forms = {"explained": '"common_pattern"', "judged": '"score"', "seen": '"shows"'}
    return next((name for name, field in forms.items() if field in instruction), "picked")


def _question(model: str, images: Sequence[bytes], instruction: str, form: object) -> str:
    hashes = [hashlib.sha256(image).hexdigest() for image in images]
    told = {"model": model, "images": hashes, "instruction": instruction, "form": form}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _json(said: object) -> bytes:
    return json.dumps(said).encode()


@final
class _RuleHTTPServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256
    rules: RuleServer


@final
class _RuleHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        assert isinstance(self.server, _RuleHTTPServer)
        rules = self.server.rules
        if not self.path.endswith("/v1/chat/completions"):
            self._send(404, _json({"error": {"message": f"nothing is at {self.path}"}}))
            return
        mood, status, answer = rules.answer({name.lower(): value for name, value in self.headers.items()}, body)
        if mood == "hanging":
            self._close()
        elif mood == "dripping":
            self._send(status, b"", {"Content-Length": "100000"})
            rules.drip(self.wfile)
            self._close()
        elif mood == "truncated":
            self._send(status, answer, sent=len(answer) // 2)
            self._close()
        else:
            self._send(status, answer, {"Retry-After": rules.retry_after} if mood == "limited" else {})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None, sent: int | None = None) -> None:
        """Send all at once: two small packets would wait for one another."""
        lines = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        try:
            self.wfile.write(f"HTTP/1.1 {status} .\r\n{head}\r\n".encode() + body[:sent])
        except OSError:
            self.close_connection = True  # who asked has gone

    def _close(self) -> None:
        self.close_connection = True
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is said."""


def main() -> None:
    """Nothing; serves until standard input ends. The first line that is printed is the address."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=0.0)
    with RuleServer(latency=parser.parse_args().latency) as server:
        print(server.url, flush=True)
        sys.stdin.read()
        print(len(server.served), flush=True)


if __name__ == "__main__":
    main()
