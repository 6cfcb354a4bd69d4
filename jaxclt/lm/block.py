"""One decoder block, the only one: live or frozen, with the MLP left to the caller.

Everything that runs the model calls `block`: the forward pass, the recording, the
frozen replay, the replacement models and the patches. They differ in two arguments:
what writes at the MLP's place (`write`), and what is held fixed (`frozen`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxclt.lm import layers
from jaxclt.lm.config import LMConfig
from jaxclt.types import Block

__all__ = ["FrozenLayer", "Taps", "block", "frozen_pattern"]


class FrozenLayer(NamedTuple):
    """One layer of `Frozen` or `Held`; None is computed from the stream."""

    pattern_HTS: Array | None
    attn_scale_T: Array | None
    mlp_scale_T: Array | None
    clean_TD: Array | None = None  # what a pattern that is not kept is computed from


class Taps(NamedTuple):
    """What one block saw, wrote and normalised by."""

    resid_TD: Array  # entering the block
    mid_TD: Array  # after attention
    write_TD: Array  # what was added at the MLP's place
    pattern_HTS: Array | None  # None: not asked for
    attn_scale_T: Array
    mlp_scale_T: Array


def block(
    p: Block,
    resid_TD: Array,
    write: Callable[[Array, Array], Array],
    *,
    cfg: LMConfig,
    frozen: FrozenLayer | None = None,
    held_T: Array | None = None,
    biases: bool = True,
    keep_patterns: bool = True,
) -> tuple[Array, Taps]:
    """Attention, then whatever `write` puts at the MLP's place.

    Args:
      p: weights of one layer (leaves without the leading L).
      resid_TD: residual stream entering the block.
      write: (mid_TD, mlp_scale_T) -> write_TD, the MLP or its replacement.
      cfg: model shape.
      frozen: clean pattern and scales; None computes them from the stream.
      held_T: bool, the positions at which `frozen` holds; None for all.
      biases: False drops attention biases, which makes a frozen block linear.
      keep_patterns: False leaves the attention pattern out of the taps.

    Returns:
      The residual stream leaving the block [T, D], and the taps.
    """
    held = FrozenLayer(None, None, None) if frozen is None else frozen

    def hold(clean: Array | None, live: Callable[[], Array]) -> Array:
        if clean is None or held_T is None:
            return live() if clean is None else clean
        row = held_T[None, :, None] if clean.ndim == 3 else held_T
        return jnp.where(row, clean, live())

    with jax.named_scope("attention"):
        attn_scale_T = hold(
            held.attn_scale_T, lambda: layers.rms_scale(resid_TD, eps=cfg.norm_eps)
        )
        normed_TD = layers.normalise(resid_TD, attn_scale_T, p.norm_attn_LD)
        pattern_HTS = hold(
            frozen_pattern(p, held, cfg=cfg),
            lambda: layers.attention_pattern(p, normed_TD, cfg=cfg),
        )
        mid_TD = resid_TD + layers.move(
            p, pattern_HTS, normed_TD, cfg=cfg, biases=biases
        )
    with jax.named_scope("mlp"):
        mlp_scale_T = hold(
            held.mlp_scale_T, lambda: layers.rms_scale(mid_TD, eps=cfg.norm_eps)
        )
        write_TD = write(mid_TD, mlp_scale_T)
    taps = Taps(
        resid_TD,
        mid_TD,
        write_TD,
        pattern_HTS if keep_patterns else None,
        attn_scale_T,
        mlp_scale_T,
    )
    return mid_TD + write_TD, taps


def frozen_pattern(p: Block, frozen: FrozenLayer, *, cfg: LMConfig) -> Array | None:
    """The clean attention pattern [H, T, S], kept or computed again; None: live."""
    if frozen.clean_TD is None or frozen.pattern_HTS is not None:
        return frozen.pattern_HTS
    assert frozen.attn_scale_T is not None, "a pattern comes from the clean norm"
    normed_TD = layers.normalise(frozen.clean_TD, frozen.attn_scale_T, p.norm_attn_LD)
    return layers.attention_pattern(p, normed_TD, cfg=cfg)
