"""A circuit in a traced directory: circuit.json, the page's groups and its words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

from jaxclt.circuits.result import Circuit
from jaxclt.files.atomic import atomic_path, write_text
from jaxclt.files.guard import locked
from jaxclt.files.json_text import to_json
from jaxclt.graph.nodes import node_id
from jaxclt.trace.pages import grouped_ids, read_graph, traced_digest, write_page
from jaxclt.viewer.graph_json import validate

__all__ = ["CIRCUIT", "MEASURED", "with_circuit", "write_circuit"]

CIRCUIT = "circuit.json"
MEASURED = "circuit.measured.jsonl"  # sets that were measured, until a search ends


def write_circuit(
    found: Circuit, directory: Path, report: dict[str, Any]
) -> dict[str, Any]:
    """Write circuit.json, and the circuit into graph.json and the page if they are.

    Args:
      found: of the graph in that directory.
      directory: that trace wrote.
      report: of trace.

    Returns:
      The content of circuit.json; ``on_page`` says whether the page opens with it.

    Raises:
      InputError: if the directory cannot be written.
    """
    said = found.to_json() | {"traced": traced_digest(report), "on_page": False}
    path = directory / "graph.json"
    if path.is_file():
        with locked(path):
            doc = with_circuit(read_graph(path), found)
            validate(doc)
            with atomic_path(path) as temporary:
                temporary.write_bytes(orjson.dumps(doc))
        said["on_page"] = doc["jaxclt"]["circuit"]["on_page"]
    write_text(directory / CIRCUIT, to_json(said, indent=1, ensure_ascii=False) + "\n")
    if path.is_file():
        write_page(directory)
    return said


def with_circuit(doc: dict[str, Any], found: Circuit) -> dict[str, Any]:
    """A document that opens with the circuit's groups and says it after its story.

    Groups that a reader saved stay instead; those of the story, or of a circuit that
    was found before, do not.

    Args:
      doc: of the graph.
      found: its circuit.
    """
    own = dict(doc.get("jaxclt") or {})
    before = own.get("circuit") or {}
    story = dict(own.get("story") or {})
    ours = [group["name"] for group in story.get("groups", ())]
    ours += before.get("groups", [])
    view = doc["qParams"]
    saved = [name for name, *_ in view.get("supernodes") or () if name not in ours]
    groups = grouped_ids(doc, found.supernodes)
    if not saved and groups:
        graph = found.graph
        members = [i for _, *ids in groups for i in ids]
        grouped = {i for _, *ids in view.get("supernodes") or () for i in ids}
        beside = [i for i in view.get("pinnedIds") or () if i not in grouped]
        target = node_id(graph, int(graph.layout.at("target", 0)))
        pinned = list(dict.fromkeys([*members, *beside, target]))
        view = view | {"supernodes": groups, "pinnedIds": pinned}
    said = str(found)
    if story:
        text = [x for x in story.get("text", ()) if x != before.get("text")]
        own["story"] = story | {"text": [*text, said]}
    own["circuit"] = {
        "text": said,
        "groups": [group.name for group in found.groups],
        "on_page": bool(not saved and groups),
    }
    return {**doc, "qParams": view, "jaxclt": own}
