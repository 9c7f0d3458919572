"""The web app under attack, over a real socket: no 5xx, nothing of other files, nothing written, others are not held up.

All addresses are found in the app itself, so that new ones are attacked too.
"""

import json
import os
import random
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from sample_study import write_book, write_dictionary, write_matches
from test_web import SAE, SCRIPT, Site, book_study

from difflex.errors import BadInput
from difflex.study import Study
from difflex.web import Studio, make_app
from difflex.web.pages import place
from difflex.web.studio import ImageModel, PaintChoices

SECRET = "the-secret-of-another-folder"
IMAGE = '"><img src=x onerror=alert(1)>'
SEGMENTS = (
    "..",
    "../../secret.txt",
    "..%2f..%2fsecret.txt",
    "%2e%2e%2f%2e%2e%2fsecret.txt",
    "%252e%252e%252fsecret.txt",
    "..%5c..%5csecret.txt",
    "/etc/passwd",
    "%2fetc%2fpasswd",
    "%00",
    "study.json%00.webp",
    "%ff%fe",
    "%F0%9F%98%80",
    "%E2%80%AE%0A%0D",
    "%3Cscript%3Ealert(1)%3C/script%3E",
    "'%20OR%201=1--",
    "{{7*7}}",
    "-1",
    "9" * 40,
    "1e5",
    "a" * 3000,
    "%",
)
VALUES = (
    "",
    "%00",
    "NaN",
    "inf",
    "-1e999",
    "9" * 60,
    "a" * 300,
    "%ff",
    "%F0%9F%98%80" * 9,
    "%3Cscript%3E",
    "..%2f",
    "[]",
    "peak%3E1e400",
)
BODIES = (
    b"",
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b"{}",
    b'{"a": NaN}',
    b"\xff\xfe{}",
    b'{"a": "\\ud800"}',
    b'{"__proto__": {}, "a": 1, "a": 2}',
    b"[" * 100_000,
    b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    b"9" * 100_000,
    b'{"seeds": ' + b"9" * 5000 + b"}",
)


PATH = dict(zip(("site", "label"), SAE.split("/"), strict=True)) | {"feature": "9", "file": "0" * 32 + ".webp", "column": "ap"}
QUERY = {"q": "red", "left": SAE, "right": SAE, "row": "0", "column": "0", "dictionary": SAE, "feature": "9"}
"""Values of parameters with which an address is answered; others are left out, or 0 in a path."""


class Answer(NamedTuple):
    """What came back over a socket."""

    status: int
    head: str
    body: str


def raw(port: int, request: bytes) -> Answer:
    """Send bytes and read the answer; a connection that is closed without one has the status 0."""
    with socket.create_connection(("127.0.0.1", port), 20) as connection:
        content = b""
        try:
            connection.sendall(request)
            while not is_whole(content) and (part := connection.recv(1 << 20)):
                content += part
        except ConnectionError:
            pass
    head, _, body = content.partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1]) if head else 0
    return Answer(status, head.decode("latin-1"), body.decode(errors="replace"))


def is_whole(content: bytes) -> bool:
    """Whether a response is complete by its own account."""
    head, end, body = content.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    return bool(end and length and len(body) >= int(length[1]))


def request(target: str, method: str = "GET", body: bytes | None = None, **headers: str) -> bytes:
    """Write a request whose target is sent as it is."""
    given = {"Host": "127.0.0.1", "Connection": "close", **{name.replace("_", "-"): value for name, value in headers.items()}}
    if body is not None:
        given = {"Content-Length": str(len(body)), "Content-Type": "application/json"} | given
    lines = "".join(f"{name}: {value}\r\n" for name, value in given.items())
    return f"{method} {target} HTTP/1.1\r\n{lines}\r\n".encode() + (body or b"")


class Address(NamedTuple):
    """An address of the app."""

    path: str
    method: str
    queries: tuple[str, ...]

    def target(self, **values: str) -> str:
        """Return the path with these values of its parameters, and usual ones for the others."""
        return re.sub(r"\{(\w+)(?::\w+)?\}", lambda match: {**PATH, **values}.get(match[1], "0"), self.path)

    def whole(self, **values: str) -> str:
        """Return the usual path with a query of these values, and usual ones for the others."""
        query = {name: QUERY[name] for name in self.queries if name in QUERY} | values
        return f"{self.target()}?{'&'.join(f'{name}={value}' for name, value in query.items())}"

    @property
    def names(self) -> list[str]:
        """The parameters in the path."""
        return re.findall(r"\{(\w+)", self.path)


