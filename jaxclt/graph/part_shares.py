"""How much of what small changes do goes through values, patterns, norms and gates.

Parts of opposite signs cancel, so that sizes are summed: a part's share is of all
sizes, and what is left over is said beside (maths 22.83).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxclt.files.json_text import rounded
from jaxclt.graph.contrast import contrast
from jaxclt.graph.graph import Graph
from jaxclt.graph.response_table import EFFECT_PARTS, PARTS

__all__ = ["part_shares"]


def part_shares(graph: Graph) -> dict[str, Any] | None:
    """Shares of parts, as JSON; None if the graph has no edges by response.

    ``effects``: of nodes' total effects by response on the contrast; ``edges``: of the
    listed edges, each times what a unit of its row does to the contrast. In both
    ``left`` is what is left of the sum of sizes after parts have cancelled.
    """
    response = graph.response
    if response is None:
        return None
    effect_QN, listed = response.effect_QN, response.parts
    unit_A = effect_QN[:, graph.feature_cols].sum(0)
    unit_A /= np.where(graph.value_A == 0, 1, graph.value_A)
    unit_E = np.concatenate([unit_A, contrast(graph).weight_K])[listed.row_E]
    value_E = graph.edge_RN[listed.row_E, listed.col_E]
    part_QE = np.stack([value_E, *(getattr(listed, f"{part}_E") for part in PARTS)])
    return {
        "contrast": contrast(graph).text,
        "effects": _shares(effect_QN),
        "edges": _shares(part_QE * unit_E),
    }


def _shares(part_QX: np.ndarray) -> dict[str, float | None]:
    size_Q = np.abs(part_QX).sum(1, dtype=np.float64)
    whole = size_Q.sum() or np.nan
    left = np.abs(part_QX.sum(0)).sum(dtype=np.float64)
    shares = zip(EFFECT_PARTS, size_Q / whole, strict=True)
    return {name: rounded(x) for name, x in (*shares, ("left", left / whole))}
