"""What every node brings to queries and keys: the factors of attention scores.

A query's C channels are linear in the stream that enters its layer, with the norms'
denominators held, but for biases; so they are read of the stream by C vectors, which go
down through the frozen layers as a graph's rows do and meet all that is written there.
A key's likewise. With `Q_NC` and `K_NC` what the columns of a graph bring to them,

    score(q, k) = sum over i, j of scale < Q_i, K_j >        (maths 22.22)

over columns and two more: `bias`, everything constant, and `rest`, features that were
active and are no nodes.

A side is read at one position, or at many with weights: the key that a query meets on
average is one side too (maths 22.24).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.attending.clean import Clean, Layer, make_clean
from jaxclt.clt.active import Active
from jaxclt.graph.graph import Graph
from jaxclt.graph.layout import Layout
from jaxclt.graph.plan import Plan
from jaxclt.graph.prompt import Recorded
from jaxclt.graph.provenance import node_mask
from jaxclt.graph.rows import Edges, Puller, Shared, make_puller, pipelined
from jaxclt.graph.stream import on_mesh
from jaxclt.graph.travel import descend
from jaxclt.lm.frozen import bias_streams
from jaxclt.replacement.errors import reconstruct

__all__ = ["BIAS", "REST", "Factors", "Side", "make_factors"]

BIAS, REST = -2, -1  # places after the columns of a graph


class Side(NamedTuple):
    """A query or a key of one head, at one position or averaged over some."""

    is_query: bool
    head: int  # of the queries, or of the keys
    weight_T: np.ndarray  # of the first positions, as many as there are


class _Vectors(NamedTuple):
    """Channels of sides that go down together."""

    is_query_X: Any
    head_X: Any
    channel_X: Any
    weight_XP: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Factors:
    """What factors are made from, on one device."""

    clean: Clean
    puller: Puller
    bias_LTD: Array
    rest_LTD: Array
    layout: Layout  # of the graph's columns
    place_A: np.ndarray  # of features among the edges

    def of(self, layer: int, sides: Sequence[Side]) -> list[np.ndarray]:
        """Factors [N + 2, C] of sides of one layer.

        Columns of the graph, then what biases and what other features bring.
        """
        C, X = self.clean.cfg.d_head, self.puller.plan.capacity
        asked = [(side, channel) for side in sides for channel in range(C)]
        dtype = self.puller.held.error_LTD.dtype
        out = np.zeros((self.layout.n_columns + 2, len(asked)), dtype)

        def start(first: int) -> _Found:
            vectors = self._vectors(asked[first : first + X])
            given = self.clean, self.puller.held, self.bias_LTD, self.rest_LTD
            with jax.default_matmul_precision("highest"):
                return _gather(*given, np.int32(layer), vectors)

        for first, found in pipelined(range(0, len(asked), X), start):
            self._fill(out[:, first : first + X], found)
        return [out[:, i : i + C] for i in range(0, len(asked), C)]

    def _vectors(self, part: list[tuple[Side, int]]) -> _Vectors:
        X, P = self.puller.plan.capacity, len(self.bias_LTD[0])
        dtype = self.puller.held.error_LTD.dtype
        weight_XP = np.zeros((X, P), dtype)
        numbers = np.zeros((3, X), np.int32)
        for x, (side, channel) in enumerate(part):
            weight_XP[x, : len(side.weight_T)] = side.weight_T
            numbers[:, x] = side.is_query, side.head, channel
        return _Vectors(*numbers, weight_XP)

    def _fill(self, out_NX: np.ndarray, found: _Found) -> None:
        """Put what was found into its columns, then bias and rest."""
        edges, nodes, T = found.edges, self.layout.nodes, self.layout.n_tokens
        X = len(found.bias_X)
        parts = (
            (
                nodes["feature"],
                np.asarray(edges.edge_ZPWX).reshape(-1, X)[self.place_A],
            ),
            (nodes["error"], np.asarray(edges.error_LPX)[:, :T].reshape(-1, X)),
            (nodes["embed"], np.asarray(edges.embed_PX)[:T]),
            (BIAS, np.asarray(found.bias_X)),
            (REST, np.asarray(found.rest_X)),
        )
        for place, part in parts:
            out_NX[place] = part[..., : out_NX.shape[1]]


class _Found(NamedTuple):
    edges: Edges
    bias_X: Array
    rest_X: Array


@jax.jit
def _gather(
    clean: Clean,
    held: Shared,
    bias_LTD: Array,
    rest_LTD: Array,
    layer: Array,
    vectors: _Vectors,
) -> _Found:
    """What all columns bring to channels of one layer's queries and keys."""
    g_PXD, bias_X = _read(clean.layer(layer), vectors, bias_LTD[layer])
    P, X, _ = g_PXD.shape

    def visit(layer: Array, g_PXD: Array, state: Any) -> Any:
        dots, rest_X = state
        rest_X = rest_X + jnp.einsum("PXD,PD->X", g_PXD, rest_LTD[layer])
        return held.add_dots(layer, g_PXD, dots), rest_X

    none = held.no_dots(P, X), jnp.zeros_like(bias_X)
    g_PXD, (dots, rest_X) = descend(
        held.way, g_PXD, layer - 1, lambda g_PXD, layer: g_PXD, visit, none
    )
    return _Found(held.edges(g_PXD, dots), bias_X, rest_X)


