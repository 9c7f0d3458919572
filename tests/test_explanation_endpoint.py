"""An endpoint over real sockets: deadlines, limits, odd addresses and proxies, and a key that is never repeated."""

import base64
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_views import MODEL, Endpoints, view

from difflex.errors import BadInput
from difflex.explanation import CachedClient, RequestPolicy
from difflex.explanation.answers import AnswerCache
from difflex.explanation.backends import BackendReply, RejectedRequest, TransportFault, UnusableEndpoint
from difflex.explanation.endpoint import ApiKey, EndpointBackend
from difflex.explanation.questions import FailedCall, JudgementAnswer, TokenUsage, judge_instruction, parse_answer
from difflex.explanation.transport import HttpAnswer

SECRET = "sk-Zq8+/=%do-not-tell&41"
JUDGE = judge_instruction("x")
Handler = Callable[[socket.socket], None]


@contextmanager
def serving(handle: Handler) -> Iterator[str]:
    """Serve connections on this machine, each in a thread; yield the address."""
    listener = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def serve() -> None:
        while not over.is_set():
            try:
                connection = listener.accept()[0]
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    def answer(connection: socket.socket) -> None:
        with connection:
            try:
                read_request(connection)
                handle(connection)
            except OSError:
                return

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        over.set()
        listener.close()


