"""One decoder block, the only one: live or frozen, with the MLP left to the caller.

Everything that runs the model calls `block`: the forward pass, the recording, the
frozen replay, the replacement models and the patches. They differ in two arguments:
what writes at the MLP's place (`write`), and what is held fixed (`frozen`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
from jax import Array

from jaxclt.lm import layers
from jaxclt.lm.config import LMConfig
from jaxclt.lm.step import up
from jaxclt.precision import precise
from jaxclt.types import Block, Held

__all__ = ["Past", "Taps", "block", "frozen_pattern"]


class Past(NamedTuple):
    """Keys and values of a layer's positions: room for S, zero after the last one."""

    key_SGC: Array  # rotated to their positions
    value_SGC: Array


class Taps(NamedTuple):
    """What one block saw, wrote and normalised by."""

    resid_TD: Array  # entering the block
    mid_TD: Array  # where the MLP reads: after attention, or `resid_TD` if parallel
    write_TD: Array  # what was added at the MLP's place
    pattern_HTS: Array | None  # None: not asked for
    attn_scale_T: Array
    mlp_scale_T: Array
    past: Past | None = None  # with the block's own rows, if it was given one
    post_attn_scale_T: Array | None = None  # None: the model has no such norm


@precise
def block(
    p: Block,
    resid_TD: Array,
    write: Callable[[Array, Array], Array],
    *,
    cfg: LMConfig,
    frozen: Held | None = None,
    keep_patterns: bool = True,
    past: Past | None = None,
    start: Array | int = 0,
) -> tuple[Array, Taps]:
    """Attention, and after or beside it whatever `write` puts at the MLP's place.

    Args:
      p: weights of one layer (leaves without the leading L).
      resid_TD: residual stream entering the block.
      write: (mid_TD, mlp_scale_T) -> write_TD, the MLP or its replacement.
      cfg: model shape.
      frozen: clean pattern and scales of the layer (leaves without the leading L); what
        is None is computed from the stream.
      keep_patterns: False leaves the attention pattern out of the taps.
      past: keys and values of earlier positions, with room for these rows.
      start: position of the first row.

    Returns:
      The residual stream leaving the block [T, D], and the taps.
    """
    held = frozen or Held()

    def hold(clean: Array | None, live: Callable[[], Array]) -> Array:
        return live() if clean is None else clean

    def scale(x_TD: Array, norm: layers.Norm) -> Array:
        return layers.norm_scale(x_TD, norm, eps=cfg.norm_eps)

    with jax.named_scope("attention"):
        norm = layers.attn_norm(p)
        attn_scale_T = hold(held.attn_scale_LT, lambda: scale(resid_TD, norm))
        normed_TD = layers.normalise(resid_TD, attn_scale_T, norm)
        key_SGC, value_SGC = None, layers.values(p, normed_TD)
        if past is not None:
            new = Past(layers.keys(p, normed_TD, cfg=cfg, start=start), value_SGC)
            put = partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
            past = Past(*(put(old, x, start) for old, x in zip(past, new, strict=True)))
            key_SGC, value_SGC = past
        pattern_HTS = hold(
            frozen_pattern(p, held, cfg=cfg),
            lambda: layers.attention_pattern(
                p, normed_TD, cfg=cfg, key_SGC=key_SGC, start=start, added=held.added
            ),
        )
        moved_TD = layers.move(p, pattern_HTS, value_SGC, cfg=cfg)
        post_scale_T = None
        if p.post_attn_LD is not None:
            post_norm = layers.Norm(p.post_attn_LD)
            post_scale_T = hold(
                held.post_attn_scale_LT, lambda: scale(moved_TD, post_norm)
            )
            moved_TD = layers.normalise(moved_TD, post_scale_T, post_norm)
        mid_TD, after_TD = up(resid_TD, moved_TD, None, cfg=cfg)
    with jax.named_scope("mlp"):
        mlp_scale_T = hold(held.mlp_scale_LT, lambda: scale(mid_TD, layers.mlp_norm(p)))
        write_TD = write(mid_TD, mlp_scale_T)
    taps = Taps(
        resid_TD,
        mid_TD,
        write_TD,
        pattern_HTS if keep_patterns else None,
        attn_scale_T,
        mlp_scale_T,
        past,
        post_scale_T,
    )
    return after_TD + write_TD, taps


def frozen_pattern(p: Block, frozen: Held, *, cfg: LMConfig) -> Array | None:
    """One layer's clean attention pattern [H, T, S], kept or recomputed; None: live."""
    if frozen.clean_LTD is None or frozen.pattern_LHTS is not None:
        return frozen.pattern_LHTS
    norm, scale_T = layers.attn_norm(p), frozen.attn_scale_LT
    if scale_T is None:  # norms may be live where patterns are held
        scale_T = layers.norm_scale(frozen.clean_LTD, norm, eps=cfg.norm_eps)
    normed_TD = layers.normalise(frozen.clean_LTD, scale_T, norm)
    return layers.attention_pattern(p, normed_TD, cfg=cfg, added=frozen.added)
