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

from jaxclt.attending.asked import Asked, ask
from jaxclt.attending.brought import Nodes, Vector
from jaxclt.attending.cells import Cell
from jaxclt.attending.pairs import strongest_pairs
from jaxclt.attending.sides import Side, Sides, packed
from jaxclt.shapes import bucket

__all__ = ["LONGEST", "Apart", "Pair", "take_apart", "take_one_apart"]


class Pair(NamedTuple):
    """A node of the query's side and one of the key's; or two positions."""

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

    asked: Asked
    query_N: np.ndarray  # what pairs sum to for every node on the query's side
    key_N: np.ndarray  # and on the key's
    query_against_N: np.ndarray  # the same of competition
    key_against_N: np.ndarray
    node_U: np.ndarray  # whose channels follow
    query_UC: np.ndarray
    key_UC: np.ndarray
    mean_key_UC: np.ndarray
    place_3PC: np.ndarray  # of all that is written at each position, then of constants

    @property
    def cell(self) -> Cell:
        """Which cell."""
        return self.asked.cell

    @property
    def score(self) -> float:
        """Of the live model."""
        return self.asked.score

    @property
    def relative_error(self) -> float:
        """Of the sum of all pairs, against the score of the live model."""
        return self._error(self.score, self.query_N, self.key_N)

    @property
    def competition_error(self) -> float:
        """Of the sum of all pairs' competition."""
        return self._error(self.asked.beyond, self.query_against_N, self.key_against_N)

    def _error(self, want: float, *sides: np.ndarray) -> float:
        off = max(abs(float(x_N.sum()) - want) for x_N in sides)
        return off / max(self.asked.size, float(np.finfo(np.float64).tiny))

    def pairs(self, n: int) -> list[Pair]:
        """Those of the largest competition, largest first."""
        sides = self.query_UC, self.key_UC, self.mean_key_UC
        return _pairs(self.asked.scale, sides, self.node_U, n)

    def places(self, n: int) -> list[Pair]:
        """The same by the positions of nodes, each with all that is written there.

        What is constant has the number T; nothing of prompts that are too long.
        """
        every_P = np.arange(self.place_3PC.shape[1])
        return _pairs(self.asked.scale, [*self.place_3PC], every_P, n)


def _pairs(
    scale: float, sides: Sequence[np.ndarray], number_U: np.ndarray, n: int
) -> list[Pair]:
    """The n strongest pairs of some nodes, from the channels that they bring."""
    query_UC, key_UC, mean_UC = sides
    i, j = strongest_pairs(query_UC, key_UC - mean_UC, n)

    def products(x_UC: np.ndarray) -> np.ndarray:
        return scale * np.einsum("nC,nC->n", query_UC[i], x_UC[j])

    score_n, mean_n = products(key_UC), products(mean_UC)
    found = number_U[i], number_U[j], score_n, score_n - mean_n
    return [Pair(*row) for row in zip(*(x.tolist() for x in found), strict=True)]


def take_one_apart(nodes: Nodes, cell: Cell) -> Apart:
    """Take one cell apart, with the channels of all nodes."""
    asked, every_C = ask(nodes, cell), np.eye(nodes.clean.cfg.d_head)
    vectors = [Vector(cell.layer, side, z_C) for side in asked.sides for z_C in every_C]
    brought_XN = nodes.pulled(vectors).astype(np.float64)
    three_3NC = brought_XN.reshape(3, len(every_C), -1).swapaxes(1, 2)
    query_NC, key_NC, mean_NC = three_3NC
    query_C, key_C, mean_C = three_3NC.sum(1)
    sums = query_NC @ key_C, key_NC @ query_C
    against = query_NC @ (key_C - mean_C), (key_NC - mean_NC) @ query_C
    sum_4N = asked.scale * np.stack([*sums, *against])
    ((_, place_3PC),) = _channels(nodes, [asked], np.zeros(0, int))
    node_U = np.arange(sum_4N.shape[1])
    return _apart(asked, sum_4N, node_U, three_3NC, place_3PC)


