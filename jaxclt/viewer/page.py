"""One self-contained HTML page that shows a graph: no server, no network, no build.

The template ``static/graph.html`` is package data. The graph document and the report
are embedded as JSON in a data block; token strings in them come from a model's
vocabulary and a user's prompt, so nothing of them may reach the HTML parser: every
character that could end the block is written as a JSON escape, the page puts text in
place as text only, and its content security policy forbids any load.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from jaxclt.errors import InputError
from jaxclt.viewer.graph_json import finite

__all__ = ["page"]

_MARKER = "/*DATA*/null"
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


MAX_LINKS = 50_000  # more make the page slow; graph.json has them all


def page(doc: dict[str, Any], report: dict[str, Any] | None = None) -> str:
    """Render a graph document as a page that opens from ``file://``.

    The embedded data is ASCII; write the page as UTF-8 for the template's own text. Of
    more than `MAX_LINKS` links only the first are embedded, and the page says so; our
    own documents list the strongest first.

    Args:
        doc: what `graph_json` returns, or another tool's file that `validate` accepts.
        report: the content of ``report.json``; its scores and certificate are shown in
            the header. Without it, ``doc["jaxclt"]["scores"]`` is.

    Raises:
        InputError: ``doc`` holds a number or an object that JSON has no word for.
    """
    if report is None:
        report = (doc.get("jaxclt") or {}).get("scores")
    all_links = len(doc.get("links") or ())
    if all_links > MAX_LINKS:
        doc = {**doc, "links": doc["links"][:MAX_LINKS]}
    try:
        data = json.dumps(
            {"graph": doc, "report": finite(report), "allLinks": all_links},
            allow_nan=False,
            separators=(",", ":"),
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"the graph document cannot be shown: {error}") from error
    template = resources.files("jaxclt.viewer").joinpath("static/graph.html")
    # Split, not replaced: the data may itself contain the marker.
    head, _, tail = template.read_text(encoding="utf-8").partition(_MARKER)
    return head + data.translate(_ESCAPES) + tail
