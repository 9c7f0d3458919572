"""The web app: pages and their JSON twins, what is refused, and `difflex serve` as a process on a real socket."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import NamedTuple

import pytest
import uvicorn
from sample_study import new_study, write_book, write_dictionary, write_matches

from difflex.cli import main
from difflex.commands.serve import _listen
from difflex.errors import BadInput
from difflex.study import Study
from difflex.web import Studio, make_app
from difflex.web.books import BookPool

SAE = "double.1:smooth/topk-12-k4"
WALL, DATA = f"/d/{SAE}", f"/api/dictionaries/{SAE}/features"
SCRIPT = "<script>alert(1)</script>"


class Reply(NamedTuple):
    status: int
    text: str
    headers: dict[str, str]


class Site:
    """A server on a real socket, and requests to it."""

    def __init__(
        self, study: Study, token: str | None = None, studio: Studio | None = None, against: Study | None = None
    ) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._server = uvicorn.Server(uvicorn.Config(make_app(study, studio, token=token, against=against), log_level="error"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})
        self._thread.start()

    def get(self, target: str, method: str = "GET", body: bytes | None = None, **headers: str) -> Reply:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request(method, target, body, headers)
        answer: HTTPResponse = connection.getresponse()
        reply = Reply(
            answer.status, answer.read().decode(errors="replace"), {name.lower(): value for name, value in answer.getheaders()}
        )
        connection.close()
        return reply

    def json(self, target: str) -> object:
        reply = self.get(target)
        assert reply.status == 200, reply
        return json.loads(reply.text)

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(60)
        self._socket.close()


def book_study(folder: Path) -> Study:
    """A study with one book: 12 features, of which eight detect concepts and two are explained."""
    study = new_study(folder)
    write_dictionary(study, SAE)
    write_book(study, SAE, explained={9: (f"stars {SCRIPT}", 0.9), 10: ("ladders", 0.6)}, captions={0: f"red {SCRIPT}"})
    write_matches(study, SAE, (0.9, 0.7, 0.6, 0.4), per_concept=2)
    return study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return book_study(tmp_path_factory.mktemp("web") / "study")


@pytest.fixture(scope="module")
def site(study: Study) -> Iterator[Site]:
    site = Site(study)
    yield site
    site.close()


def numbers(site: Site, query: str = "") -> list[int]:
    return [tile["feature"] for tile in site.json(f"{DATA}?{query}")["tiles"]]  # pyright: ignore


def test_a_wall_is_sorted_and_filtered(site: Site):
    assert numbers(site)[:2] == [0, 4] and len(numbers(site)) == 12, "by average precision, those without one last"
    assert numbers(site, "sort=peak")[:3] == [11, 10, 9] and numbers(site, "sort=feature&ascending=true") == [*range(12)]
    assert numbers(site, "sort=score")[:2] == [9, 10]
    assert numbers(site, "where=peak>5&where=peak<=8&sort=feature&ascending=true") == [5, 6, 7]
    assert numbers(site, "where=peak>5,%20peak<=8&sort=feature&ascending=true") == [5, 6, 7]
    assert numbers(site, "where=ap>=0.7") == [0, 4, 1, 5] and numbers(site, "concept=red") == [0, 4]
    assert numbers(site, "q=ladders") == [10]
    assert numbers(site, "sort=feature&ascending=true&offset=5&limit=2") == [5, 6]
    assert site.json(f"{DATA}?offset=5&limit=2")["total"] == 12  # pyright: ignore


def test_a_page_shows_what_its_json_twin_says(site: Site):
    wall = site.get(WALL)
    assert wall.status == 200 and re.findall(r'class="tile"><a href="\S+/(\d+)"', wall.text) == [str(n) for n in numbers(site)]
    feature = site.json(f"{DATA}/9")
    page = site.get(f"{WALL}/9").text
    assert feature["figures"]["peak"] == 10.0 and "peak 10" in page  # pyright: ignore
    assert feature["explanations"][0]["scores"]["accuracy"] == 0.9  # pyright: ignore
    assert page.count("<figcaption>") == len(feature["examples"]) == 6  # pyright: ignore
    image = site.get(f"/images/{feature['examples'][0]['image']}")  # pyright: ignore
    assert image.headers["content-type"] == "image/webp" and "immutable" in image.headers["cache-control"]
    found = site.json("/api/search?q=red")
    assert found[0]["tile"]["feature"] == 1 and found[0]["reason"] == "detects red, AP 0.90"  # pyright: ignore
    assert "detects red, AP 0.90" in site.get("/search?q=red").text
    assert site.get("/").headers["location"] == WALL
    assert {"/api/search", "/api/dictionaries"} <= site.json("/api")["paths"].keys()  # pyright: ignore


def test_a_dictionary_without_a_book_is_not_searched(tmp_path: Path):
    study = book_study(tmp_path / "study")
    other = "double.2/topk-12-k4"
    write_dictionary(study, other)
    write_matches(study, other, (0.99, 0.9, 0.8, 0.7))
    with closing(Site(study)) as site:
        found = site.json("/api/search?q=red")
    assert {(hit["site"], hit["label"]) for hit in found} == {tuple(SAE.split("/"))}  # pyright: ignore


def test_connections_of_the_server_do_not_wait_for_acknowledgements():
    listening = _listen("127.0.0.1", 0)
    with listening, socket.create_connection(listening.getsockname()), listening.accept()[0] as connection:
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_pages_are_served_before_torch_is_imported():
    code = "import sys, difflex.web, difflex.commands.serve; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_texts_of_others_are_never_markup(site: Site):
    for page in (f"{WALL}/9", f"{WALL}/0", WALL, f"/search?q={SCRIPT}", f"{WALL}?q={SCRIPT}", f"/{SCRIPT}"):
        text = site.get(page.replace("<", "%3C").replace(">", "%3E")).text
        assert SCRIPT not in text
    assert "&lt;script&gt;" in site.get(f"{WALL}/9").text


@pytest.mark.parametrize(
    ("target", "status", "sentence"),
    [
        ("/d/double.1:smooth/topk-12-k5", 404, "nearest: double.1:smooth/topk-12-k4"),
        (f"{WALL}/12", 404, "they are numbered from 0 to 11"),
        (f"{WALL}/one", 422, "integer"),
        (f"{WALL}?sort=beauty", 404, "The column 'beauty' is unknown"),
        (f"{WALL}?where=peak", 422, "is not a condition"),
        (f"{DATA}?limit=1000", 422, "limit"),
        (f"{DATA}?offset=-1", 422, "offset"),
        (f"{DATA}?{'where=peak>1&' * 11}", 422, "where"),
        (f"/api/search?q={'a' * 300}", 422, "q"),
        ("/nowhere", 404, "Not Found"),
        ("/images/..%2f..%2fstudy.json", 404, ""),
        ("/images/study.json", 404, "is not the name of an image"),
        ("/static/../app.py", 404, ""),
        (f"/search?q={'a' * 9000}", 414, "longer than"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_a_sentence(site: Site, target: str, status: int, sentence: str):
    reply = site.get(target)
    assert reply.status == status and sentence in reply.text.replace("&#39;", "'") and "Traceback" not in reply.text


def test_only_this_machine_and_its_own_pages_are_answered(site: Site):
    assert site.get("/", Host="localhost:1").status == 307 and site.get("/", Host="[::1]").status == 307
    for host in ("evil.example", "127.0.0.1.evil.example", "", "localhost@evil.example", "[", "a" * 5000):
        assert site.get("/", Host=host).status == 421, host
    assert site.get(DATA, Origin="http://evil.example").status == 403 and site.get(DATA, Origin="null").status == 403
    assert site.get(DATA, Origin=f"http://127.0.0.1:{site.port}").status == 200
    assert site.get("/", method="POST", body=b"x" * (1 << 20 | 1)).status == 413
    assert site.get("/", method="POST", body=b"x").status == 405
    policy = site.get(WALL).headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert site.get("/nowhere").headers["x-content-type-options"] == "nosniff"


def test_with_a_token_only_those_are_answered_who_know_it(study: Study):
    site = Site(study, token="right")
    try:
        assert {site.get(target).status for target in ("/", WALL, "/api", "/static/style.css", "/?token=wrong")} == {401}
        reply = site.get("//evil.example/?token=right")
        assert reply.status == 303 and reply.headers["location"] == "/evil.example/"
        cookie = site.get("/?token=right").headers["set-cookie"]
        assert {"HttpOnly", "SameSite=strict"} <= set(cookie.split("; "))
        assert site.get(WALL, Cookie=cookie.partition(";")[0]).status == 200
        assert site.get(WALL, Cookie="difflex=wrong").status == 401 and site.get(WALL, Cookie="\xff=;=").status == 401
    finally:
        site.close()


def test_a_study_that_changes_is_shown_as_it_is_now(tmp_path: Path):
    study = new_study(tmp_path / "study")
    write_dictionary(study, SAE)
    site = Site(study)
    try:
        assert "difflex collect" in site.get("/").text
        assert site.get(WALL).status == 404 and "has no book yet" in site.get(WALL).text
        write_book(study, SAE)
        assert "12 features" in site.get(WALL).text
        write_matches(study, SAE, (0.9, 0.7, 0.6, 0.4), per_concept=2)
        assert numbers(site, "concept=ring") == [3, 7]
        study.book(*study.find_dictionary(SAE)).write_bytes(b"no book")
        reply = site.get(WALL)
        assert reply.status == 409 and "Run difflex collect" in reply.text
    finally:
        site.close()


def test_a_folder_that_cannot_be_written_is_served(tmp_path: Path):
    study = book_study(tmp_path / "study")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    site = Site(study)
    try:
        assert len(numbers(site)) == 12 and site.get(f"{WALL}/9").status == site.get("/search?q=red").status == 200
    finally:
        site.close()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before, "reading writes nothing"


def test_the_command_serves_until_it_is_stopped(study: Study, capsys: pytest.CaptureFixture[str]):
    words = [sys.executable, "-m", "difflex", "serve", str(study.folder), "--port", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server, ExitStack() as stack:
        stack.callback(server.kill)
        assert server.stdout is not None
        line = server.stdout.readline()
        port = int(re.findall(r"http://127\.0\.0\.1:(\d+)/ ", line)[0])
        connection = HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", WALL)
        assert b"12 features" in connection.getresponse().read()
        connection.close()
        assert main(["serve", str(study.folder), "--port", str(port)]) == 2
        assert f"port {port}: Address already in use" in capsys.readouterr().err
        server.send_signal(signal.SIGINT)
        assert server.wait(10) in (0, -signal.SIGINT, 130)
    assert main(["serve", str(study.folder / "nothing")]) == 2 and "is not a study" in capsys.readouterr().err
    assert main(["serve", str(study.folder), "--host", "not.a.name.invalid"]) == 2
    assert "is no address of this machine" in capsys.readouterr().err


def test_books_stay_open_until_their_files_change(study: Study, tmp_path: Path):
    path, pool = tmp_path / "book.sqlite", BookPool()
    path.write_bytes(study.book(*study.find_dictionary(SAE)).read_bytes())
    with pool.open(path) as first, pool.open(path) as second:
        assert first is not second
    with pool.open(path) as again:
        assert again in (first, second)
    path.with_suffix(".new").write_bytes(path.read_bytes())
    path.with_suffix(".new").rename(path)
    with pool.open(path) as replaced:
        assert replaced not in (first, second) and len(replaced.images()) == 12
    with pytest.raises(BadInput, match="closed"):
        first.images()
