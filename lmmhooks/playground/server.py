"""Serves the page on this machine's loopback address, and tells browsers to ask nobody else for anything."""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING, Any

from lmmhooks.errors import LmmhooksError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping

    Message = MutableMapping[str, Any]
    Send = Callable[[Message], Awaitable[None]]

__all__ = ["HOST", "OnlyFromHere", "listen", "serve"]

HOST = "127.0.0.1"

POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; frame-src 'self' data: blob:; form-action 'self'; base-uri 'self'"
)
"""
What pages may load: what comes from this server or stands in the page. Gradio's own page names a script of a content
delivery network, which the browser then does not fetch.
"""


def listen(port: int) -> socket.socket:
    """
    A socket on `HOST`, bound before a model is loaded for it.

    Parameters
    ----------
    port
        0 takes any that is free.

    Raises
    ------
    LmmhooksError
        The port is taken or may not be used.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    # A port that was left a moment ago counts as taken otherwise.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
        # Only a socket that listens keeps others from the port.
        listener.listen()
    except (OSError, OverflowError) as error:
        listener.close()
        number = getattr(error, "errno", None)
        if number == errno.EADDRINUSE:
            raise LmmhooksError(f"port {port} is already in use; give another with --port, or 0 for any") from None
        reason = getattr(error, "strerror", None) or error
        raise LmmhooksError(f"cannot listen on {HOST}:{port} ({reason}); give another --port, or 0 for any") from None
    return listener


class OnlyFromHere:
    """
    ASGI middleware: pages load nothing from elsewhere, and requests that name another host are refused.

    The second keeps web pages of others from reaching the server through a host name of theirs that resolves to the
    loopback address.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        name = headers.get(b"host", b"").decode("latin-1").rpartition(":")[0]
        if name not in (HOST, "localhost"):
            if scope["type"] == "http":
                await send({"type": "http.response.start", "status": 421, "headers": []})
                await send({"type": "http.response.body", "body": b"this server answers to 127.0.0.1 only"})
            else:
                await send({"type": "websocket.close", "code": 1008})
            return

        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, with_policy)


def serve(app: Any, listener: socket.socket) -> None:
    """
    Answer requests until the process is interrupted.

    Parameters
    ----------
    app
        An ASGI application.
    listener
        As `listen` returns it; closed at the end.
    """
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(OnlyFromHere(app), log_level="warning", timeout_graceful_shutdown=2))
    try:
        server.run(sockets=[listener])
    finally:
        listener.close()
