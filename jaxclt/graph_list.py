"""The graphs of a folder, as a list and as a page of links."""

from __future__ import annotations

import html
import json
import mmap
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

__all__ = ["graphs_in", "list_page"]

_HEAD = 1 << 16  # bytes
_METADATA = rb'"metadata"\s*:\s*\{'
_LISTS = (rb'"nodes"\s*:\s*\[', rb'"links"\s*:\s*\[')


def graphs_in(root: Path) -> list[dict[str, str]]:
    """Every graph in the folder: its path as addresses name it, slug and prompt."""
    found = []
    for file in sorted(root.rglob("*.json")):
        beside = file.with_name("graph.json")
        hidden = any(p.startswith(".") for p in file.relative_to(root).parts)
        if hidden or (file != beside and beside.is_file()):
            continue
        if not file.is_file() or not file.resolve().is_relative_to(root):
            continue
        meta = _metadata(file)
        if meta is not None:
            place = file.parent if file == beside and file.parent != root else file
            path = place.relative_to(root).as_posix()
            found.append({"path": path, **meta})
    return found


def _metadata(file: Path) -> dict[str, str] | None:
    """Slug and prompt of a graph file, without parsing it all: graphs may be large."""
    meta = _said(file)
    if meta is None:
        return None
    return {
        "slug": str(meta.get("slug") or file.stem),
        "prompt": str(meta.get("prompt") or ""),
    }


def _said(file: Path) -> dict[str, Any] | None:
    """What a graph file says under "metadata"; None if it is no graph.

    Its keys may be in any order: where they are sorted, the links come first.
    """
    with file.open("rb") as stream:
        head = stream.read(_HEAD)
        if not re.match(rb"(\xef\xbb\xbf)?\s*\{", head):
            return None
        if not re.match(rb'[^"]*' + _METADATA, head):
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as text:
                there = re.search(_METADATA, text)
                if there is None or not all(re.search(x, text) for x in _LISTS):
                    return None
                head = text[there.start() : there.start() + _HEAD]
    said = head[head.index(b"{", head.index(b'"metadata"')) :].decode(
        "utf-8", "replace"
    )
    try:
        return json.JSONDecoder().raw_decode(said)[0]
    except (ValueError, RecursionError):
        return {}  # longer than what was looked at


def list_page(root: Path) -> str:
    """HTML of the list."""
    rows = "".join(
        f'<li><a href="/view/{quote(g["path"])}">'
        f"{html.escape(g['prompt'] or g['slug'])}</a>"
        f"<span>{html.escape(g['path'])}</span></li>"
        for g in graphs_in(root)
    )
    body = f"<ul>{rows}</ul>" if rows else "<p>No graphs yet: trace a prompt.</p>"
    return _LIST.replace("<!--LIST-->", body)


_LIST = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Attribution graphs</title>
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
span { display: block; color: var(--muted); font-size: 13px; overflow-wrap: anywhere; }
</style></head><body><main><h1>Attribution graphs</h1><!--LIST--></main></body></html>
"""
