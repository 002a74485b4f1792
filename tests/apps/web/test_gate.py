"""Whose requests the page answers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pplr.apps.web.gate import Gate

HOSTS = ("localhost", "127.0.0.1", "::1")


def asked(headers: dict[str, str], hosts: tuple[str, ...] = HOSTS, kind: str = "http") -> list[Any]:
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-own", b"1")]})

    async def receive() -> Any:
        return {}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": kind, "headers": [(name.encode(), value.encode()) for name, value in headers.items()]}
    asyncio.run(Gate(app, hosts)(scope, receive, send))
    return sent


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "127.0.0.1:8765"},
        {"host": "localhost:8765", "origin": "http://localhost:8765"},
        {"host": "[::1]:8765", "origin": "http://[::1]:8765"},
    ],
)
def test_its_own_browser_is_let_in_and_told_to_load_nothing_from_elsewhere(headers: dict[str, str]) -> None:
    (start,) = asked(headers)
    told = dict(start["headers"])
    assert start["status"] == 200
    assert told[b"x-own"] == b"1"
    assert b"default-src 'self'" in told[b"content-security-policy"]
    assert b"http" not in told[b"content-security-policy"]
    assert told[b"referrer-policy"] == b"no-referrer"


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example:8765"},  # a name that was made to lead here
        {"host": "127.0.0.1:8765", "origin": "http://evil.example"},
        {"host": "127.0.0.1:8765", "origin": "http://127.0.0.1:9999"},
        {"host": "127.0.0.1:8765", "origin": "null"},
        {},
    ],
)
def test_other_sites_are_not(headers: dict[str, str], kind: str) -> None:
    first = asked(headers, kind=kind)[0]
    assert first.get("status") == 403 or first == {"type": "websocket.close", "code": 1008}


def test_on_an_open_address_any_name_may_be_asked_but_no_other_site() -> None:
    assert asked({"host": "recommender.shop"}, hosts=())[0]["status"] == 200
    assert asked({"host": "recommender.shop", "origin": "https://evil.example"}, hosts=())[0]["status"] == 403
