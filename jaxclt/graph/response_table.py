"""What a small change of a source does, as a graph keeps it beside its edges.

Host arrays that can be cut with the graph; `jaxclt.graph.response` says what they mean
and makes them (maths 22).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxclt.graph.blocks import Edges, cut_edges
from jaxclt.graph.head_table import EdgeTable

__all__ = ["EFFECT_PARTS", "PARTS", "Response", "ResponseParts"]

PARTS = ("query", "key", "norm", "gate")  # beside OV, which is the edge by value
EFFECT_PARTS = ("value", *PARTS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResponseParts(EdgeTable):
    """Edges by what their paths changed first: with the edge by value they sum to it.

    ``response = edge + query + key + norm + gate`` (maths 22.4).
    """

    query_E: np.ndarray  # what a head asks for
    key_E: np.ndarray  # what a head answers to
    norm_E: np.ndarray  # denominators
    gate_E: np.ndarray  # how much of what it reads the target lets through

    @property
    def beside_value(self) -> np.ndarray:
        """What the response has beyond the edge by value, [E]."""
        return self.query_E + self.key_E + self.norm_E + self.gate_E


@dataclasses.dataclass(frozen=True, kw_only=True)
class Response:
    """Edges by response: a source's value times the live derivative of the row."""

    edge_RN: np.ndarray
    rest_R: np.ndarray  # of sources that are not columns, summed with sign
    rest_abs_R: np.ndarray  # and without
    # Total effects on the contrast, by the parts (`EFFECT_PARTS`) of nodes' own edges.
    effect_QN: np.ndarray
    parts: ResponseParts  # of the edges that are kept by either reading
    total_effect_KA: np.ndarray | None = None  # as that of the graph, by response

    def restrict(
        self, row: np.ndarray, col: np.ndarray, keep_N: np.ndarray
    ) -> Response:
        """That of the kept nodes; see `EdgeTable.restrict` and `cut_edges`."""
        edges = Edges(self.edge_RN, self.rest_R, self.rest_abs_R)
        cut = cut_edges(edges, row, col, keep_N)
        parts = self.parts.restrict(row, col, keep_N)
        effect_QN = (self.effect_QN * keep_N)[:, col]
        return Response(**cut._asdict(), effect_QN=effect_QN, parts=parts)
