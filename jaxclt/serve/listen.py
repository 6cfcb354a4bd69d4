"""The server of a folder, on uvicorn, with limits on what a client may hold."""

from __future__ import annotations

import asyncio
import re
import secrets
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxclt.errors import InputError
from jaxclt.serve.app import make_app
from jaxclt.serve.door import Door
from jaxclt.serve.folder import Folder
from jaxclt.serve.patch import Patcher

__all__ = ["Server", "make_server"]

LOCAL = ("127.0.0.1", "localhost", "[::1]")
ANY = ("", "0.0.0.0", "::")  # all addresses of the machine
PATIENCE = 30.0  # seconds for a request to arrive
MAX_CONNECTIONS = 64
MAX_HEADERS = 1 << 15  # bytes
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_HEADERS = [
    ("Content-Security-Policy", _POLICY),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cache-Control", "no-store"),
]


class Server:
    """A server that listens already, and answers while it runs.

    Attributes:
      port: where it listens.
      token: that requests must know.
      url: where a browser opens it, with the token.
    """

    def __init__(self, listener: socket.socket, app: Any, host: str, token: str):
        self.port: int = listener.getsockname()[1]
        self.token = token
        self.url = f"http://{_name(host)}:{self.port}/?token={token}"
        self._listener = listener
        self._stopped = False
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=_Connection,
                loop="asyncio",
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="critical",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                headers=_HEADERS,
                limit_concurrency=MAX_CONNECTIONS,
                h11_max_incomplete_event_size=MAX_HEADERS,
                timeout_graceful_shutdown=1,
            )
        )

    def run(self) -> None:
        """Answer until `stop` or a signal.

        Raises:
          KeyboardInterrupt: after a signal. The one that uvicorn raises again can be
            lost in a callback that C code runs, so nothing hangs on it.
        """
        self._server.run(sockets=[self._listener])
        if not self._stopped:
            raise KeyboardInterrupt

    def close(self) -> None:
        """Give the port back, if `run` was never called."""
        self._listener.close()

    def stop(self) -> None:
        """Let `run` return; from any thread."""
        self._stopped = True
        self._server.should_exit = True


def make_server(
    directory: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    allow_host: Sequence[str] = (),
    token: str | None = None,
    patcher: Patcher | None = None,
) -> Server:
    """A server that listens but does not answer yet.

    Args:
      directory: whose graphs it shows.
      host: where it listens.
      port: 0 takes a free one.
      allow_host: other names that this machine has.
      token: that requests must know; None makes one.
      patcher: runs patches; without one they are refused.

    Raises:
      InputError: if the folder is not there, the address is taken, or a name or the
        token is not one.
    """
    if not Path(directory).is_dir():
        raise InputError(f"{directory} is not a folder: give one that trace wrote to")
    token = secrets.token_urlsafe(24) if token is None else token
    if not re.fullmatch(r"[A-Za-z0-9_.~-]{1,200}", token):
        raise InputError("--token must be 1 to 200 letters, digits, or _ . ~ -")
    for name in allow_host:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\]", name):
            raise InputError(f"--allow-host {name[:100]!r}: give a name without a port")
    if not 0 <= port < 1 << 16:
        raise InputError(f"cannot listen on port {port}: take one from 0 to 65535")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot listen on {host}:{port}: {error}") from error
    hosts = {name.lower() for name in (*LOCAL, _name(host), *allow_host)}
    app = make_app(Folder(directory), patcher)
    cookie = f"jaxclt-{listener.getsockname()[1]}"
    app.add_middleware(Door, hosts=hosts, token=token, cookie=cookie)
    return Server(listener, app, host, token)


class _Connection(H11Protocol):
    """A connection that is closed when a request, or the reading of an answer, stalls.

    uvicorn itself waits without end for either.
    """

    _unsent = 0
    _watch: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > 2 * MAX_CONNECTIONS:  # idle ones count too
            transport.abort()
        self._wait()

    def on_response_complete(self) -> None:
        self._wait()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        if self.cycle is not None:
            self.cycle.disconnected = True  # its answer would come after this one
        super().send_400_response(msg)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._watch is not None:
            self._watch.cancel()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        self._unsent = self.transport.get_write_buffer_size()
        self._watch = self.loop.call_later(PATIENCE, self._look)

    def _look(self) -> None:
        cycle, unsent = self.cycle, self.transport.get_write_buffer_size()
        answering = cycle is not None and not (
            cycle.response_complete or cycle.more_body
        )
        if unsent != self._unsent if unsent else answering:
            self._wait()
        else:
            self.transport.abort()


def _name(host: str) -> str:
    """A host as addresses have it; this machine's own for all of its addresses."""
    if host in ANY:
        return LOCAL[0]
    return f"[{host}]" if ":" in host else host