def read_request(connection: socket.socket) -> None:
    content = b""
    while b"\r\n\r\n" not in content:
        content += connection.recv(65536)
    head, _, body = content.partition(b"\r\n\r\n")
    [length] = [int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")]
    while len(body) < length:
        body += connection.recv(65536)


def answering(body: object, status: int = 200, headers: str = "") -> Handler:
    """Send one answer, whose body is JSON unless it is bytes."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"HTTP/1.1 {status} .\r\nContent-Length: {len(content)}\r\nConnection: close\r\n{headers}\r\n".encode()
    return lambda connection: connection.sendall(head + content)


def completion(text: str, **more: object) -> dict[str, object]:
    return {"choices": [{"message": {"content": text}}], **more}


def dripping(head: bytes, part: bytes, pause: float = 0.02) -> Handler:
    """Send `head`, then `part` again and again for ten seconds."""

    def handle(connection: socket.socket) -> None:
        connection.sendall(head)
        end = time.monotonic() + 10
        while time.monotonic() < end:
            connection.sendall(part)
            time.sleep(pause)

    return handle


def reply(url: str, *, key: str = "", timeout: float = 5.0) -> BackendReply:
    with closing(EndpointBackend(url, MODEL, ApiKey(key, "a test"), timeout=timeout)) as backend:
        return backend.reply([view(1)], JUDGE)


@pytest.mark.parametrize(
    "handle",
    [
        dripping(b"HTTP/1.1 200 OK\r\n", b"X-Wait: 1\r\n"),
        dripping(b"HTTP/1.1 200 OK\r\nX-Long: ", b"1"),
        dripping(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b" "),
        dripping(b"HTTP/1.1 500 No\r\nContent-Length: 9999\r\n\r\n", b" "),
        dripping(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        dripping(b"", b"HTTP/1.1 102 Processing\r\n\r\n"),
        dripping(b"", b"HTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\n", pause=0.0),
    ],
    ids=["headers", "a header", "a body", "an error", "chunks", "1xx", "a flood of 1xx"],
)
def test_a_whole_request_ends_at_its_timeout_whatever_drips(handle: Handler):
    start = time.monotonic()
    with serving(handle) as url, pytest.raises(TransportFault, match=r"no complete answer within 0\.4 s"):
        reply(url, timeout=0.4)
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("status", [200, 400, 500])
def test_every_body_has_a_size_limit(status: int):
    endless = f"HTTP/1.1 {status} .\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    handle = dripping(endless, b"10000\r\n" + b"x" * 65536 + b"\r\n", 0.0)
    with serving(handle) as url, pytest.raises(TransportFault, match="an answer of more than 1048576 bytes"):
        reply(url)


def test_a_server_that_reads_slowly_does_not_outlast_the_timeout(monkeypatch: pytest.MonkeyPatch):
    def slow(connection: socket.socket) -> None:
        for _ in range(200):
            connection.recv(10)
            time.sleep(0.02)

    monkeypatch.setattr(f"{__name__}.read_request", slow)
    large = judge_instruction("x" * 9_000_000)
    with serving(lambda connection: None) as url, closing(EndpointBackend(url, MODEL, ApiKey("", ""), timeout=0.5)) as backend:
        start = time.monotonic()
        with pytest.raises(TransportFault, match="no complete answer"):
            backend.reply([view(1)], large)
        assert time.monotonic() - start < 2


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    "location", ["https://elsewhere.example/v1", "http://me:secret@x.example/y?k=secret", "/v2", "", "http://["]
)
def test_no_redirect_is_followed(status: int, location: str):
    handle, refusal = answering({}, status, f"Location: {location}\r\n"), "Images are not sent to another address"
    with serving(handle) as url, pytest.raises(BadInput, match=refusal) as caught:
        reply(url)
    assert "secret" not in str(caught.value)
    assert not location.startswith("https") or "to https://elsewhere.example/v1." in str(caught.value)


def test_a_host_that_does_not_exist_fails_at_once_and_is_named(tmp_path: Path):
    start = time.monotonic()
    with closing(AnswerCache(tmp_path / "answers.sqlite")) as answers:
        endpoints = Endpoints(answers)
        with pytest.raises(
            BadInput, match=r"'rule' does not answer: the host nowhere\.invalid (is not known|could not be looked)"
        ):
            endpoints("http://nowhere.invalid/v1", policy=RequestPolicy()).ask([view(1)], JUDGE)
        endpoints.close()
    assert time.monotonic() - start < 15


def test_an_address_that_swallows_everything_fails_in_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("difflex.explanation.transport.CONNECT_TIMEOUT", 0.3)
    with socket.socket() as full:  # it accepts nothing, and its queue is full
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(3)]
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        start = time.monotonic()
        with pytest.raises(UnusableEndpoint, match=r"did(?: not|es not) accept a connection|does not accept a connection"):
            reply(f"http://127.0.0.1:{full.getsockname()[1]}/v1")
        assert time.monotonic() - start < 2
        for client in waiting:
            client.close()


def test_a_look_up_that_hangs_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("difflex.explanation.transport.CONNECT_TIMEOUT", 0.2)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(1) or [])
    with pytest.raises(UnusableEndpoint, match="could not be looked up within"):
        reply("http://slow.example/v1")


def test_https_where_there_is_none_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(f"{__name__}.read_request", lambda connection: connection.recv(65536))
    with serving(answering({})) as url, pytest.raises(UnusableEndpoint, match="does not answer as https"):
        reply(url.replace("http:", "https:"))


def test_a_page_instead_of_an_endpoint_fails_at_once(tmp_path: Path):
    with serving(answering(b"<html>Welcome</html>")) as url, closing(AnswerCache(tmp_path / "answers.sqlite")) as answers:
        endpoints = Endpoints(answers)
        with pytest.raises(BadInput, match="not a completion: <html>Welcome</html>"):
            endpoints(url, policy=RequestPolicy()).ask([view(1)], JUDGE)
        endpoints.close()


@pytest.mark.parametrize(
    "url",
    [
        "ftp://x/v1",
        "localhost:8000",
        "http://",
        "http:///v1",
        "http://[::1",
        "http://x:port/v1",
        "http://x:99999/v1",
        "http://x:0/v1",
        f"http://{'x' * 70}.example/v1",
        "http://a b/v1",
        "http://x/\x1b[31m",
        "http://x/\udc80",
        "https://me:secret@host/v1",
        "https://secret@host/v1",
        "https://host/v1?key=secret",
        "https://host/v1#secret",
        "https://me:secret@host:port/v1",
    ],
)
def test_an_odd_address_or_one_with_a_secret_is_refused_without_repeating_it(url: str):
    with pytest.raises(BadInput, match="address of") as caught:
        EndpointBackend(url, MODEL, ApiKey("", ""))
    assert "secret" not in str(caught.value)


def test_an_address_of_ipv6_works():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    EndpointBackend("http://[::1]:8000/v1", MODEL, ApiKey("", "")).close()
    with pytest.raises(UnusableEndpoint, match="::1, port 1, does not accept a connection"):
        reply("http://[::1]:1/v1")


@pytest.mark.parametrize("model", ["", "  ", "a\nb", "x" * 201, "\x1b[31m", "\udc80"])
def test_an_odd_name_of_a_model_is_refused(model: str):
    with pytest.raises(BadInput, match="The name of a model has 1 to 200 printable characters"):
        EndpointBackend("http://127.0.0.1:1/v1", model, ApiKey("", ""))


@pytest.mark.parametrize(
    "settings",
    [{"timeout": t} for t in (0.0, -1.0, float("nan"), float("inf"), 1e9)]
    + [{"connections": n} for n in (0, -1, 10**6)]
    + [{"max_tokens": 0}],
)
def test_limits_that_allow_no_request_are_refused(settings: dict[str, float]):
    with pytest.raises(BadInput, match="allow no request"):
        EndpointBackend("http://127.0.0.1:1/v1", MODEL, ApiKey("", ""), **settings)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "proxy", ["socks5://me:secret@h:1", "http://", "http://me:secret@h:port", "ftp://secret", "http://[::1", "http://me:secret@"]
)
def test_an_odd_proxy_is_refused_without_repeating_it(monkeypatch: pytest.MonkeyPatch, proxy: str):
    monkeypatch.setenv("http_proxy", proxy)
    with pytest.raises(BadInput, match=r"proxy that the environment names for http .* Write it as http://HOST:PORT") as caught:
        EndpointBackend("http://host.example/v1", MODEL, ApiKey("", ""))
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("no_proxy", "host.example")
    EndpointBackend("http://host.example/v1", MODEL, ApiKey("", "")).close()


def test_a_proxy_of_the_environment_is_used_and_its_refusal_is_said(monkeypatch: pytest.MonkeyPatch):
    with serving(answering(completion('{"score": 1}'))) as url:
        monkeypatch.setenv("http_proxy", url.removesuffix("/v1").replace("//", "//me:pass%20word@"))
        assert reply("http://host.example/v1").text == '{"score": 1}'
    refusal = answering({}, 407)
    monkeypatch.setattr(f"{__name__}.read_request", lambda connection: connection.recv(65536))
    with serving(refusal) as url:
        monkeypatch.setenv("https_proxy", url.removesuffix("/v1").replace("//", "//me:pass@"))
        with pytest.raises(UnusableEndpoint, match="the proxy of the environment does not connect to it: 407") as caught:
            reply("https://host.example/v1")
        assert "pass@" not in str(caught.value)


USAGES: list[tuple[object, TokenUsage | None]] = [
    ({"prompt_tokens": 7, "completion_tokens": 3, "cost": 0.5}, TokenUsage(7, 3, 0.5)),
    ({"prompt_tokens": -7, "completion_tokens": 3}, None),
    ({"prompt_tokens": 1e30, "completion_tokens": 3}, None),
    ({"prompt_tokens": 10**400, "completion_tokens": 3}, None),
    ({"prompt_tokens": "7", "completion_tokens": None}, None),
    ({"prompt_tokens": 7, "completion_tokens": 3, "cost": -1}, TokenUsage(7, 3, None)),
    ({"prompt_tokens": 7, "completion_tokens": 3, "cost": "free"}, TokenUsage(7, 3, None)),
    ({"prompt_tokens": 7, "completion_tokens": 3, "cost": 1e30}, TokenUsage(7, 3, None)),
    ({"prompt_tokens": 7, "completion_tokens": 3, "cost": float("nan")}, TokenUsage(7, 3, None)),
    ({"prompt_tokens": float("nan"), "completion_tokens": float("inf")}, None),
    ([1, 2], None),
    ("many", None),
    (None, None),
]


@pytest.mark.parametrize(("usage", "counted"), USAGES)
def test_odd_counts_of_tokens_and_costs_do_not_count_and_do_not_drop_an_answer(usage: object, counted: TokenUsage | None):
    with serving(answering(completion('{"score": 1}', usage=usage))) as url:
        assert reply(url) == BackendReply('{"score": 1}', counted)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-5", "soon", "", "1e400", "Fri, 01 Jan 99999 00:00:00 GMT", "9" * 400])
def test_an_odd_retry_after_is_ignored(value: str):
    with serving(answering({}, 429, f"Retry-After: {value}\r\n")) as url, pytest.raises(TransportFault) as caught:
        reply(url)
    assert caught.value.retry_after is None


def escaped(secret: str) -> str:
    return "".join(f"\\u{ord(letter):04x}" for letter in secret)


ECHOES: dict[str, Callable[[str], str]] = {
    "plain": str,
    "in upper case": str.upper,
    "in an address": lambda secret: quote(secret, safe=""),
    "partly in an address": lambda secret: quote(secret, safe="+/="),
    "twice in an address": lambda secret: quote(quote(secret, safe=""), safe=""),
    "escaped as in JSON": escaped,
    "with escaped slashes": lambda secret: secret.replace("/", "\\/"),
    "escaped in JSON in JSON": lambda secret: json.dumps(escaped(secret))[1:-1],
    "in HTML": lambda secret: "".join(f"&#{ord(letter)};" for letter in secret),
    "in base64": lambda secret: base64.b64encode(f"{secret}".encode()).decode(),
    "in base64 after one byte": lambda secret: base64.b64encode(f":{secret}:".encode()).decode(),
    "in base64 of a header": lambda secret: base64.urlsafe_b64encode(f"Bearer {secret}".encode()).decode(),
    "in hexadecimal": lambda secret: secret.encode().hex(),
    "with invisible letters": lambda secret: "\u200b".join(secret),
}


@pytest.mark.parametrize("echo", ECHOES.values(), ids=ECHOES.keys())
def test_whatever_repeats_the_key_is_redacted(echo: Callable[[str], str], tmp_path: Path):
    """Let each answer repeat the key: as an explanation, an error, a refusal, a page, an odd header."""
    repeated = f"the key {echo(SECRET)} is good"
    handlers: dict[str, Handler] = {
        "answer": answering(completion(json.dumps({"score": 1, "common_pattern": repeated, "pattern_descriptions": [repeated]}))),
        "words": answering(completion(f"no JSON but {repeated}")),
        "error": answering({"error": {"message": repeated}}, 400),
        "wrong key": answering({"error": {"message": repeated}}, 401),
        "fault": answering(repeated.encode(), 500),
        "refusal": answering({"choices": [{"message": {"refusal": repeated}}]}),
        "page": answering(f"<html>{repeated}</html>".encode()),
        "no choices": answering({"error": repeated}),
        "header": lambda connection: connection.sendall(f"HTTP/1.1 200 OK\r\n{repeated}\r\n\r\n".encode()),
        "place": answering({}, 302, f"Location: https://x.example/{quote(repeated)}\r\n"),
    }
    from difflex.explanation.client import NoAnswer
    from difflex.explanation.questions import explain_instruction

    texts: list[str] = []
    with closing(AnswerCache(tmp_path / "answers.sqlite")) as answers:
        for name, handle in handlers.items():
            with serving(handle) as url, closing(EndpointBackend(url, name, ApiKey(SECRET, "a test"), timeout=5)) as backend:
                client = CachedClient(backend, answers, RequestPolicy(send_retries=0, answer_retries=0))
                try:
                    texts.append(client.ask([view(1)], explain_instruction(1)).model_dump_json())
                except (NoAnswer, BadInput) as error:
                    texts.append(str(error))
                texts.append(repr(vars(client)) + repr(vars(backend)))
    files = b"".join(path.read_bytes() for path in tmp_path.iterdir()).decode("latin-1")
    for text in [*texts, files]:
        assert SECRET not in text and echo(SECRET).lower() not in text.lower()
        assert base64.b64encode(SECRET.encode()).decode()[:20] not in text
    assert sum("[key]" in text for text in texts) >= 8


def test_redacting_takes_no_time_to_speak_of():
    key, start = ApiKey(SECRET, "a test"), time.monotonic()
    for text in ("\\" * 2**20, "%25" * 2**18, "sk-" * 2**18, base64.b64encode(bytes(2**19)).decode(), "&#000" * 2**17):
        assert key.redact(text) == text
    assert time.monotonic() - start < 5


def test_a_key_is_read_from_a_file_or_the_environment(tmp_path: Path):
    file = tmp_path / "key"
    for content in (SECRET, f"{SECRET}\n", f"  {SECRET} \r\n", f"\ufeff{SECRET}"):
        file.write_text(content, encoding="utf-8")
        assert ApiKey.read(file).secret == SECRET == ApiKey.read(None, "NAME", {"NAME": f"{SECRET}\n"}).secret
    assert not ApiKey.read(None, environment={}).secret and not ApiKey.read(None, "NAME", {"NAME": ""}).secret


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"{SECRET}\n{SECRET}\n".encode(), "it has 2 lines"),
        (f"export KEY={SECRET} more".encode(), "it has 3 words"),
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"\x89PNG\x00\x01\x02\x03do-not-tell", "not printable ASCII"),
        ("sk-dö-not-tell".encode(), "not printable ASCII"),
        (b"do-not-tell" * 1000, "characters"),
    ],
)
def test_an_odd_key_is_refused_without_repeating_any_of_it(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(BadInput, match=message) as caught:
        ApiKey.read(tmp_path / "key")
    assert "tell" not in str(caught.value)
    if b"\x00" not in content and content.strip():
        with pytest.raises(BadInput, match=r"The API key from \$NAME is not valid") as caught:
            ApiKey.read(None, "NAME", {"NAME": content.decode("latin-1")})
        assert "tell" not in str(caught.value)


def test_a_word_given_to_a_local_server_is_no_secret():
    assert ApiKey("EMPTY", "$NAME").redact("an empty EMPTY plate") == "an empty EMPTY plate"


def test_a_key_given_where_a_name_belongs_is_not_repeated(tmp_path: Path):
    for file in (tmp_path / SECRET.replace("/", ""), Path(SECRET), Path("\0do-not-tell"), tmp_path):
        with pytest.raises(BadInput, match="The key file cannot be read: ") as caught:
            ApiKey.read(file)
        assert "tell" not in str(caught.value)
    with pytest.raises(BadInput, match=r"that should hold the API key \(--key-variable\) is not set") as caught:
        ApiKey.read(None, SECRET, {})
    assert "tell" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        '{"score": 1e400}',
        '{"score": ' + "9" * 5000 + "}",
        '{"score": -Infinity}',
        "{" * 100_000 + "}",
        '{"a":' * 50_000 + "1" + "}" * 50_000,
        '{"score": "\\ud800"}',
        "\ud800{}",
        "<html>" * 100_000 + "{}",
        '{"score": 1' + " " * 10_000_000 + "0}",
        "{\x00}",
    ],
)
def test_an_odd_answer_is_malformed_for_a_short_reason(text: str):
    from difflex.explanation.questions import MalformedAnswer

    with pytest.raises(MalformedAnswer) as caught:
        parse_answer(text, JudgementAnswer)
    assert 0 < len(str(caught.value)) <= 300


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 500_000,
        b'{"choices": 3}',
        b'{"choices": [3]}',
        b"\xff\xfe",
        b"",
        b"null",
        b'{"choices":[{"message":{"content":3}}]}',
    ],
)
def test_an_odd_completion_is_no_completion(body: bytes):
    with serving(answering(body)) as url, pytest.raises(UnusableEndpoint, match="not a completion"):
        reply(url)


@pytest.mark.parametrize(
    "settings",
    [{name: value} for name in ("per_minute", "budget", "first_wait", "longest_wait", "longest_retry_after", "image_tokens")
     for value in (float("nan"), float("inf"), -1, "3")]
    + [{"per_minute": 0}, {"per_minute": 1e-300}, {"send_retries": -1}, {"answer_retries": float("inf")}]
    + [{"price": price} for price in ((1, float("nan")), (-1, 0), (float("inf"), 0), (1,), (1, 2, 3))],
)  # fmt: skip
def test_a_policy_of_odd_numbers_is_refused(settings: dict[str, object]):
    with pytest.raises(BadInput, match=r"policy of requests has|A price is two numbers"):
        RequestPolicy(**settings)  # pyright: ignore[reportArgumentType]


def test_a_rejected_request_is_bounded_and_named():
    with serving(answering(b"x" * 100_000, 422)) as url, pytest.raises(RejectedRequest, match=r"status 422: x+…") as caught:
        reply(url)
    assert len(str(caught.value)) < 400


def test_a_certificate_of_its_own_is_refused(tmp_path: Path):
    """Serve with a certificate that nobody vouches for, which must be said."""
    import subprocess

    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-subj",
        "/CN=x",
        "-days",
        "2",
        "-keyout",
        "key",
        "-out",
        "cert",
    ]
    try:
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("openssl makes no certificate here")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            try:
                context.wrap_socket(listener.accept()[0], server_side=True).close()
            except OSError:
                return

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(UnusableEndpoint, match=r"the certificate of 127\.0\.0\.1 is not valid"):
            reply(f"https://127.0.0.1:{listener.getsockname()[1]}/v1")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.floats()
    | st.text(max_size=40)
    | st.sampled_from(["score", "\ud800", "\0", "1e999"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["choices", "message", "content", "usage", "error", "score", "prompt_tokens"]), inner)
    ),
    max_leaves=12,
)
WORDS = st.text(max_size=200) | st.binary(max_size=200).map(lambda content: content.decode("latin-1"))


@cache
def unconnected() -> EndpointBackend:
    return EndpointBackend("http://127.0.0.1:1/v1", MODEL, ApiKey(SECRET, "a test"))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(content=JSON.map(json.dumps) | WORDS, usage=JSON, more=JSON, retry=WORDS)
def test_no_answer_of_any_kind_ends_in_a_traceback(content: str, usage: object, more: object, retry: str):
    backend = unconnected()
    for body in (completion(content, usage=usage), {"choices": [{"message": more}]}, {"error": more}, more):
        text = json.dumps(body)
        try:
            answer = backend._parse(text)
            parse_answer(backend.redact(answer.text), JudgementAnswer)
        except FailedCall as error:
            assert len(str(error)) <= 400
        failure = backend._failure(HttpAnswer(500, {"retry-after": retry}, b""), text)
        assert isinstance(failure, TransportFault) or "insufficient_quota" in text
        assert isinstance(backend._failure(HttpAnswer(302, {"location": retry}, b""), text), BadInput)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(address=st.text(max_size=30) | st.tuples(st.sampled_from(["http://", "https://"]), st.text(max_size=30)).map("".join))
def test_no_address_ends_in_a_traceback(address: str):
    try:
        EndpointBackend(address, MODEL, ApiKey("", "")).close()
    except BadInput:
        return
