"""One self-contained HTML page that walks through the global circuit.

Like `jaxclt.viewer.page`: data is embedded as JSON with everything escaped that could
end its block, put in place as text only, and a content security policy forbids loads.
"""

from __future__ import annotations

from typing import Any

from jaxclt.files.json_text import finite, to_json
from jaxclt.viewer.page import filled

__all__ = ["globals_page"]


def globals_page(doc: dict[str, Any]) -> str:
    """Render features and links as a page that opens from ``file://``.

    Args:
      doc: ``about`` (a line), ``k`` (rows shown), ``texts`` {token id: text},
        ``features`` [[layer, index, frequency, mean, tokens in, tokens out, lowest
        tokens out]] with [[token, weight]] each, ``links`` [[source slot, target slot,
        virtual, era, twera, coactivation]], strongest first.
    """
    data = to_json(finite(doc), separators=(",", ":"))
    return "".join(filled("globals.html", data))
