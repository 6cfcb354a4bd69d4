"""attention.json: heads, cells, and what makes their scores; its shape in one place.

Nodes are named by their ids in graph.json; ``bias`` and ``rest`` are no nodes there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxclt.attending.apart import Apart, take_apart
from jaxclt.attending.brought import make_nodes
from jaxclt.attending.cells import HeadEffects, head_effects
from jaxclt.attending.words import because, node_id, side_name
from jaxclt.files.json_file import COUNT, TEXT, TEXTS, check_json, json_schema, record
from jaxclt.graph.bank import RowTargets
from jaxclt.graph.graph import Graph
from jaxclt.graph.prompt import Recorded

__all__ = ["cell_json", "check_attention", "make_attention", "qk_tracing_results"]
__all__ += ["summary"]

_HEADS = 200  # listed with their effects
_CELLS = 200  # looked at for those that are taken apart
_NODES = 20  # of a side
_PAIRS = 30
_LONGEST = 64  # tokens of a prompt whose patterns are given whole

_NUMBER = {"type": "number"}
_LIST = {"type": "array"}
_CELL = record(
    {name: COUNT for name in ("layer", "head", "query", "key")}
    | {name: _NUMBER for name in ("weight", "score", "effect", "pattern_effect")}
    | {name: _NUMBER for name in ("relative_error", "competition_error")}
    | {"pattern": {"type": "array", "items": _NUMBER}, "text": TEXT}
    | {name: {"type": "array", "items": _LIST} for name in ("query_nodes", "key_nodes")}
    | {"pairs": {"type": "array", "items": _LIST}}
)
_HEAD = record({"layer": COUNT, "head": COUNT, "effect": _NUMBER})
_SCHEMA = json_schema(
    record(
        {
            "tokens": TEXTS,
            "contrast": TEXT,
            "heads": {"type": "array", "items": _HEAD},
            "cells": {"type": "array", "items": _CELL},
            "patterns": {"type": "object", "additionalProperties": _LIST},
        }
    )
)


def check_attention(doc: Any, where: object) -> None:
    """Whether parsed JSON is a document of this module.

    Raises:
      InputError: naming the first wrong value by its path.
    """
    check_json(doc, _SCHEMA, where)


def make_attention(
    p: Recorded,
    graph: Graph,
    targets: RowTargets,
    *,
    n: int,
    at_once: int = 128,
    packed: bool = True,
) -> dict[str, Any]:
    """The document of a prompt: its strongest cells, taken apart.

    A token that can attend to itself alone has nothing to be explained.

    Args:
      p: the prompt with all features that are active on it.
      graph: of the prompt.
      targets: what its targets read.
      n: cells to take apart.
      at_once: see `make_nodes`.
      packed: see `make_nodes`.
    """
    effects = head_effects(p, graph, targets, n=max(_CELLS, 2 * n))
    cells = [cell for cell in effects.cells if cell.query > 0][:n]
    apart = []
    if cells:
        nodes = make_nodes(p, graph, at_once=at_once, packed=packed)
        apart = take_apart(nodes, cells)
    doc = {
        "prompt": graph.meta.prompt,
        "dictionary": graph.meta.dictionary,
        "tokens": list(effects.tokens),
        "contrast": effects.contrast,
        "heads": _heads(effects),
        "cells": [cell_json(graph, one) for one in apart],
        "patterns": _patterns(p, {(cell.layer, cell.head) for cell in cells}),
    }
    check_attention(doc, "attention.json")
    return doc


def _heads(effects: HeadEffects) -> list[dict[str, Any]]:
    return [
        {"layer": layer, "head": head, "effect": _brief(effect)}
        for layer, head, effect in effects.strongest_heads(_HEADS)
    ]


def _patterns(p: Recorded, heads: set[tuple[int, int]]) -> dict[str, list[list[float]]]:
    """Whole patterns of heads of a short prompt, each row up to its own position."""
    pattern_LHTS = p.recording.frozen.pattern_LHTS
    if p.n_tokens > _LONGEST or pattern_LHTS is None:
        return {}
    found = {}
    for layer, head in sorted(heads):
        pattern_TS = np.asarray(pattern_LHTS[layer, head])[: p.n_tokens]
        rows = [_row(row_S[: t + 1]) for t, row_S in enumerate(pattern_TS)]
        found[f"{layer}.{head}"] = rows
    return found


def cell_json(graph: Graph, apart: Apart) -> dict[str, Any]:
    """One cell of the document."""
    pairs, cell = apart.pairs(_PAIRS), apart.cell
    return {
        "layer": cell.layer,
        "head": cell.head,
        "query": cell.query,
        "key": cell.key,
        "weight": _brief(apart.weight),
        "score": _brief(apart.score),
        "effect": _brief(cell.effect),
        "pattern_effect": _brief(cell.pattern_effect),
        "pattern": _row(apart.pattern_S),
        "text": because(graph, apart, pairs),
        "query_nodes": _side(graph, apart.query_N),
        "key_nodes": _side(graph, apart.key_N),
        "pairs": [
            [
                *(node_id(graph, node) for node in pair[:2]),
                *(side_name(graph, node) for node in pair[:2]),
                _brief(pair.score),
                _brief(pair.competition),
            ]
            for pair in pairs
        ],
        "relative_error": apart.relative_error,
        "competition_error": apart.competition_error,
    }


def _side(graph: Graph, sum_N: np.ndarray) -> list[list[Any]]:
    best = np.argsort(-np.abs(sum_N), kind="stable")[:_NODES].tolist()
    return [
        [node_id(graph, node), side_name(graph, node), _brief(sum_N.item(node))]
        for node in best
        if sum_N[node]
    ]


def _brief(x: float) -> float:
    return float(f"{x:.6g}")


def _row(weight_S: Sequence[float] | np.ndarray) -> list[float]:
    return [float(f"{x:.4g}") for x in weight_S]


def summary(doc: dict[str, Any]) -> dict[str, Any]:
    """What a report says of the document."""
    names = ("layer", "head", "query", "key", "effect", "score", "text")
    errors = [cell["relative_error"] for cell in doc["cells"]]
    cells = [
        {name: cell[name] for name in (*names, "relative_error")}
        | {"pairs": cell["pairs"][:3]}
        for cell in doc["cells"]
    ]
    return {
        "contrast": doc["contrast"],
        "cells": cells,
        "max_relative_error": max(errors, default=None),
    }


def qk_tracing_results(cell: dict[str, Any]) -> dict[str, list[list[Any]]]:
    """A cell of the document as Neuronpedia's graphs have it on a node.

    Its viewer shows such an object under ``qk_tracing_results`` of a node. Ids that are
    no nodes of the graph there, such as ``bias``, are shown as they are.
    """
    return {
        "pair_wise_contributors": [
            [query, key, score] for query, key, _, _, score, _ in cell["pairs"]
        ],
        "top_q_marginal_contributors": [[i, x] for i, _, x in cell["query_nodes"]],
        "top_k_marginal_contributors": [[i, x] for i, _, x in cell["key_nodes"]],
    }
