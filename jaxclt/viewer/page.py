"""One self-contained HTML page that shows a graph: no server, no network, no build.

The template ``static/graph.html`` is package data, built from ``web/`` (TypeScript;
``npm run build`` there). The graph document and the report are embedded as JSON in a
data block; token strings in them come from a model's vocabulary and a user's prompt, so
nothing of them may reach the HTML parser: every character that could end the block is
written as a JSON escape, the page puts text in place as text only, and its content
security policy forbids any load.
"""

from __future__ import annotations

import base64
import json
from importlib import resources
from typing import Any

import numpy as np
import orjson

from jaxclt.errors import InputError
from jaxclt.files.json_text import finite

__all__ = ["MAX_LINKS", "filled", "page"]

_MARKER = "/*DATA*/null"
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}
_CLOSED, _TO_SELF = "connect-src 'none'", "connect-src 'self'"

# Of a link: what it weighs, and the response with its parts, 0 where there is none.
_NUMBERS = ("weight", "response", "qk_query", "qk_key", "norm", "gate")
MAX_LINKS = 200_000  # of other tools' graphs; more make the page slow


def page(
    doc: dict[str, Any],
    report: dict[str, Any] | None = None,
    *,
    validation: dict[str, Any] | None = None,
    attention: dict[str, Any] | None = None,
    patches: list[dict[str, Any]] | None = None,
    other: dict[str, Any] | None = None,
    serve: dict[str, Any] | None = None,
) -> str:
    """Render a graph document as a page that opens from ``file://``.

    The embedded data is ASCII; write the page as UTF-8 for the template's own text. Of
    more than `MAX_LINKS` links only the first are embedded, and the page says so; our
    own documents list the strongest first.

    Args:
        doc: what `graph_json` returns, or another tool's file that `validate` accepts.
        report: the content of ``report.json``; its scores and certificate are shown
            as evidence. Without it, ``doc["jaxclt"]["scores"]`` is.
        validation: the content of ``validation.json``, shown beside them.
        attention: the content of ``attention.json``: heads, and what makes them attend.
        patches: what patches did, as `jaxclt.patching.log.patch_record` says it.
        other: a second graph document to compare with.
        serve: what `jaxclt.serve` tells its own pages: the graph's ``path``, the
            ``version`` of its file and whether the server can ``patch`` it. Only with
            it may the page talk to its server.

    Raises:
        InputError: ``doc`` holds a number or an object that JSON has no word for.
    """
    if report is None:
        report = (doc.get("jaxclt") or {}).get("scores")
    data = {
        "graph": _columns(doc),
        "report": finite(report),
        "validation": finite(validation),
        "attention": finite(attention),
        "patches": finite(patches),
        "allLinks": _all_links(doc),
        "other": None if other is None else _columns(other),
        "serve": serve,
    }
    try:
        text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise InputError(f"the graph document cannot be shown: {error}") from error
    head, data_block, tail = filled("graph.html", text)
    if serve is not None:
        head = head.replace(_CLOSED, _TO_SELF, 1)
    return head + data_block + tail


def _all_links(doc: dict[str, Any]) -> int:
    """How many links the graph has, listed in its document or not."""
    listed, kept = len(doc.get("links") or ()), None
    match doc.get("jaxclt"):
        case {"kept_links": {"kept": int(kept)}}:
            pass
    return max(listed, kept or 0)


def filled(name: str, data: str) -> tuple[str, str, str]:
    """A page's template before its data, the data escaped, and the rest."""
    template = resources.files("jaxclt.viewer").joinpath(f"static/{name}")
    # Split, not replaced: the data may itself contain the marker.
    head, _, tail = template.read_text(encoding="utf-8").partition(_MARKER)
    return head, data.translate(_ESCAPES), tail


def _columns(doc: dict[str, Any]) -> dict[str, Any]:
    """The document with its links as columns of numbers: a tenth of their text.

    ``source`` and ``target`` are node numbers of ``width`` bytes, ``numbers`` what
    links carry under `_NUMBERS` (see `_column`): bytes in base64, which the page need
    not parse. What they carry beside comes as ``extra``, pairs of number and object. A
    document that does not fit is embedded as it is: the page reads both. Nodes stay
    objects: the browser's parser makes ten thousand of them in 18 ms, a script out of
    columns in 120.
    """
    links = (doc.get("links") or [])[:MAX_LINKS]
    number: dict[str, int] = {}
    for i, node in enumerate(doc.get("nodes") or ()):
        number.setdefault(node["node_id"], i)
    if len(number) != len(doc.get("nodes") or ()):
        return {**doc, "links": links}
    present = {"weight"}.union(*links) & set(_NUMBERS)
    own = {"source", "target", *present}
    try:
        numbers = {
            name: [float(link.get(name, 0)) for link in links]
            for name in _NUMBERS
            if name in present
        }
        ends = [[number[link[end]] for link in links] for end in ("source", "target")]
    except (KeyError, TypeError, ValueError):
        return {**doc, "links": links}
    if not all(np.isfinite(column).all() for column in numbers.values()):
        return {**doc, "links": links}  # which is refused in words
    width = 2 if len(number) <= 1 << 16 else 4
    source, target = (_base64(np.array(end, f"<u{width}")) for end in ends)
    columns = {
        "width": width,
        "source": source,
        "target": target,
        "numbers": {name: _column(values) for name, values in numbers.items()},
        "extra": [
            [i, more]
            for i, link in enumerate(links)
            if (more := {k: v for k, v in link.items() if k not in own})
        ],
    }
    return {**doc, "links": columns}


def _column(values: list[float]) -> dict[str, Any]:
    """Little-endian float32 (``single``) if these say the same decimals, or float64."""
    single = np.array(values, "<f4")
    # The page writes a float32 as its shortest decimal, as this does.
    said = orjson.loads(orjson.dumps(single, option=orjson.OPT_SERIALIZE_NUMPY))
    same = said == values
    bytes_ = _base64(single if same else np.array(values, "<f8"))
    return {"single": same, "bytes": bytes_}


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode("ascii")
