"""What the list tells of a graph besides its prompt: the trace's report, and a picture.

Both are read once for each version of their file. Neither is trusted: what is not of
the right type is left out, and the picture holds numbers only.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import orjson

from jaxclt.errors import InputError
from jaxclt.files.json_file import read_json
from jaxclt.graph.kinds import KINDS

__all__ = ["Kept", "picture_of", "said", "told_by"]

T = TypeVar("T")
Stamp = tuple[int, int]

_LONGEST = 300  # characters of a text in the list
_MANY = 20_000  # files that are remembered
_WHOLE = 1 << 22  # bytes of a graph that is parsed whole for its picture
_MOST = 10_000  # positions, layers
_DOTS = 800
_SIZE = (132, 48)


class Kept(Generic[T]):
    """What was made of files, until they change.

    Args:
      make: from a file to what is kept of it.
    """

    def __init__(self, make: Callable[[Path], T]) -> None:
        self._make = make
        self._kept: dict[Path, tuple[Stamp, T]] = {}

    def of(self, file: Path) -> T:
        """What is made of a file, made anew only if its time or size has changed.

        Raises:
          OSError: if there is no such file.
        """
        state = file.stat()
        stamp = (state.st_mtime_ns, state.st_size)
        found = self._kept.get(file)
        if found is None or found[0] != stamp:
            if len(self._kept) >= _MANY:
                self._kept.clear()
            found = self._kept[file] = (stamp, self._make(file))
        return found[1]


def said(text: str) -> str:
    """Text without halves of characters, which no page can hold."""
    return text.encode(errors="backslashreplace").decode()


def told_by(report: Path) -> dict[str, Any]:
    """Prompt, model, dictionary, answer, probability and scores of a report.json."""
    try:
        found = read_json(report)
    except InputError:
        return {}
    told: dict[str, Any] = {}
    for key in ("prompt", "model", "dictionary"):
        if isinstance(text := found.get(key), str):
            told[key] = said(text)[:_LONGEST]
    match found.get("top_tokens"):
        case [[str(token), (int() | float()) as p], *_] if 0 <= p <= 1:
            told |= {"answer": said(token)[:_LONGEST], "probability": float(p)}
    match found.get("scores"):
        case {"full": {**full}}:
            for key in ("replacement", "completeness"):
                match full.get(key):
                    case (int() | float()) as score if 0 <= score <= 1:
                        told[key] = float(score)
    return told


def picture_of(graph: Path) -> str:
    """The nodes of a graph by layer and position, as a small SVG; empty without any."""
    try:
        nodes = _nodes(graph)
    except ValueError:
        return ""
    places: Counter[tuple[int, int, str]] = Counter()
    for node in nodes if isinstance(nodes, list) else ():
        if place := _place(node):
            places[place] += 1
    if not places:
        return ""
    layers = [row for row, _, _ in places]
    top = max(layers) + 1  # outputs
    wide = 1 + max(pos for _, pos, _ in places)
    width, height = _SIZE
    dots = []
    for (row, pos, kind), n in places.most_common(_DOTS):
        x = width * (pos + 0.5) / wide
        y = height - 4 - (height - 8) * (top if kind == "target" else row) / top
        size = min(1.1 + 0.5 * (n - 1) ** 0.5, 4.0) if kind == "feature" else 1.6
        shape = "r" if kind == "feature" else "s"
        dots.append(
            f'<circle class="{shape}" cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}"/>'
        )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
    return f'{head} aria-hidden="true">{"".join(dots)}</svg>'


_KIND = {KINDS[kind].drawn: kind for kind in ("feature", "embed", "target")}


def _place(node: Any) -> tuple[int, int, str] | None:
    """Row, position and kind of a node that is drawn."""
    match node:
        case {"feature_type": str(drawn), "ctx_idx": int(pos), "layer": layer}:
            kind = _KIND.get(drawn, "")
        case _:
            return None
    if not kind or not 0 <= pos < _MOST:
        return None
    if kind != "feature":
        return 0, pos, kind
    row = int(layer) + 1 if str(layer).isdecimal() and len(str(layer)) < 6 else 0
    return (row, pos, kind) if 0 < row < _MOST else None


def _nodes(graph: Path) -> Any:
    """The list of nodes, without the links if the file is as we write it.

    Raises:
      ValueError: if it is not JSON, or too long to be parsed for this.
    """
    with graph.open("rb") as stream:
        size = graph.stat().st_size
        if size == 0:
            raise ValueError("empty")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as text:
            # No string of JSON holds a bare quote, so neither is found in one.
            start, end = text.find(b'"nodes":['), -1
            if start >= 0:
                end = text.find(b'],"links":[', start)
            if end >= 0:
                return orjson.loads(text[start + 8 : end + 1])
            if size > _WHOLE:
                raise ValueError("long")
            doc = orjson.loads(text[:])
            return doc.get("nodes") if isinstance(doc, dict) else None
