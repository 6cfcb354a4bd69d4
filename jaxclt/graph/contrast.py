"""The one number that effects are stated on where a graph explains several things."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxclt.graph.graph import Graph

__all__ = ["Contrast", "contrast"]


class Contrast(NamedTuple):
    """A sum of targets, and what it is called."""

    weight_K: np.ndarray
    text: str  # has tokens in it, untrusted like them


def contrast(graph: Graph) -> Contrast:
    """Logit of the first target minus that of the second; else the first target alone.

    The second takes part if both are tokens of the output at one position: the answer
    against its runner-up.
    """
    is_logit_K = (graph.target_token_K >= 0) & (graph.target_layer_K == graph.n_layers)
    names = [
        f"logit({name})" if is_logit else name
        for name, is_logit in zip(graph.meta.target_tokens, is_logit_K, strict=True)
    ]
    weight_K = np.zeros(graph.n_targets)
    weight_K[0] = 1
    pos_K = graph.target_pos_K
    if is_logit_K[:2].sum() < 2 or pos_K[0] != pos_K[1]:
        return Contrast(weight_K, names[0])
    weight_K[1] = -1
    return Contrast(weight_K, f"{names[0]} - {names[1]}")
