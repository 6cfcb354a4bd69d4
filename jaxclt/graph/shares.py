"""What shares of rows are taken of, and how much influence passes edges; numpy only."""

from __future__ import annotations

import numpy as np

from jaxclt.graph.graph import Graph

__all__ = ["edge_influence", "shares_total", "whole_input"]


def whole_input(graph: Graph) -> np.ndarray:
    """Everything that rows read, summed without sign, [R]."""
    return graph.row_strength + np.abs(graph.bias_R) + graph.rest_abs_R


def shares_total(graph: Graph) -> np.ndarray:
    """What row shares are taken of [R], by the graph's convention."""
    paper = graph.meta.convention == "paper"
    return whole_input(graph) if paper else graph.row_strength


def edge_influence(graph: Graph, row_E: np.ndarray, edge_E: np.ndarray) -> np.ndarray:
    """How much influence passes edges: shares of their rows times the rows' influence.

    Args:
      graph: attributed.
      row_E: rows of some edges.
      edge_E: the edges.
    """
    visit_R = np.concatenate(
        [graph.influence_N[graph.feature_cols], graph.target_prob_K]
    )
    total_R = shares_total(graph)
    scale_R = visit_R / np.where(total_R > 0, total_R, 1)
    return np.abs(edge_E) * scale_R[row_E]
