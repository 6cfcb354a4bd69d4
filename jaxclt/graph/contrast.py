"""What one number of a graph's targets effects are told of: answer minus runner-up."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxclt.graph.graph import Graph
from jaxclt.graph.nodes import quoted

__all__ = ["Contrast", "contrast"]


class Contrast(NamedTuple):
    """A weighted sum of targets."""

    weight_K: np.ndarray
    text: str  # what it is called; nothing in it can steer a terminal


def contrast(graph: Graph) -> Contrast:
    """The first target minus the second where both are tokens of one output.

    A difference of logits says what decides between two answers; what raises all logits
    alike is not in it. Else the first target alone.
    """
    weight_K = np.zeros(graph.n_targets)
    weight_K[0] = 1
    first, *others = map(_name, graph.meta.target_tokens, graph.target_token_K)
    place_KX = np.stack([graph.target_layer_K, graph.target_pos_K], 1)
    same_K = (place_KX == place_KX[0]).all(1) & (graph.target_token_K >= 0)
    if graph.n_targets < 2 or not same_K[:2].all():
        return Contrast(weight_K, first)
    weight_K[1] = -1
    return Contrast(weight_K, f"{first} - {others[0]}")


def _name(text: str, token: int) -> str:
    return f"logit({quoted(text)})" if token >= 0 else quoted(text)
