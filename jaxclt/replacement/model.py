"""The replacement model: every MLP swapped for the dictionary, nothing frozen.

Circuit Tracing (2025), section 2.2. Attention is live and each encoder reads the
replacement's own stream; there are no error terms, except that the first position may
keep its MLPs (`keep_first`): it is seldom trained on, and it only sees itself. The
model's own neurons, the weak ones cut off, are the baseline (section 5.1.2). One layer
can be replaced by itself (`layer_L`), and with the error nodes of a prompt the
replacement is the model again.

`replaced` is the one pass in which a dictionary stands for the MLPs; with patterns and
norms held and error nodes added it is the local replacement model as well. Where the
stream is given, `written` is what the dictionary writes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxclt.clt.coder import Coder, Loaded, Weights, constant
from jaxclt.clt.sites import read_site
from jaxclt.lm import layers
from jaxclt.lm.config import LMConfig
from jaxclt.lm.run import Policy, Run, embed, run, unembed
from jaxclt.precision import precise
from jaxclt.types import Block, Frozen, LMParams

__all__ = ["Sources", "replaced", "replacement_logits", "written"]


class Sources(NamedTuple):
    """What enters a pass as given."""

    embed_TD: Array
    error_LTD: Array | None = None  # added to what is written in an MLP's place
    a_LTF: Array | None = None  # activations; None encodes what each layer reads


def _layer(
    coder: Coder, p: Block, w: Weights, ahead_MTD: Array, read_TD: Array, a_TF: Array
) -> tuple[Array, Array]:
    """What is written ahead after a layer [M, T, D], and the layer's output [T, D]."""
    ahead_MTD = ahead_MTD + coder.write(p, w.dec, a_TF)
    write_TD = ahead_MTD[0] + constant(coder, p, w.fixed, read_TD)
    return jnp.roll(ahead_MTD, -1, 0).at[-1].set(0), write_TD


def _nothing_ahead(coder: Coder, like_TD: Array) -> Array:
    return jnp.zeros((coder.shape.span, *like_TD.shape), like_TD.dtype)


@precise
def written(
    params: LMParams | None,
    loaded: Loaded,
    read_LTD: Array,
    post_LT: Array | None = None,
) -> tuple[Array, Array]:
    """What a dictionary writes in all MLPs' places, given what its encoders read.

    Args:
      params: the model, for a dictionary whose weights are the model's own.
      loaded: the dictionary in memory.
      read_LTD: what its encoders read, see `jaxclt.clt.coder.Coder.site`.
      post_LT: recorded scales of norms after the MLPs; None computes them.

    Returns:
      Which features are active [L, T, F] and what is written [L, T, D].
    """
    coder = loaded.coder

    def step(ahead_MTD: Array, x: Any) -> tuple[Array, tuple[Array, Array]]:
        p, w, read_TD, post_T = x
        a_TF = coder.encode(p, w.enc, read_TD, post_T).a_TF
        ahead_MTD, write_TD = _layer(coder, p, w, ahead_MTD, read_TD, a_TF)
        return ahead_MTD, (a_TF != 0, write_TD)

    blocks = None if params is None else params.blocks
    xs = (blocks, loaded.weights, read_LTD, post_LT)
    return jax.lax.scan(step, _nothing_ahead(coder, read_LTD[0]), xs)[1]


@precise
def replaced(
    params: LMParams,
    loaded: Loaded,
    given: Sources,
    *,
    cfg: LMConfig,
    frozen: Frozen | None = None,
    layer_L: Array | None = None,
    keep_first: bool = False,
) -> Run:
    """A pass in which a dictionary stands in the MLPs' place.

    Args:
      params: model weights.
      loaded: the dictionary in memory.
      given: what enters layer 0, and what else is given.
      cfg: model shape.
      frozen: patterns and norm denominators to hold; None: all live.
      layer_L: bool, which MLPs are replaced; None for all. Features of every layer are
        encoded and may write to a replaced one.
      keep_first: the true MLPs stay at the first position.
    """
    coder = loaded.coder
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
        ahead_MTD, write_TD = _layer(coder, p, w, carry, read_TD, a_TF)
        if error_TD is not None:
            write_TD = write_TD + error_TD
        if replace is not None:
            write_TD = jnp.where(replace, write_TD, true(p, mid_TD, scale_T))
        if keep_first:
            write_TD = write_TD.at[0].set(true(p, mid_TD[:1], scale_T[:1])[0])
        return ahead_MTD, write_TD

    none_MTD = _nothing_ahead(coder, given.embed_TD)
    per_layer = (loaded.weights, given.a_LTF, given.error_LTD, layer_L, post_LT)
    return run(
        params,
        given.embed_TD,
        Policy(write, none_MTD, per_layer),
        cfg=cfg,
        frozen=frozen,
        keep_patterns=False,
    )


@precise
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

    Arguments are those of `replaced`, of token ids; `error_LTD` see `Sources`.
    """
    given = Sources(embed(params, token_T), error_LTD)
    done = replaced(
        params, loaded, given, cfg=cfg, layer_L=layer_L, keep_first=keep_first
    )
    return unembed(params, done.out_TD)
