"""The replacement model: every MLP swapped for the dictionary, nothing frozen.

Circuit Tracing (2025), section 2.2. Attention is live and each encoder reads the
replacement's own stream; there are no error terms, except that the first position may
keep its MLPs (`keep_first`): it is seldom trained on, and it only sees itself. The
model's own neurons, the weak ones cut off, are the baseline (section 5.1.2). One layer
can be replaced by itself (`layer_L`), and with the error nodes of a prompt
(`error_LTD`) the replacement is the model again.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from jaxclt.clt.activations import activate
from jaxclt.clt.active import Dictionary
from jaxclt.clt.config import CLTConfig
from jaxclt.clt.neurons import NeuronDictionary, kept_neurons, neuron_values
from jaxclt.clt.sites import read_site
from jaxclt.errors import InputError
from jaxclt.lm import layers
from jaxclt.lm.config import LMConfig
from jaxclt.lm.run import WritePolicy, embed, run, unembed
from jaxclt.types import Block, CLTParams, LMParams

__all__ = [
    "Substitute",
    "neuron_logits",
    "replacement_logits",
    "substitute_logits",
    "substitute_of",
]


def replacement_logits(
    params: LMParams,
    clt: CLTParams,
    token_T: Array,
    *,
    cfg: LMConfig,
    clt_cfg: CLTConfig,
    keep_first: bool = True,
    layer_L: Array | None = None,
    error_LTD: Array | None = None,
) -> Array:
    """Logits [T, V] of the replacement model; differentiable in `clt`.

    Args:
      params: model weights.
      clt: dictionary in raw units.
      token_T: token ids.
      cfg: model shape.
      clt_cfg: dictionary shape.
      keep_first: the true MLPs stay at the first position.
      layer_L: bool, which MLPs are replaced; None for all. Features of every layer are
        encoded and may write to a replaced one.
      error_LTD: added to what is written in an MLP's place.
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
        read_TD = read_site(clt_cfg.read, layers.mlp_norm(p), mid_TD, scale_T)
        a_TF = activate(read_TD @ W_FD.T + b_F[None], theta_F, cfg=clt_cfg)
        carry = carry + jnp.einsum("TF,FMD->MTD", a_TF, dec_FMD)
        write_TD = carry[0] + b_dec_D[None]
        if skip_DD is not None:
            write_TD = write_TD + read_TD @ skip_DD
        return jnp.roll(carry, -1, 0).at[-1].set(0), write_TD

    return _replaced(
        params,
        token_T,
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
        keep_first=keep_first,
        layer_L=layer_L,
        error_LTD=error_LTD,
    )


def neuron_logits(
    params: LMParams,
    token_T: Array,
    *,
    cfg: LMConfig,
    k: int | None = None,
    threshold: Array | float | None = None,
    keep_first: bool = True,
    layer_L: Array | None = None,
    error_LTD: Array | None = None,
) -> Array:
    """Logits [T, V] with the weak neurons of every layer and token cut off.

    Args:
      params: model weights.
      token_T: token ids.
      cfg: model shape.
      k: neurons that stay, see `jaxclt.clt.neurons.kept_neurons`.
      threshold: written norm of those that stay.
      keep_first: all neurons stay at the first position.
      layer_L: bool, in which layers neurons are cut off; None for all.
      error_LTD: added to what is written in an MLP's place.
    """

    def policy(
        carry: None, mid_TD: Array, scale_T: Array, p: Block, x: None
    ) -> tuple[None, Array]:
        del x
        value_TI, _ = neuron_values(p, mid_TD, scale_T, cfg=cfg)
        keep_TI = kept_neurons(p, value_TI, k=k, threshold=threshold)
        if keep_TI is not None:
            value_TI = jnp.where(keep_TI, value_TI, 0)
        write_TD = value_TI @ layers.neuron_rows(p)
        if p.down_bias_LD is not None:
            write_TD = write_TD + p.down_bias_LD[None]
        return carry, write_TD

    return _replaced(
        params,
        token_T,
        policy,
        cfg=cfg,
        keep_first=keep_first,
        layer_L=layer_L,
        error_LTD=error_LTD,
    )