@cache
def addresses() -> list[Address]:
    """Return all addresses of the app."""
    app: Any = make_app(Study(folder=Path("none"), model="none"), studio())._app
    assert isinstance(app, FastAPI)
    found = [
        Address(route.path, method, tuple(_query_names(route.dependant)))
        for route in app.routes
        if isinstance(route, APIRoute)
        for method in sorted(route.methods or ())
    ]
    assert len(found) >= 10
    return [*found, Address("/static/{file}", "GET", ()), Address("/api", "GET", ())]


def _query_names(dependant: Any) -> list[str]:
    names = [parameter.alias for parameter in dependant.query_params]
    return names + [name for part in dependant.dependencies for name in _query_names(part)]


def studio() -> Studio:
    """A studio whose model cannot be loaded."""

    def load() -> ImageModel:
        raise BadInput("There is no model here.")

    return Studio(load, lambda: PaintChoices([], {}))


def contents(folder: Path) -> dict[str, str]:
    return {str(path): sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


def check(answer: Answer, sent: bytes) -> None:
    """Fail if an answer is an error of the server, or says what it should not."""
    assert 0 < answer.status < 500, (sent[:200], answer)
    assert SECRET not in answer.body and "root:" not in answer.body and "Traceback" not in answer.body, sent[:200]
    assert SCRIPT not in answer.body or "text/html" not in answer.head, sent[:200]
    assert IMAGE not in answer.body or "text/html" not in answer.head, sent[:200]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    root = tmp_path_factory.mktemp("attack")
    (root / "secret.txt").write_text(SECRET)
    study = book_study(root / "study")
    name = f"double.2/topk-12-k4-{IMAGE}"
    write_dictionary(study, name)
    write_book(study, name, explained={1: (IMAGE, 0.9)}, captions={2: IMAGE})
    return study


@pytest.fixture(scope="module")
def site(study: Study) -> Iterator[Site]:
    before, site = contents(study.folder), Site(study, studio=studio())
    yield site
    site.close()
    assert contents(study.folder) == before, "nothing was written"


def test_no_path_leads_to_another_file(site: Site):
    for address in addresses():
        for name in address.names:
            for segment in SEGMENTS:
                sent = request(address.target(**{name: segment}), address.method, b"{}" if address.method == "POST" else None)
                check(raw(site.port, sent), sent)


def test_odd_queries_are_answered(site: Site):
    for address in addresses():
        targets = [address.whole(**{name: value}) for name in address.queries for value in VALUES]
        for target in [*targets, f"{address.whole()}&{'&'.join(['where=peak>1'] * 400)}", f"{address.whole()}{'&' * 5000}"]:
            sent = request(target, address.method, b"{}" if address.method == "POST" else None)
            check(raw(site.port, sent), sent)


def test_every_address_is_guarded(site: Site):
    for address in addresses():
        refused: list[tuple[dict[str, Any], int]] = [
            ({"Host": "evil.example"}, 421),
            ({"Host": f"127.0.0.1.evil.example:{site.port}"}, 421),
            ({"Origin": "http://evil.example"}, 403),
            ({"Origin": "null"}, 403),
            ({"Content_Length": "99999999999"}, 413),
        ]
        for headers, status in refused:
            answer = raw(site.port, request(address.target(), address.method, **headers))
            assert answer.status == status and "content-security-policy" in answer.head.lower(), (address, headers)


def test_every_address_refuses_other_methods(site: Site):
    known: dict[str, set[str]] = {}
    for address in addresses():
        known.setdefault(address.target(), set()).add(address.method)
    for target, methods in known.items():
        for method in {"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "FOO"} - methods:
            if method == "HEAD" and target in ("/api", "/static/" + "0" * 32 + ".webp"):
                continue
            answer = raw(site.port, request(target, method))
            assert answer.status in (400, 405), (method, target, answer)
            assert answer.status == 400 or "allow:" in answer.head.lower(), (method, target)


def test_bodies_that_are_no_request_are_refused(site: Site):
    for address in [address for address in addresses() if address.method not in ("GET", "HEAD")]:
        for body in BODIES:
            sent = request(address.target(), address.method, body)
            answer = raw(site.port, sent)
            check(answer, sent)
            assert answer.status in (400, 404, 413, 422), (address, body[:50], answer)
        for kind in (
            "text/plain",
            "multipart/form-data",
            "application/x-www-form-urlencoded",
            "application/json; charset=utf-99",
        ):
            sent = request(address.target(), address.method, b"a=b", Content_Type=kind)
            check(raw(site.port, sent), sent)


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\x00" * 3000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"X: a\r\n" * 20_000 + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nCookie: difflex=\xff\x00\r\n\r\n",
        b"POST /api HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
        b"POST /api HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /api HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_http_is_refused(site: Site, sent: bytes):
    assert 400 <= raw(site.port, sent).status < 500


def test_a_body_without_end_is_cut_off(site: Site):
    [target, *_] = [address.target() for address in addresses() if address.method == "POST"]
    head = f"POST {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    answer = raw(site.port, head + (b"10000\r\n" + b" " * 0x10000 + b"\r\n") * 40)
    assert answer.status < 500 and answer.status not in (200, 201)


def test_slow_clients_hold_up_nobody(site: Site):
    [votes, *_] = [address.target() for address in addresses() if address.method == "POST"]
    begun = [socket.create_connection(("127.0.0.1", site.port)) for _ in range(150)]
    try:
        for number, connection in enumerate(begun):
            parts = b"GET / HTTP/1.1\r\nHost: 127.", request(votes, "POST", b"{", Content_Length="900"), request(f"/d/{SAE}/9")
            connection.sendall(parts[number % 3])
        start = time.perf_counter()
        assert site.get(f"/d/{SAE}").status == 200
        assert time.perf_counter() - start < 3
    finally:
        for connection in begun:
            connection.close()


@pytest.mark.parametrize(
    "range", ["0-9", "5-2", "-1", "99999999-", ",".join(["0-0"] * 2000), "a-b", "0-0,0-0", "-0", "0-" + "9" * 40]
)
def test_parts_of_an_image_can_be_asked_for(site: Site, study: Study, range: str):
    file = next(study.images.iterdir()).name
    answer = raw(site.port, request(f"/images/{file}", Range=f"bytes={range}"))
    assert answer.status in (200, 206, 400, 416), answer


def test_names_and_texts_are_never_markup(site: Site, study: Study):
    for ref in study.dictionaries():
        for feature in (None, 1, 2):
            sent = request(place(str(ref.site), ref.label, feature))
            answer = raw(site.port, sent)
            check(answer, sent)
            assert answer.status == 200, (sent, answer)


def test_a_token_is_not_found_out(study: Study):
    site = Site(study, token="right-token", studio=studio())
    try:
        guesses = ("", "right-toke", "right-token2", "RIGHT-TOKEN", "%00", "right-token%00", "*", "a" * 4000, "r%C3%AF")
        for address in addresses():
            assert raw(site.port, request(address.target(), address.method)).status == 401, address
        for guess in guesses:
            for sent in (
                request(f"/?token={guess}"),
                request("/?token=" + guess + "&token=x"),
                request("/", Cookie=f"difflex={guess}"),
                request("/", Cookie=f"difflex=; difflex={guess}"),
                request("/", Authorization=f"Bearer {guess}"),
            ):
                answer = raw(site.port, sent)
                assert answer.status == 401 and "set-cookie" not in answer.head.lower(), sent
    finally:
        site.close()


def looked_at(site: Site) -> Iterator[tuple[bytes, Answer]]:
    """Yield the answers of all addresses that can be read."""
    targets = [address.whole() for address in addresses() if address.method == "GET"]
    targets += ["/search?q=red", "/api/search?q=ladders", f"/d/{SAE}?q=red", f"/d/{SAE}?concept=red", f"/d/{SAE}?sort=score"]
    for target in targets:
        sent = request(target)
        yield sent, raw(site.port, sent)


def damage(kind: str, study: Study) -> None:
    """Damage a study in one way."""
    ref = study.find_dictionary(SAE)
    book, folder = study.book(*ref), study.dictionary(*ref)
    truncated: Callable[[Path], object] = lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])  # noqa: E731
    actions: dict[str, Callable[[], object]] = {
        "book cut off": lambda: truncated(book),
        "book empty": lambda: book.write_bytes(b""),
        "book away": book.unlink,
        "book a folder": lambda: (book.unlink(), book.mkdir()),
        "images away": lambda: shutil.rmtree(study.images),
        "images a file": lambda: (shutil.rmtree(study.images), study.images.write_text("x")),
        "images cut off": lambda: [truncated(path) for path in study.images.iterdir()],
        "concepts no JSON": lambda: study.concepts(*ref).write_text("{"),
        "concepts another thing": lambda: study.concepts(*ref).write_text('{"format": 2}'),
        "concepts a folder": lambda: (study.concepts(*ref).unlink(), study.concepts(*ref).mkdir()),
        "config no JSON": lambda: (folder / "config.json").write_text("{"),
        "config away": lambda: (folder / "config.json").unlink(),
        "tensors away": lambda: (folder / "dictionary.safetensors").unlink(),
        "tensors cut off": lambda: truncated(folder / "dictionary.safetensors"),
        "dictionary away": lambda: shutil.rmtree(folder),
        "site of no name": lambda: folder.parent.rename(folder.parent.with_name("no site at all")),
        "study file away": lambda: (study.folder / "study.json").unlink(),
        "study away": lambda: shutil.rmtree(study.folder),
        "a link in a circle": lambda: (book.unlink(), book.symlink_to(book)),
    }
    actions[kind]()


