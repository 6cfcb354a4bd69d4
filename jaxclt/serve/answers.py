"""The server's own words: JSON, refusals, the list, and where to find the token."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from starlette.responses import Response

from jaxclt.files.json_text import to_json

__all__ = ["as_json", "list_page", "locked_page", "refusal"]


def as_json(value: Any, status: int = 200) -> Response:
    """A value as JSON that every reader takes: ASCII, no NaN."""
    return Response(to_json(value), status, media_type="application/json")


def refusal(status: int, why: str) -> Response:
    """An answer that says what is wrong."""
    return as_json({"error": why}, status)


def list_page(graphs: Sequence[dict[str, str]]) -> str:
    """The graphs as links, and those that cannot be opened with what is wrong.

    Args:
      graphs: see `jaxclt.serve.folder.Folder.graphs`.
    """
    rows = "".join(map(_row, graphs))
    body = f"<ul>{rows}</ul>" if rows else "<p>No graphs yet: trace a prompt.</p>"
    return _page("Attribution graphs", body)


def locked_page(path: str, how: str) -> str:
    """The page for whoever has no token.

    Args:
      path: what was asked for, as addresses have it.
      how: where the token is found.
    """
    # A link from another site comes without the cookie; one from here brings it.
    link = f'<a href="{html.escape(path)}">try again</a>'
    return _page(
        "Token needed",
        f"<p>{html.escape(how)}</p><p>If it was open in this browser: {link}.</p>",
    )


def _row(graph: dict[str, str]) -> str:
    path = html.escape(graph["path"])
    if "error" in graph:
        why = html.escape(graph["error"])
        return f"<li><b>{path}</b><span>not shown: {why}</span></li>"
    name = html.escape(graph["prompt"] or graph["slug"])
    where = quote(graph["path"])
    return f'<li><a href="/view/{where}">{name}</a><span>{path}</span></li>'


def _page(title: str, body: str) -> str:
    return _SHELL.replace("<!--TITLE-->", title).replace("<!--BODY-->", body)


_SHELL = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title><!--TITLE--></title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">
<style>
:root { --ink: #1b2026; --muted: #59636e; --line: #dde1e6; --accent: #6d3be0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e7eaee; --muted: #9da8b4; --line: #313841; --accent: #b695ff; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 860px;
  margin: 40px auto; padding: 0 20px; }
h1 { font-size: 20px; }
ul { list-style: none; padding: 0; }
li { border-bottom: 1px solid var(--line); padding: 10px 0; }
a { color: var(--accent); font-weight: 600; overflow-wrap: anywhere; }
b { color: var(--muted); font-weight: 600; overflow-wrap: anywhere; }
span { display: block; color: var(--muted); font-size: 13px; overflow-wrap: anywhere; }
</style></head><body><main><h1><!--TITLE--></h1><!--BODY--></main></body></html>
"""
