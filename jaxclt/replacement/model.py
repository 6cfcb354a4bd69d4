"""The replacement model: every MLP swapped for the dictionary, nothing frozen.

Circuit Tracing (2025), section 2.2. Attention is live and each encoder reads the
replacement's own stream; there are no error terms, except that the first position may
keep its MLPs (`keep_first`): it is seldom trained on, and it only sees itself. The
model's own neurons, all but the strongest cut off, are the baseline (section 5.1.2).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.clt.activations import activate
from jaxclt.clt.config import CLTConfig
from jaxclt.clt.sites import read_diagonal
from jaxclt.lm import layers
from jaxclt.lm.config import LMConfig
from jaxclt.lm.run import embed, forward, run, unembed
from jaxclt.types import Block, CLTParams, LMParams

__all__ = ["agreement", "neuron_logits", "replacement_logits"]


def replacement_logits(
    params: LMParams,
    clt: CLTParams,
    token_T: Array,
    *,
    cfg: LMConfig,
    clt_cfg: CLTConfig,
    keep_first: bool = True,
) -> Array:
    """Logits [T, V] of the replacement model; differentiable in `clt`.

    Args:
      params: model weights.
      clt: dictionary in raw units.
      token_T: token ids.
      cfg: model shape.
      clt_cfg: dictionary shape.
      keep_first: the true MLPs stay at the first position.
    """
    T, D, span = token_T.shape[0], cfg.d_model, clt_cfg.span
    dtype = params.embed_VD.dtype
    dec_LFMD = jnp.stack(
        [jnp.pad(W, ((0, 0), (0, span - W.shape[1]), (0, 0))) for W in clt.W_dec]
    )

    def policy(
        carry: Array, mid_TD: Array, scale_T: Array, p: Block, x: tuple
    ) -> tuple[Array, Array]:
        W_FD, b_F, theta_F, dec_FMD, b_dec_D, skip_DD = x
        read_TD = mid_TD * read_diagonal(clt_cfg.read, scale_T, p.norm_mlp_LD)
        a_TF = activate(read_TD @ W_FD.T + b_F[None], theta_F, cfg=clt_cfg)
        carry = carry + jnp.einsum("TF,FMD->MTD", a_TF, dec_FMD)
        write_TD = carry[0] + b_dec_D[None]
        if skip_DD is not None:
            write_TD = write_TD + read_TD @ skip_DD
        if keep_first:
            write_TD = _true_first(p, mid_TD, scale_T, write_TD, cfg)
        return jnp.roll(carry, -1, 0).at[-1].set(0), write_TD

    done = run(
        params,
        embed(params, token_T),
        policy,
        cfg=cfg,
        carry=jnp.zeros((span, T, D), dtype),
        per_layer=(
            clt.W_enc_LFD,
            clt.b_enc_LF,
            clt.theta_LF,
            dec_LFMD,
            clt.b_dec_LD,
            clt.W_skip_LDD,
        ),
    )
    return unembed(params, done.out_TD)


def neuron_logits(
    params: LMParams,
    token_T: Array,
    *,
    cfg: LMConfig,
    k: int,
    keep_first: bool = True,
) -> Array:
    """Logits [T, V] with all but k neurons of every layer and token cut off.

    Those with the largest written norm stay, as in `jaxclt.clt.neurons`.

    Args:
      params: model weights.
      token_T: token ids.
      cfg: model shape.
      k: neurons that stay, at most ``cfg.d_mlp``.
      keep_first: all neurons stay at the first position.
    """

    def policy(
        carry: None, mid_TD: Array, scale_T: Array, p: Block, x: None
    ) -> tuple[None, Array]:
        normed_TD = layers.normalise(mid_TD, scale_T, p.norm_mlp_LD)
        gate_TI, up_TI = layers.gate_and_up(p, normed_TD, cfg=cfg)
        value_TI = gate_TI * up_TI
        size_TI = jnp.abs(value_TI) * jnp.linalg.norm(p.down_LID, axis=-1)[None]
        least_T1 = jax.lax.top_k(size_TI, k)[0][:, -1:]
        write_TD = jnp.where(size_TI >= least_T1, value_TI, 0) @ p.down_LID
        if p.down_bias_LD is not None:
            write_TD = write_TD + p.down_bias_LD[None]
        if keep_first:
            write_TD = _true_first(p, mid_TD, scale_T, write_TD, cfg)
        return carry, write_TD

    done = run(params, embed(params, token_T), policy, cfg=cfg)
    return unembed(params, done.out_TD)


def _true_first(
    p: Block, mid_TD: Array, scale_T: Array, write_TD: Array, cfg: LMConfig
) -> Array:
    """The writes with the true MLP's at the first position."""
    normed_TD = layers.normalise(mid_TD[:1], scale_T[:1], p.norm_mlp_LD)
    return write_TD.at[0].set(layers.mlp(p, normed_TD, cfg=cfg)[0])


@partial(jax.jit, static_argnames=("cfg", "clt_cfg", "keep_first"))
def _compare(
    params: LMParams,
    clt: CLTParams,
    token_T: Array,
    cfg: LMConfig,
    clt_cfg: CLTConfig,
    keep_first: bool,
) -> tuple[Array, Array]:
    true_TV = forward(params, token_T, cfg=cfg)
    found_TV = replacement_logits(
        params, clt, token_T, cfg=cfg, clt_cfg=clt_cfg, keep_first=keep_first
    )
    same_T = true_TV.argmax(-1) == found_TV.argmax(-1)
    log_p_TV = jax.nn.log_softmax(true_TV)
    log_q_TV = jax.nn.log_softmax(found_TV)
    return same_T, jnp.sum(jnp.exp(log_p_TV) * (log_p_TV - log_q_TV), -1)


def agreement(
    params: LMParams,
    clt: CLTParams,
    token_WS: np.ndarray,
    valid_WS: np.ndarray,
    *,
    cfg: LMConfig,
    clt_cfg: CLTConfig,
    keep_first: bool = True,
) -> dict[str, float]:
    """Top-1 agreement and ``KL(model | replacement)`` in nats, over valid positions.

    Args:
      params: model weights.
      clt: dictionary in raw units.
      token_WS: windows, padded with -1.
      valid_WS: positions that count.
      cfg: model shape.
      clt_cfg: dictionary shape.
      keep_first: the true MLPs stay at the first position.
    """
    same, kl = [], []
    for token_S, valid_S in zip(token_WS, valid_WS, strict=True):
        found = _compare(
            params, clt, jnp.maximum(jnp.asarray(token_S), 0), cfg, clt_cfg, keep_first
        )
        same.append(np.asarray(found[0])[valid_S])
        kl.append(np.asarray(found[1], np.float64)[valid_S])
    return {
        "top1": float(np.concatenate(same).mean()),
        "kl": float(np.concatenate(kl).mean()),
    }
