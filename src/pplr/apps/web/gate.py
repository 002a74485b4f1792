"""What every request passes on its way to the page: whose it may be, and what a browser may load for it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any
from urllib.parse import urlsplit

__all__ = ["Gate", "is_loopback"]

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_App = Callable[[_Scope, _Receive, _Send], Awaitable[None]]

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_HEADERS = {
    # the page's own scripts compile its elements in the browser, which is why eval stands here
    "content-security-policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def is_loopback(host: str) -> bool:
    """Say whether an address can be reached from this machine alone.

    Example:
        >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("0.0.0.0")
        (True, True, False)
    """
    return host in _LOOPBACK or host.startswith("127.")


class Gate:
    """Refuses what another site makes a browser ask, and forbids the page to load anything from elsewhere.

    A page without a login on the own machine can be asked by any site that the browser visits: by its address, with
    that site as the ``Origin``, or under a name that leads to this machine. Both are refused.

    Args:
        app: What is behind it.
        hosts: Names and addresses that a request may be for; any where this is empty.
    """

    def __init__(self, app: _App, hosts: Collection[str] = ()) -> None:
        self._app, self._hosts = app, frozenset(hosts)

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if not self._lets_in(headers):
            await _refuse(scope, send)
            return

        async def sending(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *own]}
            await send(message)

        await self._app(scope, receive, sending)

    def _lets_in(self, headers: dict[bytes, str]) -> bool:
        asked, origin = headers.get(b"host", ""), headers.get(b"origin")
        if self._hosts and urlsplit(f"//{asked}").hostname not in self._hosts:
            return False
        return origin is None or urlsplit(origin).netloc.lower() == asked.lower()


async def _refuse(scope: _Scope, send: _Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"This page is not for other sites.\n"})
