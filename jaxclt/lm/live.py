"""Live attention at the clean stream, differentiated: what it does to a small change.

With patterns and norm denominators live, attention is not linear; its derivative is.
Transposed, it takes cotangents of what attention adds to those of the stream entering
the layer. A change reaches attention by these routes (maths 22.3):

- through what heads ask for: queries, and with them scores and patterns;
- through what they answer to: keys;
- through the rest: values, which pass the frozen map, and denominators of norms, which
  answer to what they normalise.

After it has entered, everything is live on every route: patterns, values mixed by them,
and a norm after attention.

Written out instead of asked of `jax.vjp`: many cotangents travel at once, positions are
their first axis (see `jaxclt.graph.stream`), and no array has more than one head's
scores of all of them. B is the axis of cotangents, X channels of queries, keys and
values one after another.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
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
    """Cotangents [T, B, D] of the stream that enters a layer, beside plain values."""

    query_TBD: Array
    key_TBD: Array
    norm_TBD: Array


class _Heads(NamedTuple):
    """Cotangents of what heads project of the stream: queries, keys and values."""

    query_TBHC: Array
    key_TBGC: Array
    value_TBGC: Array

    def flat(self) -> list[Array]:
        """Channels of all heads as one axis X, [T, B, X] each."""
        return [x.reshape(*x.shape[:2], -1) for x in self]


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
        held, answer = at.pull_heads(g_TBD)
        every = _Heads(*map(jnp.add, held, answer)) if answer else held
        return at.live(at.reads(every.flat(), at.read_XD))

    def routes(self, layer: Array, g_TBD: Array, value_TBD: Array) -> Routes:
        """What the same has beyond plain values, apart.

        Args:
          layer: which layer.
          g_TBD: cotangents of what its attention adds, at the first positions.
          value_TBD: those pulled back through values alone, all else held.
        """
        at = _Layer.of(self, layer, len(g_TBD))
        held, answer = at.pull_heads(g_TBD)
        query_TBX, key_TBX, _ = held.flat()
        ends = [query_TBX.shape[2], query_TBX.shape[2] + key_TBX.shape[2]]
        query_XD, key_XD, _ = jnp.split(at.read_XD, ends)
        query_TBD = at.reads([query_TBX], query_XD)
        key_TBD = at.reads([key_TBX], key_XD)
        norm_TBD = jnp.zeros_like(g_TBD)
        if answer is not None:
            norm_TBD = at.reads(answer.flat(), at.read_XD)
        # The denominator of the norm before attention answers to all that is read.
        all_TBD = query_TBD + key_TBD + value_TBD + norm_TBD
        return Routes(query_TBD, key_TBD, norm_TBD + at.live(all_TBD) - all_TBD)

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


class _Clean(NamedTuple):
    """What the heads of one layer did."""

    normed_TD: Array  # what they read
    query_THC: Array  # queries and keys as scores are made of them
    key_SGC: Array
    value_SGC: Array
    pattern_HTS: Array
    slope_HTS: Array  # times the derivative of capped scores by products of the two

    def pull(self, g_TBHC: Array) -> tuple[list[Array], ...]:
        """Cotangents [T, B, C] of every head's queries, keys and values.

        From those of what heads gather; head by head, so that compilers need not hold
        the scores of all at once.
        """
        found = [self._pull_one(g_TBHC[:, :, h], h) for h in range(g_TBHC.shape[2])]
        query, key, value = zip(*found, strict=True)
        return list(query), list(key), list(value)

    def move_back(self, g_TBHC: Array) -> list[Array]:
        """Those of values alone, the pattern held."""
        every = enumerate(self.pattern_HTS)
        return [_move_back(pattern_TS, g_TBHC[:, :, h]) for h, pattern_TS in every]

    def _pull_one(self, g_TBC: Array, h: int) -> tuple[Array, Array, Array]:
        query_TC, pattern_TS = self.query_THC[:, h], self.pattern_HTS[h]
        group = h * self.key_SGC.shape[1] // self.query_THC.shape[1]
        key_SC, value_SC = self.key_SGC[:, group], self.value_SGC[:, group]
        weight_TBS = jnp.einsum("TBC,SC->TBS", g_TBC, value_SC)
        # A softmax passes on what differs from the mean under the pattern.
        mean_TB = jnp.einsum("TBC,TC->TB", g_TBC, pattern_TS @ value_SC)
        score_TBS = self.slope_HTS[h][:, None] * (weight_TBS - mean_TB[..., None])
        return (
            jnp.einsum("TBS,SC->TBC", score_TBS, key_SC),
            jnp.einsum("TBS,TC->SBC", score_TBS, query_TC),
            _move_back(pattern_TS, g_TBC),
        )


def _move_back(pattern_TS: Array, g_TBC: Array) -> Array:
    return jnp.einsum("TS,TBC->SBC", pattern_TS, g_TBC)


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

    def reads(self, parts: list[Array], read_XD: Array) -> Array:
        """Heads' cotangents [T, B, X] as those of the stream, denominator held."""
        heads_TBX = parts[0] if len(parts) == 1 else jnp.concatenate(parts, -1)
        read_TBD = jnp.einsum("TBX,XD->TBD", heads_TBX, read_XD)
        return read_TBD * self.scale_T[:, None, None]

    def live(self, read_TBD: Array) -> Array:
        """The same with the denominator of the norm before attention live."""
        if not self.norms:
            return read_TBD
        unit_TD = layers.centre(self.resid_TD, self.norm) * self.scale_T[:, None]
        return layers.live_reads(read_TBD, unit_TD[:, None])

    def pull_heads(self, g_TBD: Array) -> tuple[_Heads, _Heads | None]:
        """Cotangents of what heads project, from those of what attention adds.

        With the denominators held that the stream enters by values or in heads, and
        what these add if live; None if they do not.
        """
        p, clean = self.p, self.clean()
        # A norm after attention answers to everything. Its answer to what values bring
        # is that of a denominator which they enter.
        held_TBD, answer_TBD = self._past_post_norm(g_TBD, clean)
        every_TBD = held_TBD if answer_TBD is None else held_TBD + answer_TBD
        query, key, value = clean.pull(self._out_of_heads(every_TBD))
        query_TBHC, query_answer = self._unturned(
            jnp.stack(query, 2), layers.query_heads(p, clean.normed_TD), p.q_norm_LC
        )
        key_TBGC, key_answer = self._unturned(
            self._grouped(key), layers.key_heads(p, clean.normed_TD), p.k_norm_LC
        )
        held = _Heads(query_TBHC, key_TBGC, self._grouped(value))
        value_answer = None
        if answer_TBD is not None:
            value_answer = self._grouped(
                clean.move_back(self._out_of_heads(answer_TBD))
            )
            held = held._replace(value_TBGC=held.value_TBGC - value_answer)
        answers = query_answer, key_answer, value_answer
        if all(answer is None for answer in answers):
            return held, None
        found = [
            jnp.zeros_like(x) if answer is None else answer
            for answer, x in zip(answers, held, strict=True)
        ]
        return held, _Heads(*found)

    def pull_each(self, g_TBD: Array) -> tuple[list[Array], ...]:
        """Cotangents [T, B, C] of each head's queries, keys and values."""
        clean = self.clean()
        held_TBD, answer_TBD = self._past_post_norm(g_TBD, clean)
        every_TBD = held_TBD if answer_TBD is None else held_TBD + answer_TBD
        return clean.pull(self._out_of_heads(every_TBD))

    def clean(self) -> _Clean:
        """What heads did."""
        p, cfg = self.p, self.cfg
        normed_TD = layers.normalise(self.resid_TD, self.scale_T, self.norm)
        query_THC = layers.queries(p, normed_TD, cfg=cfg)
        key_SGC = layers.keys(p, normed_TD, cfg=cfg)
        score_HTS = layers.attention_scores(query_THC, key_SGC, cfg=cfg)
        pattern_HTS = layers.pattern_of(p, score_HTS, cfg=cfg)
        slope_HTS = pattern_HTS * cfg.score_scale
        if cfg.attn_cap is not None:
            slope_HTS *= 1 - jnp.square(jnp.tanh(score_HTS / cfg.attn_cap))
        value_SGC = layers.values(p, normed_TD)
        return _Clean(normed_TD, query_THC, key_SGC, value_SGC, pattern_HTS, slope_HTS)

    def _out_of_heads(self, g_TBD: Array) -> Array:
        """Cotangents of what heads gather, from those of what they write."""
        return jnp.einsum("TBD,DHC->TBHC", g_TBD, self.output_DHC)

    def _grouped(self, heads: Sequence[Array]) -> Array:
        """Of heads, summed over those that share a key and value, [T, B, G, C]."""
        n = self.cfg.n_queries_per_kv
        groups = [heads[i : i + n] for i in range(0, self.cfg.n_heads, n)]
        return jnp.stack([functools.reduce(jnp.add, group) for group in groups], 2)

    def _past_post_norm(
        self, g_TBD: Array, clean: _Clean
    ) -> tuple[Array, Array | None]:
        """Cotangents of what a norm after attention gets, and what it adds if live."""
        if self.p.post_attn_LD is None:
            return g_TBD, None
        norm = Norm(self.p.post_attn_LD)
        moved_TD = layers.move(self.p, clean.pattern_HTS, clean.value_SGC, cfg=self.cfg)
        scale_T = layers.norm_scale(moved_TD, norm, eps=self.cfg.norm_eps)
        g_TBD = g_TBD * (norm.gain[None] * scale_T[:, None])[:, None]
        return g_TBD, self._answer(g_TBD, moved_TD * scale_T[:, None])

    def _answer(self, read_TBX: Array, unit_TX: Array) -> Array | None:
        """What a live denominator adds to reads; None where denominators are held."""
        if not self.norms:
            return None
        return layers.live_reads(read_TBX, unit_TX[:, None]) - read_TBX

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
        return g_TBHC, self._answer(g_TBHC, heads_THC * scale_TH[..., None])
