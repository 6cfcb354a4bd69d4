"""The replacement model: every MLP swapped for the dictionary, nothing frozen.

Circuit Tracing (2025), section 2.2. Attention is live and each encoder reads the
replacement's own stream; there are no error terms, except that the first position may
keep its MLPs (`keep_first`): it is seldom trained on, and it only sees itself. The
model's own neurons, the weak ones cut off, are the baseline (section 5.1.2). One layer
can be replaced by itself (`layer_L`), and with the error nodes of a prompt
(`error_LTD`) the replacement is the model again.

`replaced` is the one pass in which a dictionary stands for the MLPs; with patterns and
norms held and error nodes added it is the local replacement model as well.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxclt.clt.coder import Loaded, constant
from jaxclt.clt.sites import read_site
from jaxclt.lm import layers
from jaxclt.lm.config import LMConfig
from jaxclt.lm.run import Policy, Run, embed, run, unembed
from jaxclt.types import Block, Frozen, LMParams

__all__ = ["replaced", "replacement_logits"]


def replaced(
    params: LMParams,
    loaded: Loaded,
    embed_TD: Array,
    *,
    cfg: LMConfig,
    frozen: Frozen | None = None,
    a_LTF: Array | None = None,
    error_LTD: Array | None = None,
    layer_L: Array | None = None,
    keep_first: bool = False,
) -> Run:
    """A pass in which a dictionary stands in the MLPs' place.

    Args:
      params: model weights.
      loaded: the dictionary in memory.
      embed_TD: what enters layer 0.
      cfg: model shape.
      frozen: patterns and norm denominators to hold; None: all live.
      a_LTF: activations as given; None encodes what each layer reads.
      error_LTD: added to what is written in an MLP's place.
      layer_L: bool, which MLPs are replaced; None for all. Features of every layer are
        encoded and may write to a replaced one.
      keep_first: the true MLPs stay at the first position.
    """
    coder = loaded.coder
    T, D = embed_TD.shape
    post_LT = None if frozen is None else frozen.post_mlp_scale_LT

    def true(p: Block, mid_TD: Array, scale_T: Array) -> Array:
        return layers.mlp_at(p, mid_TD, scale_T, cfg=cfg)[0]

    def write(
        carry: Array, mid_TD: Array, scale_T: Array, p: Block, x: Any
    ) -> tuple[Array, Array]:
        w, a_TF, error_TD, replace, post_T = x
        read_TD = read_site(coder.site, layers.mlp_norm(p), mid_TD, scale_T)
        if a_TF is None:
            a_TF = coder.encode(p, w.enc, read_TD, post_T).a_TF
        ahead_MTD = carry + coder.write(p, w.dec, a_TF)
        write_TD = ahead_MTD[0] + constant(coder, p, w.fixed, read_TD)
        if error_TD is not None:
            write_TD = write_TD + error_TD
        if replace is not None:
            write_TD = jnp.where(replace, write_TD, true(p, mid_TD, scale_T))
        if keep_first:
            write_TD = write_TD.at[0].set(true(p, mid_TD[:1], scale_T[:1])[0])
        return jnp.roll(ahead_MTD, -1, 0).at[-1].set(0), write_TD

    none_MTD = jnp.zeros((coder.shape.span, T, D), embed_TD.dtype)
    per_layer = (loaded.weights, a_LTF, error_LTD, layer_L, post_LT)
    policy = Policy(write, none_MTD, per_layer)
    return run(params, embed_TD, policy, cfg=cfg, frozen=frozen, keep_patterns=False)


def replacement_logits(
    params: LMParams,
    loaded: Loaded,
    token_T: Array,
    *,
    cfg: LMConfig,
    keep_first: bool = True,
    layer_L: Array | None = None,
    error_LTD: Array | None = None,
) -> Array:
    """Logits [T, V] of the replacement model; differentiable in the dictionary.

    Args:
      params: model weights.
      loaded: the dictionary, from `jaxclt.clt.coder.load` or
        `jaxclt.clt.transcoder.loaded_params`.
      token_T: token ids.
      cfg: model shape.
      keep_first: the true MLPs stay at the first position.
      layer_L: bool, which MLPs are replaced; None for all.
      error_LTD: added to what is written in an MLP's place.
    """
    done = replaced(
        params,
        loaded,
        embed(params, token_T),
        cfg=cfg,
        keep_first=keep_first,
        layer_L=layer_L,
        error_LTD=error_LTD,
    )
    return unembed(params, done.out_TD)
