"""A directory that trace wrote, as a page: graph, scores, validation, features.

What a reader saved (labels in the nodes, pins and supernodes in ``qParams``) is in
``graph.json`` and outlives the page.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxclt.dashboards.files import FeatureFiles, uncantor
from jaxclt.errors import InputError
from jaxclt.files.atomic import atomic_path
from jaxclt.files.json_file import MOST_DATA, find_json
from jaxclt.files.json_text import to_json
from jaxclt.graph.graph import Graph
from jaxclt.graph.kinds import KINDS
from jaxclt.graph.nodes import node_id
from jaxclt.graph.supernodes import suggest_supernodes
from jaxclt.io.published import dashboards
from jaxclt.naming.words import label_of
from jaxclt.types import Supernode
from jaxclt.viewer.graph_json import validate
from jaxclt.viewer.page import page

__all__ = [
    "ATTENTION",
    "EXAMPLES",
    "PATCHES",
    "TOLD",
    "carry_over",
    "directory_page",
    "feature_files",
    "grouped_ids",
    "read_graph",
    "traced_digest",
    "with_changes",
    "with_features",
    "with_saved_view",
    "with_story",
    "with_suggestions",
    "write_page",
]

ATTENTION = "attention.json"  # heads, and what makes them attend
EXAMPLES = "examples"  # what `trace --examples` gathered
FEATURES = "features"  # folder of feature files beside graph.json; before EXAMPLES
PATCHES = "patches.json"  # what patches did, see `jaxclt.patching.log`


def read_graph(path: Path) -> dict[str, Any]:
    """A checked graph document, of any tool that writes this format.

    Raises:
        InputError: if there is no such file, or it is not a graph.
    """
    doc = find_json(path, most=MOST_DATA)
    if doc is None:
        raise InputError(f"no {path.name} in {path.parent}: trace a prompt into it")
    validate(doc, foreign=True)
    return doc


def directory_page(
    directory: Path,
    *,
    doc: dict[str, Any] | None = None,
    compare: dict[str, Any] | None = None,
    serve: dict[str, Any] | None = None,
) -> str:
    """The page of a traced prompt with all that is kept next to its graph.

    Args:
        directory: with graph.json, and report.json, validation.json, attention.json,
            patches.json, features/ or examples/ if any.
        doc: the graph to show instead of graph.json, perhaps pruned differently.
        compare: a second graph document.
        serve: see `jaxclt.viewer.page.page`; features are then asked for one by one.

    Raises:
        InputError: if a file is not what it should be.
    """
    doc = read_graph(directory / "graph.json") if doc is None else doc
    doc = _with_dashboards(doc)
    if serve is None:
        doc = with_features(doc, feature_files(directory))
    own = (doc.get("jaxclt") or {}).get("scores") or {}
    return page(
        doc,
        # Scores of another pruning than trace's come with the document.
        None if "scores" in own else _beside(directory, "report.json", doc),
        validation=_of_this_trace(directory, "validation.json", doc),
        attention=_of_this_trace(directory, ATTENTION, doc),
        patches=(_beside(directory, PATCHES, doc) or {}).get("patches"),
        other=compare,
        serve=serve,
    )


def _with_dashboards(doc: dict[str, Any]) -> dict[str, Any]:
    """The document with the public address of its features, if that is known."""
    own, listed = doc.get("jaxclt") or {}, doc["metadata"].get("transcoder_list")
    match own.get("dictionary"), listed:
        case str(name), _:
            pass
        case _, [str(name)]:
            pass
        case _:
            return doc
    where = dashboards(name)
    return {**doc, "jaxclt": {**own, "dashboards": where}} if where else doc


def write_page(directory: Path, **parts: Any) -> Path:
    """Write ``index.html`` again; see `directory_page`."""
    path = directory / "index.html"
    text = directory_page(directory, **parts)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def feature_files(directory: Path) -> Path:
    """Where the feature files of a traced directory are."""
    given = directory / FEATURES
    return given if given.is_dir() else directory / EXAMPLES


def with_features(doc: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The document with the feature files of its nodes, under ``jaxclt.features``.

    Args:
        doc: of a graph.
        folder: of feature files, loose or packed (see `FeatureFiles`).

    Raises:
        InputError: if a feature's file is not a JSON object.
    """
    if not folder.is_dir():
        return doc
    files = FeatureFiles(folder)
    numbers = {
        node["feature"]
        for node in doc["nodes"]
        if isinstance(node.get("feature"), int) and node["feature"] >= 0
    }
    found = {str(n): files.record(*uncantor(n)) for n in sorted(numbers)}
    found = {key: feature for key, feature in found.items() if feature is not None}
    own = dict(doc.get("jaxclt") or {})
    own["features"] = {**(own.get("features") or {}), **found}
    return {**doc, "jaxclt": own}


def with_suggestions(doc: dict[str, Any], graph: Graph) -> dict[str, Any]:
    """The document with supernodes that the page offers (`suggest_supernodes`).

    Under ``jaxclt.suggested_supernodes``: lists of a name and the members' ids. Groups
    of one feature are left out.

    Args:
        doc: of the graph.
        graph: attributed and pruned.
    """
    groups = grouped_ids(doc, suggest_supernodes(graph))
    many = [group for group in groups if len(group) > 2]
    own = {**(doc.get("jaxclt") or {}), "suggested_supernodes": many}
    return {**doc, "jaxclt": own}