def _read(here: Layer, vectors: _Vectors, bias_TD: Array) -> tuple[Array, Array]:
    """What channels read of the stream [P, X, D], and what is constant of them [X]."""
    heads, back = jax.vjp(here.heads, here.resid_TD)
    zero = here.heads(jnp.zeros_like(here.resid_TD))
    query_THC, key_TGC = heads

    def one(is_query: Array, head: Array, channel: Array, weight_P: Array) -> Any:
        def asked(x_THC: Array, mine: Array) -> Array:
            at_HC = jnp.zeros(x_THC.shape[1:], x_THC.dtype).at[head, channel].set(1)
            weight = weight_P * mine.astype(weight_P.dtype)
            return weight[:, None, None] * at_HC[None]

        asked_of = asked(query_THC, is_query), asked(key_TGC, 1 - is_query)
        (read_PD,) = back(asked_of)
        constant = sum(jnp.vdot(a, b) for a, b in zip(asked_of, zero, strict=True))
        return read_PD, constant + jnp.vdot(read_PD, bias_TD)

    return jax.vmap(one, out_axes=(1, 0))(*vectors)


def make_factors(
    p: Recorded, graph: Graph, *, at_once: int = 128, packed: bool = True
) -> Factors:
    """Put what the factors of a graph's prompt are made from on one device.

    Args:
      p: the prompt with all features that are active on it.
      graph: whose columns are wanted.
      at_once: channels that go down together.
      packed: hold the source vectors written out, as for `make_puller`.
    """
    is_node_A, T = node_mask(graph, p.active), len(p.recording.token_T)
    nodes = dataclasses.replace(p, active=p.active.where(is_node_A))
    plan = Plan(band_end=(T,), capacities=(at_once,))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("rows",))
    puller = make_puller(nodes, plan=plan, mesh=mesh, packed=packed)
    frozen, bias_LD = p.recording.frozen, p.active.write_bias_LD
    every = jnp.broadcast_to(jnp.asarray(bias_LD)[:, None], p.recording.mid_LTD.shape)
    bias_LTD = _bias(p.params, frozen, every, cfg=p.cfg, skip=p.active.skip)
    rest_LTD = jnp.asarray(_rest(p.active.where(~is_node_A), T))
    clean, bias_LTD, rest_LTD = on_mesh((make_clean(p), bias_LTD, rest_LTD), mesh)
    return Factors(
        clean=clean,
        puller=puller,
        bias_LTD=bias_LTD,
        rest_LTD=rest_LTD,
        layout=graph.layout,
        place_A=puller.bank.place(np.arange(graph.n_features), 0, T),
    )


_bias = jax.jit(bias_streams, static_argnames="cfg")


def _rest(active: Active, n_positions: int) -> np.ndarray:
    """What features write, [L, T, D]."""
    L, D = active.write_bias_LD.shape
    zero_LTD = np.zeros((L, n_positions, D), active.value_A.dtype)
    alone = dataclasses.replace(active, write_bias_LD=zero_LTD[:, 0], skip_LDD=None)
    return reconstruct(alone, zero_LTD)
