"""What readers save: labels, pins, groups and places, in the graph's own file.

A save says which version of the file it was made from. If the file has changed since,
nothing is saved, and the reader's page gets what the file holds now, puts its own
changes on top and saves again: of two tabs neither wipes what the other saved.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from jaxclt.errors import InputError
from jaxclt.files.atomic import atomic_path
from jaxclt.files.guard import locked
from jaxclt.files.json_file import TEXT, TEXTS, check_json, json_schema, named, record
from jaxclt.files.json_text import to_json, well_formed
from jaxclt.graph.kinds import KINDS
from jaxclt.trace.pages import read_graph

__all__ = ["ChangedError", "save_view", "version_of"]

MAX_LABEL = 2000
MAX_PLACE = 1e6  # of a card, px
_PLACE = {"type": "number", "minimum": -MAX_PLACE, "maximum": MAX_PLACE}
_CARD = {"type": "array", "prefixItems": [TEXT, _PLACE, _PLACE]}
_VIEW = {
    "pinnedIds": TEXTS,
    "supernodes": {"type": "array", "items": {**TEXTS, "minItems": 2}},
    "linkType": {"enum": ["both", "either", "input", "output", None]},
    "clickedId": {"type": ["string", "null"]},
    "sg_pos": {"type": ["string", "null"]},
    "cards": {"type": "array", "items": {**_CARD, "minItems": 3, "maxItems": 3}},
}
_CHANGE = json_schema(
    record(
        {},
        {
            "labels": named({**TEXT, "maxLength": MAX_LABEL}),
            "qParams": record({}, _VIEW),
        },
    )
)


class ChangedError(Exception):
    """The file is not the version that a save was made from.

    Attributes:
      version: that it is now.
      labels: of all its nodes that can have one, by id.
      view: its ``qParams``.
    """

    def __init__(self, version: str, doc: dict[str, Any]) -> None:
        super().__init__("the graph was saved elsewhere meanwhile")
        self.version = version
        self.labels = {
            node_id: node["clerp"]
            for node_id, node in _by_id(doc).items()
            if node["feature_type"] != KINDS["target"].drawn
        }
        self.view = doc["qParams"]


def version_of(file: Path) -> str:
    """A hash of all that a file holds.

    Raises:
      InputError: if it cannot be read.
    """
    try:
        return _hash(file.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error


def save_view(file: Path, change: Any, *, version: str | None = None) -> str:
    """Put a reader's labels, pins and groups into a graph file, all or nothing.

    Args:
      file: a graph.json.
      change: ``{"labels": {node id: text}, "qParams": {...}}``.
      version: the file's when the change was begun; None takes any.

    Returns:
      Its version now.

    Raises:
      InputError: if the change does not fit the graph.
      ChangedError: if the file has another version.
    """
    _check(change)
    with locked(file):
        now = version_of(file)
        doc = read_graph(file)
        if version not in (None, now):
            raise ChangedError(now, doc)
        _apply(doc, change.get("labels", {}), change.get("qParams", {}))
        text = well_formed(to_json(doc, ensure_ascii=False)).encode()
        with atomic_path(file) as temporary:
            temporary.write_bytes(text)
    return _hash(text)


def _apply(doc: dict[str, Any], labels: dict[str, str], view: dict[str, Any]) -> None:
    node_by_id = _by_id(doc)
    for node_id, label in labels.items():
        node = node_by_id.get(node_id)
        if node is None or node["feature_type"] == KINDS["target"].drawn:
            raise InputError(f"no node {node_id[:60]!r} that can have a label")
        node["clerp"] = label
    pinned = {*view.get("pinnedIds", ())}.union(
        *(group[1:] for group in view.get("supernodes", ()))
    )
    if unknown := pinned - node_by_id.keys():
        raise InputError(
            f"no node {min(unknown)[:60]!r} to pin: load the page again, the graph may "
            "have been traced again"
        )
    doc["qParams"] |= {key: view[key] for key in _VIEW if key in view}


def _by_id(doc: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Nodes by id; the feature where an error shares its id.

    As in files of circuit-tracer up to 0.5.0.
    """
    error = KINDS["error"].drawn
    nodes = sorted(doc["nodes"], key=lambda node: node["feature_type"] != error)
    return {node["node_id"]: node for node in nodes}


def _check(change: Any) -> None:
    where = "what is to be saved"
    try:
        # No file can hold half a character, which JSON can.
        to_json(change, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where} holds half a character: {error}") from error
    check_json(change, _CHANGE, where)


def _hash(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()
