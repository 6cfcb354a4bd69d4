"""Proof that a graph is exact: every row sums to what it explains.

One number per graph says whether reading the weights, the hook points or the frozen
maps went wrong, and three say what else than nodes the rows consist of (maths 6.11).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxclt.errors import InputError
from jaxclt.graph.graph import Graph
from jaxclt.graph.kinds import KINDS

__all__ = ["Certificate", "certificate"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certificate:
    """Conservation over the attributed rows.

    A row's error is |sum - readout| over the sum of its absolute terms; shares are the
    mean over rows of the class's absolute part of that sum.
    """

    max_relative_row_error: float
    bias_share: float
    rest_share: float
    error_share: float


def certificate(graph: Graph) -> Certificate:
    """Check ``edge_RN.sum(1) + bias_R + rest_R == readout_R`` in float64.

    Raises:
      InputError: for a graph by response, whose rows sum to nothing.
    """
    if graph.meta.reading != "value":
        raise InputError(
            "edges by response sum to nothing, so that there is no certificate: give "
            "the graph itself, not what by_response made of it"
        )
    rows = np.flatnonzero(graph.attributed_R)
    signed = graph.bias_R.astype(np.float64) + graph.rest_R - graph.readout_R
    absolute = np.abs(graph.bias_R).astype(np.float64) + graph.rest_abs_R
    bias, error = np.abs(graph.bias_R).astype(np.float64), np.zeros(len(signed))
    # Row by row blocks: the edge matrix is large and need not be copied to float64.
    for start in range(0, len(rows), 512):
        part = rows[start : start + 512]
        edge = graph.edge_RN[part].astype(np.float64)
        signed[part] += edge.sum(1)
        absolute[part] += np.abs(edge).sum(1)
        for kind in graph.layout.sources:
            size = {"bias": bias, "error": error}.get(KINDS[kind].ends or "")
            if size is not None:
                size[part] += np.abs(edge[:, graph.layout.nodes[kind]]).sum(1)
    safe = np.where(absolute > 0, absolute, 1)[rows]
    if len(rows) == 0:
        return Certificate(
            max_relative_row_error=0.0, bias_share=0.0, rest_share=0.0, error_share=0.0
        )
    return Certificate(
        max_relative_row_error=float((np.abs(signed[rows]) / safe).max()),
        bias_share=float((bias[rows] / safe).mean()),
        rest_share=float((graph.rest_abs_R[rows] / safe).mean()),
        error_share=float((error[rows] / safe).mean()),
    )
