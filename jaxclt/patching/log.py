"""``patches.json``: what patches of a traced prompt did, kept beside its graph.

`jaxclt patch` and the server write it, the page shows it. A patch that is made again
replaces the older record.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxclt.files.atomic import write_text
from jaxclt.files.guard import locked
from jaxclt.files.json_file import find_json
from jaxclt.files.json_text import finite, to_json
from jaxclt.graph.graph import GraphMeta
from jaxclt.patching.patch import PatchResult
from jaxclt.trace.pages import PATCHES

__all__ = ["MOST", "keep_patch", "patch_record"]

MOST = 100  # older ones are forgotten


def patch_record(
    result: PatchResult, names: Sequence[str], change: dict[str, float]
) -> dict[str, Any]:
    """What the page shows of a patch: the result, and what was changed how.

    Args:
      result: of `jaxclt.patching.patch.patch`.
      names: of what was changed, groups or features.
      change: the operation, ``{"scale": 0.0}``.
    """
    out = finite(result.to_json())
    ids = [f"{e['layer']}_{e['feature']}_{e['pos']}" for e in out["edits"]]
    return {"name": ", ".join(names), "change": change, "nodes": ids, **out}


def keep_patch(directory: Path, record: dict[str, Any], meta: GraphMeta) -> None:
    """Put a record first in the directory's ``patches.json``.

    Records of another prompt or dictionary, left by an earlier trace, are dropped.

    Args:
      directory: written by `trace`.
      record: from `patch_record`.
      meta: of the graph.

    Raises:
      InputError: if the file exists but is not JSON, or cannot be written.
    """
    path = directory / PATCHES
    about = {"prompt": meta.prompt, "dictionary": meta.dictionary}
    with locked(path):
        before = find_json(path) or {}
        same = all(before.get(key) == value for key, value in about.items())
        older = before.get("patches") if same else None
        kept = [
            p
            for p in (older if isinstance(older, list) else [])
            if isinstance(p, dict) and _made_of(p) != _made_of(record)
        ]
        text = to_json({**about, "patches": [record, *kept][:MOST]})
        write_text(path, text)


def _made_of(record: dict[str, Any]) -> str:
    keys = ("nodes", "change", "mode", "layers", "options", "heads")
    said = {key: record.get(key) for key in keys}
    said["nodes"] = sorted(map(str, said["nodes"] or ()))
    return to_json(said, sort_keys=True)
