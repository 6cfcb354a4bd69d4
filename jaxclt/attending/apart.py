"""Scores of chosen cells taken apart: why a head attends from here to there.

    score = sum over pairs P_ij,            P_ij = scale < Q_i, K_j >
    score - mean score = sum over pairs P_ij - scale < Q_i, mean key_j >

The mean is over the keys of the row, weighted by the pattern: the second sum is the
competition, what makes this key win against the others (maths 22.22 to 22.25). Both
are certified against the live model's own scores, cell by cell.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cached_property

import jax
import numpy as np
from jax import Array

from jaxclt.attending.cells import Cell
from jaxclt.attending.clean import Clean
from jaxclt.attending.factors import Factors, Side
from jaxclt.attending.pairs import strongest_pairs
from jaxclt.lm.layers import attention_scores, pattern_of

__all__ = ["Apart", "take_apart"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Apart:
    """One cell's score by what every node brings to it.

    The axis N is here the graph's columns, then `BIAS` and `REST`, see
    `jaxclt.attending.factors`.
    """

    cell: Cell
    scale: float  # what products are multiplied by
    score_S: np.ndarray  # the live model's, of all keys up to the query's own
    pattern_S: np.ndarray  # what the head makes of them
    query_NC: np.ndarray
    key_NC: np.ndarray
    mean_key_NC: np.ndarray  # of all keys, weighted by the pattern

    @property
    def score(self) -> float:
        """Of the live model."""
        return float(self.score_S[self.cell.key])

    @property
    def mean_score(self) -> float:
        """Of the row, weighted by the pattern."""
        return float(self.score_S @ self.pattern_S)

    @cached_property
    def against_NC(self) -> np.ndarray:  # noqa: N802  axes, as in the fields
        """Keys less the mean key."""
        return self.key_NC - self.mean_key_NC

    @cached_property
    def query_N(self) -> np.ndarray:  # noqa: N802
        """What pairs sum to for every node on the query's side."""
        return self._sums(self.query_NC, self.key_NC)

    @cached_property
    def key_N(self) -> np.ndarray:  # noqa: N802
        """The same for every node on the key's side."""
        return self._sums(self.key_NC, self.query_NC)

    @property
    def relative_error(self) -> float:
        """Of the sum of all pairs, against the score of the live model.

        Relative to the product of the query's length and the key's: what a score could
        be.
        """
        return self._error(self.key_NC, self.score)

    @property
    def competition_error(self) -> float:
        """The same of all pairs less those with the mean key."""
        return self._error(self.against_NC, self.score - self.mean_score)

    def pairs(self, n: int) -> list[tuple[int, int, float, float]]:
        """The strongest pairs against the mean key: nodes, pair, competition."""
        found = strongest_pairs(self.query_NC, self.against_NC, n)[:2]
        i, j = found
        query_nC = self.query_NC[i].astype(np.float64) * self.scale
        pair_n, against_n = (
            np.einsum("nC,nC->n", query_nC, x_NC[j])
            for x_NC in (self.key_NC, self.against_NC)
        )
        return list(zip(*(x.tolist() for x in (i, j, pair_n, against_n)), strict=True))

    def _sums(self, x_NC: np.ndarray, other_NC: np.ndarray) -> np.ndarray:
        return self.scale * (x_NC @ other_NC.sum(0, np.float64))

    def _error(self, key_NC: np.ndarray, want: float) -> float:
        size = np.linalg.norm(self.query_NC.sum(0, np.float64)) * max(
            np.linalg.norm(x_NC.sum(0, np.float64))
            for x_NC in (self.key_NC, self.mean_key_NC)
        )
        off = self._sums(self.query_NC, key_NC).sum() - want
        return float(abs(off) / max(self.scale * size, np.finfo(np.float64).tiny))


def take_apart(factors: Factors, cells: Sequence[Cell]) -> Iterator[tuple[int, Apart]]:
    """Take the scores of cells apart, layer by layer.

    Args:
      factors: of the graph's prompt.
      cells: which; those of one layer share what they have in common.

    Yields:
      The place of a cell among those given, and its parts.
    """
    for layer in sorted({cell.layer for cell in cells}):
        mine = [i for i, cell in enumerate(cells) if cell.layer == layer]
        for first in range(0, len(mine), _CELLS):
            yield from _of_layer(factors, layer, mine[first : first + _CELLS], cells)


_CELLS = 4  # of a layer, whose factors are held together


def _of_layer(
    factors: Factors, layer: int, mine: list[int], cells: Sequence[Cell]
) -> Iterator[tuple[int, Apart]]:
    clean, cfg = factors.clean, factors.clean.cfg
    rows, sides = {}, {}
    names = {i: _names(cells[i], cfg.n_queries_per_kv) for i in mine}
    for i in mine:
        cell, (query, key, mean) = cells[i], names[i]
        if mean not in rows:
            found = _row(clean, layer, cell.head, cell.query)
            rows[mean] = [np.asarray(x)[: cell.query + 1] for x in found]
        sides[query] = Side(True, cell.head, _only(cell.query))
        sides[key] = Side(False, key[1], _only(cell.key))
        sides[mean] = Side(False, key[1], rows[mean][1])
    found = dict(zip(sides, factors.of(layer, list(sides.values())), strict=True))
    for i in mine:
        query, key, mean = names[i]
        score_S, pattern_S = rows[mean]
        yield (
            i,
            Apart(
                cell=cells[i],
                scale=cfg.score_scale,
                score_S=score_S,
                pattern_S=pattern_S,
                query_NC=found[query],
                key_NC=found[key],
                mean_key_NC=found[mean],
            ),
        )


_Name = tuple[str, int, int]  # what, head, position


def _names(cell: Cell, n_queries_per_kv: int) -> tuple[_Name, _Name, _Name]:
    """What tells a cell's query, key and mean key apart: heads and cells share them."""
    return (
        ("query", cell.head, cell.query),
        ("key", cell.head // n_queries_per_kv, cell.key),
        ("mean", cell.head, cell.query),
    )


def _only(pos: int) -> np.ndarray:
    return np.r_[np.zeros(pos), 1]


@jax.jit
def _row(clean: Clean, layer: Array, head: Array, query: Array) -> tuple[Array, Array]:
    """Scores and pattern [S] of one query, by the live model."""
    here = clean.layer(layer)
    query_THC, key_SGC = here.live_heads()
    score_HS = attention_scores(query_THC[query][None], key_SGC, cfg=clean.cfg)
    pattern_HTS = pattern_of(here.p, score_HS, cfg=clean.cfg, start=query)
    return score_HS[head, 0], pattern_HTS[head, 0]