DAMAGES = [
    "book cut off",
    "book empty",
    "book away",
    "book a folder",
    "images away",
    "images a file",
    "images cut off",
    "concepts no JSON",
    "concepts another thing",
    "concepts a folder",
    "config no JSON",
    "config away",
    "tensors away",
    "tensors cut off",
    "dictionary away",
    "site of no name",
    "study file away",
    "study away",
    "a link in a circle",
]


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_study_is_answered_with_a_sentence(study: Study, tmp_path: Path, kind: str):
    copy = Study.open(shutil.copytree(study.folder, tmp_path / "study"))
    site = Site(copy, studio=studio())
    try:
        list(looked_at(site))  # what is in memory now must not hide what is on the disk later
        damage(kind, copy)
        for sent, answer in looked_at(site):
            check(answer, sent)
    finally:
        site.close()


def test_flipped_bytes_in_a_book_are_answered_with_a_sentence(study: Study, tmp_path: Path):
    copy = Study.open(shutil.copytree(study.folder, tmp_path / "study"))
    path, dice = copy.book(*copy.find_dictionary(SAE)), random.Random(0)
    whole, site = path.read_bytes(), Site(copy, studio=studio())
    targets = [f"/d/{SAE}", f"/d/{SAE}/9", f"/api/dictionaries/{SAE}/features/9", "/search?q=stars"]
    try:
        for _ in range(40):
            content = bytearray(whole)
            for place in dice.sample(range(100, len(whole)), 200):
                content[place] = dice.randrange(256)
            path.write_bytes(content)
            for target in targets:
                check(raw(site.port, sent := request(target)), sent)
    finally:
        site.close()


