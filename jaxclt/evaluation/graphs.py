"""What attribution graphs of a set of prompts say about a dictionary.

Circuit Tracing (2025), sections 5.2 and appendix F: path lengths, completeness and
replacement score, of the full graph and pruned, and the pruning frontier (figure 28);
and the share of the influence that passed through attention (section 7).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxclt.graph.graph import Graph
from jaxclt.graph.influence import solve_walk
from jaxclt.graph.prune import prune
from jaxclt.graph.scores import path_length_curve, scores
from jaxclt.graph.shares import shares_total
from jaxclt.validation.stats import mean_interval

__all__ = ["THRESHOLDS", "attention_share", "frontier", "graph_means", "graph_row"]

THRESHOLDS = (0.95, 0.9, 0.8, 0.7, 0.5)  # of nodes; the first four are the paper's


def graph_row(graph: Graph, thresholds: Sequence[float] = THRESHOLDS) -> dict[str, Any]:
    """Everything about one graph, as JSON.

    Args:
      graph: attributed, with its default pruning.
      thresholds: of nodes, for the frontier.

    Returns:
      ``scores`` and ``pruned`` (fields of `Scores`), ``curve`` (`path_length_curve`),
      ``frontier`` (see `frontier`), ``attention`` and ``attention_embedding`` (see
      `attention_share`), ``features`` and ``active`` counts, ``top`` the first target.
    """
    crossing = attention_share(graph)
    return {
        "prompt": graph.meta.prompt,
        "tokens": graph.n_tokens,
        "target": graph.meta.target_tokens[0],
        "probability": float(graph.target_prob_K[0]),
        "features": graph.n_features,
        "scores": dataclasses.asdict(scores(graph)),
        "pruned": dataclasses.asdict(scores(graph, graph.pruning)),
        "curve": path_length_curve(graph).tolist(),
        "frontier": frontier(graph, thresholds),
        "attention": crossing[0],
        "attention_embedding": crossing[1],
    }


def frontier(graph: Graph, thresholds: Sequence[float]) -> list[dict[str, float]]:
    """What pruning leaves: nodes, edges and scores at each node threshold.

    Nodes are features (embeddings, errors and targets always stay).
    """
    rows = []
    for threshold in thresholds:
        kept = prune(
            graph,
            node_threshold=threshold,
            edge_threshold=graph.pruning.edge_threshold,
        )
        found = scores(graph, kept)
        rows.append(
            {
                "threshold": threshold,
                "nodes": int(kept.keep_N[graph.feature_cols].sum()),
                "edges": int(kept.keep_edge_RN.sum()),
                "completeness": found.completeness,
                "replacement": found.replacement,
            }
        )
    return rows


def attention_share(graph: Graph) -> tuple[float, float]:
    """Share of the influence that passed at least one attention head on its way.

    In the walk of `jaxclt.graph.influence` a step takes the residual-direct or the
    attention-mediated part of its edge in proportion to their sizes. The first number
    is of all walks that end in an embedding or error node, the second of those that
    end in an embedding. Nan where no walk does, or the graph does not say.
    """
    direct_RN = graph.edge_direct_RN
    if direct_RN is None:
        return float("nan"), float("nan")
    edge_RN = graph.edge_RN
    size_RN = np.abs(direct_RN)
    both_RN = size_RN + np.abs(edge_RN - direct_RN)
    stay_RN = np.abs(edge_RN) * (size_RN / np.where(both_RN > 0, both_RN, 1))
    weight_K = graph.target_prob_K / graph.target_prob_K.sum()
    total_R = shares_total(graph)
    every_N, _ = solve_walk(edge_RN, total_R, weight_K)
    stays_N, _ = solve_walk(stay_RN.astype(edge_RN.dtype), total_R, weight_K)
    found = []
    for ends in (("error", "input"), ("input",)):
        columns = graph.layout.ends(*ends)
        total = float(every_N[columns].sum())
        stayed = float(stays_N[columns].sum())
        found.append(1 - stayed / total if total > 0 else float("nan"))
    return found[0], found[1]


_SCORES = {
    "completeness": "completeness",
    "completeness_ct": "completeness_ct",
    "replacement": "replacement",
    "path_length": "mean_path_length",
    "error_share": "error_share",
}


def graph_means(lines: Sequence[dict[str, Any]], key: jax.Array) -> dict[str, Any]:
    """Means over prompts with their intervals, the path-length curve and the frontier.

    Args:
      lines: from `graph_row`, one a prompt.
      key: draws resamples.
    """
    value = {
        name: np.array([line["scores"][of] for line in lines], float)
        for name, of in _SCORES.items()
    }
    for name, of in (("completeness", "completeness"), ("replacement", "replacement")):
        value[f"pruned_{name}"] = np.array([line["pruned"][of] for line in lines])
    for name in ("attention", "attention_embedding"):
        value[name] = np.array([line[name] for line in lines], float)
    curve = np.array([line["curve"] for line in lines])
    steps = list(zip(*(line["frontier"] for line in lines), strict=True))
    return {
        **{name: _mean(x) for name, x in value.items()},
        "graphs": len(lines),
        "curve": curve.mean(0).tolist(),
        "frontier": [
            {k: float(np.mean([one[k] for one in step])) for k in step[0]}
            for step in steps
        ],
        "intervals": {name: mean_interval(x, key) for name, x in value.items()},
    }


def _mean(x: np.ndarray) -> float:
    x = x[np.isfinite(x)]
    return float(x.mean()) if len(x) else math.nan
