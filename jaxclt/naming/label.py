"""All that the shown feature nodes of a graph say of themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxclt.clt.active import Active
from jaxclt.graph.graph import Graph
from jaxclt.graph.supernodes import input_by_token
from jaxclt.naming.words import label_of
from jaxclt.naming.writes import Spread, Writes, node_writes
from jaxclt.types import LMParams

__all__ = ["CLEAR", "shown_features", "with_said"]

CLEAR = 4.0  # standard deviations; a largest score below reads as nothing


def with_said(
    graph: Graph,
    active: Active,
    params: LMParams,
    spread: Spread,
    token_strings: Callable[[Sequence[int]], list[str]],
) -> dict[str, dict[str, Any]]:
    """What the shown feature nodes say of themselves, by "layer:pos:feature".

    ``raises`` and ``lowers``: tokens and standard deviations, the clear ones, at most
    five; ``share``: of what the node writes in the first of them; ``reads``: positions,
    tokens and shares of the tokens that it rests on, at most three; ``label``.

    Args:
      graph: attributed and pruned.
      active: features, of which the graph's are some, in their order.
      params: the model.
      spread: of the dictionary's features.
      token_strings: texts of token ids.
    """
    node_N = shown_features(graph)
    place = {
        key: slot
        for slot, key in enumerate(
            zip(
                active.layer_A.tolist(),
                active.pos_A.tolist(),
                active.feature_A.tolist(),
                strict=True,
            )
        )
    }
    key_N = [graph.feature(node) for node in node_N.tolist()]
    slot_N = np.array([place[layer, pos, f] for layer, pos, f in key_N], int)
    writes = node_writes(active, slot_N, spread, params)
    reads = _reads(graph, node_N)
    texts = _texts(writes, token_strings)
    said = {}
    for n, (layer, pos, feature) in enumerate(key_N):
        one = _of_node(writes, n, texts) | {"reads": reads[n]}
        one["label"] = label_of(one)
        said[f"{layer}:{pos}:{feature}"] = one
    return said


def shown_features(graph: Graph) -> np.ndarray:
    """Feature nodes that pruning keeps, by either reading, ascending."""
    kept_A = np.array(graph.pruning.keep_N[graph.feature_cols])
    if graph.response is not None:
        parts = graph.response.parts
        for node_E in (parts.row_E, parts.col_E):
            kept_A[node_E[node_E < graph.n_features]] = True
    return np.flatnonzero(kept_A)


def _texts(
    writes: Writes, token_strings: Callable[[Sequence[int]], list[str]]
) -> dict[int, str]:
    ids = np.unique(np.concatenate([writes.raised_NK, writes.lowered_NK])).tolist()
    return dict(zip(ids, token_strings(ids), strict=True))


def _of_node(writes: Writes, n: int, texts: dict[int, str]) -> dict[str, Any]:
    """The clear tokens each way, and how sure."""
    both = {
        "raises": (writes.raised_NK[n], writes.raised_z_NK[n]),
        "lowers": (writes.lowered_NK[n], writes.lowered_z_NK[n]),
    }
    said: dict[str, Any] = {
        name: [
            [texts[token], round(z, 1)]
            for token, z in zip(token_K.tolist(), z_K.tolist(), strict=True)
            if z >= CLEAR
        ]
        for name, (token_K, z_K) in both.items()
    }
    return said | {"share": round(float(writes.share_N[n]), 4)}


def _reads(graph: Graph, node_N: np.ndarray) -> list[list[list[Any]]]:
    """By node the positions, tokens and shares of the tokens that it rests on."""
    effect_NT = np.abs(input_by_token(graph)[node_N])
    whole_N1 = effect_NT.sum(1, keepdims=True)
    share_NT = effect_NT / np.where(whole_N1 > 0, whole_N1, 1)
    found = []
    for share_T in share_NT:
        order = np.argsort(-share_T, kind="stable")[:3].tolist()
        found.append(
            [
                [pos, graph.meta.tokens[pos], round(float(share_T[pos]), 3)]
                for pos in order
                if share_T[pos] >= 0.1
            ]
        )
    return found
