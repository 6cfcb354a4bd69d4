"""`jaxclt serve`: the pages of a folder of graphs on 127.0.0.1, and what readers save.

The server hands out four kinds of things: the list, a page, a graph's JSON, a feature's
JSON; and takes two: labels, pins and groups for a graph.json, and, if the command named
a model, features to patch (`jaxclt.serve_patch`). Every path is resolved (links
included) and must lie in the folder. Requests must name this host, so that no other
site's name can be pointed here, and what changes a file must come from its own pages.
"""

from __future__ import annotations

import dataclasses
import json
import re
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote, urlsplit

import tyro
from rich.console import Console

from jaxclt.compiled import use_compilation_cache
from jaxclt.dashboards.files import INDEX, FeatureFiles, uncantor
from jaxclt.errors import InputError
from jaxclt.graph_list import graphs_in, list_page
from jaxclt.json_text import to_json
from jaxclt.serve_patch import BUSY, FILES, Patcher

__all__ = ["ServeConfig", "make_server", "run_serve", "save_view"]

MAX_BODY = 1 << 20  # of what is saved
MAX_PATCH = 1 << 16  # of what is to be patched
MAX_LABEL = 2000
MAX_PLACE = 1e6  # of a card, px
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_LOCAL = ("127.0.0.1", "localhost")
_SAVING = threading.Lock()  # a save reads the file it replaces


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Show all graphs of a folder in the browser; saves labels and supernodes."""

    directory: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """Folder of what trace and sweep wrote, at any depth, or of graph files."""
    port: int = 8032
    """Port; 0 takes a free one."""
    host: str = "127.0.0.1"
    """Address to listen at. Whoever reaches it can read the graphs, save labels and,
    with --model, run patches."""
    model: Annotated[str | None, tyro.conf.arg(metavar="M")] = None
    """With it, pages can patch graphs of this model; needs --dictionary."""
    dictionary: Annotated[str | None, tyro.conf.arg(metavar="D")] = None
    """The traced dictionary, for patches."""
    json: bool = False
    """Print the address as JSON on stdout."""
    debug: bool = False
    """Show tracebacks."""


def run_serve(config: ServeConfig, say: Console) -> None:
    """Serve until interrupted."""
    if (config.model is None) != (config.dictionary is None):
        raise InputError("patches need both --model and --dictionary: give both")
    patcher = None
    if config.model is not None and config.dictionary is not None:
        use_compilation_cache()
        patcher = Patcher(config.model, config.dictionary)
    server = make_server(
        config.directory, host=config.host, port=config.port, patcher=patcher
    )
    host, port = server.server_address[:2]
    url = f"http://{host}:{port}/"
    if config.host not in _LOCAL:
        say.print(f"jaxclt: {config.host} can be reached by others", markup=False)
    if config.json:
        print(to_json({"url": url}), flush=True)  # noqa: T201
    else:
        Console().print(f"serving {config.directory} at {url} (Ctrl+C ends)")
    with server:
        server.serve_forever()


def make_server(
    directory: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    patcher: Patcher | None = None,
) -> ThreadingHTTPServer:
    """A server that is not running yet.

    Args:
      directory: whose graphs it shows.
      host: where it listens.
      port: 0 takes a free one.
      patcher: runs patches; without one they are refused.

    Raises:
      InputError: if the folder is not there or the address is taken.
    """
    root = Path(directory).resolve()
    if not root.is_dir():
        raise InputError(f"{directory} is no folder: give one that trace wrote to")
    handler = partial(_Handler, root=root, host=host, patcher=patcher)
    try:
        return ThreadingHTTPServer((host, port), handler)
    except (OSError, OverflowError) as error:
        raise InputError(f"cannot listen at {host}:{port}: {error}") from error


class _RefusedError(Exception):
    """A request that gets an error status."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    server_version, sys_version = "jaxclt", ""
    timeout = 30

    def __init__(
        self, *args: Any, root: Path, host: str, patcher: Patcher | None
    ) -> None:
        self.root, self.host, self.patcher = root, host, patcher
        super().__init__(*args)

    def do_GET(self) -> None:
        """Answer with the list, a page or JSON."""
        self._answer(self._get)

    def do_HEAD(self) -> None:
        """The same without the body."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """Save what a reader made, or run a patch."""
        self._answer(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet: what readers look at is not logged."""

    def _answer(self, make: Any) -> None:
        try:
            self._check_host()
            kind, body = make(unquote(urlsplit(self.path).path, errors="strict"))
            self._send(200, kind, body)
        except _RefusedError as refused:
            self._send_error(refused.status, str(refused))
        except InputError as error:
            self._send_error(422, str(error))
        except ConnectionError:
            self.close_connection = True
        except (ValueError, OSError):  # a path that is no UTF-8, or too long for one
            self._send_error(400, "bad request")

    def _get(self, path: str) -> tuple[str, bytes]:
        if path == "/":
            return "text/html", list_page(self.root).encode()
        if path == "/api/graphs":
            return "application/json", to_json(graphs_in(self.root)).encode()
        for prefix, answer in (
            ("/view/", self._page),
            ("/api/graph/", self._graph),
            ("/api/feature/", self._feature),
        ):
            if path.startswith(prefix):
                return answer(path.removeprefix(prefix))
        raise _RefusedError(404, "no such page")

    def _page(self, name: str) -> tuple[str, bytes]:
        from jaxclt.pages import PATCHES, directory_page, read_graph

        file = self._file(name)
        for beside in ("report.json", "validation.json", PATCHES):
            self._inside(file.parent / beside)  # a link to elsewhere is not followed
        serve = {
            "path": name,
            "graphs": graphs_in(self.root),
            "patch": self.patcher is not None and self._traced(file) is not None,
        }
        doc = read_graph(file)
        return "text/html", directory_page(file.parent, doc=doc, serve=serve).encode()

    def _graph(self, name: str) -> tuple[str, bytes]:
        return "application/json", self._file(name).read_bytes()

    def _feature(self, path: str) -> tuple[str, bytes]:
        name, _, number = path.rpartition("/")
        if not re.fullmatch(r"\d{1,20}\.json", number):
            raise _RefusedError(404, "no such feature")
        files = FeatureFiles(self._inside(self._file(name).parent / "features"))
        place = uncantor(int(number.removesuffix(".json")))
        self._inside(files.folder / INDEX)  # links may lead elsewhere
        for file in files.paths(*place):
            self._inside(file)
        record = files.record(*place)
        if record is None:
            raise _RefusedError(404, "no such feature")
        return "application/json", to_json(record).encode()

    def _post(self, path: str) -> tuple[str, bytes]:
        for prefix, answer, most in (
            ("/api/save/", self._save, MAX_BODY),
            ("/api/patch/", self._patch, MAX_PATCH),
        ):
            if path.startswith(prefix):
                name = path.removeprefix(prefix)
                return "application/json", answer(name, self._body(most))
        raise _RefusedError(404, "no such page")

    def _body(self, most: int) -> Any:
        """The JSON that a page of this server sent."""
        origin = self.headers.get("Origin")
        if origin != f"http://{self.headers.get('Host')}":
            raise _RefusedError(403, "only pages of this server may save or patch")
        if self.headers.get_content_type() != "application/json":
            raise _RefusedError(415, "send application/json")
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"\d{1,12}", length) or "Transfer-Encoding" in self.headers:
            raise _RefusedError(411, "say how long the body is")
        if int(length) > most:
            raise _RefusedError(413, f"more than {most} bytes")
        try:
            return json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise _RefusedError(400, "the body is no JSON") from error

    def _save(self, name: str, change: Any) -> bytes:
        file = self._file(name)
        with _SAVING:
            save_view(file, change)
        return b'{"saved": true}'

    def _patch(self, name: str, change: Any) -> bytes:
        if self.patcher is None:
            raise _RefusedError(404, "start jaxclt serve with --model and --dictionary")
        directory = self._traced(self._file(name))
        if directory is None:
            raise _RefusedError(404, "no trace lies beside this graph: trace it again")
        try:
            record = self.patcher.patch(directory, change)
        except (RuntimeError, MemoryError) as error:  # too large for the device
            raise _RefusedError(500, f"the patch failed: {error!s:.300}") from error
        if record is None:
            raise _RefusedError(409, BUSY)
        return to_json(record).encode()

    def _traced(self, graph: Path) -> Path | None:
        """The directory that trace wrote with a graph.json, all of it in the folder."""
        from jaxclt.pages import PATCHES

        beside = [graph.parent / name for name in (*FILES, PATCHES)]
        inside = all(p.resolve().is_relative_to(self.root) for p in beside)
        whole = graph.name == "graph.json" and all(p.is_file() for p in beside[:2])
        return graph.parent if inside and whole else None

    def _file(self, name: str) -> Path:
        """The graph.json (or other graph file) that a name in a path stands for."""
        if "\0" in name or "\\" in name:
            raise _RefusedError(404, "no such graph")
        file = self._inside(self.root / name.strip("/"))
        if file.is_dir():
            file = self._inside(file / "graph.json")
        if file.suffix != ".json" or not file.is_file():
            raise _RefusedError(404, "no such graph")
        return file

    def _inside(self, path: Path) -> Path:
        resolved = path.resolve()
        if not resolved.is_relative_to(self.root):
            raise _RefusedError(404, "no such graph")
        return resolved

    def _check_host(self) -> None:
        """Refuse names that only an attacker's name server points here."""
        host = re.sub(r":\d+$", "", self.headers.get("Host", ""))
        if self.host in _LOCAL and host not in _LOCAL:
            raise _RefusedError(403, "this server answers to 127.0.0.1 and localhost")

    def _send_error(self, status: int, why: str) -> None:
        # What is left of the body would be read as the next request.
        self.close_connection = True
        self._send(status, "application/json", to_json({"error": why}).encode())

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
            "Content-Security-Policy": _POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-store",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def save_view(file: Path, change: Any) -> None:
    """Put a reader's labels, pins and groups into a graph file, all or nothing.

    Args:
      file: a graph.json.
      change: ``{"labels": {node id: text}, "qParams": {...}}``.

    Raises:
      InputError: if the change does not fit the graph.
    """
    from jaxclt.io.atomic import atomic_path
    from jaxclt.pages import read_graph
    from jaxclt.viewer.graph_json import validate

    if not isinstance(change, dict):
        raise InputError("what is to be saved is no JSON object")
    labels, view = change.get("labels", {}), change.get("qParams", {})
    if not isinstance(labels, dict) or not isinstance(view, dict):
        raise InputError("labels and qParams must be JSON objects")
    if not all(isinstance(v, str) and len(v) <= MAX_LABEL for v in labels.values()):
        raise InputError(f"a label is text of at most {MAX_LABEL} characters")
    doc = read_graph(file)
    node_by_id = {node["node_id"]: node for node in doc["nodes"]}
    for node_id, label in labels.items():
        node = node_by_id.get(node_id)
        if node is None or node["feature_type"] == "logit":
            raise InputError(f"no node {node_id!r} that can have a label")
        node["clerp"] = label
    known = ("pinnedIds", "supernodes", "linkType", "clickedId", "sg_pos", "cards")
    doc["qParams"] |= {key: view[key] for key in known if key in view}
    _check_groups(doc["qParams"], set(node_by_id))
    _check_cards(doc["qParams"].get("cards", []))
    validate(doc, foreign=True)
    with atomic_path(file) as temporary:
        temporary.write_text(to_json(doc, ensure_ascii=False), encoding="utf-8")


def _check_groups(view: dict[str, Any], ids: set[str]) -> None:
    pinned, groups = view.get("pinnedIds") or [], view.get("supernodes") or []
    if isinstance(pinned, str) or isinstance(groups, str):
        return  # another tool saved them, and they were not changed
    rows = [pinned, *(g[1:] for g in groups if isinstance(g, list) and len(g) > 1)]
    if len(rows) != len(groups) + 1:
        raise InputError("supernodes must be [label, node id, ...]")
    flat = [x for row in rows for x in row] + [g[0] for g in groups]
    if not all(isinstance(x, str) for x in flat):
        raise InputError("pinnedIds and supernodes hold node ids, which are text")
    if not {x for row in rows for x in row} <= ids:
        raise InputError("pinnedIds and supernodes name nodes that are not there")


def _check_cards(cards: Any) -> None:
    good = isinstance(cards, list) and all(
        isinstance(card, list)
        and len(card) == 3
        and isinstance(card[0], str)
        and all(type(x) in (int, float) and abs(x) <= MAX_PLACE for x in card[1:])
        for card in cards
    )
    if not good:
        raise InputError("cards must be [card id, x, y] with numbers that fit a screen")
