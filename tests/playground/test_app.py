"""The page is put together and served without asking any other machine for anything."""

from __future__ import annotations

import re
import socket

import pytest

pytest.importorskip("gradio", reason="gradio is not installed: pip install '.[ui]'")

from starlette.testclient import TestClient

from lmmhooks.playground.app import application
from lmmhooks.playground.server import OnlyFromHere

HERE = ("127.0.0.1", "localhost", "::1", None)


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """Other machines that this process looks up or connects to."""
    found: list[str] = []
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def connecting(self, address):
        if isinstance(address, tuple) and address[0] not in HERE:
            found.append(str(address[0]))
        return connect(self, address)

    def looking_up(host, *args, **kwargs):
        if host not in HERE:
            found.append(str(host))
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", connecting)
    monkeypatch.setattr(socket, "getaddrinfo", looking_up)
    return found


def test_page_is_served_without_any_network(session, asked) -> None:
    with TestClient(OnlyFromHere(application(session, 7860)), base_url="http://127.0.0.1:7860") as client:
        page = client.get("/")
        config = client.get("/config").json()
        theme = client.get("/theme.css")
    assert page.status_code == theme.status_code == 200
    loaded = re.findall(r"<(?:script|link)\b[^>]*?(?:src|href)=\"([^\"]+)\"", page.text)
    assert loaded
    assert [address for address in loaded if address.startswith(("http:", "https:", "//"))] == []
    assert re.search(r"@import|url\(['\"]?(https?:)?//", theme.text) is None
    assert config["analytics_enabled"] is False
    assert asked == []


def test_what_the_page_does_is_no_public_interface(session) -> None:
    with TestClient(OnlyFromHere(application(session, 7860)), base_url="http://127.0.0.1:7860") as client:
        described = client.get("/gradio_api/info").json()
        assert client.get("/docs").status_code == 404
    assert described["named_endpoints"] == {}