def test_a_study_that_is_replaced_while_it_is_read_is_answered(study: Study, tmp_path: Path):
    copy = Study.open(shutil.copytree(study.folder, tmp_path / "study"))
    ref = copy.find_dictionary(SAE)
    book, concepts = copy.book(*ref), copy.concepts(*ref)
    versions = [book.read_bytes(), b"no book", book.read_bytes()[:5000]]
    site, problems, ends = Site(copy, studio=studio()), list[object](), time.monotonic() + 1.5

    def read() -> None:
        while time.monotonic() < ends:
            for target in (f"/d/{SAE}", f"/d/{SAE}/9", f"/api/dictionaries/{SAE}/features?q=red", "/"):
                answer = raw(site.port, request(target))
                problems.extend([answer] * (answer.status >= 500))

    readers = [threading.Thread(target=read) for _ in range(3)]
    try:
        for reader in readers:
            reader.start()
        turn = 0
        while time.monotonic() < ends:
            turn += 1
            (tmp_path / "new").write_bytes(versions[turn % 3])
            os.replace(tmp_path / "new", book)
            write_matches(copy, SAE, (0.9, 0.7, 0.6, 0.4), per_concept=1 + turn % 3)
            if turn % 5 == 0:
                concepts.unlink()
    finally:
        for reader in readers:
            reader.join()
        site.close()
    assert problems == [] and turn > 10


def test_the_documented_errors_are_those_that_are_sent(site: Site):
    document = json.loads(site.get("/api").text)
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert {"404", "409", "422"} <= operation["responses"].keys(), (method, path)
