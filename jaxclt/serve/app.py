"""The addresses of the server and what answers there.

What is handed out: the list, a page, a graph's JSON, its small picture, a feature's
JSON; and two things are taken: labels, pins and groups for a graph's file, and, unless
the command said no, features to patch (`jaxclt.serve.patch`). What changes a file must
come from the server's own pages.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from jaxclt.errors import InputError
from jaxclt.files.json_file import parse_json
from jaxclt.serve.answers import as_json, refusal
from jaxclt.serve.folder import Folder, NotServedError
from jaxclt.serve.listing import list_page
from jaxclt.serve.patch import BUSY, FILES, Patcher
from jaxclt.serve.save import ChangedError, save_view, version_of
from jaxclt.trace.pages import PATCHES, directory_page, read_graph

__all__ = ["MAX_BODY", "MAX_PATCH", "make_app"]

MAX_BODY = 1 << 20  # of what is saved
MAX_PATCH = 1 << 16  # of what is to be patched
PATIENCE = 30  # seconds for a body to arrive

_LOG = logging.getLogger("jaxclt.serve")
T = TypeVar("T")


def make_app(folder: Folder, patcher: Patcher | None = None) -> Starlette:
    """The app of a folder.

    Args:
      folder: whose graphs it shows.
      patcher: runs patches; without one they are refused.
    """
    answers = _Answers(folder, patcher)
    app = Starlette(
        routes=[
            Route("/", answers.list),
            Route("/api/graphs", answers.graphs),
            Route("/view/{name:path}", answers.page),
            Route("/api/graph/{name:path}", answers.graph),
            Route("/api/picture/{name:path}", answers.picture),
            Route("/api/feature/{name:path}/{number:int}.json", answers.feature),
            Route("/api/save/{name:path}", answers.save, methods=["POST"]),
            Route("/api/patch/{name:path}", answers.patch, methods=["POST"]),
        ],
        exception_handlers={
            HTTPException: _refused,
            NotServedError: lambda _, error: refusal(404, str(error)),
            InputError: lambda _, error: refusal(422, str(error)),
            ChangedError: _changed,
            ClientDisconnect: lambda *_: refusal(400, "cut off"),
            Exception: _failed,
        },
    )
    app.router.redirect_slashes = False
    return app


class _Answers:
    """What is answered; those without async run on threads."""

    def __init__(self, folder: Folder, patcher: Patcher | None) -> None:
        self.folder, self.patcher = folder, patcher

    def list(self, _: Request) -> Response:
        return HTMLResponse(list_page(self.folder.graphs()))

    def graphs(self, _: Request) -> Response:
        return as_json(self.folder.graphs())

    def page(self, request: Request) -> Response:
        name = request.path_params["name"]
        file = self.folder.graph(name)
        for beside in ("report.json", "validation.json", PATCHES):
            self.folder.inside(file.parent / beside)  # links may lead elsewhere
        # A version older than what is shown costs a merge, a newer one the changes.
        version = version_of(file)
        doc = read_graph(file)
        second = request.query_params.get("compare")
        other = None if second is None else read_graph(self.folder.graph(second))
        can_patch = self.patcher is not None and self._traced(file) is not None
        serve = {"path": name.strip("/"), "version": version, "patch": can_patch}
        serve["compare"] = other is not None
        page = directory_page(file.parent, doc=doc, compare=other, serve=serve)
        return HTMLResponse(page)

    def graph(self, request: Request) -> Response:
        file = self.folder.graph(request.path_params["name"])
        read_graph(file)  # refuses what is not a graph
        return Response(file.read_bytes(), media_type="application/json")

    def picture(self, request: Request) -> Response:
        text = self.folder.picture(request.path_params["name"])
        return Response(text, media_type="image/svg+xml")

    def feature(self, request: Request) -> Response:
        return as_json(self.folder.feature(**request.path_params))

    async def save(self, request: Request) -> Response:
        change = await _body(request, MAX_BODY)
        made_from = request.headers.get("if-match", "*").strip().strip('"')

        def work() -> str:
            file = self.folder.graph(request.path_params["name"])
            return save_view(
                file, change, version=None if made_from == "*" else made_from
            )

        version = await run_in_threadpool(work)
        return as_json({"saved": True, "version": version})

    async def patch(self, request: Request) -> Response:
        change = await _body(request, MAX_PATCH)
        patcher = self.patcher
        if patcher is None:
            raise HTTPException(404, "start jaxclt serve without --no-patch")

        def work() -> dict[str, Any] | None:
            directory = self._traced(self.folder.graph(request.path_params["name"]))
            if directory is None:
                raise NotServedError("no trace lies beside this graph: trace it again")
            try:
                return patcher.patch(directory, change)
            except (RuntimeError, MemoryError) as error:  # too large for the device
                raise HTTPException(500, f"the patch failed: {error!s:.300}") from error

        record = await _aside(work)
        return refusal(409, BUSY) if record is None else as_json(record)

    def _traced(self, graph: Path) -> Path | None:
        """The directory that trace wrote with a graph.json, all of it in the folder."""
        beside = [graph.parent / name for name in (*FILES, PATCHES)]
        inside = all(p.resolve().is_relative_to(self.folder.root) for p in beside)
        whole = graph.name == "graph.json" and all(p.is_file() for p in beside[:2])
        return graph.parent if inside and whole else None


async def _body(request: Request, most: int) -> Any:
    """The JSON that a page of this server sent."""
    headers = request.headers
    host = headers.get("host")
    if headers.get("origin") not in (f"http://{host}", f"https://{host}"):
        raise HTTPException(403, "only pages of this server may save or patch")
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, "send application/json")
    length = headers.get("content-length", "")
    if not length.isdecimal() or "transfer-encoding" in headers:
        raise HTTPException(411, "say how long the body is")
    if int(length) > most:
        raise HTTPException(413, f"more than {most} bytes")
    try:
        async with asyncio.timeout(PATIENCE):
            return parse_json(await request.body(), "the body")
    except TimeoutError as error:
        raise HTTPException(408, "the body did not arrive") from error
    except InputError as error:
        raise HTTPException(400, str(error)) from error


async def _aside(work: Callable[[], T]) -> T:
    """Do what may take minutes on a thread that does not keep the process alive."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return await asyncio.wrap_future(future)


def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    answer = refusal(error.status_code, error.detail)
    answer.headers.update(error.headers or {})
    return answer


def _changed(_: Request, error: Exception) -> Response:
    assert isinstance(error, ChangedError)
    now = {"version": error.version, "labels": error.labels, "qParams": error.view}
    return as_json({"error": str(error), **now}, 409)


def _failed(request: Request, error: Exception) -> Response:
    """A fault of ours, or a file that changed meanwhile."""
    line = f"{type(error).__name__}: {error!s:.300}"
    full = error if _LOG.isEnabledFor(logging.DEBUG) else None
    where = request.scope["path"]
    _LOG.error("%s %s failed: %s", request.method, where, line, exc_info=full)
    return refusal(500, f"the server failed ({line})")
