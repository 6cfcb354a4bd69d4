"""What a trace leaves in its directory: the graph, a report, its JSON and its page."""

from __future__ import annotations

import dataclasses
import os
import platform
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orjson

from jaxclt.attending.document import summary
from jaxclt.files.atomic import atomic_path, write_text
from jaxclt.files.json_text import to_json
from jaxclt.graph.certificate import certificate
from jaxclt.graph.graph import Graph
from jaxclt.graph.part_shares import part_shares
from jaxclt.graph.paths import describe_paths, strongest_paths
from jaxclt.graph.prune import restrict
from jaxclt.graph.response import by_response
from jaxclt.graph.scores import scores
from jaxclt.graph.yardstick import derivative_agreement
from jaxclt.io.graph_file import save_graph
from jaxclt.trace.pages import (
    ATTENTION,
    TOLD,
    grouped_ids,
    traced_digest,
    with_changes,
    with_saved_view,
    with_story,
    write_page,
)
from jaxclt.trace.prompt import Traced
from jaxclt.types import Supernode
from jaxclt.version import __version__
from jaxclt.viewer.graph_json import graph_json, validate

__all__ = ["FULL_GRAPH_BYTES", "scores_json", "write_trace"]

FULL_GRAPH_BYTES = 8 << 20  # larger graphs are saved pruned unless asked otherwise


def write_trace(
    traced: Traced,
    out: str | os.PathLike[str],
    *,
    save: str = "auto",
    supernodes: Sequence[Supernode] = (),
    told: Mapping[str, Any] | None = None,
    change_A: np.ndarray | None = None,
) -> dict[str, Any]:
    """Write graph.npz, report.json, graph.json and index.html; return the report.

    And attention.json, if the trace took attention apart.

    Files are written one by one, each atomically, the page last. It also shows the
    validation, patches and features that are there for the same prompt and dictionary.
    What a reader saved there (labels, pins, groups) is kept.

    Args:
      traced: from `trace_prompt`.
      out: directory, created if absent.
      save: `full`, `pruned`, or `auto` (full up to 8 MB).
      supernodes: groups of features that the page opens with, and that `jaxclt patch
        --group` knows by name.
      told: ``story``, ``tokens`` and ``sink`` of the graph (`jaxclt.story`); the page
        opens with its groups if there are no others.
      change_A: how much features change from a counterfactual prompt
        (`jaxclt.story.change`); the page ranks by it.

    Raises:
      InputError: if the directory cannot be written.
    """
    out = Path(out)
    started = time.perf_counter()
    graph = traced.graph
    other = None if graph.response is None else by_response(graph)
    report = _report(traced, other) | {"environment": _environment(traced)}
    slug, stated = out.name or "graph", report["scores"]
    doc = graph_json(graph, slug=slug, scores=stated, other=other)
    doc = with_saved_view(doc, out)
    for part in (*TOLD, "changes", "circuit"):
        doc["jaxclt"].pop(part, None)  # of an earlier trace
    if change_A is not None:
        doc = with_changes(doc, change_A, graph)
    if told is not None:
        report |= told
        doc = with_story(doc, told, graph)
    if groups := grouped_ids(doc, supernodes):
        pinned = [i for _, *ids in groups for i in ids]
        doc["qParams"] |= {"supernodes": groups, "pinnedIds": pinned}
    validate(doc)
    small = save == "pruned" or (save == "auto" and _bytes(graph) > FULL_GRAPH_BYTES)
    # Without a page the directory counts as unfinished: another graph may have been
    # there, whose report would be found beside the files of this one.
    (out / "index.html").unlink(missing_ok=True)
    save_graph(out / "graph.npz", restrict(graph) if small else graph)
    with atomic_path(out / "graph.json") as temporary:
        temporary.write_bytes(orjson.dumps(doc))
    report["graph"]["saved"] = "pruned" if small else "full"
    report["graph"]["listed"] = doc["jaxclt"]["kept_links"]
    report["timing_s"]["write"] = round(time.perf_counter() - started, 3)
    write_text(out / "report.json", to_json(report, indent=1, ensure_ascii=False))
    (out / ATTENTION).unlink(missing_ok=True)
    if traced.attention is not None:
        found = traced.attention | {"traced": traced_digest(report)}
        write_text(out / ATTENTION, to_json(found, ensure_ascii=False))
    write_page(out, doc=doc)
    return report


