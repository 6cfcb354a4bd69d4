"""Scores of cells taken apart: why a head attends from here to there.

    score = sum over pairs of P_ij,               P_ij = scale < Q_i, K_j >
    score - mean score = sum of C_ij,             C_ij = P_ij - scale < Q_i, mean K_j >

over all nodes i of the query's side and j of the key's (maths 22.22, 22.24). The mean
is over the keys of the row, weighted by the pattern: the second sum is the competition,
what makes this key win against the others. What pairs sum to for one node is exact for
all of them. Both sums are certified against the live model's own scores, cell by cell.

Pairs themselves take a side's channels apart: of one cell for all nodes, pulled
(`take_one_apart`); of many cells for chosen nodes, pushed once for all cells
(`take_apart`). Chosen are those that bring most to a score, to a competition, or, as
far as a few random sums of channels can say, to a side at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax import Array

from jaxclt.attending.brought import Nodes, Vector
from jaxclt.attending.cells import Cell
from jaxclt.attending.clean import Clean
from jaxclt.attending.pairs import strongest_pairs
from jaxclt.attending.sides import Side, Sides, channels, packed
from jaxclt.lm.layers import attention_scores, pattern_of
from jaxclt.shapes import bucket

__all__ = ["Apart", "Pair", "take_apart", "take_one_apart"]


class Pair(NamedTuple):
    """A node of the query's side and one of the key's."""

    query: int
    key: int
    score: float  # its part of the score
    competition: float  # its part of the score less the mean score


@dataclasses.dataclass(frozen=True, kw_only=True)
class Apart:
    """One cell's score by what every node brings to it.

    The axis N is here the graph's columns, then `BIAS` and `REST`, see
    `jaxclt.attending.brought`; U are some of them.
    """

    cell: Cell
    scale: float  # what products of channels are multiplied by
    score_S: np.ndarray  # the live model's, of all keys up to the query's own
    pattern_S: np.ndarray  # what the head makes of them
    size: float  # the largest score that vectors as long as its two sides can have
    query_N: np.ndarray  # what pairs sum to for every node on the query's side
    key_N: np.ndarray  # and on the key's
    query_against_N: np.ndarray  # the same of competition
    key_against_N: np.ndarray
    node_U: np.ndarray  # whose channels follow
    query_UC: np.ndarray
    key_UC: np.ndarray
    mean_key_UC: np.ndarray

    @property
    def score(self) -> float:
        """Of the live model."""
        return float(self.score_S[self.cell.key])

    @property
    def weight(self) -> float:
        """A(q, k)."""
        return float(self.pattern_S[self.cell.key])

    @property
    def against(self) -> float:
        """The score less the mean score of the row."""
        return self.score - float(self.score_S @ self.pattern_S)

    @property
    def relative_error(self) -> float:
        """Of the sum of all pairs, against the score of the live model."""
        return self._error(self.score, self.query_N, self.key_N)

    @property
    def competition_error(self) -> float:
        """Of the sum of all pairs' competition."""
        return self._error(self.against, self.query_against_N, self.key_against_N)

    def _error(self, want: float, *sides: np.ndarray) -> float:
        off = max(abs(float(x_N.sum(dtype=np.float64)) - want) for x_N in sides)
        return off / max(self.size, float(np.finfo(np.float64).tiny))

    def pairs(self, n: int) -> list[Pair]:
        """Those of the largest competition, largest first."""
        query_UC, key_UC, mean_UC = (
            x.astype(np.float64) for x in (self.query_UC, self.key_UC, self.mean_key_UC)
        )
        i, j = strongest_pairs(query_UC, key_UC - mean_UC, n)
        score_n, mean_n = (
            self.scale * np.einsum("nC,nC->n", query_UC[i], x_UC[j])
            for x_UC in (key_UC, mean_UC)
        )
        found = self.node_U[i], self.node_U[j], score_n, score_n - mean_n
        return [Pair(*row) for row in zip(*(x.tolist() for x in found), strict=True)]


class _Row(NamedTuple):
    """A query with its keys, as the live model has them."""

    score_S: np.ndarray
    pattern_S: np.ndarray


