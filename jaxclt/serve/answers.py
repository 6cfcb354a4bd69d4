"""The server's own words: JSON, refusals, its pages, and where to find the token."""

from __future__ import annotations

import html
from typing import Any

from starlette.responses import Response

from jaxclt.files.json_text import to_json

__all__ = ["as_json", "locked_page", "refusal", "shell"]


def as_json(value: Any, status: int = 200) -> Response:
    """A value as JSON that every reader takes: ASCII, no NaN."""
    return Response(to_json(value), status, media_type="application/json")


def refusal(status: int, why: str) -> Response:
    """An answer that says what is wrong."""
    return as_json({"error": why}, status)


def locked_page(path: str, how: str) -> str:
    """The page for whoever has no token.

    Args:
      path: what was asked for, as addresses have it.
      how: where the token is found.
    """
    # A link from another site comes without the cookie; one from here brings it.
    link = f'<a href="{html.escape(path)}">try again</a>'
    return shell(
        "Token needed",
        f"<p>{html.escape(how)}</p><p>If it was open in this browser: {link}.</p>",
    )


def shell(title: str, body: str, style: str = "") -> str:
    """A page of the server's own: a heading and what lies below it, as HTML.

    Args:
      title: plain words of ours.
      body: HTML.
      style: CSS of this page alone.
    """
    page = _SHELL.replace("<!--TITLE-->", title).replace("/*STYLE*/", style)
    return page.replace("<!--BODY-->", body)


_SHELL = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title><!--TITLE--></title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">
<style>
:root { --ink: #1b2026; --muted: #59636e; --line: #dde1e6; --accent: #6d3be0;
  --dot: #64778e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e7eaee; --muted: #9da8b4; --line: #313841; --accent: #b695ff;
    --dot: #8499b1; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 860px;
  margin: 40px auto; padding: 0 20px; }
h1 { font-size: 20px; }
a { color: var(--accent); font-weight: 600; overflow-wrap: anywhere; }
b { color: var(--muted); font-weight: 600; overflow-wrap: anywhere; }
/*STYLE*/</style></head><body><main><h1><!--TITLE--></h1><!--BODY--></main></body></html>
"""
