"""HTTP to one address: a deadline for each whole request, a limit on every body, and no redirects."""

from __future__ import annotations

import logging
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Mapping
from queue import Empty, Queue
from typing import Any, NamedTuple, final
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import httpcore2

from difflex.errors import BadInput
from difflex.explanation.backends import TransportFault, UnusableEndpoint

CONNECT_TIMEOUT = 10.0
"""Seconds to look up a host, connect to it and agree on encryption."""
MAX_BYTES = 2**20
"""Longest body of an answer, also of one that reports an error."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")

# At DEBUG it logs the headers of answers, which may repeat the key.
logging.getLogger("httpcore2").setLevel(logging.WARNING)


class HttpAnswer(NamedTuple):
    """An answer to a request."""

    status: int
    headers: Mapping[str, str]
    """By names in small letters."""
    body: bytes


@final
class HttpTransport:
    """Connections to one address; threads share it."""

    def __init__(self, url: str, headers: Mapping[str, str], *, timeout: float, connections: int) -> None:
        """`timeout`: seconds for a whole request, from the look-up of the host to the last byte of the answer."""
        parts = split_address(url)
        assert parts.hostname is not None
        host, port = parts.hostname.encode("idna"), parts.port
        target = f"{parts.path.rstrip('/')}/chat/completions".encode()
        self._url = httpcore2.URL(scheme=parts.scheme.encode(), host=host, port=port, target=target)
        named = f"[{host.decode()}]" if b":" in host else host.decode()
        lines = {"Host": f"{named}:{port}" if port else named, "Content-Type": "application/json", **headers}
        self._headers = [(name.encode(), value.encode()) for name, value in lines.items()]
        self._timeout, self._clock = timeout, _Clock()
        self._pool = _open_pool(parts, _SocketBackend(self._clock), connections)

    def post(self, body: bytes) -> HttpAnswer:
        """Send `body` and return the answer, complete and within the limits of time and size."""
        self._clock.start(self._timeout)
        headers = [*self._headers, (b"Content-Length", str(len(body)).encode())]
        content = bytearray()
        try:
            with self._pool.stream("POST", self._url, headers=headers, content=body) as response:
                for part in response.iter_stream():
                    content += part
                    if len(content) > MAX_BYTES:
                        raise TransportFault(f"an answer of more than {MAX_BYTES} bytes")
                    self._clock.remaining()
        except httpcore2.ProxyError as error:
            raise UnusableEndpoint(f"the proxy of the environment does not connect to it: {error}") from None
        except (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException) as error:
            raise TransportFault(f"the connection failed: {error or type(error).__name__}") from None
        names = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
        return HttpAnswer(response.status, names, bytes(content))

    def close(self) -> None:
        """Close the connections."""
        self._pool.close()


def split_address(url: str) -> SplitResult:
    """Return the parts of the address of an endpoint, which must contain no secret; errors do not repeat it."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and url.isascii() and url.isprintable()
        valid = valid and " " not in url and bool((parts.hostname or "").encode("idna"))
    except ValueError:  # of the port, of an IPv6 address, or of a label that is too long
        parts, valid = SplitResult("", "", "", "", ""), False
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise BadInput(
            "The address of the endpoint contains a user name, a password or a query, which logs and errors would show. Put the "
            "key into the environment or a key file."
        )
    if not valid:
        raise BadInput("That is not the address of an endpoint. Write it as in https://openrouter.ai/api/v1.")
    return parts


def _open_pool(parts: SplitResult, backend: _SocketBackend, connections: int) -> httpcore2.ConnectionPool:
    options: dict[str, Any] = {
        "max_connections": connections,
        "max_keepalive_connections": connections,
        "keepalive_expiry": 5.0,
        "network_backend": backend,
    }
    if parts.scheme == "https":
        try:
            options["ssl_context"] = httpcore2.default_ssl_context()
        except OSError as error:
            raise BadInput(f"The certificates of authorities cannot be read ({error}). Check $SSL_CERT_FILE.") from error
    if (address := _proxy_address(parts)) is None:
        return httpcore2.ConnectionPool(**options)
    proxy = _split_proxy(address, parts.scheme)
    auth = (unquote(proxy.username).encode(), unquote(proxy.password or "").encode()) if proxy.username else None
    assert proxy.hostname is not None
    url = httpcore2.URL(scheme=b"http", host=proxy.hostname.encode("idna"), port=proxy.port or 80, target=b"/")
    return httpcore2.HTTPProxy(url, proxy_auth=auth, **options)


def _proxy_address(parts: SplitResult) -> str | None:
    """Return the address of the proxy that the environment names for an endpoint; None on this machine."""
    if parts.hostname in LOOPBACK or proxy_bypass(parts.netloc):
        return None
    proxies = getproxies()
    return proxies.get(parts.scheme) or proxies.get("all") or None