class _Sides(NamedTuple):
    """A cell's query, its key, and the mean of its row's keys."""

    query: Side
    key: Side
    mean: Side

    @property
    def against(self) -> Side:
        """The key less the mean key."""
        weight_T = -self.mean.weight_T
        weight_T[len(self.key.weight_T) - 1] += 1
        return self.key._replace(weight_T=weight_T)


def _sides(nodes: Nodes, cell: Cell) -> tuple[_Row, _Sides]:
    clean, seen = nodes.clean, cell.query + 1
    found = _row(clean, cell.layer, cell.head, cell.query)
    row = _Row(*(np.asarray(x)[:seen].astype(np.float64) for x in found))
    group = cell.head // clean.cfg.n_queries_per_kv
    key = Side(False, group, _only(cell.key))
    mean = Side(False, group, row.pattern_S)
    return row, _Sides(Side(True, cell.head, _only(cell.query)), key, mean)


def _only(pos: int) -> np.ndarray:
    return np.r_[np.zeros(pos), 1.0]


@jax.jit
def _row(clean: Clean, layer: Array, head: Array, query: Array) -> tuple[Array, Array]:
    """Scores and pattern [S] of one query, by the live model."""
    here = clean.layer(layer)
    query_THC, key_SGC = here.live_heads()
    score_HTS = attention_scores(query_THC[query][None], key_SGC, cfg=clean.cfg)
    pattern_HTS = pattern_of(here.p, score_HTS, cfg=clean.cfg, start=query)
    return score_HTS[head, 0], pattern_HTS[head, 0]


@jax.jit
def _clean_channels(clean: Clean, layer: Array, sides: Sides) -> Array:
    here = clean.layer(layer)
    return channels(here, sides, here.resid_TD)


def _whole(nodes: Nodes, layer: int, sides: _Sides) -> np.ndarray:
    """Channels [3, C] of a cell's sides in the clean run."""
    three = packed(sides, 3, nodes.n_positions, nodes.dtype)
    with jax.default_matmul_precision("highest"):
        found = _clean_channels(nodes.clean, layer, three)
    return np.asarray(found).astype(np.float64)


def take_one_apart(nodes: Nodes, cell: Cell) -> Apart:
    """Take one cell apart, with the channels of all nodes."""
    row, sides = _sides(nodes, cell)
    every_C = np.eye(nodes.clean.cfg.d_head)
    vectors = [Vector(cell.layer, side, mix_C) for side in sides for mix_C in every_C]
    brought_XN = nodes.pulled(vectors)
    parts = brought_XN.reshape(3, len(every_C), -1).swapaxes(1, 2)
    query_NC, key_NC, mean_NC = parts.astype(np.float64)
    query_C, key_C, mean_C = (x_NC.sum(0) for x_NC in (query_NC, key_NC, mean_NC))
    scale = nodes.clean.cfg.score_scale
    return Apart(
        cell=cell,
        scale=scale,
        score_S=row.score_S,
        pattern_S=row.pattern_S,
        size=_size(scale, query_C, key_C, mean_C),
        query_N=scale * query_NC @ key_C,
        key_N=scale * key_NC @ query_C,
        query_against_N=scale * query_NC @ (key_C - mean_C),
        key_against_N=scale * (key_NC - mean_NC) @ query_C,
        node_U=np.arange(brought_XN.shape[1]),
        query_UC=query_NC,
        key_UC=key_NC,
        mean_key_UC=mean_NC,
    )


def _size(scale: float, query_C: np.ndarray, *keys: np.ndarray) -> float:
    return scale * float(
        np.linalg.norm(query_C) * max(np.linalg.norm(key_C) for key_C in keys)
    )