def take_apart(nodes: Nodes, cells: Sequence[Cell]) -> list[Apart]:
    """Take cells apart, with the channels of the nodes that bring most to them."""
    if not cells:
        return []
    asked = [ask(nodes, cell) for cell in cells]
    vectors = [vector for one in asked for vector in _sums(one)]
    found = np.split(nodes.pulled(vectors).astype(np.float64), len(cells))
    chosen = [_chosen(one, sum_XN) for one, sum_XN in zip(asked, found, strict=True)]
    column_U, N = np.unique(np.concatenate(chosen)), nodes.columns.layout.n_columns
    column_U = column_U[column_U < N]
    node_U = np.r_[column_U, N, N + 1]
    parts = zip(asked, found, _channels(nodes, asked, column_U), strict=True)
    return [_apart(one, sum_XN[:4], node_U, *x) for one, sum_XN, x in parts]


def _apart(
    asked: Asked,
    sum_4N: np.ndarray,
    node_U: np.ndarray,
    channel_3UC: np.ndarray,
    place_3PC: np.ndarray,
) -> Apart:
    names = "query_N", "key_N", "query_against_N", "key_against_N"
    sums = dict(zip(names, sum_4N, strict=True))
    names = "query_UC", "key_UC", "mean_key_UC"
    channels = zip(names, channel_3UC.astype(np.float64), strict=True)
    place_3PC = place_3PC.astype(np.float64)
    return Apart(
        asked=asked, node_U=node_U, place_3PC=place_3PC, **sums, **dict(channels)
    )


LONGEST = 64  # tokens of a prompt of which every position is looked at
_SKETCHES = 4  # random sums of a side's channels
_CHOSEN = 40  # nodes of a side of a cell


def _sums(asked: Asked) -> list[Vector]:
    """What is pulled of a cell: the four sums of `Apart`, then sketches."""
    query, key, _ = asked.sides
    query_C, key_C, mean_C = asked.scale * asked.whole_3C
    shape = _SKETCHES, len(query_C)
    random = np.asarray(jax.random.rademacher(jax.random.key(0), shape))
    wanted = [
        (query, key_C),
        (key, query_C),
        (query, key_C - mean_C),
        (asked.against, query_C),
        *((side, z_C) for side in (query, asked.against) for z_C in random),
    ]
    return [Vector(asked.cell.layer, side, mix_C) for side, mix_C in wanted]


def _chosen(asked: Asked, sum_XN: np.ndarray) -> np.ndarray:
    """Nodes whose channels are worth knowing.

    A random sum of channels is on average as large as they are long.
    """
    sum_22N, sketch_2ZN = np.split(np.abs(sum_XN), [4])
    length_2N = np.sqrt((sketch_2ZN.reshape(2, _SKETCHES, -1) ** 2).mean(1))
    query_C, key_C, mean_C = asked.scale * asked.whole_3C
    other_2 = np.linalg.norm([key_C - mean_C, query_C], axis=1)
    sum_2N = sum_22N.reshape(2, 2, -1).max(0)
    most_2N = np.maximum(length_2N * other_2[:, None], sum_2N)
    return np.argsort(-most_2N, axis=1, kind="stable")[:, :_CHOSEN].ravel()


def _channels(
    nodes: Nodes, asked: Sequence[Asked], column_U: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """What is brought to the channels of the sides of every cell.

    By some columns, biases and the rest, [3, U + 2, C]; by positions and biases, which
    are none where the prompt is long, [3, P, C].
    """
    mine: dict[int, list[Side]] = {one.cell.layer: [] for one in asked}
    places = []
    for one in asked:
        layer = one.cell.layer
        places.append((list(mine).index(layer), len(mine[layer])))
        mine[layer] += one.sides
    # Sizes are bucketed so that prompts share their program.
    S, Y = bucket(max(map(len, mine.values()))), bucket(len(mine), 4)
    layer_Y = np.array([*mine, *([next(iter(mine))] * (Y - len(mine)))], np.int32)
    each = [*mine.values(), *([[]] * (Y - len(mine)))]
    alike = [packed(x, S, nodes.n_positions, nodes.dtype) for x in each]
    side_YS = Sides(*map(np.stack, zip(*alike, strict=True)))
    n_tokens = nodes.columns.p.n_tokens
    n_places = n_tokens if n_tokens <= LONGEST else 0
    every_YSUC, place_YSPC = nodes.pushed(column_U, layer_Y, side_YS, n_places)
    if n_places:
        bias_YS1C = every_YSUC[:, :, -2:-1]
        place_YSPC = np.concatenate([place_YSPC, bias_YS1C], axis=2)
    both = every_YSUC, place_YSPC
    return [tuple(x[y, s : s + 3] for x in both) for y, s in places]  # pyright: ignore
