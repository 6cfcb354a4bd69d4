"""Who is let in: requests for this host by one of its names, that know the token.

The token comes once in the address, as the command prints it, and stays as a cookie
that only this server's own pages send; scripts send it in an Authorization header. The
names matter because any site may let its own name point here (DNS rebinding): its pages
would be of the same origin as ours.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable
from urllib.parse import unquote_to_bytes, urlencode

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxclt.serve.answers import locked_page, refusal

__all__ = ["Door"]

_LONGEST = 4096  # bytes of a path
_HOW = (
    "This server needs its token: open the address that jaxclt serve printed, which "
    "ends in ?token=..., or send the header Authorization: Bearer TOKEN."
)


class Door:
    """An app that lets requests through to another.

    Args:
      app: where they are let through to.
      hosts: names by which it may be addressed, in lower case, besides the address
        that a connection was made to.
      token: what requests must know.
      cookie: name of the cookie that keeps it.
    """

    def __init__(
        self, app: ASGIApp, *, hosts: Iterable[str], token: str, cookie: str
    ) -> None:
        self.app, self.hosts = app, frozenset(hosts)
        self.token, self.cookie = token, cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or let it through."""
        try:
            answer = self._stop(Request(scope)) or self.app
        except HTTPException as error:
            answer = refusal(error.status_code, error.detail)
        await answer(scope, receive, send)

    def _stop(self, request: Request) -> Response | None:
        """The answer to a request that is not let through."""
        self._check_host(request)
        path = request.scope["raw_path"]
        if len(path) > _LONGEST:
            raise HTTPException(414, "the path is too long")
        try:
            unquote_to_bytes(path).decode()
        except UnicodeDecodeError as error:
            raise HTTPException(400, "the path is not UTF-8") from error
        here = "/" + path.decode().lstrip("/\\")  # two would begin another host
        given = request.query_params.get("token", "")
        if request.method in ("GET", "HEAD") and self._knows(given):
            return self._welcome(request, here)
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() in ("bearer", "token") and self._knows(given.strip()):
            return None
        if self._knows(request.cookies.get(self.cookie, "")):
            return None
        return _unknown(request, here)

    def _check_host(self, request: Request) -> None:
        name = re.sub(r":\d{1,5}$", "", request.headers.get("host", "")).lower()
        here = request.scope["server"][0]
        if name not in self.hosts | {f"[{here}]" if ":" in here else here}:
            raise HTTPException(
                403, f"this server is not called {name[:200]!r}: see --allow-host"
            )

    def _welcome(self, request: Request, path: str) -> Response:
        """To the same address without the token, which the cookie keeps."""
        pairs = request.query_params.multi_items()
        rest = urlencode([pair for pair in pairs if pair[0] != "token"])
        answer = RedirectResponse(f"{path}?{rest}" if rest else path, 303)
        answer.set_cookie(self.cookie, self.token, httponly=True, samesite="strict")
        return answer

    def _knows(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.token.encode())


def _unknown(request: Request, here: str) -> Response:
    answer = refusal(401, _HOW)
    if "text/html" in request.headers.get("accept", ""):
        answer = HTMLResponse(locked_page(here, _HOW), 401)
    answer.headers["WWW-Authenticate"] = "Bearer"
    return answer
