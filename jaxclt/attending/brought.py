"""What nodes bring to sides of attention scores: pulled for all, pushed for some.

Pulled: what a weighted sum of a side's channels reads of the stream goes down through
the frozen layers, as a graph's rows do, and meets all that is written there. Pushed:
what chosen columns write goes up through them, and every side reads its channels of it.
Pulling takes a vector for every sum and answers for all nodes; pushing takes one for
every node and answers for all channels of all sides.

Besides its columns a graph has here two nodes more: `BIAS`, everything constant, and
`REST`, features that were active and are no nodes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.sharding import Mesh

from jaxclt.attending.clean import Clean, Layer, make_clean
from jaxclt.attending.sides import Side, Sides, channels, packed, read_vector
from jaxclt.clt.active import Active
from jaxclt.graph.columns import Columns
from jaxclt.graph.graph import Graph
from jaxclt.graph.plan import Chunk, Plan
from jaxclt.graph.prompt import Recorded
from jaxclt.graph.provenance import node_mask
from jaxclt.graph.rows import (
    Edges,
    Puller,
    Shared,
    make_puller,
    pipelined,
    write_rows,
)
from jaxclt.graph.stream import Stream, make_stream, on_mesh
from jaxclt.graph.travel import Frozen, Way, Writes, descend, push
from jaxclt.lm.config import LMConfig
from jaxclt.lm.frozen import bias_streams
from jaxclt.precision import jit
from jaxclt.replacement.errors import reconstruct
from jaxclt.shapes import bucket

__all__ = ["BIAS", "REST", "Nodes", "Vector", "make_nodes"]

BIAS, REST = -2, -1  # places after the columns of a graph


class Vector(NamedTuple):
    """A weighted sum of the channels of a side of a layer."""

    layer: int
    side: Side
    mix_C: np.ndarray


@struct.dataclass
class _Constant:
    """What enters every layer that no column writes, [L, T, D]."""

    bias_LTD: Array
    rest_LTD: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nodes:
    """The nodes of a prompt's graph, ready to be pulled to and pushed."""

    clean: Clean
    columns: Columns
    puller: Puller
    up: Stream
    constant: _Constant
    write_LTD: np.ndarray  # by columns and by features that are none
    at_once: int  # vectors that travel together

    @property
    def dtype(self) -> np.dtype:
        """Of all numbers."""
        return self.puller.held.error_LTD.dtype

    @property
    def n_positions(self) -> int:
        """P, padding included."""
        return len(self.puller.held.embed_TD)

    def pulled(self, vectors: Sequence[Vector]) -> np.ndarray:
        """What nodes bring to vectors, [X, N + 2]; they sum to the clean run's."""
        layout, P = self.columns.layout, self.n_positions
        out_XN = np.zeros((len(vectors), layout.n_columns + 2), self.dtype)
        # Those of one layer together: none passes layers above its own in vain.
        order = np.argsort([vector.layer for vector in vectors], kind="stable")
        X = min(self.at_once, bucket(len(vectors)))
        parts = [order[i : i + X] for i in range(0, len(order), X)]
        every_A = np.arange(self.puller.n_features)
        place_A = self.puller.bank.place(every_A, 0, P)

        def start(part: np.ndarray) -> _Pulled:
            given = _packed([vectors[x] for x in part], X, P, self.dtype)
            return _pull(self.clean, self.puller.held, self.constant, given)

        for part, found in pipelined(parts, start):
            n = len(part)
            edge_ZPWX, *others = (np.asarray(x)[..., :n] for x in found.edges)
            edges = [edge_ZPWX.reshape(-1, n), *others]
            write_rows(Chunk(part, P, X), edges, every_A, place_A, layout, out_XN)
            out_XN[part, BIAS] = np.asarray(found.bias_X)[:n]
            out_XN[part, REST] = np.asarray(found.rest_X)[:n]
        return out_XN

    def pushed(
        self, column_U: np.ndarray, layer_Y: np.ndarray, side_YS: Sides, n_places: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """What some sources bring to sides.

        Args:
          column_U: of the graph.
          layer_Y: some layers; where one is there twice, the first place counts.
          side_YS: as many sides of each.
          n_places: so many positions, of the first ones.

        Returns:
          By columns, then `BIAS` and `REST`, [Y, S, U + 2, C]; by all that is written
          at a position, [Y, S, n_places, C].
        """
        slot_L = np.full(self.clean.cfg.n_layers, -1, np.int32)
        slot_L[layer_Y[::-1]] = np.arange(len(layer_Y))[::-1]  # the first counts
        up, clean, end = self.up, self.clean, np.int32(layer_Y.max() + 1)
        U = len(column_U)
        X = min(self.at_once, bucket(U + n_places))

        def start(first: int) -> Array:
            writes = self._writes(column_U, n_places, first, X)
            return _push(up, clean, writes, side_YS, slot_L, end)

        found = pipelined(range(0, U + n_places, X), start)
        none = np.zeros((*side_YS.weight_SP.shape[:2], 0, self.clean.cfg.d_head))
        parts = [none.astype(self.dtype), *(np.asarray(part) for _, part in found)]
        every_YSBC = np.concatenate(parts, axis=2)
        last_YS2C = _constants(clean, self.constant, layer_Y, side_YS)
        columns = every_YSBC[:, :, :U], np.asarray(last_YS2C)
        return np.concatenate(columns, axis=2), every_YSBC[:, :, U : U + n_places]

    def _writes(
        self, column_U: np.ndarray, n_places: int, first: int, size: int
    ) -> Writes:
        """Sources of a chunk: columns, then positions with all that they write."""
        some = column_U[first : first + size]
        writes = self.columns.writes(some, size, 0)
        after = first + len(some) - len(column_U)
        pos = np.arange(max(after, 0), n_places)[: size - len(some)]
        if not len(pos):
            return writes
        here = slice(len(some), len(some) + len(pos))
        writes.write_MBD[0, here] = np.asarray(self.puller.held.embed_TD)[pos]
        writes.write_MBD[1:, here] = self.write_LTD[:, pos]
        writes.pos_B[here] = pos
        return writes._replace(first=np.int32(0))


class _Vectors(NamedTuple):
    layer_X: Any
    sides: Sides
    mix_XC: Any


def _packed(
    vectors: list[Vector], size: int, n_positions: int, dtype: np.dtype
) -> _Vectors:
    layer_X = np.zeros(size, np.int32)
    layer_X[: len(vectors)] = [vector.layer for vector in vectors]
    mix_XC = np.zeros((size, len(vectors[0].mix_C)), dtype)
    mix_XC[: len(vectors)] = [vector.mix_C for vector in vectors]
    sides = packed([vector.side for vector in vectors], size, n_positions, dtype)
    return _Vectors(layer_X, sides, mix_XC)


class _Pulled(NamedTuple):
    edges: Edges
    bias_X: Array
    rest_X: Array


@struct.dataclass
class _Entering(Way):
    """A way down on which vectors set out where they read the stream enter a layer."""

    way: Way
    read_PXD: Array
    layer_X: Array

    @property
    def cfg(self) -> LMConfig:
        """Model shape."""
        return self.way.cfg

    def below(
        self, layer: Array, g_PXD: Array, add_reads: Callable[[Array], Array]
    ) -> Array:
        """See `jaxclt.graph.travel.Way`."""
        here_X11 = (self.layer_X == layer)[None, :, None]
        below_PXD = self.way.below(layer, g_PXD, add_reads)
        return below_PXD + jnp.where(here_X11, self.read_PXD, 0)


@jit
def _pull(
    clean: Clean, held: Shared, constant: _Constant, vectors: _Vectors
) -> _Pulled:
    """All nodes' shares in some vectors."""

    def read(vector: _Vectors) -> tuple[Array, Array, Array]:
        layer, side, mix_C = vector
        here = clean.layer(layer)
        read_PD = read_vector(here, side, mix_C)
        alone = Sides(*(leaf[None] for leaf in side))
        bias_1C = channels(here, alone, constant.bias_LTD[layer])
        rest = jnp.vdot(read_PD, constant.rest_LTD[layer])
        return read_PD, jnp.vdot(bias_1C[0], mix_C), rest

    read_XPD, bias_X, rest_X = jax.lax.map(read, vectors)
    read_PXD = read_XPD.swapaxes(0, 1)
    way = _Entering(held.way, read_PXD, vectors.layer_X)
    g_PXD, dots = descend(
        way,
        jnp.zeros_like(read_PXD),
        jnp.max(vectors.layer_X),
        lambda g_PXD, layer: g_PXD,
        held.add_dots,
        held.no_dots(*read_PXD.shape[:2]),
    )
    return _Pulled(held.edges(g_PXD, dots), bias_X, rest_X)


@jit
def _push(
    up: Stream,
    clean: Clean,
    writes: Writes,
    side_YS: Sides,
    slot_L: Array,
    end: Array,
) -> Array:
    """Channels [Y, S, B, C] of sides, of what columns bring to their layers."""
    Y, S, P = side_YS.weight_SP.shape
    B, C = writes.pos_B.shape[0], clean.cfg.d_head
    out_YSBC = jnp.zeros((Y, S, B, C), up.value.dtype)

    def visit(layer: Array, x_PBD: Array, _: Array, __: Array, out: Array) -> Array:
        slot = slot_L[layer]

        def asked() -> Array:
            here, sides = clean.layer(layer), Sides(*(leaf[slot] for leaf in side_YS))
            found_SBC = _linear(here, sides, x_PBD)
            return out.at[slot].set(found_SBC)

        return jax.lax.cond(slot >= 0, asked, lambda: out)

    return push(up, writes, visit, out_YSBC, n_positions=P, end=end)[1]


def _linear(here: Layer, sides: Sides, x_PBD: Array) -> Array:
    """Channels [S, B, C] of streams that are parts of the whole, without biases."""
    zero_SC = channels(here, sides, jnp.zeros_like(x_PBD[:, 0]))
    each = jax.vmap(lambda x_PD: channels(here, sides, x_PD), in_axes=1, out_axes=1)
    return each(x_PBD) - zero_SC[:, None]


@jit
def _constants(
    clean: Clean, constant: _Constant, layer_Y: Array, side_YS: Sides
) -> Array:
    """Channels [Y, S, 2, C] of what is constant, and of features that are no nodes."""

    def of_layer(given: tuple[Array, Sides]) -> Array:
        layer, sides = given
        here = clean.layer(layer)
        bias_SC = channels(here, sides, constant.bias_LTD[layer])
        rest_S1C = _linear(here, sides, constant.rest_LTD[layer][:, None])
        return jnp.concatenate([bias_SC[:, None], rest_S1C], axis=1)

    return jax.lax.map(of_layer, (layer_Y, side_YS))


def make_nodes(
    p: Recorded, graph: Graph, *, at_once: int = 128, packed: bool = True
) -> Nodes:
    """Put what nodes bring on one device.

    Args:
      p: the graph's prompt with all features that are active on it.
      graph: whose columns are nodes.
      at_once: vectors that travel together.
      packed: hold the source vectors written out, as for `make_puller`.
    """
    is_node_A, T = node_mask(graph, p.active), len(p.recording.token_T)
    nodes = dataclasses.replace(p, active=p.active.where(is_node_A))
    plan = Plan(band_end=(T,), capacities=(at_once,))
    mesh = Mesh(np.array(jax.devices()[:1]), ("rows",))
    down = make_stream(p, pull=True)
    up = make_stream(p, pull=False, other=down)
    rest_LTD = _written(p.active.where(~is_node_A), T)
    here = make_clean(p), up, _constant(p, rest_LTD)
    clean, up, constant = on_mesh(here, mesh)
    puller = make_puller(nodes, plan=plan, mesh=mesh, packed=packed, way=Frozen(down))
    return Nodes(
        clean=clean,
        columns=Columns(nodes),
        puller=puller,
        up=up,
        constant=constant,
        write_LTD=_written(nodes.active, T) + rest_LTD + p.error_LTD,
        at_once=at_once,
    )


def _written(active: Active, n_positions: int) -> np.ndarray:
    """What features write, [L, T, D]."""
    L, D = active.write_bias_LD.shape
    zero_LTD = np.zeros((L, n_positions, D), active.value_A.dtype)
    alone = dataclasses.replace(active, write_bias_LD=zero_LTD[:, 0], skip_LDD=None)
    return reconstruct(alone, zero_LTD)


def _constant(p: Recorded, rest_LTD: np.ndarray) -> _Constant:
    """What enters every layer of all biases, and of some writes."""
    bias_L1D = p.active.write_bias_LD[:, None]

    def streams(write_LTD: np.ndarray) -> Array:
        frozen, skip = p.recording.frozen, p.active.skip
        return _streams(p.params, frozen, write_LTD, cfg=p.cfg, skip=skip)

    bias_LTD = streams(np.broadcast_to(bias_L1D, rest_LTD.shape))
    return _Constant(bias_LTD, streams(bias_L1D + rest_LTD) - bias_LTD)


_streams = jit(bias_streams, static_argnames="cfg")
