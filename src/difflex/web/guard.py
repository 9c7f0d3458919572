"""`Guard`: what every request must be before it is answered, and the headers of every answer.

By default the server listens on the loopback address; on any other it requires a token. Pages of other sites in the same browser
cannot reach it: neither by a host name of their own that resolves to it (Host), nor by cross-site requests (Origin).
"""

from __future__ import annotations

import hmac
import secrets
from http.cookies import CookieError, SimpleCookie
from typing import final
from urllib.parse import parse_qsl, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["LOCAL", "Guard", "new_token"]

LOCAL = ("127.0.0.1", "localhost", "::1")
COOKIE = "difflex"
MOST_BYTES = 1 << 20
"""The largest body of a request."""
MOST_TARGET = 8192
"""The longest path and query."""
MOST_HEADERS = 16_384
"""Bytes of the names and values of headers."""
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; img-src 'self' data: blob:; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "manifest-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


def new_token() -> str:
    """Return a random token of 192 bits."""
    return secrets.token_urlsafe(24)


@final
class Guard:
    """Refuses requests from elsewhere, without the token, or of too large a size."""

    def __init__(self, app: ASGIApp, *, hosts: tuple[str, ...] = LOCAL, token: str | None = None) -> None:
        """Answer for these names of this machine; with a `token`, only those who know it."""
        self._app, self._hosts, self._token = app, {host.lower() for host in hosts}, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self._refusal(scope, Headers(scope=scope))
        if refusal is not None:
            await refusal(scope, receive, send_guarded)
            return
        await self._app(scope, _limited(receive), send_guarded)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        """Return the answer to a request that is refused; None for one that may go on."""
        host = headers.get("host", "")
        if len(headers.getlist("host")) != 1 or _name(host) not in self._hosts:
            return PlainTextResponse(
                f"This server is not called {host[:100]!r}. Open the address that difflex serve printed.", 421
            )
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return PlainTextResponse("Requests from pages of other sites are refused.", 403)
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > MOST_TARGET:
            return PlainTextResponse(f"The address is longer than {MOST_TARGET:,} characters.", 414)
        if sum(len(name) + len(value) for name, value in headers.raw) > MOST_HEADERS:
            return PlainTextResponse(
                f"The headers have more than {MOST_HEADERS:,} bytes. Delete the cookies of this address.", 431
            )
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > MOST_BYTES:
            return PlainTextResponse(f"A request may have {MOST_BYTES:,} bytes.", 413)
        return None if self._token is None else self._check_token(scope, headers)

    def _check_token(self, scope: Scope, headers: Headers) -> Response | None:
        """Let those pass who have the token in a cookie; give the cookie to those who have it in the address."""
        if self._is_token(_cookie(headers)):
            return None
        given = dict(parse_qsl(scope["query_string"].decode("latin-1"))).get("token", "")
        if not self._is_token(given):
            return PlainTextResponse("Open the address with the token that difflex serve printed.", 401)
        # To the same path without the token, so that it is not in what is bookmarked or sent on; never to another host.
        answer = RedirectResponse("/" + scope["path"].lstrip("/\\"), 303)
        answer.set_cookie(COOKIE, given, httponly=True, samesite="strict")
        return answer

    def _is_token(self, given: str) -> bool:
        return self._token is not None and hmac.compare_digest(given.encode(), self._token.encode())


def _name(host: str) -> str:
    """Return the name in a Host header, without its port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _cookie(headers: Headers) -> str:
    try:
        morsel = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return morsel.value if morsel else ""


def _limited(receive: Receive) -> Receive:
    """Return `receive` for bodies that come in parts without a length: what is beyond the largest size ends the connection."""
    read = 0

    async def receive_part() -> Message:
        nonlocal read
        message = await receive()
        read += len(message.get("body", b""))
        return {"type": "http.disconnect"} if read > MOST_BYTES else message

    return receive_part
