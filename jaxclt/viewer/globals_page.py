"""One self-contained HTML page that walks through the global circuit.

Like `jaxclt.viewer.page`: data is embedded as JSON with everything escaped that could
end its block, put in place as text only, and a content security policy forbids loads.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

from jaxclt.files.json_text import finite, to_json

__all__ = ["globals_page"]

_MARKER = "/*DATA*/null"
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def globals_page(doc: dict[str, Any]) -> str:
    """Render features and links as a page that opens from ``file://``.

    Args:
      doc: ``about`` (a line), ``k`` (rows shown), ``texts`` {token id: text},
        ``features`` [[layer, index, frequency, mean, tokens in, tokens out, lowest
        tokens out]] with [[token, weight]] each, ``links`` [[source slot, target slot,
        virtual, era, twera, coactivation]], strongest first.
    """
    data = to_json(finite(doc), separators=(",", ":"))
    template = resources.files("jaxclt.viewer").joinpath("static/globals.html")
    # Split, not replaced: the data may itself contain the marker.
    head, _, tail = template.read_text(encoding="utf-8").partition(_MARKER)
    return head + data.translate(_ESCAPES) + tail