def _replaced(
    params: LMParams,
    token_T: Array,
    policy: WritePolicy,
    *,
    cfg: LMConfig,
    keep_first: bool,
    layer_L: Array | None,
    error_LTD: Array | None,
    carry: Any = None,
    per_layer: Any = None,
) -> Array:
    """Logits of a run with a policy, the true MLPs where they stay."""

    def true(p: Block, mid_TD: Array, scale_T: Array) -> Array:
        normed_TD = layers.normalise(mid_TD, scale_T, layers.mlp_norm(p))
        return layers.mlp(p, normed_TD, cfg=cfg)

    def write(
        carry: Any, mid_TD: Array, scale_T: Array, p: Block, x: tuple
    ) -> tuple[Any, Array]:
        own, replace, error_TD = x
        carry, write_TD = policy(carry, mid_TD, scale_T, p, own)
        if error_TD is not None:
            write_TD = write_TD + error_TD
        if replace is not None:
            write_TD = jnp.where(replace, write_TD, true(p, mid_TD, scale_T))
        if keep_first:
            write_TD = write_TD.at[0].set(true(p, mid_TD[:1], scale_T[:1])[0])
        return carry, write_TD

    done = run(
        params,
        embed(params, token_T),
        write,
        cfg=cfg,
        carry=carry,
        per_layer=(per_layer, layer_L, error_LTD),
        keep_patterns=False,
    )
    return unembed(params, done.out_TD)


@struct.dataclass
class Substitute:
    """What stands in the MLPs' place: a transcoder, or the model's strong neurons."""

    clt: CLTParams | None = None  # None: neurons
    threshold: Array | None = None
    clt_cfg: CLTConfig | None = struct.field(pytree_node=False, default=None)
    k: int | None = struct.field(pytree_node=False, default=None)


def substitute_of(dictionary: Dictionary, params: LMParams) -> Substitute:
    """A dictionary as it stands in the MLPs' place, in the model's dtype.

    Raises:
      InputError: for a dictionary of no known kind.
    """
    dtype = params.embed_VD.dtype
    if isinstance(dictionary, NeuronDictionary):
        least = dictionary.threshold
        return Substitute(
            threshold=None if least is None else jnp.asarray(least, dtype),
            k=dictionary.k,
        )
    clt, clt_cfg = getattr(dictionary, "params", None), getattr(dictionary, "cfg", None)
    if not isinstance(clt, CLTParams) or not isinstance(clt_cfg, CLTConfig):
        raise InputError(f"dictionary {dictionary.name} cannot stand for the MLPs")
    clt = jax.tree.map(lambda x: jnp.asarray(x, dtype), clt)
    return Substitute(clt=clt, clt_cfg=clt_cfg)


def substitute_logits(
    params: LMParams,
    sub: Substitute,
    token_T: Array,
    *,
    cfg: LMConfig,
    keep_first: bool = True,
    layer_L: Array | None = None,
    error_LTD: Array | None = None,
) -> Array:
    """Logits [T, V] of the replacement model of any dictionary.

    Args:
      params: model weights.
      sub: from `substitute_of`.
      token_T: token ids.
      cfg: model shape.
      keep_first: the true MLPs stay at the first position.
      layer_L: bool, which MLPs are replaced; None for all.
      error_LTD: added to what is written in an MLP's place.
    """
    if sub.clt is None:
        return neuron_logits(
            params,
            token_T,
            cfg=cfg,
            k=sub.k,
            threshold=sub.threshold,
            keep_first=keep_first,
            layer_L=layer_L,
            error_LTD=error_LTD,
        )
    assert sub.clt_cfg is not None
    return replacement_logits(
        params,
        sub.clt,
        token_T,
        cfg=cfg,
        clt_cfg=sub.clt_cfg,
        keep_first=keep_first,
        layer_L=layer_L,
        error_LTD=error_LTD,
    )