def _split_proxy(address: str, scheme: str) -> SplitResult:
    """Return the parts of the address of a proxy, which may contain a password: errors do not repeat it."""
    try:
        proxy = urlsplit(address if "://" in address else f"http://{address}")
        if proxy.scheme == "http" and proxy.hostname and proxy.hostname.encode("idna") and proxy.port != 0:
            return proxy
    except ValueError:
        pass
    raise BadInput(
        f"The proxy that the environment names for {scheme} (${scheme}_proxy or $all_proxy) cannot be used. Write it as "
        "http://HOST:PORT, or name the endpoint in $no_proxy."
    )


@final
class _Clock(threading.local):
    """The deadlines of the request that this thread is sending."""

    def start(self, seconds: float) -> None:
        self.seconds, self.end = seconds, time.monotonic() + seconds

    def start_connecting(self) -> None:
        self.connected = time.monotonic() + CONNECT_TIMEOUT

    def remaining(self) -> float:
        """Return the seconds until the deadline; raise an error after it."""
        if (seconds := self.end - time.monotonic()) <= 0:
            raise self.fault()
        return seconds

    def fault(self) -> TransportFault:
        return TransportFault(f"no complete answer within {self.seconds:g} s")

    def remaining_to_connect(self, place: str) -> float:
        """Return the seconds until the connection must stand; raise an error after that."""
        if (seconds := min(self.connected, self.end) - time.monotonic()) <= 0:
            raise UnusableEndpoint(f"{place} did not accept a connection within {min(CONNECT_TIMEOUT, self.seconds):g} s")
        return seconds


@final
class _SocketBackend(httpcore2.NetworkBackend):
    """Connects sockets, each step within the deadlines."""

    def __init__(self, clock: _Clock) -> None:
        self._clock = clock

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        clock, place = self._clock, f"{host}, port {port},"
        clock.start_connecting()
        addresses, reason = _look_up(host, port, clock.remaining_to_connect(place)), ""
        for number, (family, kind, protocol, _, address) in enumerate(addresses):
            # An address that swallows everything leaves time for the others.
            seconds = clock.remaining_to_connect(place) / (len(addresses) - number)
            try:
                return _SocketStream(_connect(family, kind, protocol, address, seconds), clock, place)
            except OSError as error:
                reason = error.strerror or str(error)
        clock.remaining_to_connect(place)
        raise UnusableEndpoint(f"{place} does not accept a connection: {reason}")


def _look_up(host: str, port: int, seconds: float) -> list[Any]:
    """Return the network addresses of a host. A look-up cannot be interrupted: one that is too slow is left to its thread."""
    results: Queue[list[Any] | Exception] = Queue(1)

    def look_up() -> None:
        try:
            results.put([*socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)])
        except (OSError, UnicodeError) as error:
            results.put(error)

    threading.Thread(target=look_up, name="look-up", daemon=True).start()
    try:
        result = results.get(timeout=seconds)
    except Empty:
        raise UnusableEndpoint(f"the host {host} could not be looked up within {seconds:.0f} s") from None
    if isinstance(result, Exception):
        raise UnusableEndpoint(f"the host {host} is not known ({getattr(result, 'strerror', None) or result})")
    return result


def _connect(family: int, kind: int, protocol: int, address: Any, seconds: float) -> socket.socket:
    connection = socket.socket(family, kind, protocol)
    try:
        connection.settimeout(seconds)
        connection.connect(address)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        connection.close()
        raise
    return connection


@final
class _SocketStream(httpcore2.NetworkStream):
    """A socket whose every read and write ends at the deadline of the request."""

    def __init__(self, connection: socket.socket, clock: _Clock, place: str) -> None:
        self._socket, self._clock, self._place = connection, clock, place

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        try:
            self._socket.settimeout(self._clock.remaining())
            return self._socket.recv(max_bytes)
        except TimeoutError:
            raise self._clock.fault() from None
        except OSError as error:
            raise httpcore2.ReadError(str(error)) from error

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        view = memoryview(buffer)
        try:
            while view:
                self._socket.settimeout(self._clock.remaining())
                view = view[self._socket.send(view) :]
        except TimeoutError:
            raise self._clock.fault() from None
        except OSError as error:
            raise httpcore2.WriteError(str(error)) from error

    def close(self) -> None:
        self._socket.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        try:
            self._socket.settimeout(self._clock.remaining_to_connect(self._place))
            encrypted = ssl_context.wrap_socket(self._socket, server_hostname=server_hostname)
        except ssl.SSLCertVerificationError as error:
            self.close()
            raise UnusableEndpoint(f"the certificate of {server_hostname} is not valid: {error.verify_message}") from None
        except OSError as error:
            self.close()
            reason = getattr(error, "reason", None) or error.strerror or error
            raise UnusableEndpoint(f"{self._place} does not answer as https ({reason}), but perhaps as http") from None
        return _SocketStream(encrypted, self._clock, self._place)

    def get_extra_info(self, info: str) -> Any:
        if info == "ssl_object":
            return getattr(self._socket, "_sslobj", None)
        return _is_readable(self._socket) if info == "is_readable" else None


def _is_readable(connection: socket.socket) -> bool:
    """Whether an idle connection has something to read, which means that the other side closed it."""
    if connection.fileno() < 0:
        return True
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        return bool(selector.select(0))
