"""Live attention at the clean stream, differentiated: what it does to a small change.

With patterns and norm denominators live, attention is not linear; its derivative is.
Transposed, it takes cotangents of what attention adds to those of the stream entering
the layer. A change reaches attention by three routes (maths 22.3):

- through what heads ask for: queries, and with them scores and patterns;
- through what they answer to: keys;
- through the rest: values, and all denominators that the stream enters before or in
  the heads.

After it has entered, everything is live on every route: patterns, values mixed by them,
and a norm after attention.

Written out instead of asked of `jax.vjp`: many cotangents travel at once, positions are
their first axis (see `jaxclt.graph.stream`), and no array has more than one head's
scores of all of them. B is the axis of cotangents, X channels of queries, keys and
values one after another.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from jaxclt.lm import layers
from jaxclt.lm.config import LMConfig
from jaxclt.lm.layers import Norm
from jaxclt.types import Block

__all__ = ["LiveAttention", "Routes", "make_live"]


class Routes(NamedTuple):
    """Cotangents [T, B, D] of the stream that enters a layer, by route."""

    query_TBD: Array
    key_TBD: Array
    rest_TBD: Array


class _Heads(NamedTuple):
    """Cotangents of what attention reads, as heads project it: before their norms.

    The last two are what live denominators of norms over heads' channels add.
    """

    query_TBHC: Array
    key_TBGC: Array
    value_TBGC: Array
    query_norm_TBHC: Array | None
    key_norm_TBGC: Array | None


@struct.dataclass
class LiveAttention:
    """Attention of all layers of a model at the clean stream of a prompt."""

    blocks: Block  # what patterns, values and norms are computed from
    read_LXD: Array  # what heads read of the stream, a norm's gain folded in
    output_LDHC: Array
    resid_LTD: Array  # clean, entering the layers
    cfg: LMConfig = struct.field(pytree_node=False)
    norms: bool = struct.field(pytree_node=False, default=True)  # live, or held

    def pull(self, layer: Array, g_TBD: Array) -> Array:
        """Cotangents of the stream that enters a layer, by all routes, [T, B, D].

        Args:
          layer: which layer.
          g_TBD: cotangents of what its attention adds, at the first positions.
        """
        at = _Layer.of(self, layer, len(g_TBD))
        heads = at.pull_heads(g_TBD)
        query_TBHC, key_TBGC, value_TBGC = heads[:3]
        if heads.query_norm_TBHC is not None:
            query_TBHC = query_TBHC + heads.query_norm_TBHC
        if heads.key_norm_TBGC is not None:
            key_TBGC = key_TBGC + heads.key_norm_TBGC
        flat = [_flat(x) for x in (query_TBHC, key_TBGC, value_TBGC)]
        return at.live(at.reads(jnp.concatenate(flat, -1), at.read_XD))

    def routes(self, layer: Array, g_TBD: Array) -> Routes:
        """The same apart; arguments as of `pull`."""
        at = _Layer.of(self, layer, len(g_TBD))
        heads = at.pull_heads(g_TBD)
        flat = [_flat(x) for x in heads[:3]]
        ends = [flat[0].shape[-1], flat[0].shape[-1] + flat[1].shape[-1]]
        rows = jnp.split(at.read_XD, ends)
        query_TBD, key_TBD, rest_TBD = map(at.reads, flat, rows)
        for norm, row_XD in zip(heads[3:], rows[:2], strict=True):
            if norm is not None:
                rest_TBD += at.reads(_flat(norm), row_XD)
        all_TBD = query_TBD + key_TBD + rest_TBD
        # The denominator of the norm before attention answers to all that is read.
        rest_TBD += at.live(all_TBD) - all_TBD
        return Routes(query_TBD, key_TBD, rest_TBD)

    def by_head(self, layer: Array, g_TBD: Array) -> tuple[Array, Array]:
        """Cotangents [T, B, H, C] of queries, and of keys as each head meets them.

        At their positions, as scores are made of them. Arguments as of `pull`.
        """
        query, key, _ = _Layer.of(self, layer, len(g_TBD)).pull_each(g_TBD)
        return jnp.stack(query, 2), jnp.stack(key, 2)


def make_live(
    blocks: Block, resid_LTD: Array, *, cfg: LMConfig, norms: bool = True
) -> LiveAttention:
    """Lay out a model's attention for pulling cotangents back through it.

    Args:
      blocks: of the model.
      resid_LTD: the clean stream that enters each layer.
      cfg: model shape.
      norms: whether denominators answer; else only patterns do.
    """
    blocks = layers.attention_weights(blocks)
    read_LXD, output_LDHC = _laid_out(blocks)
    return LiveAttention(blocks, read_LXD, output_LDHC, resid_LTD, cfg, norms)


@jax.jit
def _laid_out(blocks: Block) -> tuple[Array, Array]:
    def one(p: Block) -> tuple[Array, Array]:
        D = len(p.norm_attn_LD)
        reads = [W.reshape(D, -1).T for W in (p.q_LDHC, p.k_LDGC, p.v_LDGC)]
        read_XD = layers.fold_norm(jnp.concatenate(reads), layers.attn_norm(p))
        return read_XD, p.o_LHCD.transpose(2, 0, 1)

    return jax.vmap(one)(blocks)


def _flat(heads_TBHC: Array) -> Array:
    return heads_TBHC.reshape(*heads_TBHC.shape[:2], -1)


class _Layer(NamedTuple):
    """One layer of a `LiveAttention` at its first positions."""

    p: Block
    read_XD: Array
    output_DHC: Array
    resid_TD: Array
    cfg: LMConfig
    norms: bool

    @classmethod
    def of(cls, attention: LiveAttention, layer: Array, n_positions: int) -> _Layer:
        a = attention
        every = a.blocks, a.read_LXD, a.output_LDHC, a.resid_LTD
        p, read_XD, output_DHC, resid_TD = jax.tree.map(lambda x: x[layer], every)
        return cls(p, read_XD, output_DHC, resid_TD[:n_positions], a.cfg, a.norms)

    @property
    def norm(self) -> Norm:
        return layers.attn_norm(self.p)

    @property
    def scale_T(self) -> Array:  # noqa: N802  an axis, as in the fields
        return layers.norm_scale(self.resid_TD, self.norm, eps=self.cfg.norm_eps)

    def reads(self, heads_TBX: Array, read_XD: Array) -> Array:
        """Cotangents of heads' projections as those of the stream, denominator held."""
        read_TBD = jnp.einsum("TBX,XD->TBD", heads_TBX, read_XD)
        return read_TBD * self.scale_T[:, None, None]

    def live(self, read_TBD: Array) -> Array:
        """The same with the denominator of the norm before attention live."""
        if not self.norms:
            return read_TBD
        unit_TD = layers.centre(self.resid_TD, self.norm) * self.scale_T[:, None]
        return layers.live_reads(read_TBD, unit_TD[:, None])

    @property
    def normed_TD(self) -> Array:  # noqa: N802
        return layers.normalise(self.resid_TD, self.scale_T, self.norm)

    def pull_each(self, g_TBD: Array) -> tuple[tuple[Array, ...], ...]:
        """Cotangents [T, B, C] of each head's queries, keys and values."""
        p, cfg, normed_TD = self.p, self.cfg, self.normed_TD
        query_THC = layers.queries(p, normed_TD, cfg=cfg)
        key_SGC, value_SGC = (
            layers.keys(p, normed_TD, cfg=cfg),
            layers.values(p, normed_TD),
        )
        score_HTS = layers.attention_scores(query_THC, key_SGC, cfg=cfg)
        pattern_HTS = layers.pattern_of(p, score_HTS, cfg=cfg)
        g_TBD = self._before_post_norm(g_TBD, pattern_HTS, value_SGC)
        g_TBHC = jnp.einsum("TBD,DHC->TBHC", g_TBD, self.output_DHC)
        slope_HTS = pattern_HTS * cfg.score_scale
        if cfg.attn_cap is not None:
            slope_HTS *= 1 - jnp.square(jnp.tanh(score_HTS / cfg.attn_cap))
        one = partial(_pull_head, pattern_HTS, slope_HTS, query_THC, key_SGC, value_SGC)
        found = [one(g_TBHC, h, h // cfg.n_queries_per_kv) for h in range(cfg.n_heads)]
        return tuple(zip(*found, strict=True))

    def pull_heads(self, g_TBD: Array) -> _Heads:
        """Cotangents of what heads read, from those of what attention adds."""
        p, cfg, normed_TD = self.p, self.cfg, self.normed_TD
        query_TBHC, *of_groups = (jnp.stack(x, 2) for x in self.pull_each(g_TBD))

        def grouped(heads_TBHC: Array) -> Array:
            T, B, _, C = heads_TBHC.shape
            each = heads_TBHC.reshape(T, B, cfg.n_kv_heads, cfg.n_queries_per_kv, C)
            return each.sum(3)

        key_TBGC, value_TBGC = map(grouped, of_groups)
        query = self._unturned(
            query_TBHC, layers.query_heads(p, normed_TD), p.q_norm_LC
        )
        key = self._unturned(key_TBGC, layers.key_heads(p, normed_TD), p.k_norm_LC)
        return _Heads(query[0], key[0], value_TBGC, query[1], key[1])

    def _before_post_norm(
        self, g_TBD: Array, pattern_HTS: Array, value_SGC: Array
    ) -> Array:
        """Cotangents of what a norm after attention gets, if there is one."""
        if self.p.post_attn_LD is None:
            return g_TBD
        norm = Norm(self.p.post_attn_LD)
        moved_TD = layers.move(self.p, pattern_HTS, value_SGC, cfg=self.cfg)
        scale_T = layers.norm_scale(moved_TD, norm, eps=self.cfg.norm_eps)
        read_TBD = g_TBD * norm.gain[None, None] * scale_T[:, None, None]
        if not self.norms:
            return read_TBD
        return layers.live_reads(read_TBD, (moved_TD * scale_T[:, None])[:, None])

    def _unturned(
        self, g_TBHC: Array, heads_THC: Array, gain_C: Array | None
    ) -> tuple[Array, Array | None]:
        """Cotangents of queries or keys before they are turned and normalised.

        Those with the norm's denominator held, and what it adds if it is live.
        """
        T, B, H, C = g_TBHC.shape
        freq_J = layers.frequencies(self.p, self.cfg, g_TBHC.dtype)
        turned = layers.rotate(g_TBHC.reshape(T, B * H, C), -freq_J)
        g_TBHC = turned.reshape(T, B, H, C)
        if gain_C is None:
            return g_TBHC, None
        scale_TH = layers.norm_scale(heads_THC, Norm(gain_C), eps=self.cfg.norm_eps)
        g_TBHC = g_TBHC * (scale_TH[..., None] * gain_C[None, None])[:, None]
        if not self.norms:
            return g_TBHC, None
        unit_THC = heads_THC * scale_TH[..., None]
        return g_TBHC, layers.live_reads(g_TBHC, unit_THC[:, None]) - g_TBHC


def _pull_head(
    pattern_HTS: Array,
    slope_HTS: Array,
    query_THC: Array,
    key_SGC: Array,
    value_SGC: Array,
    g_TBHC: Array,
    h: int,
    g: int,
) -> tuple[Array, Array, Array]:
    """Cotangents of one head's queries, keys and values at the turned positions.

    Args:
      pattern_HTS: of all heads.
      slope_HTS: pattern times the derivative of capped scores by products of queries
        and keys.
      query_THC: as scores are made of them.
      key_SGC: as scores are made of them.
      value_SGC: what the pattern mixes.
      g_TBHC: cotangents of what heads gather.
      h: the head.
      g: its group.
    """
    value_SC, key_SC, g_TBC = value_SGC[:, g], key_SGC[:, g], g_TBHC[:, :, h]
    mixed_TC = pattern_HTS[h] @ value_SC
    weight_TBS = jnp.einsum("TBC,SC->TBS", g_TBC, value_SC)
    # A softmax passes on what differs from the mean under the pattern.
    mean_TB = jnp.einsum("TBC,TC->TB", g_TBC, mixed_TC)
    score_TBS = slope_HTS[h][:, None] * (weight_TBS - mean_TB[..., None])
    return (
        jnp.einsum("TBS,SC->TBC", score_TBS, key_SC),
        jnp.einsum("TBS,TC->SBC", score_TBS, query_THC[:, h]),
        jnp.einsum("TS,TBC->SBC", pattern_HTS[h], g_TBC),
    )