def take_apart(nodes: Nodes, cells: Sequence[Cell]) -> list[Apart]:
    """Take cells apart, with the channels of the nodes that bring most to them."""
    if not cells:
        return []
    found = [_sides(nodes, cell) for cell in cells]
    summed = [
        _Sums(nodes, cell, sides) for cell, (_, sides) in zip(cells, found, strict=True)
    ]
    vectors = [vector for sums in summed for vector in sums.vectors()]
    parts = np.split(nodes.pulled(vectors).astype(np.float64), len(cells))
    chosen = [sums.chosen(part) for sums, part in zip(summed, parts, strict=True)]
    column_U = np.unique(np.concatenate(chosen))
    N = nodes.columns.layout.n_columns
    node_U = np.r_[column_U[column_U < N], N, N + 1]
    channels = _channels(nodes, cells, [sides for _, sides in found], node_U[:-2])
    return [
        Apart(
            cell=cell,
            scale=nodes.clean.cfg.score_scale,
            score_S=row.score_S,
            pattern_S=row.pattern_S,
            size=sums.size,
            query_N=part[0],
            query_against_N=part[1],
            key_N=part[2],
            key_against_N=part[3],
            node_U=node_U,
            query_UC=three[0],
            key_UC=three[1],
            mean_key_UC=three[2],
        )
        for cell, (row, _), sums, part, three in zip(
            cells, found, summed, parts, channels, strict=True
        )
    ]


_SKETCHES = 4  # random sums of a side's channels
_CHOSEN = 40  # nodes of a side of a cell


class _Sums:
    """What is pulled of a cell: four exact sums for every node, and sketches."""

    def __init__(self, nodes: Nodes, cell: Cell, sides: _Sides) -> None:
        self.layer, self.sides = cell.layer, sides
        scale = nodes.clean.cfg.score_scale
        whole = _whole(nodes, cell.layer, sides)
        self.size = _size(scale, *whole)
        query_C, key_C, mean_C = whole
        self.query_C, self.key_C = scale * query_C, scale * key_C
        self.against_C = scale * (key_C - mean_C)
        key = jax.random.key(0)
        self.sketch_ZC = np.asarray(jax.random.rademacher(key, (_SKETCHES, len(key_C))))

    def vectors(self) -> list[Vector]:
        """What is pulled, sketches last."""
        query, key, against = self.sides.query, self.sides.key, self.sides.against
        asked = [(query, self.key_C), (query, self.against_C)]
        asked += [(key, self.query_C), (against, self.query_C)]
        asked += [(side, z_C) for side in (query, against) for z_C in self.sketch_ZC]
        return [Vector(self.layer, side, mix_C) for side, mix_C in asked]

    def chosen(self, part_XN: np.ndarray) -> np.ndarray:
        """Nodes whose channels are worth knowing.

        A random sum of channels is on average as large as they are long.
        """
        size_XN = np.abs(part_XN)
        sketch_2ZN = size_XN[4:].reshape(2, _SKETCHES, -1)
        length_2N = np.sqrt((sketch_2ZN**2).mean(1))
        other_2 = np.linalg.norm([self.against_C, self.query_C], axis=1)
        most_2N = np.maximum(
            length_2N * other_2[:, None], size_XN[:4].reshape(2, 2, -1).max(1)
        )
        return np.argsort(-most_2N, axis=1, kind="stable")[:, :_CHOSEN].ravel()


def _channels(
    nodes: Nodes, cells: Sequence[Cell], sides: list[_Sides], column_U: np.ndarray
) -> list[np.ndarray]:
    """Channels [3, U + 2, C] that nodes bring to the sides of every cell."""
    layers = sorted({cell.layer for cell in cells})
    mine: dict[int, list[Side]] = {layer: [] for layer in layers}
    places = []
    for cell, three in zip(cells, sides, strict=True):
        places.append((layers.index(cell.layer), len(mine[cell.layer])))
        mine[cell.layer] += three
    # Sizes are bucketed so that prompts share their program.
    S, Y = bucket(max(map(len, mine.values()))), bucket(len(layers), 4)
    layer_Y = np.array(layers + layers[:1] * (Y - len(layers)), np.int32)
    each = [*mine.values(), *([[]] * (Y - len(layers)))]
    alike = [packed(x, S, nodes.n_positions, nodes.dtype) for x in each]
    side_YS = Sides(*map(np.stack, zip(*alike, strict=True)))
    every_YSUC = nodes.pushed(column_U, layer_Y, side_YS)
    return [every_YSUC[y, s : s + 3] for y, s in places]
