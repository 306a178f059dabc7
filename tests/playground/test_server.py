"""The server is on the loopback address, keeps pages to themselves, and says in a sentence when a port is taken."""

from __future__ import annotations

import asyncio

import pytest

from lmmhooks.errors import LmmhooksError
from lmmhooks.playground.server import HOST, OnlyFromHere, listen


def test_any_port_is_a_free_one_of_this_machine() -> None:
    with listen(0) as one, listen(0) as two:
        assert one.getsockname()[0] == two.getsockname()[0] == HOST
        assert one.getsockname()[1] != two.getsockname()[1]


def test_a_port_that_is_taken_is_said() -> None:
    with listen(0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LmmhooksError, match=f"port {port} is already in use; give another"):
            listen(port)
    listen(port).close()


@pytest.mark.parametrize("port", [70000, -1])
def test_numbers_that_are_no_port(port) -> None:
    with pytest.raises(LmmhooksError, match="cannot listen"):
        listen(port)


def respond(host: str) -> list[dict]:
    """What a browser gets that names a host."""
    sent: list[dict] = []

    async def page(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
        await send({"type": "http.response.body", "body": b"page"})

    async def send(message) -> None:
        sent.append(message)

    scope = {"type": "http", "headers": [(b"host", host.encode())]}
    asyncio.run(OnlyFromHere(page)(scope, None, send))
    return sent


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost:80"])
def test_pages_may_load_nothing_from_elsewhere(host) -> None:
    start, body = respond(host)
    policy = dict(start["headers"])[b"content-security-policy"].decode()
    assert start["status"] == 200
    assert body["body"] == b"page"
    assert "http" not in policy
    assert "*" not in policy


@pytest.mark.parametrize("host", ["evil.example:7860", "127.0.0.1.evil.example:80", ""])
def test_other_names_of_this_machine_are_refused(host) -> None:
    assert respond(host)[0]["status"] == 421
