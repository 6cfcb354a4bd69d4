"""What the encoders read and what the MLPs write, by our own forward pass, batched."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxclt.clt.config import ReadSite
from jaxclt.clt.sites import read_site
from jaxclt.lm import layers
from jaxclt.lm.config import LMConfig
from jaxclt.lm.run import record
from jaxclt.precision import jit
from jaxclt.train.normalise import Scales, normalise
from jaxclt.types import LMParams

__all__ = ["harvest", "mlp_response"]


@partial(jit, static_argnames=("cfg", "site", "dtype"))
def harvest(
    params: LMParams,
    token_WS: Array,
    scales: Scales | None,
    *,
    cfg: LMConfig,
    site: ReadSite,
    dtype: str = "float32",
) -> tuple[Array, Array, Array]:
    """Reads and writes [L, W S, D] of a batch of windows, all positions, and norms.

    The norms [L, W S] are of the writes in raw units, whatever `scales` says.

    Padding (-1) follows the text, where a causal model does not see it.

    Args:
      params: the model.
      token_WS: windows.
      scales: normalise by these; None leaves raw units.
      cfg: model shape.
      site: where encoders read.
      dtype: of the result.
    """

    def taps(token_S: Array) -> tuple[Array, Array]:
        recording = record(params, token_S, cfg=cfg)
        norms, scale_LT = layers.mlp_norm(params.blocks), recording.frozen.mlp_scale_LT
        read = jax.vmap(partial(read_site, site))
        return read(norms, recording.mid_LTD, scale_LT), recording.write_LTD

    # Layers lead at once: a transpose of the result would copy all of it.
    read_LWSD, write_LWSD = jax.vmap(taps, out_axes=1)(jnp.maximum(token_WS, 0))
    L, W, S, D = read_LWSD.shape
    read_LTD, write_LTD = (x.reshape(L, W * S, D) for x in (read_LWSD, write_LWSD))
    norm_LT = jnp.sqrt(jnp.sum(jnp.square(write_LTD), -1))
    if scales is not None:
        read_LTD, write_LTD = normalise(scales, read_LTD, write_LTD)
    return read_LTD.astype(dtype), write_LTD.astype(dtype), norm_LT


@partial(jit, static_argnames=("cfg", "site"))
def mlp_response(
    params: LMParams,
    scales: Scales,
    read_LTD: Array,
    tangent_LTD: Array,
    *,
    cfg: LMConfig,
    site: ReadSite,
) -> Array:
    """Derivative [L, T, D] of the true MLPs at `read` along `tangent`, normalised.

    For ``resid_mid`` the norm before the MLP is part of the map (its denominator live);
    for ``normalized`` and ``mlp_in`` the read already holds the denominator, which then
    counts as given.

    Args:
      params: the model.
      scales: normalisation of reads and writes.
      read_LTD: where, in normalised units.
      tangent_LTD: along what, in normalised units.
      cfg: model shape.
      site: where encoders read.
    """

    def one(p, read_mean_D, read_scale, write_scale, x_TD, v_TD):
        norm = layers.mlp_norm(p)

        def mlp(x_TD: Array) -> Array:
            raw_TD = x_TD * read_scale + read_mean_D[None]
            if site == "resid_mid":
                scale_T = layers.norm_scale(raw_TD, norm, eps=cfg.norm_eps)
                raw_TD = layers.normalise(raw_TD, scale_T, norm)
            elif site == "normalized" and norm.gain is not None:
                raw_TD = raw_TD * norm.gain[None]
                raw_TD = raw_TD if norm.bias is None else raw_TD + norm.bias[None]
            return layers.mlp(p, raw_TD, cfg=cfg) / write_scale

        return jax.jvp(mlp, (x_TD,), (v_TD,))[1]

    return jax.vmap(one)(
        params.blocks,
        scales.read_mean_LD,
        scales.read_scale_L,
        scales.write_scale_L,
        read_LTD.astype(params.embed_VD.dtype),
        tangent_LTD.astype(params.embed_VD.dtype),
    )
