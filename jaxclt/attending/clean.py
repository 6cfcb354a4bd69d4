"""Attention of every layer at the clean stream of a prompt: what it reads and moves.

Scores are what queries and keys make of the stream, with every norm denominator as it
is there: before attention, over heads' channels, after attention.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from jaxclt.graph.prompt import Recorded
from jaxclt.lm import layers
from jaxclt.lm.config import LMConfig
from jaxclt.types import Block

__all__ = ["Clean", "Layer", "make_clean"]


@struct.dataclass
class Layer:
    """Attention of one layer at the clean stream."""

    p: Block
    resid_TD: Array
    scale_T: Array
    post_scale_T: Array | None
    cfg: LMConfig = struct.field(pytree_node=False)

    def normed(self, resid_TD: Array) -> Array:
        """What attention reads of a stream, the denominator held."""
        return layers.normalise(resid_TD, self.scale_T, layers.attn_norm(self.p))

    def heads(self, resid_TD: Array) -> tuple[Array, Array]:
        """Queries [T, H, C] and keys [T, G, C] of a stream, all denominators held.

        Affine in the stream; of the clean one, the model's own.
        """
        clean_TD, normed_TD = map(self.normed, (self.resid_TD, resid_TD))
        scale_TH, scale_TG = layers.head_scales(self.p, clean_TD, cfg=self.cfg)
        return (
            layers.queries(self.p, normed_TD, cfg=self.cfg, scale_TH=scale_TH),
            layers.keys(self.p, normed_TD, cfg=self.cfg, scale_TG=scale_TG),
        )

    def live_heads(self) -> tuple[Array, Array]:
        """Queries and keys as the model computes them, denominators and all."""
        norm = layers.attn_norm(self.p)
        scale_T = layers.norm_scale(self.resid_TD, norm, eps=self.cfg.norm_eps)
        normed_TD = layers.normalise(self.resid_TD, scale_T, norm)
        query_THC = layers.queries(self.p, normed_TD, cfg=self.cfg)
        return query_THC, layers.keys(self.p, normed_TD, cfg=self.cfg)

    def values(self) -> Array:
        """What heads move, [T, G, C], biases included."""
        return layers.values(self.p, self.normed(self.resid_TD))

    def pull_heads(self, moved_TD: Array) -> Array:
        """Cotangents [T, H, C] of what heads gather, from those of what attention adds.

        Past the norm after attention, held, where there is one.
        """
        if self.post_scale_T is not None:
            moved_TD = moved_TD * self.post_scale_T[:, None]
            moved_TD = moved_TD * self.p.post_attn_LD[None, :]  # pyright: ignore
        return jnp.einsum("TD,HCD->THC", moved_TD, self.p.o_LHCD)


@struct.dataclass
class Clean:
    """All layers; leaves of the block have a leading L."""

    blocks: Block
    resid_LTD: Array
    scale_LT: Array
    post_scale_LT: Array | None
    cfg: LMConfig = struct.field(pytree_node=False)

    def layer(self, layer: Array | int) -> Layer:
        """One of them."""
        every = self.blocks, self.resid_LTD, self.scale_LT, self.post_scale_LT
        return Layer(*jax.tree.map(lambda leaf: leaf[layer], every), cfg=self.cfg)


def make_clean(p: Recorded) -> Clean:
    """Attention of a recorded prompt."""
    frozen = p.recording.frozen
    return Clean(
        blocks=layers.attention_weights(p.params.blocks),
        resid_LTD=p.recording.resid_LTD,
        scale_LT=frozen.attn_scale_LT,
        post_scale_LT=frozen.post_attn_scale_LT,
        cfg=p.cfg,
    )
