"""Who may ask what: reading only, by the names that this server has, from its own page."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any
from urllib.parse import urlsplit

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
"""The page runs its own scripts and nothing else: no text of a run can become one."""
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
)
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Guard:
    """An ASGI app before another one.

    * Only GET and HEAD.
    * Only requests whose Host is a name of this server, with any port: through a tunnel it is another one. A page of
      another site whose name was made to lead here (DNS rebinding) has that site's name.
    * No requests that other sites' pages make, but for links to follow.
    * Where there is a secret, only addresses that begin with it.

    Args:
        hosts: names of this server.
        addresses: any numeric address is a name, too: nobody can make that lead elsewhere.
        secret: the first part of every address; "" for none.
    """

    def __init__(self, app: App, hosts: Collection[str] = LOOPBACK, addresses: bool = False, secret: str = "") -> None:
        self._app = app
        self._hosts = frozenset(host.lower() for host in hosts)
        self._addresses = addresses
        self._secret = secret

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.lower(), []).append(value)
        if scope["method"] not in ("GET", "HEAD"):
            await _refuse(send, 405, "this server only shows: GET or HEAD", (b"allow", b"GET, HEAD"))
        elif not self._is_own(headers.get(b"host", [])):
            await _refuse(send, 421, "this server has another name: use the address that klab serve printed")
        elif _is_foreign(headers):
            await _refuse(send, 403, "another site's page may not ask this server")
        elif self._secret and not self._is_let_in(scope):
            await _refuse(send, 404, "use the whole address that klab serve printed")
        else:
            await self._app(scope, receive, _with_headers(send))

    def _is_own(self, hosts: list[bytes]) -> bool:
        if len(hosts) != 1:
            return False
        try:
            parts = urlsplit(f"//{hosts[0].decode('ascii')}")
            name = (parts.hostname or "").lower()
            sound = parts.path == "" and parts.username is None and (parts.port is None or parts.port >= 0)
        except ValueError:
            return False
        return sound and (name in self._hosts or (self._addresses and _is_address(name)))

    def _is_let_in(self, scope: Scope) -> bool:
        first = str(scope["path"]).split("/")[1:2]
        if not first or "/" not in str(scope["path"])[1:]:
            return False
        if not hmac.compare_digest(first[0].encode(errors="replace"), self._secret.encode()):
            return False
        scope["root_path"] = f"/{self._secret}"
        return True


def _is_foreign(headers: dict[bytes, list[bytes]]) -> bool:
    """Whether a page of another site, or one without any (a sandboxed report), asks for a part of itself."""
    if headers.get(b"sec-fetch-site", [b""])[0] not in (b"cross-site", b"same-site"):
        return False
    follows = headers.get(b"sec-fetch-mode", [b""])[0] == b"navigate"
    return not (follows and headers.get(b"sec-fetch-dest", [b""])[0] == b"document")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _with_headers(send: Send) -> Send:
    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", []))
            known = {name.lower() for name, _ in headers}
            headers += [pair for pair in _HEADERS if pair[0] not in known]
            if b"content-security-policy" not in known:
                headers.append((b"content-security-policy", POLICY.encode()))
            if b"cache-control" not in known:
                headers.append((b"cache-control", b"no-cache"))
            message = {**message, "headers": headers}
        await send(message)

    return sending


async def _refuse(send: Send, status: int, text: str, *more: tuple[bytes, bytes]) -> None:
    body = f"klab: {text}\n".encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode()), *more]
    start = {"type": "http.response.start", "status": status, "headers": headers}
    await _with_headers(send)(start)
    await send({"type": "http.response.body", "body": body})
