"""Which heads matter to a graph's targets: the total effect of every cell.

A cell is a query position that attends to a key position through one head. With G the
cotangent of a target at what attention adds to the stream, in the whole local
replacement model with gates held (maths 22.20, 22.21),

    effect(q, k) = A(q, k) u(q, k),      u(q, k) = < G_q, v_k W_O >
    pattern(q, k) = d target / d score(q, k)
                  = cap'(score) A(q, k) (u(q, k) - sum over k' of A(q, k') u(q, k'))

The first is what the cell's move does to the target, exactly, whatever its size. The
second is what a small change of the score would do, which the first cannot say: a cell
that moves what all others of its row move decides nothing.

G takes one way down, past frozen attention, with what features read added at every
layer: a feature's unit effect times its read vector. Features that are no nodes of the
graph hold still.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.attending.clean import Clean, Layer, make_clean
from jaxclt.attending.words import place_name
from jaxclt.clt.active import Active
from jaxclt.errors import on_one_line
from jaxclt.graph.bank import RowTargets
from jaxclt.graph.contrast import contrast
from jaxclt.graph.graph import Graph
from jaxclt.graph.prompt import Recorded
from jaxclt.graph.provenance import graph_active
from jaxclt.graph.stream import Stream, make_stream
from jaxclt.graph.travel import Frozen, descend
from jaxclt.graph.yardstick import unit_effects
from jaxclt.lm.layers import attention_scores, pattern_of
from jaxclt.precision import jit

__all__ = ["Cell", "HeadEffects", "head_effects", "moved_cotangents", "one_cell"]


class Cell(NamedTuple):
    """One cell of an attention pattern, and what it does to the targets."""

    layer: int
    head: int
    query: int
    key: int
    weight: float  # A(q, k)
    score: float  # before a soft cap
    effect: float  # of what it moves
    pattern_effect: float  # derivative with respect to its score


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadEffects:
    """Total effects of heads on a weighted sum of a graph's targets."""

    contrast: str  # what the effects are on; untrusted like tokens
    tokens: tuple[str, ...]  # untrusted: escape where shown
    effect_LH: np.ndarray  # all cells of a head together
    cells: tuple[Cell, ...]  # the strongest, strongest first

    def strongest_heads(self, n: int) -> list[tuple[int, int, float]]:
        """Layer, head and effect of the n strongest, strongest first."""
        best = np.argsort(-np.abs(self.effect_LH), axis=None, kind="stable")[:n]
        places = (divmod(at, self.effect_LH.shape[1]) for at in best.tolist())
        return [(l, h, self.effect_LH.item(l, h)) for l, h in places]

    def __str__(self) -> str:
        """The strongest heads and cells, as plain text."""
        lines = [f"effects on {on_one_line(self.contrast)}"]
        lines += [f"  {x:+10.4g}  L{l}H{h}" for l, h, x in self.strongest_heads(10)]
        lines += ["cells: effect of what they move, effect of their score"]
        for cell in self.cells[:10]:
            size = f"{cell.effect:+10.4g} {cell.pattern_effect:+10.4g}"
            lines += [f"  {size}  {place_name(self.tokens, cell)} ({cell.weight:.0%})"]
        return "\n".join(lines)


def head_effects(
    p: Recorded, graph: Graph, targets: RowTargets, *, n: int = 200
) -> HeadEffects:
    """Total effects of all heads, and of the strongest cells.

    Args:
      p: the graph's prompt, recorded.
      graph: attributed; its nodes answer, other features hold still.
      targets: what its targets read.
      n: cells to list.
    """
    clean = make_clean(p)
    moved_LTD = moved_cotangents(p, graph, targets)
    found, effect_LH = _strongest(clean, moved_LTD, n=n)
    return HeadEffects(
        contrast=contrast(graph).text,
        tokens=graph.meta.tokens,
        effect_LH=np.asarray(effect_LH),
        cells=tuple(
            cell
            for cell in _listed(found, len(moved_LTD[0]))
            if cell.effect and cell.query < p.n_tokens
        ),
    )


def moved_cotangents(p: Recorded, graph: Graph, targets: RowTargets) -> Array:
    """Cotangents [L, T, D] of the contrast at what attention adds to the stream.

    Arguments as of `head_effects`.
    """
    nodes, A = graph_active(graph, p.active), graph.n_features
    unit_A, weight_K = np.split(unit_effects(graph), [A])
    read_MTD = np.zeros((p.cfg.n_layers + 1, *p.recording.embed_TD.shape), unit_A.dtype)
    for layer in range(p.cfg.n_layers):
        read_MTD[layer] = _read_by(nodes, layer, unit_A, len(read_MTD[0]))
    for k in np.flatnonzero(weight_K):
        at = targets.layer_R[k], targets.pos_R[k]
        read_MTD[at] += weight_K[k] * targets.read_RD[k]
    return _cotangents(make_stream(p, pull=True), read_MTD)


def _read_by(
    nodes: Active, layer: int, unit_A: np.ndarray, n_positions: int
) -> np.ndarray:
    """What the features of a layer read, times their unit effects, summed, [T, D]."""
    of = nodes.of_layer(layer)
    rows_UD = nodes.encoder[layer]
    unit_TU = np.zeros((n_positions, len(rows_UD)), unit_A.dtype)
    unit_TU[nodes.pos_A[of], nodes.row_A[of]] = (unit_A * nodes.gate_A)[of]
    return (unit_TU @ rows_UD) * nodes.scale_LT[layer][:, None]


