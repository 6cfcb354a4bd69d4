"""Keys and values of the positions that have been run, so that a new one runs alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxclt.lm import layers
from jaxclt.lm.block import Past, Taps
from jaxclt.lm.config import LMConfig
from jaxclt.lm.run import embed, native_mlp, run, unembed
from jaxclt.types import Block, LMParams

__all__ = ["past_of", "sample_text"]


def past_of(params: LMParams, taps: Taps, *, cfg: LMConfig, room: int) -> Past:
    """Keys and values of a pass, [L, T + room, G, C] each, zero after it.

    They come from what the pass read: its stream and its norm denominators, live or
    held, patched or not.

    Args:
      params: model weights.
      taps: of the pass, leaves with a leading L.
      cfg: model shape.
      room: positions to come.
    """

    def one(p: Block, resid_TD: Array, scale_T: Array) -> Past:
        normed_TD = layers.normalise(resid_TD, scale_T, layers.attn_norm(p))
        return Past(layers.keys(p, normed_TD, cfg=cfg), layers.values(p, normed_TD))

    past = jax.vmap(one)(params.blocks, taps.resid_TD, taps.attn_scale_T)
    return jax.tree.map(
        lambda x_LTGC: jnp.pad(x_LTGC, [(0, 0), (0, room), (0, 0), (0, 0)]), past
    )


def sample_text(
    params: LMParams, start: Array, key: Array, *, cfg: LMConfig, size: int
) -> Array:
    """Token ids [size] drawn from the model at temperature 1, `start` the first.

    The draw of position t uses ``fold_in(key, t)``.

    Args:
      params: model weights.
      start: first token.
      key: PRNG key.
      cfg: model shape.
      size: tokens, the first included.
    """
    shape = (cfg.n_layers, size, cfg.n_kv_heads, cfg.d_head)
    empty = jnp.zeros(shape, params.embed_VD.dtype)

    def step(state: tuple[Array, Past], at: Array) -> tuple[tuple[Array, Past], Array]:
        token, past = state
        done = run(
            params,
            embed(params, token[None], start=at),
            native_mlp(cfg),
            cfg=cfg,
            past=past,
            start=at,
        )
        assert done.taps.past is not None
        logit_V = unembed(params, done.out_TD[0])
        drawn = jax.random.categorical(jax.random.fold_in(key, at + 1), logit_V)
        return (drawn.astype(token.dtype), done.taps.past), token

    positions = jnp.arange(size, dtype=jnp.int32)
    _, token_T = jax.lax.scan(step, (start, Past(empty, empty)), positions)
    return token_T
