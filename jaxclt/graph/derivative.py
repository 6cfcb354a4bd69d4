"""The model's own derivative: what a small change of a node's write does to targets.

``D[k, n] = a_n · d target_k / d a_n`` of the real model, with what node n writes
``a_n · vector`` and everything else live: attention patterns, norms, MLPs (maths
22.40). No dictionary is asked how it would answer, so that this is what a graph's total
effects can be measured by.

Cotangents go the same way down as those of a graph's rows, past the model's own layers
at the clean stream instead of the frozen ones. No more than one layer's intermediate
values is ever held.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from jaxclt.graph.answers import answering, past_final_norm
from jaxclt.graph.bank import RowTargets
from jaxclt.graph.columns import Columns
from jaxclt.graph.plan import Plan
from jaxclt.graph.prompt import Prompt
from jaxclt.graph.rows import edge_rows, make_puller
from jaxclt.graph.target_reads import target_reads
from jaxclt.graph.travel import Way
from jaxclt.lm.block import Taps, block
from jaxclt.lm.config import LMConfig
from jaxclt.lm.layers import mlp_norm, norm_scale
from jaxclt.lm.run import native_mlp
from jaxclt.precision import jit
from jaxclt.types import Block

__all__ = ["model_derivative"]


@struct.dataclass
class _Model(Way):
    """Past the layers of the model itself, at the clean stream."""

    blocks: Block
    clean_LTD: Array  # what enters each layer
    lm: LMConfig = struct.field(pytree_node=False)

    @property
    def cfg(self) -> LMConfig:
        """Model shape."""
        return self.lm

    def below(
        self, layer: Array, g_PXD: Array, add_reads: Callable[[Array], Array]
    ) -> Array:
        """See `jaxclt.graph.travel.Way`."""
        at = (self.blocks, self.clean_LTD)
        p, clean_TD = jax.tree.map(lambda leaf: leaf[layer], at)

        def streams(resid_PD: Array) -> tuple[Array, Array]:
            after_PD, taps = _layer(p, resid_PD, cfg=self.cfg)
            return after_PD, taps.mid_TD

        _, back = jax.vjp(streams, clean_TD[: len(g_PXD)])
        read_PXD = add_reads(jnp.zeros_like(g_PXD))
        P, X, _ = g_PXD.shape
        room = max(1, _TOGETHER // P)
        together = next(n for n in range(room, 0, -1) if X % n == 0)
        each = g_PXD.swapaxes(0, 1), read_PXD.swapaxes(0, 1)
        below_XPD = jax.lax.map(lambda g: back(g)[0], each, batch_size=together)
        return below_XPD.swapaxes(0, 1)


def _layer(p: Block, resid_TD: Array, *, cfg: LMConfig) -> tuple[Array, Taps]:
    """One layer of the model."""
    return block(p, resid_TD, partial(_mlp, p, cfg), cfg=cfg, keep_patterns=False)


def _mlp(p: Block, cfg: LMConfig, mid_TD: Array, scale_T: Array) -> Array:
    return native_mlp(cfg).write(None, mid_TD, scale_T, p, None)[1]


def model_derivative(p: Prompt, *, packed: bool = True) -> np.ndarray:
    """First-order effects of all nodes on all targets in the real model, [K, N].

    Targets are what the graph's rows explain: a logit through the live final norm, a
    feature through its own live norm and gate, directions of other sites likewise.

    Args:
      p: the prompt, with the features that are nodes.
      packed: hold the source vectors written out, as for `make_puller`.
    """
    T, K = len(p.recording.token_T), p.n_targets
    puller = make_puller(
        p,
        plan=Plan(band_end=(T,), capacities=_TARGETS),
        mesh=None,
        packed=packed,
        way=_Model(p.params.blocks, p.recording.resid_LTD, p.cfg),
    )
    p = answering(p)
    rows = _reads(p)
    derivative_KN = np.zeros((K, Columns(p).layout.n_columns), rows.read_RD.dtype)
    edge_rows(puller, rows, derivative_KN)
    for k, edge_N in p.written():
        derivative_KN[k] += edge_N
    n_features = len(p.active.layer_A)
    derivative_KN[:, p.ignored_columns(n_features)] = 0
    return derivative_KN


_TARGETS = (32, 10, 8, 6, 4, 3, 2, 1)  # whose cotangents are held together
# Positions times targets that pass a layer side by side: short prompts gain by it, and
# of long ones the patterns of few targets are held. XLA for CPUs (jaxlib 0.10.2, YNN)
# gets cotangents of norms, r - u (u . r), wrong from 4096 on where several r share a u.
_TOGETHER = 1024


def _reads(p: Prompt) -> RowTargets:
    """What targets read of the stream, gates, norms and an MLP on the way live."""
    t = p.targets
    layer_K, pos_K = np.asarray(t.layer_K), np.asarray(t.pos_K)
    read_KD = np.array(t.vec_KD) + np.asarray(t.gate_KD)
    out = np.flatnonzero(layer_K == p.cfg.n_layers)
    held_KD = target_reads(p.params, p.recording, read_KD[out], pos_K[out])
    read_KD[out] = past_final_norm(p, held_KD, pos_K[out])
    for k in np.flatnonzero(np.asarray(t.write_KD).any(1)):
        layer, pos = int(layer_K[k]), int(pos_K[k])
        mid_D, write_D = p.recording.mid_LTD[layer, pos], np.asarray(t.write_KD)[k]
        read_KD[k] += _past_mlp(p.params.blocks, layer, mid_D, write_D, cfg=p.cfg)
    return RowTargets(layer_R=layer_K, pos_R=pos_K, read_RD=read_KD)


@partial(jit, static_argnames="cfg")
def _past_mlp(
    blocks: Block, layer: Array, mid_D: Array, write_D: Array, *, cfg: LMConfig
) -> Array:
    """A direction of an MLP's output as read of the stream where the MLP reads, [D]."""
    p = jax.tree.map(lambda x: x[layer], blocks)

    def mlp(mid_1D: Array) -> Array:
        scale_1 = norm_scale(mid_1D, mlp_norm(p), eps=cfg.norm_eps)
        return _mlp(p, cfg, mid_1D, scale_1)

    _, back = jax.vjp(mlp, mid_D[None])
    return back(write_D[None])[0][0]