@jit
def _cotangents(stream: Stream, read_MTD: Array) -> Array:
    way, L = Frozen(stream), stream.cfg.n_layers

    def add_reads(g_T1D: Array, layer: Array) -> Array:
        return g_T1D + read_MTD[layer][:, None]

    def visit(layer: Array, g_T1D: Array, moved_LTD: Array) -> Array:
        _, moved_T1D = way.past_mlp(layer, g_T1D, partial(add_reads, layer=layer))
        return moved_LTD.at[layer].set(moved_T1D[:, 0])

    moved_LTD = jnp.zeros_like(read_MTD[:L])
    top = read_MTD[L][:, None]
    return descend(way, top, L - 1, add_reads, visit, moved_LTD)[1]


class _Found(NamedTuple):
    """Cells, any shape; the fields of `Cell`, with query and key as one number."""

    layer: Any
    head: Any
    place: Any  # query * T + key
    weight: Any
    score: Any
    effect: Any
    pattern_effect: Any

    def strongest(self, n: int) -> _Found:
        """Those of the largest effects, in order."""
        flat = _Found(*(leaf.reshape(-1) for leaf in self))
        _, best = jax.lax.top_k(jnp.abs(flat.effect), n)
        return _Found(*(leaf[best] for leaf in flat))


@partial(jit, static_argnames="n")
def _strongest(clean: Clean, moved_LTD: Array, *, n: int) -> tuple[_Found, Array]:
    """Strongest cells of all layers, and the sum of each head's cells [L, H]."""
    L, T, _ = moved_LTD.shape
    H, n_head = clean.cfg.n_heads, min(n, T * T)

    def of_layer(best: _Found, layer: Array) -> tuple[_Found, Array]:
        heads = _heads(clean.layer(layer), moved_LTD[layer])

        def of_head(head: Array) -> tuple[_Found, Array]:
            cells = heads.cells(layer, head)
            return cells.strongest(n_head), cells.effect.sum()

        # One head at a time: all cells of a long prompt are many numbers.
        found, effect_H = jax.lax.map(of_head, jnp.arange(H))
        every = jax.tree.map(lambda a, b: jnp.r_[a, b.reshape(-1)], best, found)
        return every.strongest(n), effect_H

    none, zero = jnp.zeros(n, jnp.int32), jnp.zeros(n, moved_LTD.dtype)
    start = _Found(none, none, none, zero, zero, zero, zero)
    return jax.lax.scan(of_layer, start, jnp.arange(L))


class _Heads(NamedTuple):
    """What the heads of a layer read, move and are asked for."""

    here: Layer
    query_THC: Array
    key_SGC: Array
    value_SGC: Array
    pull_THC: Array  # cotangents of what they gather

    def cells(self, layer: Array, head: Array) -> _Found:
        """All cells [T, S] of one head."""
        group = head // self.here.cfg.n_queries_per_kv
        key_S1C, value_SC = self.key_SGC[:, group, None], self.value_SGC[:, group]
        cfg = dataclasses.replace(self.here.cfg, n_heads=1, n_kv_heads=1)
        score_1TS = attention_scores(self.query_THC[:, head, None], key_S1C, cfg=cfg)
        pattern = partial(pattern_of, self.here.p, cfg=cfg)
        weight_1TS, back = jax.vjp(pattern, score_1TS)
        moves_TS = jnp.einsum("TC,SC->TS", self.pull_THC[:, head], value_SC)
        place_TS = jnp.arange(moves_TS.size, dtype=jnp.int32).reshape(moves_TS.shape)
        return _Found(
            layer=jnp.full_like(place_TS, layer),
            head=jnp.full_like(place_TS, head),
            place=place_TS,
            weight=weight_1TS[0],
            score=score_1TS[0],
            effect=weight_1TS[0] * moves_TS,
            pattern_effect=back(moves_TS[None])[0][0],
        )


def _heads(here: Layer, moved_TD: Array) -> _Heads:
    query_THC, key_SGC = here.heads(here.resid_TD)
    return _Heads(here, query_THC, key_SGC, here.values(), here.pull_heads(moved_TD))


def one_cell(
    clean: Clean, moved_LTD: Array, layer: int, head: int, query: int, key: int
) -> Cell:
    """A cell by its place."""
    found = _one_cell(clean, moved_LTD, layer, head, query, key)
    return _listed(found, moved_LTD.shape[1])[0]


@jit
def _one_cell(
    clean: Clean, moved_LTD: Array, layer: Array, head: Array, query: Array, key: Array
) -> _Found:
    cells = _heads(clean.layer(layer), moved_LTD[layer]).cells(layer, head)
    return jax.tree.map(lambda leaf: leaf[query, key], cells)


def _listed(found: _Found, n_positions: int) -> list[Cell]:
    """The same on the host."""
    layer, head, place, *numbers = (np.asarray(leaf).ravel() for leaf in found)
    columns = layer, head, *np.divmod(place, n_positions), *numbers
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [Cell(*row) for row in rows]
