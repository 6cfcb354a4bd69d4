"""A graph's total effects measured by the model's own derivative (maths 22.42).

Both say what a small change of a feature does to the targets. The graph's say it with
other features answering as its rows have it, the derivative with the whole model live.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxclt.files.json_text import rounded
from jaxclt.graph.agreement import sign_agreement, slope, spearman
from jaxclt.graph.contrast import contrast
from jaxclt.graph.effects import total_effects
from jaxclt.graph.graph import Graph

__all__ = [
    "contrast_derivative",
    "derivative_agreement",
    "hidden_effect",
    "total_effect",
    "unit_effects",
]


def contrast_derivative(graph: Graph) -> np.ndarray | None:
    """First-order effect of every node on the contrast, [N]; None: not computed."""
    if graph.derivative_KN is None:
        return None
    return contrast(graph).weight_K @ graph.derivative_KN.astype(np.float64)


def total_effect(graph: Graph, *, response: bool = False) -> np.ndarray:
    """The graph's total effect of every feature on the contrast, [A].

    Args:
      graph: attributed.
      response: by response, which the graph must have, instead of by value.
    """
    effect_KA = total_effects(graph, response=response).astype(np.float64)
    return contrast(graph).weight_K @ effect_KA


def unit_effects(graph: Graph) -> np.ndarray:
    """What a unit of each row does to the contrast, all paths counted, [R]."""
    value_A = np.where(graph.value_A == 0, 1, graph.value_A)
    unit_R = np.r_[total_effect(graph) / value_A, contrast(graph).weight_K]
    return unit_R.astype(graph.edge_RN.dtype)


def hidden_effect(graph: Graph) -> np.ndarray | None:
    """What features do to the contrast that the graph does not show, [A].

    The derivative minus the total effect by response: what goes through error nodes,
    features that are no nodes, and gates that move. None without both.
    """
    derivative_N = contrast_derivative(graph)
    if derivative_N is None or graph.response is None:
        return None
    return derivative_N[graph.feature_cols] - total_effect(graph, response=True)


def derivative_agreement(graph: Graph) -> dict[str, Any] | None:
    """How the total effects of features agree with the model's derivative, as JSON.

    By value; under ``by_response`` the same by response where the graph has that, with
    the share of the derivative that is ``hidden``: sums of sizes. ``after_first`` is
    without features of the first position. None if the graph has no derivative.

    ``spearman``; ``sign``, the share of right signs among the larger half by size of
    the derivative; ``slope`` of the derivative on total effects, by least squares
    through zero; ``n`` features.
    """
    derivative_N = contrast_derivative(graph)
    if derivative_N is None:
        return None
    derivative_A = derivative_N[graph.feature_cols]
    found: dict[str, Any] = {"contrast": contrast(graph).text}
    found |= _slices(graph, total_effect(graph), derivative_A)
    hidden_A = hidden_effect(graph)
    if hidden_A is not None:
        size = np.abs(derivative_A).sum()
        share = np.abs(hidden_A).sum() / size if size > 0 else np.nan
        by_response = _slices(graph, derivative_A - hidden_A, derivative_A)
        found["by_response"] = {**by_response, "hidden": rounded(share)}
    return found


def _slices(
    graph: Graph, total_A: np.ndarray, derivative_A: np.ndarray
) -> dict[str, Any]:
    after = graph.pos_A > 0
    return {
        **_agreement(total_A, derivative_A),
        "after_first": _agreement(total_A[after], derivative_A[after]),
    }


def _agreement(total_A: np.ndarray, derivative_A: np.ndarray) -> dict[str, Any]:
    return {
        "spearman": rounded(spearman(total_A, derivative_A)),
        "sign": rounded(sign_agreement(derivative_A, total_A)),
        "slope": rounded(slope(total_A, derivative_A)),
        "n": len(total_A),
    }