def scores_json(graph: Graph) -> dict[str, Any]:
    """The scores of a graph, full and pruned, and by value its certificate, as JSON."""
    full, pruned = scores(graph), scores(graph, graph.pruning)
    said = {
        "scores": {
            "full": dataclasses.asdict(full),
            "pruned": dataclasses.asdict(pruned),
        }
    }
    if graph.meta.reading == "value":
        said["certificate"] = dataclasses.asdict(certificate(graph))
    return said


def _report(traced: Traced, other: Graph | None) -> dict[str, Any]:
    """Everything that is said of a trace; `other` is its graph by response."""
    graph = traced.graph
    pruning, stated = graph.pruning, scores_json(graph)
    agreement, attention = derivative_agreement(graph), traced.attention
    n_kept = int(pruning.keep_N.sum()) + graph.n_targets
    return {
        "prompt": graph.meta.prompt,
        "model": graph.meta.model,
        "dictionary": graph.meta.dictionary,
        "convention": graph.meta.convention,
        "top_tokens": [list(pair) for pair in traced.top_tokens],
        **({"targets": _explained(graph)} if "targets" in traced.identity else {}),
        **stated,
        **({} if agreement is None else {"derivative": agreement}),
        **({} if attention is None else {"attention": summary(attention)}),
        "graph": {
            "features_active": traced.n_active,
            "features_attributed": int(graph.attributed_R[graph.feature_cols].sum()),
            "nodes": graph.edge_RN.shape[1] + graph.n_targets,
            "edges": int(np.count_nonzero(graph.edge_RN)),
            "kept_nodes": n_kept,
            "kept_edges": int(pruning.keep_edge_RN.sum()),
            # circuit-tracer's shares leave out what is unexplored.
            "unexplored_influence": stated["scores"]["full"]["unexplored_share"]
            if graph.meta.convention == "paper"
            else None,
        },
        "paths": _paths(graph),
        **({} if other is None else {"response": _by_response(graph, other)}),
        "pruning": {
            "node_threshold": pruning.node_threshold,
            "edge_threshold": pruning.edge_threshold,
        },
        "work": traced.work,
        "identity": traced.identity,
        "timing_s": {k: round(v, 3) for k, v in traced.timing.items()},
    }


def _paths(graph: Graph) -> list[str]:
    return describe_paths(graph, strongest_paths(graph, k=5)).splitlines()


def _by_response(graph: Graph, other: Graph) -> dict[str, Any]:
    """What the other reading says: its scores, paths, and shares of its parts."""
    return scores_json(other) | {"paths": _paths(other), "parts": part_shares(graph)}


def _explained(graph: Graph) -> list[dict[str, Any]]:
    """Given targets: where they read, their weights and their values."""
    value_K = graph.readout_R[graph.target_rows]
    return [
        {
            "label": label,
            "layer": None if layer == graph.n_layers else layer,  # null: the output
            "pos": int(graph.target_pos_K[k]),
            "weight": round(float(graph.target_prob_K[k]), 6),
            "readout": float(value_K[k]),
        }
        for k, label in enumerate(graph.meta.target_tokens)
        for layer in [int(graph.target_layer_K[k])]
    ]


def _environment(traced: Traced) -> dict[str, Any]:
    device = jax.devices()[0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
    return {
        "jaxclt": __version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": f"{device.platform}:{device.device_kind}",
        "n_devices": jax.device_count(),
        "cpus": os.cpu_count(),
        "peak_memory_gb": round(peak * unit / 1e9, 2),
        "dtype": traced.dtype,
        "precision": traced.identity["config"]["precision"],
    }


def _bytes(graph: Graph) -> int:
    return graph.edge_RN.nbytes + graph.pruning.keep_edge_RN.nbytes