def grouped_ids(
    doc: dict[str, Any], supernodes: Sequence[Supernode]
) -> list[list[str]]:
    """Name and ids of each group's features, as far as the document shows them."""
    shown = {node["node_id"] for node in doc["nodes"]}
    groups = []
    for group in supernodes:
        ids = [f"{layer}_{feature}_{pos}" for layer, pos, feature in group.features]
        if ids := [i for i in ids if i in shown]:
            groups.append([group.name, *ids])
    return groups


TOLD = ("story", "tokens", "sink")
LOUD = 0.5  # logits of the answer's lead that a token must change to be pinned


def with_story(
    doc: dict[str, Any], told: Mapping[str, Any], graph: Graph
) -> dict[str, Any]:
    """A document with what is told of it, opening with the story's groups.

    Beside them stand the first target and the tokens without which the answer's lead
    changes. Groups that a reader saved stay instead.
    """
    view = doc["qParams"]
    if not view["supernodes"] and not view["pinnedIds"]:
        shown = {node["node_id"] for node in doc["nodes"]}
        groups = [
            [group["name"], *(i for i in group["members"] if i in shown)]
            for group in told["story"]["groups"]
        ]
        groups = [group for group in groups if len(group) > 1]
        loud = [x for x in told["tokens"] if abs(x["effect"] or 0) >= LOUD]
        ends = [graph.layout.at("embed", x["position"]) for x in loud]
        ends.append(graph.layout.at("target", 0))
        beside = [node_id(graph, int(node)) for node in ends]
        pinned = [i for _, *ids in groups for i in ids] + beside
        view = view | {"supernodes": groups, "pinnedIds": pinned}
    told = {part: told[part] for part in TOLD}
    return {**doc, "qParams": view, "jaxclt": doc["jaxclt"] | told}


def with_changes(
    doc: dict[str, Any], change_A: np.ndarray, graph: Graph
) -> dict[str, Any]:
    """A document whose features say how much changes from a counterfactual prompt.

    Args:
      doc: of the graph.
      change_A: from `jaxclt.story.change`.
      graph: attributed and pruned.
    """
    first = graph.feature_cols.start
    change = {
        node_id(graph, first + a): float(f"{x:.4g}") for a, x in enumerate(change_A)
    }
    nodes = [
        node | {"change": change[node["node_id"]]}
        if node["node_id"] in change
        else node
        for node in doc["nodes"]
    ]
    own = doc["jaxclt"] | {"changes": "counterfactual prompt"}
    return {**doc, "nodes": nodes, "jaxclt": own}


def carry_over(doc: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """A fresh document with the labels, pins and groups of a saved one.

    Labels of features that the fresh one does not show are kept under
    ``jaxclt.labels_not_shown``, for a document that shows them again.
    """
    own = {**(saved.get("jaxclt") or {}), **(doc.get("jaxclt") or {})}
    labels = dict(own.pop("labels_not_shown", {})) | {
        node["jsNodeId"]: node["clerp"]
        for node in saved["nodes"]
        if node["clerp"] and _of_reader(node)
    }
    nodes = [
        {**node, "clerp": labels[node["jsNodeId"]], "label_source": "own"}
        if node["jsNodeId"] in labels and _may_rename(node)
        else node
        for node in doc["nodes"]
    ]
    shown = {node["jsNodeId"] for node in nodes}
    if rest := {key: text for key, text in labels.items() if key not in shown}:
        own["labels_not_shown"] = rest
    return {**doc, "nodes": nodes, "qParams": saved["qParams"], "jaxclt": own}


def _may_rename(node: dict[str, Any]) -> bool:
    """Whether a reader's label goes before what the fresh document says."""
    return not node["clerp"] or node.get("label_source") == "automatic"


def _of_reader(node: dict[str, Any]) -> bool:
    """Whether a saved label may be a reader's: no target's, no automatic one."""
    if node["feature_type"] == KINDS["target"].drawn:
        return False
    if node.get("label_source") != "automatic":
        return True
    said = {"raises": [], "lowers": [], "reads": node.get("reads") or []}
    return node["clerp"] != label_of(said | (node.get("writes") or {}))


def with_saved_view(doc: dict[str, Any], directory: Path) -> dict[str, Any]:
    """A fresh document with what a reader saved in the one that it replaces.

    Only if that is of the same prompt, model and dictionary, and whole.
    """
    try:
        saved = read_graph(directory / "graph.json")
    except InputError:
        return doc
    what = ("prompt_tokens", "scan", "transcoder_list")
    same = all(saved["metadata"].get(key) == doc["metadata"][key] for key in what)
    return carry_over(doc, saved) if same else doc


def traced_digest(report: dict[str, Any]) -> str:
    """A digest that differs between graphs traced with different settings."""
    same = to_json(report.get("identity"), sort_keys=True)
    return hashlib.sha256(same.encode()).hexdigest()


def _of_this_trace(
    directory: Path, name: str, doc: dict[str, Any]
) -> dict[str, Any] | None:
    """What a file says about this graph, not about one that was here before."""
    found = _beside(directory, name, doc)
    if found is None or "traced" not in found:
        return found
    report = find_json(directory / "report.json") or {}
    return found if found["traced"] == traced_digest(report) else None


def _beside(directory: Path, name: str, doc: dict[str, Any]) -> dict[str, Any] | None:
    """A file about this graph, unless another prompt or dictionary left it."""
    found = find_json(directory / name)
    if found is None or found.get("prompt") != doc["metadata"]["prompt"]:
        return None
    dictionary = (doc.get("jaxclt") or {}).get("dictionary", found.get("dictionary"))
    return found if found.get("dictionary") == dictionary else None
