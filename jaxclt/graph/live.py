"""Ways down past live attention and live norms: what a small change of a source does.

Beside `jaxclt.graph.travel.Frozen`, which holds patterns and denominators, `Live` takes
the whole derivative of every layer at the clean stream, MLPs left out (maths 22.1), and
`Parts` keeps its parts apart by where a path first leaves the frozen maps (maths 22.4).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from jaxclt.graph.prompt import Recorded
from jaxclt.graph.stream import make_stream
from jaxclt.graph.travel import Frozen, Way
from jaxclt.lm.config import LMConfig
from jaxclt.lm.layers import live_reads, mlp_norm, unit
from jaxclt.lm.live import LiveAttention, make_live
from jaxclt.lm.step import Skip, down

__all__ = ["STATES", "Live", "Parts", "live_parts", "live_way", "split_parts"]


@struct.dataclass
class _LiveSkip:
    """A dictionary's linear path with the norm that it reads live."""

    skip: Skip  # of all layers
    unit_LTD: Array | None  # what that norm makes of the stream; None: it reads none

    def held(self, layer: Array, g_PXD: Array) -> Array:
        """What readers of its output read of the stream, denominator held."""
        return self.skip.at(layer, slice(len(g_PXD))).read(g_PXD)

    def live(self, layer: Array, g_PXD: Array) -> Array:
        """The same with the denominator live."""
        read_PXD = self.held(layer, g_PXD)
        if self.unit_LTD is None:
            return read_PXD
        return live_reads(read_PXD, self.unit_LTD[layer, : len(g_PXD), None])


def _live_skip(p: Recorded, *, past_norm: bool) -> _LiveSkip | None:
    if p.active.skip is None:
        return None
    unit_LTD = None
    if past_norm:
        mid_LTD, blocks = jnp.asarray(p.recording.mid_LTD), p.params.blocks
        scale_LT = p.recording.frozen.mlp_scale_LT
        unit_LTD = unit(mid_LTD, scale_LT, mlp_norm(blocks))
    return _LiveSkip(jax.tree.map(jnp.asarray, p.active.skip), unit_LTD)


@struct.dataclass
class Live(Way):
    """Past live attention, and a skip whose norm is live."""

    attention: LiveAttention
    skip: _LiveSkip | None

    @property
    def cfg(self) -> LMConfig:
        """Model shape."""
        return self.attention.cfg

    def past_mlp(
        self, layer: Array, g_PXD: Array, add_reads: Callable[[Array], Array]
    ) -> tuple[Array, Array]:
        """See `jaxclt.graph.travel.Way`."""

        def reads(g_PXD: Array) -> Array:
            if self.skip is not None:
                g_PXD = g_PXD + self.skip.live(layer, g_PXD)
            return add_reads(g_PXD)

        return down(g_PXD, None, reads, cfg=self.cfg)

    def past_attention(self, layer: Array, moved_PXD: Array) -> Array:
        """See `jaxclt.graph.travel.Way`."""
        with jax.named_scope("pull_live_attention"):
            return self.attention.pull(layer, moved_PXD)


def live_way(p: Recorded, *, past_norm: bool, norms: bool = True) -> Live:
    """The live way down a prompt's model.

    Args:
      p: the prompt.
      past_norm: whether its dictionary reads past the norm before the MLP.
      norms: whether denominators answer; else only patterns do.
    """
    resid_LTD = p.recording.resid_LTD
    attention = make_live(p.params.blocks, resid_LTD, cfg=p.cfg, norms=norms)
    return Live(attention, _live_skip(p, past_norm=past_norm and norms))


STATES = ("all", "norm", "query", "key")  # targets read in the first two


@struct.dataclass
class Parts(Way):
    """As `Live`, with some paths kept apart by their step nearest to the source.

    That is the step nearest among those that are not plain OV, by what it enters: a
    query, a key, or a denominator; above it everything is live. The first state has
    what `Live` has; paths that are plain OV, or enter the target's own gate, are what
    the others leave of it.
    """

    live: Live
    frozen: Frozen
    n_states = len(STATES)

    @property
    def cfg(self) -> LMConfig:
        """Model shape."""
        return self.live.cfg

    def past_mlp(
        self, layer: Array, g_PXD: Array, add_reads: Callable[[Array], Array]
    ) -> tuple[Array, Array]:
        """See `jaxclt.graph.travel.Way`."""
        skip = self.live.skip

        def reads(g_PXD: Array) -> Array:
            if skip is not None:
                all_PBD = _apart(g_PXD)[:, 0]
                answer_PBD = skip.live(layer, all_PBD) - skip.held(layer, all_PBD)
                held_PQBD = _apart(g_PXD + skip.held(layer, g_PXD))
                g_PXD = held_PQBD.at[:, :2].add(answer_PBD[:, None])
                g_PXD = g_PXD.reshape(len(g_PXD), -1, g_PXD.shape[-1])
            return add_reads(g_PXD)

        return down(g_PXD, None, reads, cfg=self.cfg)

    def past_attention(self, layer: Array, moved_PXD: Array) -> Array:
        """See `jaxclt.graph.travel.Way`."""
        B = moved_PXD.shape[1] // self.n_states
        all_PBD, others_PYD = jnp.split(moved_PXD, [B], axis=1)
        with jax.named_scope("pull_live_attention"):
            value_PBD, *more = self.live.attention.routes(layer, all_PBD)
        back_PYD = self.frozen.past_attention(layer, others_PYD)
        return jnp.concatenate(
            [sum(more, value_PBD), back_PYD + jnp.concatenate(more, 1)], axis=1
        )


def _apart(g_PXD: Array) -> Array:
    """Cotangents by state, [P, Q, B, D]."""
    P, _, D = g_PXD.shape
    return g_PXD.reshape(P, len(STATES), -1, D)


def split_parts(
    state_QX: np.ndarray, value_X: np.ndarray, gated_X: np.ndarray | bool
) -> np.ndarray:
    """Parts `EFFECT_PARTS` [Q, X] of anything that came down `Parts`.

    Args:
      state_QX: by `STATES`.
      value_X: the same down the frozen way: plain OV.
      gated_X: whether gates answer; where they do not, none has a share of rounding.
    """
    all_X, norm_X, query_X, key_X = state_QX
    gate_X = np.where(gated_X, all_X - value_X - norm_X - query_X - key_X, 0)
    return np.stack([value_X, query_X, key_X, norm_X, gate_X])


def live_parts(p: Recorded, *, past_norm: bool) -> Parts:
    """The way down of the parts; arguments as of `live_way`."""
    frozen = Frozen(make_stream(p, pull=True))
    return Parts(live_way(p, past_norm=past_norm), frozen)
