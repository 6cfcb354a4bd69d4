"""A cell that is asked about: its two sides, and the row of keys that it is one of."""

from __future__ import annotations

import dataclasses

import numpy as np
from jax import Array

from jaxclt.attending.brought import Nodes
from jaxclt.attending.cells import Cell
from jaxclt.attending.clean import Clean
from jaxclt.attending.sides import Side, Sides, channels, packed
from jaxclt.lm.layers import attention_scores, pattern_of
from jaxclt.precision import jit

__all__ = ["Asked", "ask"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """A cell, its sides, and what they are in the clean run."""

    cell: Cell
    scale: float  # what products of channels are multiplied by
    score_S: np.ndarray  # the live model's, of all keys up to the query's own
    pattern_S: np.ndarray  # what the head makes of them
    sides: tuple[Side, Side, Side]  # the query, the key, and the mean key of the row
    whole_3C: np.ndarray  # their channels

    @property
    def against(self) -> Side:
        """The key less the mean key."""
        _, key, mean = self.sides
        weight_T = -mean.weight_T
        weight_T[self.cell.key] += 1
        return key._replace(weight_T=weight_T)

    @property
    def size(self) -> float:
        """The largest score that vectors as long as its sides can have."""
        query, key, mean = np.linalg.norm(self.whole_3C, axis=1)
        return self.scale * float(query * max(key, mean))

    @property
    def score(self) -> float:
        """Of the live model."""
        return float(self.score_S[self.cell.key])

    @property
    def weight(self) -> float:
        """A(q, k)."""
        return float(self.pattern_S[self.cell.key])

    @property
    def beyond(self) -> float:
        """The score less the mean score of the row, weighted by the pattern."""
        return self.score - float(self.score_S @ self.pattern_S)


def ask(nodes: Nodes, cell: Cell) -> Asked:
    """Ask about a cell; its numbers are not read, only its place."""
    clean, cfg = nodes.clean, nodes.clean.cfg
    found = _row(clean, cell.layer, cell.head, cell.query)
    row = (np.asarray(x)[: cell.query + 1].astype(np.float64) for x in found)
    score_S, pattern_S = row
    group = cell.head // cfg.n_queries_per_kv
    query = Side(True, cell.head, _only(cell.query))
    sides = query, Side(False, group, _only(cell.key)), Side(False, group, pattern_S)
    three = packed(sides, 3, nodes.n_positions, nodes.dtype)
    whole_3C = _whole(clean, cell.layer, three)
    return Asked(
        cell=cell,
        scale=cfg.score_scale,
        score_S=score_S,
        pattern_S=pattern_S,
        sides=sides,
        whole_3C=np.asarray(whole_3C).astype(np.float64),
    )


def _only(pos: int) -> np.ndarray:
    return np.r_[np.zeros(pos), 1.0]


@jit
def _row(clean: Clean, layer: Array, head: Array, query: Array) -> tuple[Array, Array]:
    """Scores and pattern [S] of one query, by the live model."""
    here = clean.layer(layer)
    query_THC, key_SGC = here.live_heads()
    score_HTS = attention_scores(query_THC[query][None], key_SGC, cfg=clean.cfg)
    pattern_HTS = pattern_of(here.p, score_HTS, cfg=clean.cfg, start=query)
    return score_HTS[head, 0], pattern_HTS[head, 0]


@jit
def _whole(clean: Clean, layer: Array, sides: Sides) -> Array:
    """Channels [S, C] of sides in the clean run."""
    here = clean.layer(layer)
    return channels(here, sides, here.resid_TD)
