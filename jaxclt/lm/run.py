"""Running the model: forward, record, and the general `run` they are made of."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from jaxclt.lm import layers
from jaxclt.lm.block import Past, Taps, block
from jaxclt.lm.config import LMConfig
from jaxclt.precision import precise
from jaxclt.types import Block, Frozen, Held, LMParams, Recording

__all__ = [
    "Policy",
    "Run",
    "Write",
    "cap_logits",
    "embed",
    "forward",
    "native_mlp",
    "readout",
    "record",
    "run",
    "token_vectors",
    "unembed",
]


class Write(Protocol):
    """What stands at the MLP's place: the only seam of the model.

    Called once per layer inside a scan, with one layer of the weights and of the
    policy's own per-layer data `x`; `carry` goes from layer to layer.
    """

    def __call__(
        self, carry: Any, mid_TD: Array, scale_T: Array, p: Block, x: Any
    ) -> tuple[Any, Array]:
        """Return the new carry and write_TD."""
        ...


class Policy(NamedTuple):
    """A `Write`, the carry it starts with, and its data: leaves with a leading L."""

    write: Write
    carry: Any = None
    per_layer: Any = None


class Run(NamedTuple):
    """A pass through all blocks."""

    carry: Any
    taps: Taps  # leaves with a leading L
    end_TD: Array  # leaving the last layer
    out_TD: Array  # after the final norm
    out_scale_T: Array


@precise
def run(
    params: LMParams,
    embed_TD: Array,
    policy: Policy,
    *,
    cfg: LMConfig,
    frozen: Frozen | Held | None = None,
    keep_patterns: bool = True,
    past: Past | None = None,
    start: Array | int = 0,
) -> Run:
    """Scan the block over the layers with a write policy.

    Args:
      params: model weights.
      embed_TD: what enters layer 0.
      policy: writes at the MLP's place.
      cfg: model shape.
      frozen: hold these patterns and scales instead of computing them; a `Held` may
        hold some of them only.
      keep_patterns: False leaves attention patterns out of the taps.
      past: keys and values of earlier positions, leaves with a leading L; the taps
        then have them with these rows.
      start: position of the first row.

    Returns:
      The run; `taps` have a leading layer axis.
    """
    held = None
    if frozen is not None:  # the scan takes leaves with layers; the last norm has none
        held = Held(**(vars(frozen) | {"out_scale_T": None}))

    def step(state: tuple[Array, Any], xs: Any) -> tuple[tuple[Array, Any], Taps]:
        resid_TD, carry = state
        p, x, layer_held, layer_past = xs

        def write(mid_TD: Array, scale_T: Array) -> Array:
            nonlocal carry
            carry, write_TD = policy.write(carry, mid_TD, scale_T, p, x)
            return write_TD

        resid_TD, taps = block(
            p,
            resid_TD,
            write,
            cfg=cfg,
            frozen=layer_held,
            keep_patterns=keep_patterns,
            past=layer_past,
            start=start,
        )
        return (resid_TD, carry), taps

    xs = params.blocks, policy.per_layer, held, past
    (resid_TD, carry), taps = jax.lax.scan(step, (embed_TD, policy.carry), xs)
    norm = layers.out_norm(params)
    scale_T = None if frozen is None else frozen.out_scale_T
    if scale_T is None:
        scale_T = layers.norm_scale(resid_TD, norm, eps=cfg.norm_eps)
    out_TD = layers.normalise(resid_TD, scale_T, norm)
    return Run(carry, taps, resid_TD, out_TD, scale_T)


def native_mlp(cfg: LMConfig) -> Policy:
    """The policy of the underlying model: its own MLP."""

    def write(
        carry: Any, mid_TD: Array, scale_T: Array, p: Block, x: Any
    ) -> tuple[Any, Array]:
        del x
        return carry, layers.mlp_at(p, mid_TD, scale_T, cfg=cfg)[0]

    return Policy(write)


def embed(params: LMParams, token_T: Array, *, start: Array | int = 0) -> Array:
    """What enters layer 0 [T, D], the embedding nodes' vectors.

    Token embeddings, and with them those of positions where a model has learned these:
    an embedding node is a token at its place. The first token stands at `start`.
    """
    embed_TD = token_vectors(params, token_T)
    if params.position_TD is None:
        return embed_TD
    pos_T = start + jnp.arange(len(token_T), dtype=jnp.int32)
    # A padded prompt may be longer than the model's context.
    return embed_TD + params.position_TD.at[pos_T].get(mode="clip")


def token_vectors(params: LMParams, token_T: Array) -> Array:
    """Embeddings [T, D] of tokens wherever they stand."""
    embed_TD = params.embed_VD[token_T]
    return embed_TD if params.embed_scale is None else embed_TD * params.embed_scale


def unembed(params: LMParams, out_TD: Array) -> Array:
    """Logits [T, V] from the normed output (any leading shape works)."""
    return cap_logits(params, readout(params, out_TD))


def cap_logits(params: LMParams, logit: Array) -> Array:
    """A readout as the model's logits; nothing where these are not capped."""
    if params.logit_cap is None:
        return logit
    return params.logit_cap * jnp.tanh(logit / params.logit_cap)


