"""Live attention at the clean stream, differentiated: what it does to a small change.

With patterns and norm denominators live, attention is not linear; its derivative is.
Transposed, it takes cotangents of what attention adds to those of the stream entering
the layer. A change reaches attention by these routes (maths 22.3):

- through what heads ask for: queries, and with them scores and patterns;
- through what they answer to: keys;
- through values, which pass the frozen map;
- through denominators of norms, which answer to what they normalise.

After it has entered, everything is live on every route: patterns, values mixed by them,
and a norm after attention.

Written out instead of asked of `jax.vjp`: many cotangents travel at once, positions are
their first axis (see `jaxclt.graph.stream`), and heads that share a key and value are
done with before the next are begun: one program for all of them, and their scores alone
are held. B is the axis of cotangents, J that of such heads, E their channels one after
another, X channels of their queries, of the key and of the value.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from jaxclt.lm import layers
from jaxclt.lm.config import LMConfig
from jaxclt.lm.layers import Norm
from jaxclt.lm.rotary import frequencies, rotate
from jaxclt.precision import jit
from jaxclt.types import Block

__all__ = ["LiveAttention", "Routes", "make_live"]


class Routes(NamedTuple):
    """Cotangents [T, B, D] of the stream that enters a layer, by route."""

    value_TBD: Array
    norm_TBD: Array
    query_TBD: Array
    key_TBD: Array


@struct.dataclass
class LiveAttention:
    """Attention of all layers of a model at the clean stream of a prompt."""

    blocks: Block  # what patterns, values and norms are computed from
    read_LGXD: Array  # what heads read of the stream, a norm's gain folded in
    output_LGDE: Array
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
        g = _Part(_total(at.past_post_norm(g_TBD)), None)

        def projected(heads: _Heads) -> tuple[Array, Array, Array]:
            query, key, value = map(_total, at.pull(heads, g))
            return query, key, value

        all_heads = at.heads
        query, key, value = jax.lax.map(projected, all_heads)
        if at.joint:
            query, key = (_total(x) for x in at.jointly(all_heads, query, key))
        return at.live(at.read(jnp.concatenate([query, key, value], -1), slice(None)))

    def routes(self, layer: Array, g_TBD: Array) -> Routes:
        """The same apart; arguments as of `pull`."""
        at = _Layer.of(self, layer, len(g_TBD))
        g = at.past_post_norm(g_TBD)
        all_heads = at.heads
        parts = jax.lax.map(lambda heads: at.pull(heads, g), all_heads)
        if at.joint:
            found = at.jointly(all_heads, parts[0].held, parts[1].held)
            parts = (*found, parts[2])
        ends = np.cumsum([0, *(part.held.shape[-1] for part in parts)])
        rows = [slice(a, b) for a, b in itertools.pairwise(ends.tolist())]
        held = [at.read(part.held, X) for part, X in zip(parts, rows, strict=True)]
        norm_TBD = jnp.zeros_like(g_TBD)
        for part, X in zip(parts, rows, strict=True):
            if part.answer is not None:
                norm_TBD = norm_TBD + at.read(part.answer, X)
        # The denominator of the norm before attention answers to all that is read.
        all_TBD = sum(held, norm_TBD)
        query_TBD, key_TBD, value_TBD = held
        norm_TBD = norm_TBD + at.live(all_TBD) - all_TBD
        return Routes(value_TBD, norm_TBD, query_TBD, key_TBD)

    def by_head(self, layer: Array, g_TBD: Array) -> tuple[Array, Array]:
        """Cotangents [T, B, H, C] of queries, and of keys as each head meets them.

        At their positions, as scores are made of them. Arguments as of `pull`.
        """
        at = _Layer.of(self, layer, len(g_TBD))
        every_TBD = _total(at.past_post_norm(g_TBD))

        def each(heads: _Heads) -> tuple[Array, Array]:
            score_TBJS = heads.scores(heads.gathered(every_TBD))
            key_SBJC = jnp.einsum("TBJS,TJC->SBJC", score_TBJS, heads.query_TJC)
            return heads.queries(score_TBJS), key_SBJC

        def flat(x_GTBJC: Array) -> Array:
            x_TBGJC = jnp.moveaxis(x_GTBJC, 0, 2)
            return x_TBGJC.reshape(*g_TBD.shape[:2], -1, x_GTBJC.shape[-1])

        query, key = jax.lax.map(each, at.heads)
        return flat(query), flat(key)


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
    read_LGXD, output_LGDE = _laid_out(blocks)
    return LiveAttention(blocks, read_LGXD, output_LGDE, resid_LTD, cfg, norms)


@jit
def _laid_out(blocks: Block) -> tuple[Array, Array]:
    def one(p: Block) -> tuple[Array, Array]:
        (D, G, _), (H, C, _) = p.k_LDGC.shape, p.o_LHCD.shape
        by_group = [W.reshape(D, G, -1) for W in (p.q_LDHC, p.k_LDGC, p.v_LDGC)]
        read_GXD = jnp.concatenate(by_group, 2).transpose(1, 2, 0)
        output_GDE = p.o_LHCD.reshape(G, H // G * C, D).transpose(0, 2, 1)
        return layers.fold_norm(read_GXD, layers.attn_norm(p)), output_GDE

    return jax.vmap(one)(blocks)


class _Part(NamedTuple):
    """A cotangent with denominators held, and what live ones add; None: nothing."""

    held: Array
    answer: Array | None


def _total(part: _Part) -> Array:
    return part.held if part.answer is None else part.held + part.answer


class _Heads(NamedTuple):
    """Heads that share a key and value, and what they did; keys' own axis of 1 is J's.

    Queries and keys are as scores are made of them, and as norms over their channels
    found them, before they were turned.
    """

    output_DE: Array
    query_TJC: Array
    key_S1C: Array
    value_S1C: Array
    raw_query_TJC: Array
    raw_key_S1C: Array
    query_gain_JC: Array | None  # of norms of theirs, and reciprocal denominators
    key_gain_1C: Array | None
    query_scale_TJ: Array | None
    key_scale_S1: Array | None
    pattern_JTS: Array
    slope_JTS: Array  # times the derivative of capped scores by products of the two

    def gathered(self, g_TBD: Array) -> Array:
        """Cotangents [T, B, J, C] of what heads gather, from those of what they add."""
        g_TBE = jnp.einsum("TBD,DE->TBE", g_TBD, self.output_DE)
        return g_TBE.reshape(*g_TBE.shape[:2], *self.query_TJC.shape[1:])

    def scores(self, g_TBJC: Array) -> Array:
        """Those of products of queries and keys, [T, B, J, S]."""
        value_SC = self.value_S1C[:, 0]
        weight_TBJS = jnp.einsum("TBJC,SC->TBJS", g_TBJC, value_SC)
        # A softmax passes on what differs from the mean under the pattern.
        mixed_TJC = jnp.einsum("JTS,SC->TJC", self.pattern_JTS, value_SC)
        mean_TBJ = jnp.einsum("TBJC,TJC->TBJ", g_TBJC, mixed_TJC)
        slope_T1JS = self.slope_JTS.swapaxes(0, 1)[:, None]
        return slope_T1JS * (weight_TBJS - mean_TBJ[..., None])

    def queries(self, score_TBJS: Array) -> Array:
        """Those of queries, [T, B, J, C]."""
        return jnp.einsum("TBJS,SC->TBJC", score_TBJS, self.key_S1C[:, 0])

    def keys(self, score_TBJS: Array) -> Array:
        """Those of keys, [S, B, 1, C]."""
        return jnp.einsum("TBJS,TJC->SBC", score_TBJS, self.query_TJC)[:, :, None]

    def values(self, g_TBJC: Array) -> Array:
        """Those of values, [S, B, C]."""
        return jnp.einsum("JTS,TBJC->SBC", self.pattern_JTS, g_TBJC)


class _Layer(NamedTuple):
    """One layer of a `LiveAttention` at its first positions."""

    p: Block
    read_GXD: Array
    output_GDE: Array
    resid_TD: Array
    cfg: LMConfig
    norms: bool

    @classmethod
    def of(cls, attention: LiveAttention, layer: Array, n_positions: int) -> _Layer:
        a = attention
        every = a.blocks, a.read_LGXD, a.output_LGDE, a.resid_LTD
        p, read_GXD, output_GDE, resid_TD = jax.tree.map(lambda x: x[layer], every)
        return cls(p, read_GXD, output_GDE, resid_TD[:n_positions], a.cfg, a.norms)

    @property
    def norm(self) -> Norm:
        return layers.attn_norm(self.p)

    @property
    def scale_T(self) -> Array:  # noqa: N802  an axis, as in the fields
        return layers.norm_scale(self.resid_TD, self.norm, eps=self.cfg.norm_eps)

    @property
    def normed_TD(self) -> Array:  # noqa: N802
        return layers.normalise(self.resid_TD, self.scale_T, self.norm)

    def read(self, heads_GTBX: Array, X: slice) -> Array:
        """Cotangents of projections as those of the stream, denominator held."""
        read_GXD = self.read_GXD[:, X]
        read_TBD = jnp.einsum("GTBX,GXD->TBD", heads_GTBX, read_GXD)
        return read_TBD * self.scale_T[:, None, None]

    def live(self, read_TBD: Array) -> Array:
        """The same with the denominator of the norm before attention live."""
        if not self.norms:
            return read_TBD
        unit_TD = layers.unit(self.resid_TD, self.scale_T, self.norm)
        return layers.live_reads(read_TBD, unit_TD[:, None])

    @property
    def joint(self) -> bool:
        """Whether the norms of queries and keys are over all heads together."""
        return self.p.q_norm_LHC is not None

    def jointly(
        self, heads: _Heads, query_GTBX: Array, key_GTBX: Array
    ) -> tuple[_Part, _Part]:
        """Cotangents of projections, with what norms over all heads' channels answer.

        Args:
          heads: all of them, leaves with a leading G.
          query_GTBX: of what queries are projected to, denominators held.
          key_GTBX: the same of keys.
        """

        def one(read_GTBX: Array, raw_GTJC: Array, scale_GTJ: Array | None) -> _Part:
            assert scale_GTJ is not None
            G, T, B, X = read_GTBX.shape
            unit_GTX = (raw_GTJC * scale_GTJ[..., None]).reshape(G, T, X)
            read_TBX = jnp.moveaxis(read_GTBX, 0, 2).reshape(T, B, G * X)
            unit_TX = jnp.moveaxis(unit_GTX, 0, 1).reshape(T, G * X)
            answer = self._answered(read_TBX, unit_TX).answer
            if answer is None:
                return _Part(read_GTBX, None)
            return _Part(read_GTBX, jnp.moveaxis(answer.reshape(T, B, G, X), 2, 0))

        return (
            one(query_GTBX, heads.raw_query_TJC, heads.query_scale_TJ),
            one(key_GTBX, heads.raw_key_S1C, heads.key_scale_S1),
        )

    @property
    def heads(self) -> _Heads:
        """What heads did; every leaf has a leading G."""
        p, cfg = self.p, self.cfg
        query_THC = layers.queries(p, self.normed_TD, cfg=cfg)
        key_SGC = layers.keys(p, self.normed_TD, cfg=cfg)
        score_HTS = layers.attention_scores(query_THC, key_SGC, cfg=cfg)
        pattern_HTS = layers.pattern_of(p, score_HTS, cfg=cfg)
        slope_HTS = pattern_HTS * cfg.score_scale
        if cfg.attn_cap is not None:
            slope_HTS *= 1 - jnp.square(jnp.tanh(score_HTS / cfg.attn_cap))
        projected = (
            query_THC,
            key_SGC,
            layers.values(p, self.normed_TD),
            layers.query_heads(p, self.normed_TD),
            layers.key_heads(p, self.normed_TD),
        )
        G, J, T = cfg.n_kv_heads, cfg.n_queries_per_kv, len(self.resid_TD)

        def gains(gain: Array | None, n: int) -> Array | None:
            if gain is None:
                return None
            gain = gain if gain.ndim == 2 else jnp.tile(gain, (G * n, 1))
            return gain.reshape(G, n, cfg.d_head)

        def scales(scale_TH: Array | None) -> Array | None:
            if scale_TH is None:
                return None
            return jnp.moveaxis(scale_TH.reshape(T, G, -1), 1, 0)

        query_TH, key_TG = layers.head_scales(p, self.normed_TD, cfg=cfg)
        return _Heads(
            self.output_GDE,
            *(jnp.moveaxis(x.reshape(T, G, -1, cfg.d_head), 1, 0) for x in projected),
            query_gain_JC=gains(layers.query_gain(p), J),
            key_gain_1C=gains(layers.key_gain(p), 1),
            query_scale_TJ=scales(query_TH),
            key_scale_S1=scales(key_TG),
            pattern_JTS=pattern_HTS.reshape(G, J, T, T),
            slope_JTS=slope_HTS.reshape(G, J, T, T),
        )

    def pull(self, heads: _Heads, g: _Part) -> tuple[_Part, _Part, _Part]:
        """Cotangents [T, B, X] of what heads project: queries, a key and a value.

        Args:
          heads: of one group.
          g: cotangents of what attention adds, past the norm after it.
        """
        # A norm after attention answers to everything. Its answer to what values bring
        # is that of a denominator which they enter.
        score_TBJS = heads.scores(heads.gathered(_total(g)))
        query = self._unturned(
            heads.queries(score_TBJS),
            heads.raw_query_TJC,
            (heads.query_gain_JC, heads.query_scale_TJ),
        )
        key = self._unturned(
            heads.keys(score_TBJS),
            heads.raw_key_S1C,
            (heads.key_gain_1C, heads.key_scale_S1),
        )
        held, answer = (
            None if x is None else heads.values(heads.gathered(x)) for x in g
        )
        assert held is not None
        return query, key, _Part(held, answer)

    def past_post_norm(self, g_TBD: Array) -> _Part:
        """Cotangents of what a norm after attention gets, from those of its output."""
        if self.p.post_attn_LD is None:
            return _Part(g_TBD, None)
        gain_D = self.p.post_attn_LD
        norm = Norm(gain_D)
        pattern_HTS = layers.attention_pattern(self.p, self.normed_TD, cfg=self.cfg)
        value_SGC = layers.values(self.p, self.normed_TD)
        moved_TD = layers.move(self.p, pattern_HTS, value_SGC, cfg=self.cfg)
        scale_T = layers.norm_scale(moved_TD, norm, eps=self.cfg.norm_eps)
        g_TBD = g_TBD * (gain_D[None] * scale_T[:, None])[:, None]
        return self._answered(g_TBD, moved_TD * scale_T[:, None])

    def _answered(self, read_TBX: Array, unit_TX: Array) -> _Part:
        """What reads through a norm read, its denominator held, and what it adds."""
        if not self.norms:
            return _Part(read_TBX, None)
        live_TBX = layers.live_reads(read_TBX, unit_TX[:, None])
        return _Part(read_TBX, live_TBX - read_TBX)

    def _unturned(
        self,
        g_TBJC: Array,
        raw_TJC: Array,
        norm: tuple[Array | None, Array | None],
    ) -> _Part:
        """Cotangents of queries or keys before they are turned and normalised.

        Without what a norm over all heads answers, for which see `jointly`.

        Args:
          g_TBJC: of them as scores are made of them.
          raw_TJC: as they are projected.
          norm: gains [J, C] and reciprocal denominators [T, J] of their norm, or None.
        """
        T, B, J, C = g_TBJC.shape
        gain_JC, scale_TJ = norm
        freq = frequencies(self.p, self.cfg, g_TBJC.dtype)

        def turned_back(g_TBJC: Array) -> Array:
            g_TBX = rotate(g_TBJC.reshape(T, B * J, C), -freq)
            return g_TBX.reshape(T, B, J, C)

        part = _Part(g_TBJC, None)
        if gain_JC is None or scale_TJ is None:
            part = _Part(turned_back(g_TBJC), None)
        else:
            gain_11JC = gain_JC[None, None]
            if self.cfg.norm_turned:
                g_TBJC = turned_back(g_TBJC * gain_11JC)
            else:
                g_TBJC = turned_back(g_TBJC) * gain_11JC
            part = _Part(g_TBJC * scale_TJ[:, None, :, None], None)
            if not self.joint:
                part = self._answered(part.held, raw_TJC * scale_TJ[..., None])
        return jax.tree.map(lambda x: x.reshape(T, B, J * C), part)