@precise
def readout(params: LMParams, out_TD: Array, *, bias: bool = True) -> Array:
    """Logits [T, V] before any cap: what is affine in the output, and what graphs
    explain; without what tokens are given anyway, if `bias` is False.
    """
    if params.unembed_DV is None:
        logit_TV = jnp.einsum("...D,VD->...V", out_TD, params.embed_VD)
    else:
        logit_TV = jnp.einsum("...D,DV->...V", out_TD, params.unembed_DV)
    if params.unembed_bias_V is None or not bias:
        return logit_TV
    return logit_TV + jnp.broadcast_to(params.unembed_bias_V, logit_TV.shape)


def record(
    params: LMParams, token_T: Array, *, cfg: LMConfig, keep_patterns: bool = True
) -> Recording:
    """One clean pass with everything the local replacement model needs.

    Args:
      params: model weights.
      token_T: int token ids.
      cfg: model shape.
      keep_patterns: False for prompts whose L·H·T² attention probabilities would take
        too much memory; they are then computed again where they are used.

    Returns:
      The recording, in the weights' dtype.
    """

    def write(
        carry: Any, mid_TD: Array, scale_T: Array, p: Block, x: Any
    ) -> tuple[Any, Array]:
        write_TD, post_T = layers.mlp_at(p, mid_TD, scale_T, cfg=cfg)
        return carry if post_T is None else carry.at[x].set(post_T), write_TD

    embed_TD = embed(params, token_T)
    L, has_post = cfg.n_layers, params.blocks.post_mlp_LD is not None
    post_LT = jnp.zeros((L, len(token_T)), embed_TD.dtype) if has_post else None
    policy = Policy(write, post_LT, jnp.arange(L, dtype=jnp.int32))
    done = run(params, embed_TD, policy, cfg=cfg, keep_patterns=keep_patterns)
    taps = done.taps
    return Recording(
        token_T=token_T,
        embed_TD=embed_TD,
        resid_LTD=taps.resid_TD,
        mid_LTD=taps.mid_TD,
        write_LTD=taps.write_TD,
        end_TD=done.end_TD,
        out_TD=done.out_TD,
        frozen=Frozen(
            pattern_LHTS=taps.pattern_HTS,
            attn_scale_LT=taps.attn_scale_T,
            mlp_scale_LT=taps.mlp_scale_T,
            out_scale_T=done.out_scale_T,
            clean_LTD=None if keep_patterns else taps.resid_TD,
            post_attn_scale_LT=taps.post_attn_scale_T,
            post_mlp_scale_LT=done.carry,
        ),
    )


def forward(params: LMParams, token_T: Array, *, cfg: LMConfig) -> Array:
    """Logits [T, V] of the underlying model."""
    done = record(params, token_T, cfg=cfg, keep_patterns=False)
    return unembed(params, done.out_TD)
